"""How well a model predicts held-out texts."""

import math
from dataclasses import dataclass

import torch

from src.data.stream import Stream
from src.generation.relayout import plain
from src.logs import RunLog
from src.models.batch import over_ranks, response_logprobs
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.settings.pretraining import PerplexitySettings


@dataclass(frozen=True)
class Perplexity:
    """Of each folder of shards; does nothing where there are none.

    stream: their rows; names: what each folder is called; rows: of each, at most.
    """

    stream: Stream | None
    names: list[str]
    rows: int | None
    batch_size: int

    @classmethod
    def read(
        cls,
        settings: PerplexitySettings,
        max_seq_len: int,
        document_mask: bool,
        parallel: Parallel,
    ) -> "Perplexity":
        """Open the shards. Raises UserError for them."""
        stream, names = None, list[str]()
        if settings.valid_file:
            part = parallel.rank, parallel.world_size
            stream = Stream.open(
                ",".join(settings.valid_file), max_seq_len, document_mask, 0, *part
            )
            names = [part.shards.folder.name for part in stream.parts]
            if len(set(names)) < len(names):
                names = [str(part.shards.folder) for part in stream.parts]
        return cls(stream, names, settings.valid_rows, settings.eval_batch_size)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `run` returns, higher is better."""
        return () if self.stream is None else ("logprob",)

    @torch.no_grad()
    def run(
        self, moment: str, number: int, model: Transformer, parallel: Parallel, log: RunLog
    ) -> dict[str, float]:
        """The mean log-probability of a token of all folders, each of which is logged by itself.

        `moment`, such as "epoch 2", names the moment in the log; number: its place on the curves'
        axis.
        """
        if self.stream is None:
            return {}
        total, count = 0.0, 0
        with plain(model, parallel) as (whole, division):
            for part, name in enumerate(self.names):
                logprob, tokens = self._of(part, whole, division, log)
                loss = -logprob / tokens
                scalars = {"loss": loss, "perplexity": math.exp(min(loss, 700))}
                log.scalars(number, scalars, prefix=f"eval/{name}")
                log.info(
                    f"after {moment}: {name}, perplexity {scalars['perplexity']:.3f} (loss "
                    f"{loss:.4f} on {tokens:,} tokens)"
                )
                total, count = total + logprob, count + tokens
        return {"logprob": total / count}

    def _of(
        self, part: int, model: Transformer, parallel: Parallel, log: RunLog
    ) -> tuple[float, int]:
        """Σ log p of a folder's tokens, and how many these are."""
        stream = self.stream
        assert stream is not None
        count = min(stream.rows_of[part], self.rows or stream.rows_of[part])
        spans = [stream.spans_at(part, row) for row in range(count)]
        spans = [of_row for of_row in spans if of_row]

        def score(rows: list[int]) -> list[float]:
            batch = stream.batch([span for i in rows for span in spans[i]], parallel.device)
            logprobs, _ = response_logprobs(model, batch)
            learned = [sum(len(span) - 1 for span in spans[i]) for i in rows]
            return [float(x.double().sum()) for x in logprobs.split(learned)]

        lengths = [sum(map(len, of_row)) for of_row in spans]
        with log.progress(len(spans), "perplexity", unit="row", work=sum(lengths)) as bar:
            found = over_ranks(score, lengths, self.batch_size, parallel, bar)
        return math.fsum(found), sum(len(span) - 1 for of_row in spans for span in of_row)
