"""An optimizer step's micro-batches through the stages of a pipeline."""

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
from src.trainer.objective import Objective
from src.trainer.optimizer import Optimizer


class PipelinedStep:
    """Forward and backward of a step's micro-batches, of which each stage computes its layers.

    All stages know the rows, so that none is told how long they are. The last one's output is the
    objective's loss.
    """

    def __init__(
        self, model: Transformer, optimizer: Optimizer, objective: Objective, parallel: Parallel
    ) -> None:
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.parallel = parallel
        assert parallel.pp_group is not None
        stages = model.stages
        self.pipeline = Pipeline(
            self._compute, stages.count, parallel.pp_group, parallel.device, self._trains()
        )
        self.turns: list[list[int] | None] = []
        self.batches: list[tuple[Tensor, Packed | Divided]] = []
        self.denominator, self.sums = 1.0, dict[str, Tensor]()

    def _trains(self) -> list[bool]:
        """Which of all stages train anything; a collective of the pipeline's ranks."""
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

    def run(self, turns: list[list[int] | None], denominator: float) -> dict[str, Tensor]:
        """All micro-batches; sums to be logged, on the last stage's ranks.

        turns: rows of each; None: a micro-batch of nothing.
        """
        idle = self.pipeline.idle_needed(len(turns))
        self.turns, self.denominator, self.sums = [*turns, *[None] * idle], denominator, {}
        if not self.turns:
            return {}
        with clock.phase("data"):
            self.batches = [self._batch(rows) for rows in self.turns]
            boundaries = self._boundaries([len(tokens) for tokens, _ in self.batches])
        buckets = self.optimizer.buckets
        arm = buckets.arm if buckets else lambda: None
        with clock.phase("forward and backward"):
            self.pipeline.train(len(self.turns), boundaries, arm)
        self.batches = []
        return self.sums

    def _batch(self, rows: list[int] | None) -> tuple[Tensor, Packed | Divided]:
        """Tokens and layout of a micro-batch."""
        device = self.parallel.device
        if rows is None:
            return torch.zeros(1, dtype=torch.long, device=device), Packed([1], device)
        batch: Batch | PromptTree = self.objective.batch(rows)
        return batch.tokens, batch.layout

    def _boundaries(self, tokens: list[int]) -> list[Boundary]:
        """What goes from stage to stage: hidden states, and experts' decisions where they count."""
        model, config = self.model, self.model.config
        split = self.parallel.mp_size if model.sequence_parallel else 1
        rows = [-(-n // split) for n in tokens]
        boundaries = [Boundary(rows, (config.dim,), model.dtype)]
        if model.balances:
            boundaries.append(Boundary(tokens, (2, config.n_experts), torch.float32))
        return boundaries

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
            rows = self.turns[number]
            if rows is None:
                return self.optimizer.idle_loss(model(tokens, layout))
            loss, stats = self.objective.loss(model, rows, self.denominator)
        finally:
            model.received = None
        for name, value in {"loss": loss.detach(), **stats}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        return loss * self.optimizer.loss_scale
