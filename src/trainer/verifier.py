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
    sequence_scores,
    shared_prompt,
    weighted_balance_loss,
)
from src.models.transformer import Transformer


def margins(scores: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """r_chosen − r_rejected of every pair of each comparison, [chosen × rejected] each.

    scores: [Σ (chosen + rejected)], in that order per comparison.
    """
    parts = scores.split([n for size in sizes for n in size])
    return [(c.unsqueeze(1) - r.unsqueeze(0)).flatten() for c, r in zip(parts[::2], parts[1::2])]


class VerifierObjective:
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
        self.needed = [len(c.chosen) + len(c.rejected) for c in comparisons]

    def pieces(self, row: int) -> list[tuple[int, int]]:
        sequences = self.comparisons[row].chosen + self.comparisons[row].rejected
        prompt = shared_prompt(sequences) if self.share_prompts else 0
        return [(prompt, 0)] * bool(prompt) + [(len(s.tokens) - prompt, prompt) for s in sequences]

    def loss(
        self, model: Transformer, rows: list[int], denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = [self.comparisons[i] for i in rows]
        groups = [c.chosen + c.rejected for c in chosen]  # one forward for both sides
        batch: Batch | PromptTree
        if self.share_prompts:
            batch = PromptTree.of(groups, self.device)
        else:
            batch = Batch.of([s for group in groups for s in group], self.device)
        pairs = margins(
            sequence_scores(model, batch), [(len(c.chosen), len(c.rejected)) for c in chosen]
        )
        loss = torch.stack([-F.logsigmoid(m).mean() for m in pairs]).sum() / denominator
        correct = torch.stack([(m.detach() > 0).float().mean() for m in pairs]).sum()
        balance = weighted_balance_loss(
            model, batch, [1 / len(group) for group in groups for _ in group], denominator
        )
        return loss + balance, {"accuracy": correct / denominator, "balance_loss": balance.detach()}
