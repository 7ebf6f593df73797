"""Rollouts on disk, one Parquet file per iteration, and as texts in the log."""

import math
from pathlib import Path
from typing import Any

import torch.distributed as dist

from src.data.encoding import Prompt
from src.data.tokenizer import Tokenizer
from src.logs import RunLog
from src.parallel.setup import Parallel
from src.ppo.buffer import RolloutBuffer

PER_TOKEN = (
    "rollout_logprobs",
    "logprobs",
    "ref_logprobs",
    "entropy",
    "values",
    "rewards",
    "advantages",
    "returns",
)


def asked(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """What is asked, for people to read: a row's text, or a conversation as its template has it."""
    text = prompt.row.get("instruction")
    return text if isinstance(text, str) else tokenizer.spelled(prompt.tokens)


def rows_of(buffer: RolloutBuffer, tokenizer: Tokenizer) -> list[dict]:
    """A row per rollout of this rank: texts, tokens, and what is known of each response token."""
    known = {name: getattr(buffer, name) for name in PER_TOKEN}
    lists = {
        name: x.cpu().split(buffer.response_lengths) for name, x in known.items() if x is not None
    }
    components = {name: x.tolist() for name, x in buffer.components.items()}
    shaped = buffer.scores if buffer.shaped is None else buffer.shaped
    columns = zip(
        buffer.prompts,
        buffer.places,
        buffer.responses(),
        buffer.truncated.tolist(),
        buffer.scores.tolist(),
        shaped.tolist(),
    )
    return [
        {
            "place": place,
            "prompt": asked(prompt, tokenizer),
            "response": tokenizer.decode(response),
            "gold": prompt.gold,
            "prompt_tokens": prompt.tokens,
            "tokens": response,
            "stop_reason": "length" if truncated else "stop",
            "score": score,
            "shaped_score": shaped_score,
            **{f"score_{name}": values[i] for name, values in components.items()},
            **{name: parts[i].tolist() for name, parts in lists.items()},
        }
        for i, (prompt, place, response, truncated, score, shaped_score) in enumerate(columns)
    ]


class RolloutDump:
    """Writes FOLDER/iteration-000001.parquet and so on: all ranks' rollouts, by their places."""

    def __init__(self, folder: str, tokenizer: Tokenizer, parallel: Parallel) -> None:
        self.folder, self.tokenizer, self.parallel = Path(folder), tokenizer, parallel

    def __call__(self, number: int, buffer: RolloutBuffer) -> None:
        p = self.parallel
        parts: list[Any] | None = [None] * p.world_size if p.is_main else None
        # The ranks of a model all have the same.
        dist.gather_object(rows_of(buffer, self.tokenizer) if p.speaks else [], parts, dst=0)
        rows = sorted((row for part in parts or [] for row in part), key=lambda row: row["place"])
        if rows:
            self._write(number, rows)

    def _write(self, number: int, rows: list[dict]) -> None:
        import pyarrow
        from pyarrow import parquet

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"iteration-{number + 1:06d}.parquet"
        table = pyarrow.Table.from_pylist([{"iteration": number + 1, **row} for row in rows])
        parquet.write_table(table, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)


class SampleTexts:
    """The first few rollouts of an iteration, with their rewards, as text in the log."""

    def __init__(self, count: int, tokenizer: Tokenizer, log: RunLog, parallel: Parallel) -> None:
        """parallel: of whose models the rollouts are."""
        self.count, self.tokenizer, self.log, self.parallel = count, tokenizer, log, parallel

    def __call__(self, number: int, buffer: RolloutBuffer) -> None:
        # Rank 0, which writes the log, may have none.
        for i, text in enumerate(self.parallel.known_to_all(self._texts(buffer)), 1):
            self.log.text(number + 1, f"samples/{i}", text)

    def _texts(self, buffer: RolloutBuffer) -> list[str]:
        texts = []
        for i in range(min(self.count, len(buffer))):
            prompt, ids = buffer.prompts[i], buffer.responses()[i]
            numbers = {name: float(x[i]) for name, x in buffer.components.items()}
            parts = ", ".join(
                f"{name} {'no opinion' if math.isnan(x) else f'{x:.4g}'}"
                for name, x in numbers.items()
            )
            cut = ", cut at the limit" if bool(buffer.truncated[i]) else ""
            query = asked(prompt, self.tokenizer)
            reward = f"reward {float(buffer.scores[i]):.4g} ({parts}){cut}"
            texts.append(f"{query}\n\n{self.tokenizer.decode(ids)}\n\n{reward}")
        return texts
