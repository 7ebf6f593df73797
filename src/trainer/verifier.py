"""Training the verifier (reward model) on pairs: −log σ(r_chosen − r_rejected) (arXiv 2203.02155, equation 1)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from src.models.batch import Batch, Sequence, sequence_scores, weighted_balance_loss
from src.models.transformer import Transformer


@dataclass(frozen=True)
class Comparison:
    """One prompt's responses, each side one or more, prompt included in each sequence."""

    chosen: list[Sequence]
    rejected: list[Sequence]


def margins(scores: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """r_chosen − r_rejected of every pair of each comparison. scores: [Σ (chosen + rejected)], in that order per comparison."""
    parts = scores.split([n for size in sizes for n in size])
    return [(c.unsqueeze(1) - r.unsqueeze(0)).flatten() for c, r in zip(parts[::2], parts[1::2])]


class VerifierObjective:
    """The pairwise loss, averaged over each comparison's pairs and then over the comparisons of a batch."""

    stats = ("loss", "accuracy")

    def __init__(self, comparisons: list[Comparison], device: torch.device) -> None:
        self.comparisons, self.device = comparisons, device
        self.lengths = [sum(len(s.tokens) for s in c.chosen + c.rejected) for c in comparisons]
        self.weights = [1] * len(comparisons)

    def loss(self, model: Transformer, rows: list[int], denominator: float) -> tuple[Tensor, dict[str, float]]:
        chosen = [self.comparisons[i] for i in rows]
        batch = Batch.of([s for c in chosen for s in c.chosen + c.rejected], self.device)  # one forward for both sides
        pairs = margins(sequence_scores(model, batch), [(len(c.chosen), len(c.rejected)) for c in chosen])
        loss = torch.stack([-F.logsigmoid(m).mean() for m in pairs]).sum() / denominator
        balance = weighted_balance_loss(
            model, batch, [1 / len(c.chosen + c.rejected) for c in chosen for _ in c.chosen + c.rejected], denominator
        )
        correct = torch.stack([(m.detach() > 0).float().mean() for m in pairs]).sum()
        return loss + balance, {"accuracy": float(correct) / denominator, "balance_loss": float(balance.detach())}
