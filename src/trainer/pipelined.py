"""Micro-batches through the stages of a pipeline."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from src.models.attention import Packed
from src.models.batch import Batch, PromptTree
from src.models.context import Divided
from src.models.transformer import Received, Transformer
from src.parallel.clock import clock
from src.parallel.pipeline import Boundary, Pipeline
from src.parallel.setup import Parallel
from src.trainer.optimizer import Optimizer, idle_forward
from src.trainer.passes import Passes, T, Turns


class Pipelined(Passes):
    """Passes in which each stage computes its layers of every micro-batch.

    All stages know the rows, so that none is told how long they are. Collectives of the model's
    ranks.
    """

    def __init__(self, model: Transformer, parallel: Parallel, optimizer: Optimizer | None) -> None:
        super().__init__(model, parallel, optimizer)
        assert parallel.pp_group is not None
        self.pipeline = Pipeline(
            self._compute, model.stages.count, parallel.pp_group, parallel.device
        )
        self.trains: list[bool] | None = None  # which of all stages train anything, once known
        # Of the pass that is under way: its turns, their tokens and layouts, and what ends it.
        self.turns: list[Any] = []
        self.batches: list[tuple[Tensor, Packed | Divided]] = []
        self.end_of: Callable[[Any], Tensor | None] = lambda turn: None

    def train(
        self,
        turns: Turns[T],
        batch_of: Callable[[T], Batch | PromptTree],
        loss_of: Callable[[T], Tensor],
        last: bool = True,
    ) -> None:
        assert self.optimizer is not None
        if self.trains is None:
            self.trains = self._trains()
        buckets = self.optimizer.buckets
        arm = buckets.arm if buckets and last else lambda: None
        with clock.phase("data"):
            boundaries = self._begin(turns, batch_of, loss_of)
        with clock.phase("forward and backward"):
            self.pipeline.train(len(self.turns), boundaries, self.trains, arm)
        self.batches = []

    @torch.no_grad()
    def score(
        self,
        turns: Turns[T],
        batch_of: Callable[[T], Batch | PromptTree],
        read: Callable[[T], None],
    ) -> None:
        boundaries = self._begin(turns, batch_of, read)
        self.pipeline.score(len(self.turns), boundaries)
        self.batches = []

    def _begin(
        self,
        turns: Turns[T],
        batch_of: Callable[[T], Batch | PromptTree],
        end_of: Callable[[T], Tensor | None],
    ) -> list[Boundary]:
        """Set up a pass; what goes from stage to stage in it."""
        self.turns = [*turns, *[None] * self.pipeline.idle_needed(len(turns))]
        self.end_of = end_of
        self.batches = [self._tokens(turn, batch_of) for turn in self.turns]
        model, config = self.model, self.model.config
        tokens = [len(of_turn) for of_turn, _ in self.batches]
        split = self.parallel.mp_size if model.sequence_parallel else 1
        boundaries = [Boundary([-(-n // split) for n in tokens], (config.dim,), model.dtype)]
        if model.balances:  # the experts' decisions, too
            boundaries.append(Boundary(tokens, (2, config.n_experts), torch.float32))
        return boundaries

    def _tokens(
        self, turn: T | None, batch_of: Callable[[T], Batch | PromptTree]
    ) -> tuple[Tensor, Packed | Divided]:
        """Tokens and layout of a micro-batch."""
        device = self.parallel.device
        if turn is None:
            return torch.zeros(1, dtype=torch.long, device=device), Packed([1], device)
        batch = batch_of(turn)
        return batch.tokens, batch.layout

    def _trains(self) -> list[bool]:
        """Which of all stages train anything."""
        model, count = self.model, self.model.stages.count
        trains = [False] * count
        own = model.stages.of_rank(self.parallel.pp_rank)
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            if name.startswith("layers."):
                number = int(name.split(".")[1])
                trains[next(s for s in own if number in model.stages.layers(s))] = True
            else:  # the embedding's gradient comes to the first stage, the head's to the last
                is_embedding = name.startswith("tok_embeddings.") and model.part.first
                trains[0 if is_embedding else count - 1] = True
        every: list[list[bool]] = [[]] * self.parallel.pp_size
        dist.all_gather_object(every, trains, group=self.parallel.pp_group)
        return [any(of_stage) for of_stage in zip(*every)]

    def _compute(
        self, stage: int, received: tuple[Tensor, ...], number: int
    ) -> tuple[Tensor, ...] | Tensor:
        """One of this rank's stages on a micro-batch."""
        model, index = self.model, self.pipeline.local[stage]
        tokens, layout = self.batches[number]
        model.received = None if index == 0 else Received(stage, *received)
        try:
            if index < model.stages.count - 1:
                return model.pass_on(tokens, layout)
            return self._end(self.turns[number])
        finally:
            model.received = None

    def _end(self, turn: Any) -> Tensor:
        """What the last stage makes of a micro-batch: its loss; nothing of what is only read."""
        if not torch.is_grad_enabled():
            if turn is None:
                idle_forward(self.model, self.parallel.device)
            else:
                self.end_of(turn)
            return torch.zeros((), device=self.parallel.device)
        assert self.optimizer is not None
        if turn is None:
            return self.optimizer.idle_loss(idle_forward(self.model, self.parallel.device))
        loss = self.end_of(turn)
        assert loss is not None
        return loss * self.optimizer.loss_scale
