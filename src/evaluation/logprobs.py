"""Log-probabilities of given responses."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.data.tokenizer import Tokenizer
from src.logs import RunLog
from src.models.batch import Batch, Sequence, over_ranks, predicting
from src.models.transformer import Transformer
from src.parallel.divergence import top_k
from src.parallel.setup import Parallel
from src.parallel.vocab import chunks_of, token_logprobs


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
        hidden = predicting(model, batch)  # [tokens of all responses, dim]
        logprobs: list[Tensor] = []
        ids: list[list[int]] = []
        tops: list[list[float]] = []
        for (chunk,) in chunks_of(len(hidden), model.vocabulary_weight, copies=3 if k else 1):
            logits = model.logits(hidden[chunk])
            logprobs.append(token_logprobs(logits, batch.targets[chunk], temperature)[0])
            if k:
                best, values = top_k(logits.float() / temperature, k)
                ids += best.tolist()
                tops += values.tolist()
        parts = [x.tolist() for x in torch.cat(logprobs).split(batch.responses)]
        found, start = [], 0
        for part in parts:
            of_row = slice(start, start + len(part))
            found.append(Scored(part, ids[of_row], tops[of_row]))
            start += len(part)
        return found

    lengths = [len(s.tokens) for s in sequences]
    with log.progress(len(sequences), "scoring", unit="row", work=sum(lengths)) as bar:
        return over_ranks(score, lengths, max_batch_size, parallel, bar)


def logprob_lines(
    sequences: list[Sequence], scored: list[Scored], tokenizer: Tokenizer, temperature: float
) -> list[dict[str, Any]]:
    """A row for each sequence, as solver_score.py writes them."""
    rows = []
    for s, x in zip(sequences, scored):
        row: dict[str, Any] = {
            "prompt_tokens": list(s.tokens[: s.prompt_length]),
            "tokens": s.response,
            "logprobs": x.logprobs,
            "sum": sum(x.logprobs),
        }
        if x.top_tokens:
            row |= {"top_tokens": x.top_tokens, "top_logprobs": x.top_logprobs}
            row |= {"vocabulary": tokenizer.vocabulary, "temperature": temperature}
        rows.append(row)
    return rows
