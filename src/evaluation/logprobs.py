"""Log-probabilities of given responses."""

from typing import Any

from src.logs import RunLog
from src.models.batch import Batch, Sequence, over_ranks, response_logprobs
from src.models.transformer import Transformer
from src.parallel.setup import Parallel


def score_responses(
    model: Transformer,
    parallel: Parallel,
    sequences: list[Sequence],
    temperature: float,
    max_batch_size: int,
    log: RunLog,
) -> list[list[float]]:
    """log p of each response token of each sequence, the same on every rank."""

    def score(rows: list[int]) -> list[list[float]]:
        batch = Batch.of([sequences[i] for i in rows], parallel.device)
        logprobs, _ = response_logprobs(model, batch, temperature)  # [tokens of all responses]
        return [x.tolist() for x in logprobs.split(batch.responses)]

    lengths = [len(s.tokens) for s in sequences]
    with log.progress(len(sequences), "scoring", unit="row", work=sum(lengths)) as bar:
        return over_ranks(score, lengths, max_batch_size, parallel, bar)


def logprob_lines(sequences: list[Sequence], scored: list[list[float]]) -> list[dict[str, Any]]:
    """A row for each sequence, as solver_score.py writes them."""
    return [
        {
            "prompt_tokens": list(s.tokens[: s.prompt_length]),
            "tokens": list(s.tokens[s.prompt_length :]),
            "logprobs": logprobs,
            "sum": sum(logprobs),
        }
        for s, logprobs in zip(sequences, scored)
    ]
