"""Training the verifier (reward model) on pairs: −log σ(r_chosen − r_rejected).

(arXiv 2203.02155, equation 1.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from src.data.encoding import Comparison
from src.models.batch import (
    Batch,
    PromptTree,
    pieces_of,
    sequence_scores,
    weighted_balance_loss,
)
from src.models.transformer import Transformer
from src.trainer.objective import Objective


def margins(scores: Tensor, compared: list[Comparison]) -> list[Tensor]:
    """r_better − r_worse of every pair of each comparison, [pairs] each.

    scores: of all responses, comparison after comparison.
    """
    parts = scores.split([len(c.responses) for c in compared])
    return [
        part[[better for better, _ in c.pairs]] - part[[worse for _, worse in c.pairs]]
        for part, c in zip(parts, compared)
    ]


class VerifierObjective(Objective):
    """The pairwise loss, averaged over a comparison's pairs and then over a batch's comparisons.

    A prompt goes through the model once for all its responses. (Not with experts, whose balance is
    each sequence's own.)
    """

    stats: tuple[str, ...] = ("loss", "accuracy")

    def __init__(
        self, comparisons: list[Comparison], device: torch.device, share_prompts: bool = True
    ) -> None:
        self.comparisons, self.device, self.share_prompts = comparisons, device, share_prompts
        self.lengths = [
            sum(length for length, _ in self.pieces(i)) for i in range(len(comparisons))
        ]
        self.weights = [1] * len(comparisons)
        self.needed = [len(c.responses) for c in comparisons]

    def pieces(self, row: int) -> list[tuple[int, int]]:
        return pieces_of(self.comparisons[row].responses, self.share_prompts)

    def loss(
        self, model: Transformer, rows: list[int], denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        compared = [self.comparisons[i] for i in rows]
        groups = [c.responses for c in compared]  # one forward for all sides
        batch: Batch | PromptTree
        if self.share_prompts:
            batch = PromptTree(groups, self.device)
        else:
            batch = Batch.of([s for group in groups for s in group], self.device)
        pairs = margins(sequence_scores(model, batch), compared)
        loss = torch.stack([-F.logsigmoid(m).mean() for m in pairs]).sum() / denominator
        correct = torch.stack([(m.detach() > 0).float().mean() for m in pairs]).sum()
        balance = weighted_balance_loss(
            model, batch, [1 / len(group) for group in groups for _ in group], denominator
        )
        return loss + balance, {"accuracy": correct / denominator, "balance_loss": balance.detach()}
