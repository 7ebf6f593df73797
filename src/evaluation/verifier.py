"""A verifier's scores and its accuracy on pairs."""

import torch

from src.logs import RunLog
from src.models.batch import Batch, Sequence, over_ranks, sequence_scores
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
    comparisons: list[Comparison],
    max_batch_size: int,
    log: RunLog,
) -> tuple[float, float]:
    """Mean and standard deviation of the scores of all responses, the same on every rank."""
    sequences = _sequences_of(comparisons)
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
