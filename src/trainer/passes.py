"""How a model's micro-batches go through it: one after the other, or through a pipeline's stages.

The same calls for both: what a micro-batch is made of, how it becomes a batch, and what is to be
computed with the model at its end. In a pipeline that end is the last stage's.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from src.models.batch import Batch, PromptTree
from src.models.transformer import Transformer
from src.parallel.clock import clock
from src.parallel.setup import Parallel
from src.trainer.optimizer import Optimizer, idle_forward

T = TypeVar("T")
Turns = Sequence[T | None]  # what each micro-batch is made of; None: it is one of nothing


class Passes:
    """A model's passes over micro-batches: one after the other, on ranks that have all of it."""

    def __init__(self, model: Transformer, parallel: Parallel, optimizer: Optimizer | None) -> None:
        self.model, self.parallel, self.optimizer = model, parallel, optimizer

    def train(
        self,
        turns: Turns[T],
        batch_of: Callable[[T], Batch | PromptTree],
        loss_of: Callable[[T], Tensor],
        last: bool = True,
    ) -> None:
        """Forward and backward of each micro-batch; gradients are added up.

        batch_of: what `loss_of` puts through the model; loss_of: is called where the model ends;
        last: whether the optimizer's step comes next.
        """
        assert self.optimizer is not None
        for number, turn in enumerate(turns, 1):
            is_last = last and number == len(turns)
            if turn is None:
                self.optimizer.idle_backward(is_last)
                continue
            with clock.phase("forward"):
                loss = loss_of(turn)
            with clock.phase("backward"):
                self.optimizer.backward(loss, is_last)

    @torch.no_grad()
    def score(
        self,
        turns: Turns[T],
        batch_of: Callable[[T], Batch | PromptTree],
        read: Callable[[T], None],
    ) -> None:
        """Forward of each micro-batch, without gradients.

        read: puts `batch_of` it through the model, where that ends, and keeps what is wanted.
        """
        for turn in turns:
            if turn is None:
                idle_forward(self.model, self.parallel.device)
            else:
                with clock.phase("score"):
                    read(turn)


def passes_of(model: Transformer, parallel: Parallel, optimizer: Optimizer | None = None) -> Passes:
    """As the model lies on the ranks. optimizer: of a model in training."""
    if model.stages.count == 1 or not parallel.is_member:
        return Passes(model, parallel, optimizer)
    # PyTorch's pipelines take seconds to import.
    from src.trainer.pipelined import Pipelined

    return Pipelined(model, parallel, optimizer)


def from_last_stage(x: Tensor, parallel: Parallel) -> Tensor:
    """What ranks where the model ends have in x, on all of the model's; in place."""
    if parallel.pp_group is not None:
        dist.broadcast(x, group=parallel.pp_group, group_src=parallel.pp_size - 1)
    return x
