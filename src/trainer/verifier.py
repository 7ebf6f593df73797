"""Training the verifier (reward model): on pairs, or on scores or labels of single responses.

Of pairs −log σ(r_chosen − r_rejected) (arXiv 2203.02155, equation 1).
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from src.data.encoding import Comparison, Graded
from src.models.batch import (
    Batch,
    PromptTree,
    packed,
    pieces_of,
    place_scores,
    sequence_scores,
    weighted_balance_loss,
)
from src.models.transformer import Transformer
from src.parallel.context import ALONE, ContextGroup
from src.parallel.setup import Parallel
from src.trainer.objective import Objective


def margins(scores: Tensor, compared: list[Comparison]) -> list[Tensor]:
    """r_better − r_worse of every pair of each comparison, [pairs] each.

    scores: of all responses, comparison after comparison.
    """
    places: list[tuple[int, int]] = []
    first = 0
    for c in compared:
        places += [(first + better, first + worse) for better, worse in c.pairs]
        first += len(c.responses)
    better, worse = torch.tensor(places, device=scores.device).T  # [pairs] each
    return list((scores[better] - scores[worse]).split([len(c.pairs) for c in compared]))


class VerifierObjective(Objective):
    """The pairwise loss, averaged over a comparison's pairs and then over a batch's comparisons.

    A prompt goes through the model once for all its responses. (Not with experts, whose balance is
    each sequence's own.)
    """

    stats: tuple[str, ...] = ("loss", "accuracy")

    def __init__(
        self,
        comparisons: list[Comparison],
        device: torch.device,
        share_prompts: bool = True,
        context: ContextGroup = ALONE,
    ) -> None:
        """context: the ranks that divide the rows' tokens."""
        self.comparisons, self.device, self.context = comparisons, device, context
        self.share_prompts = share_prompts
        self.lengths = [
            sum(length for length, _ in self.pieces(i)) for i in range(len(comparisons))
        ]
        self.weights = [1] * len(comparisons)
        self.needed = [len(c.responses) for c in comparisons]

    def pieces(self, row: int) -> list[tuple[int, int]]:
        return pieces_of(self.comparisons[row].responses, self.share_prompts)

    def batch(self, rows: list[int]) -> Batch | PromptTree:
        groups = [self.comparisons[i].responses for i in rows]  # one forward for all sides
        return packed(groups, self.share_prompts, self.device, self.context)

    def loss(
        self, model: Transformer, rows: list[int], denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        compared = [self.comparisons[i] for i in rows]
        groups, batch = [c.responses for c in compared], self.batch(rows)
        pairs = margins(sequence_scores(model, batch), compared)
        loss = torch.stack([-F.logsigmoid(m).mean() for m in pairs]).sum() / denominator
        correct = torch.stack([(m.detach() > 0).float().mean() for m in pairs]).sum()
        balance = weighted_balance_loss(
            model, batch, [1 / len(group) for group in groups for _ in group], denominator
        )
        return loss + balance, {"accuracy": correct / denominator, "balance_loss": balance.detach()}


# What a score costs beside its grade, [places] → [places].
GRADED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pointwise": lambda scores, grades: (scores - grades).square(),
    "classification": lambda scores, grades: F.binary_cross_entropy_with_logits(
        scores, grades, reduction="none"
    ),
}


class GradedObjective(Objective):
    """The mean over a response's steps (or its end alone), and then over a batch's responses.

    "pointwise": the squared distance from a score; "classification": the cross entropy of a label,
    true or false, whose log odds the score is. Of steps: a process reward (arXiv 2305.20050).
    """

    stats: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        rows: list[Graded],
        kind: str,
        device: torch.device,
        context: ContextGroup = ALONE,
    ) -> None:
        """kind: a key of `GRADED`; context: the ranks that divide the rows' tokens."""
        self.rows, self.cost, self.device, self.context = rows, GRADED[kind], device, context
        self.stats += ("accuracy",) if kind == "classification" else ()
        self.lengths = [len(row.sequence.tokens) for row in rows]
        self.weights = [1] * len(rows)
        self.needed = [len(row.places) for row in rows]

    def pieces(self, row: int) -> list[tuple[int, int]]:
        return [(self.lengths[row], 0)]

    def batch(self, rows: list[int]) -> Batch:
        return Batch.of([self.rows[i].sequence for i in rows], self.device, self.context)

    def loss(
        self, model: Transformer, rows: list[int], denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, batch = [self.rows[i] for i in rows], self.batch(rows)
        scores = place_scores(model, batch, [row.places for row in chosen])  # [places]
        grades = torch.tensor([x for row in chosen for x in row.grades], device=self.device)
        shares = [1 / len(row.places) for row in chosen for _ in row.places]
        weights = torch.tensor(shares, device=self.device) / denominator
        loss = (self.cost(scores, grades) * weights).sum()
        right = (((scores.detach() > 0) == (grades > 0.5)) * weights).sum()
        balance = weighted_balance_loss(model, batch, [1.0] * len(chosen), denominator)
        return loss + balance, {"accuracy": right, "balance_loss": balance.detach()}


def objective_of(
    rows: list[Comparison] | list[Graded], kind: str, model: Transformer, parallel: Parallel
) -> Objective:
    """What --objective asks for."""
    device, context = parallel.device, parallel.context
    if kind == "pairwise":
        compared, share_prompts = cast(list[Comparison], rows), not model.config.n_experts
        return VerifierObjective(compared, device, share_prompts, context)
    return GradedObjective(cast(list[Graded], rows), kind, device, context)
