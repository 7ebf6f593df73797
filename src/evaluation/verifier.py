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
        return sequence_scores(
            model, Batch.of([sequences[i] for i in rows], parallel.device)
        ).tolist()

    with evaluating(model), log.progress(len(sequences), "scoring", unit="text") as bar:
        return torch.tensor(
            over_ranks(score, [len(s.tokens) for s in sequences], max_batch_size, parallel, bar)
        )


def score_moments(
    model: Transformer,
    parallel: Parallel,
    comparisons: list[Comparison],
    max_batch_size: int,
    log: RunLog,
) -> tuple[float, float]:
    """Mean and standard deviation of the scores of all responses, the same on every rank."""
    sequences = [s for c in comparisons for s in c.chosen + c.rejected]
    scores = score_all(model, parallel, sequences, max_batch_size, log).double()
    return float(scores.mean()), max(float(scores.std(correction=0)), 1e-6)


def evaluate_pairs(
    model: Transformer,
    parallel: Parallel,
    comparisons: list[Comparison],
    max_batch_size: int,
    log: RunLog,
) -> tuple[dict, list[dict]]:
    """(summary, rows): the share of pairs in which the chosen side scores higher, and each comparison's scores.

    `accuracy` counts every pair once; a tie is not right.
    """
    sequences = [s for c in comparisons for s in c.chosen + c.rejected]
    scores = score_all(model, parallel, sequences, max_batch_size, log)
    sizes = [(len(c.chosen), len(c.rejected)) for c in comparisons]
    pairs = torch.cat(margins(scores, sizes))
    parts = iter(scores.split([n for size in sizes for n in size]))
    rows = [{"chosen": next(parts).tolist(), "rejected": next(parts).tolist()} for _ in sizes]
    summary = {
        "n": len(comparisons),
        "pairs": len(pairs),
        "accuracy": float((pairs > 0).double().mean()),
    }
    return {**summary, "margin": float(pairs.mean())}, rows
