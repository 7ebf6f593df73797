"""Supervised fine-tuning of the solver: next-token loss on the outputs."""

import torch
from torch import Tensor

from src.data.kept import Sequences, lengths_of
from src.models.batch import Batch, response_loss, weighted_balance_loss
from src.models.transformer import Transformer
from src.parallel.context import ALONE, ContextGroup
from src.trainer.batches import PerRow
from src.trainer.objective import Objective


class SolverObjective(Objective):
    """Mean of −log p over the output tokens (EOS included) of a batch."""

    stats: tuple[str, ...] = ("loss",)

    def __init__(
        self, sequences: Sequences, device: torch.device, context: ContextGroup = ALONE
    ) -> None:
        """context: the ranks that divide the rows' tokens."""
        self.sequences, self.device, self.context = sequences, device, context
        self.lengths: PerRow
        self.weights: PerRow
        self.lengths, self.weights = lengths_of(sequences)
        self.needed: PerRow = self.weights

    def pieces(self, row: int) -> list[tuple[int, int]]:
        return [(self.lengths[row], 0)]

    def batch(self, rows: list[int]) -> Batch:
        return Batch.of([self.sequences[i] for i in rows], self.device, self.context)

    def loss(
        self, model: Transformer, rows: list[int], denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch = self.batch(rows)
        loss = (
            response_loss(model, batch, lambda logprobs, entropy, chunk: -logprobs.sum())
            / denominator
        )
        balance = weighted_balance_loss(model, batch, batch.responses, denominator)
        return loss + balance, {"balance_loss": balance.detach()}
