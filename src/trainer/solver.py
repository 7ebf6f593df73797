"""Supervised fine-tuning of the solver: next-token loss on the outputs."""

import torch
from torch import Tensor

from src.models.batch import Batch, Sequence, response_logprobs
from src.models.transformer import Transformer


class SolverObjective:
    """Mean of −log p over the output tokens (EOS included) of a batch."""

    stats = ("loss",)

    def __init__(self, sequences: list[Sequence], device: torch.device) -> None:
        self.sequences, self.device = sequences, device
        self.lengths = [len(s.tokens) for s in sequences]
        self.weights = [s.response_length for s in sequences]

    def loss(self, model: Transformer, rows: list[int], denominator: float) -> tuple[Tensor, dict[str, float]]:
        logprobs, _ = response_logprobs(model, Batch.of([self.sequences[i] for i in rows], self.device))
        return -logprobs.sum() / denominator, {}
