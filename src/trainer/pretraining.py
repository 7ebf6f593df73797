"""Pre-training: next-token loss on rows of a stream."""

import torch

from src.data.mixture import Mixture
from src.data.stream import Span, Stream
from src.models.batch import Batch
from src.models.transformer import Transformer
from src.parallel.clock import clock
from src.parallel.context import ALONE, ContextGroup
from src.trainer.batches import Steps, StreamSteps
from src.trainer.solver import SolverObjective


class PretrainingObjective(SolverObjective):
    """Mean of −log p over a batch's tokens but the first of each sequence.

    A row is one of the stream, by its number; it is looked up when its step begins.
    """

    def __init__(
        self,
        stream: Stream,
        device: torch.device,
        context: ContextGroup = ALONE,
        most: int | None = None,
    ) -> None:
        """context: the ranks that divide the rows' tokens; most: steps, in place of epochs."""
        super().__init__([], device, context)
        self.stream, self.most = stream, most
        self.spans: dict[int, list[Span]] = {}

    @property
    def tokens_per_row(self) -> float:
        return self.stream.tokens / self.stream.rows

    def steps(self, batch_size: int, epochs: int, seed: int, mixture: Mixture | None) -> Steps:
        return StreamSteps(self.stream.rows, batch_size, epochs, self.most)

    def begin(self, number: int, batch: list[int], model: Transformer) -> None:
        with clock.phase("data"):
            self.spans = {row: self.stream.spans(row) for row in batch}
            self.lengths = {i: sum(map(len, spans)) for i, spans in self.spans.items()}
            self.weights = self.needed = {
                i: sum(len(span) - 1 for span in spans) for i, spans in self.spans.items()
            }

    def pieces(self, row: int) -> list[tuple[int, int]]:
        return [(len(span), 0) for span in self.spans[row]]

    def batch(self, rows: list[int]) -> Batch:
        spans = [span for row in rows for span in self.spans[row]]
        return self.stream.batch(spans, self.device, self.context)
