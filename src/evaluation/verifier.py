"""A verifier's scores and its accuracy on pairs."""

import torch

from src.data.encoding import Graded
from src.logs import RunLog
from src.models.batch import Batch, Sequence, over_ranks, place_scores, sequence_scores
from src.models.transformer import Transformer, evaluating
from src.parallel.setup import Parallel
from src.trainer.verifier import Comparison, margins


@torch.no_grad()
def score_all(
    model: Transformer,
    parallel: Parallel,
    sequences: list[Sequence],
    max_batch_size: int,
    log: RunLog,
) -> torch.Tensor:
    """The score of each sequence, [sequences] on the host, the same on every rank."""

    def score(rows: list[int]) -> list[float]:
        batch = Batch.of([sequences[row] for row in rows], parallel.device)
        return sequence_scores(model, batch).tolist()

    lengths = [len(sequence.tokens) for sequence in sequences]
    bar = log.progress(len(sequences), "scoring", unit="text", work=sum(lengths))
    with evaluating(model), bar:
        return torch.tensor(over_ranks(score, lengths, max_batch_size, parallel, bar))


@torch.no_grad()
def score_places(
    model: Transformer,
    parallel: Parallel,
    sequences: list[Sequence],
    places: list[list[int]],
    max_batch_size: int,
    log: RunLog,
) -> list[list[float]]:
    """The scores at some tokens of each sequence, the same on every rank."""

    def score(rows: list[int]) -> list[list[float]]:
        batch = Batch.of([sequences[i] for i in rows], parallel.device)
        scores = place_scores(model, batch, [places[i] for i in rows])
        return [x.tolist() for x in scores.split([len(places[i]) for i in rows])]

    lengths = [len(sequence.tokens) for sequence in sequences]
    bar = log.progress(len(sequences), "scoring", unit="text", work=sum(lengths))
    with evaluating(model), bar:
        return over_ranks(score, lengths, max_batch_size, parallel, bar)


def evaluate_graded(
    model: Transformer,
    parallel: Parallel,
    graded: list[Graded],
    objective: str,
    max_batch_size: int,
    log: RunLog,
) -> tuple[dict, list[dict]]:
    """(summary, rows): how near the scores are to the grades, each step counting once.

    "classification": `accuracy`, the share on the right side of 0; "pointwise": `correlation`
    (Pearson's) and `mse`, the mean squared distance. A row holds one response's scores.
    """
    sequences, places = [x.sequence for x in graded], [x.places for x in graded]
    scores = score_places(model, parallel, sequences, places, max_batch_size, log)
    said = torch.tensor([x for row in scores for x in row], dtype=torch.float64)
    wanted = torch.tensor([x for row in graded for x in row.grades], dtype=torch.float64)
    summary: dict = {"n": len(graded), "graded": len(said)}
    if objective == "classification":
        summary["accuracy"] = float(((said > 0) == (wanted > 0.5)).double().mean())
    else:
        summary["mse"] = float((said - wanted).square().mean())
        spread = said.std(correction=0) * wanted.std(correction=0)
        covariance = ((said - said.mean()) * (wanted - wanted.mean())).mean()
        summary["correlation"] = float(covariance / spread) if spread > 0 else 0.0
    return summary, [{"scores": x, "grades": row.grades} for x, row in zip(scores, graded)]


def _sequences_of(comparisons: list[Comparison]) -> list[Sequence]:
    """All responses, in the order in which `margins` takes their scores."""
    return [sequence for comparison in comparisons for sequence in comparison.responses]


def _row(scores: list[float], comparison: Comparison) -> dict[str, list[float]]:
    """A comparison's scores by side, or of a ranking in its order."""
    chosen, rejected = comparison.chosen, comparison.rejected
    if set(chosen) & set(rejected):
        return {"ranked": scores}
    return {"chosen": [scores[i] for i in chosen], "rejected": [scores[i] for i in rejected]}


def score_moments(
    model: Transformer,
    parallel: Parallel,
    sequences: list[Sequence],
    max_batch_size: int,
    log: RunLog,
) -> tuple[float, float]:
    """Mean and standard deviation of the scores of all responses, the same on every rank."""
    scores = score_all(model, parallel, sequences, max_batch_size, log).double()
    # a floor, so that scores that are all the same can be divided by it
    return float(scores.mean()), max(float(scores.std(correction=0)), 1e-6)


def evaluate_pairs(
    model: Transformer,
    parallel: Parallel,
    comparisons: list[Comparison],
    max_batch_size: int,
    log: RunLog,
) -> tuple[dict, list[dict]]:
    """(summary, rows): the share of pairs whose chosen side scores higher, and all the scores.

    `accuracy` counts every pair once; a tie is not right. A row holds one comparison's scores.
    """
    scores = score_all(model, parallel, _sequences_of(comparisons), max_batch_size, log)
    pairs = torch.cat(margins(scores, comparisons))  # [pairs]
    parts = scores.split([len(comparison.responses) for comparison in comparisons])
    rows = [_row(part.tolist(), comparison) for part, comparison in zip(parts, comparisons)]
    summary = {
        "n": len(comparisons),
        "pairs": len(pairs),
        "accuracy": float((pairs > 0).double().mean()),
    }
    return {**summary, "margin": float(pairs.mean())}, rows
