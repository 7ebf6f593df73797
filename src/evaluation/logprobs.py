"""Log-probabilities of given responses."""

from dataclasses import dataclass
from typing import Any

from src.data.tokenizer import Tokenizer
from src.logs import RunLog
from src.models.batch import (
    Batch,
    Sequence,
    over_ranks,
    predicting,
    response_logprobs,
)
from src.models.transformer import Transformer
from src.parallel.divergence import top_k
from src.parallel.setup import Parallel
from src.parallel.vocab import chunks_of


@dataclass(frozen=True)
class Scored:
    """Of each token of a response: log p, and the likeliest tokens with theirs, k or none."""

    logprobs: list[float]
    top_tokens: list[list[int]]
    top_logprobs: list[list[float]]


def score_responses(
    model: Transformer,
    parallel: Parallel,
    sequences: list[Sequence],
    temperature: float,
    max_batch_size: int,
    log: RunLog,
    k: int = 0,
) -> list[Scored]:
    """log p of each response token of each sequence, the same on every rank.

    k: how many of the likeliest tokens at each place are wanted beside.
    """

    def score(rows: list[int]) -> list[Scored]:
        batch = Batch.of([sequences[i] for i in rows], parallel.device)
        logprobs, _ = response_logprobs(model, batch, temperature)  # [tokens of all responses]
        parts = [x.tolist() for x in logprobs.split(batch.responses)]
        ids, tops = likeliest(model, batch, temperature, k) if k else ([], [])
        found, start = [], 0
        for part in parts:
            of_row = slice(start, start + len(part))
            found.append(Scored(part, ids[of_row], tops[of_row]))
            start += len(part)
        return found

    lengths = [len(s.tokens) for s in sequences]
    with log.progress(len(sequences), "scoring", unit="row", work=sum(lengths)) as bar:
        return over_ranks(score, lengths, max_batch_size, parallel, bar)


def likeliest(
    model: Transformer, batch: Batch, temperature: float, k: int
) -> tuple[list[list[int]], list[list[float]]]:
    """The k likeliest tokens in place of each response token, and their log-probabilities."""
    hidden = predicting(model, batch)
    ids: list[list[int]] = []
    logprobs: list[list[float]] = []
    for (rows,) in chunks_of(len(hidden), model.vocabulary_weight, copies=3):
        best, values = top_k(model.logits(hidden[rows]).float() / temperature, k)
        ids += best.tolist()
        logprobs += values.tolist()
    return ids, logprobs


def logprob_lines(
    sequences: list[Sequence], scored: list[Scored], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """A row for each sequence, as solver_score.py writes them."""
    rows = []
    for s, x in zip(sequences, scored):
        row: dict[str, Any] = {
            "prompt_tokens": list(s.tokens[: s.prompt_length]),
            "tokens": list(s.tokens[s.prompt_length :]),
            "logprobs": x.logprobs,
            "sum": sum(x.logprobs),
        }
        if x.top_tokens:
            row |= {"top_tokens": x.top_tokens, "top_logprobs": x.top_logprobs}
            row["vocabulary"] = tokenizer.vocabulary
        rows.append(row)
    return rows
