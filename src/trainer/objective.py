"""What a training loop asks of that which is trained."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from src.data.mixture import Mixture
from src.models.batch import Batch, PromptTree
from src.models.transformer import Transformer
from src.trainer.batches import EpochSteps, PerRow, Steps


class Objective(Protocol):
    """Rows, how much each counts, and the loss of some of them.

    lengths: tokens of each row; weights: what each row adds to the denominator of the loss, 0: it
    is left out; needed: positions of each row whose last hidden state the loss needs; stats: names
    of what `loss` returns to be logged, "loss" among them. frozen: another model that each row goes
    through, forward alone; held: what else lies on the device, parameters of frozen parts; noted:
    what `begin` found of a batch, to be logged, too.
    """

    lengths: PerRow
    weights: PerRow
    needed: PerRow
    stats: tuple[str, ...]
    frozen: Transformer | None = None
    held: tuple[nn.Module, ...] = ()
    noted: Mapping[str, float] = {}

    @property
    def tokens_per_row(self) -> float:
        """On the average."""
        return sum(self.lengths) / len(self.lengths)

    def steps(self, batch_size: int, epochs: int, seed: int, mixture: Mixture | None) -> Steps:
        """Which rows each step takes; by default each once in an epoch, at random.

        mixture: of how many; all of them when not given.
        """
        return EpochSteps(mixture or len(self.lengths), batch_size, epochs, seed)

    def begin(self, number: int, batch: list[int], model: Transformer) -> None:
        """A step, its number from 0, is to be taken on a batch of all ranks' rows.

        What belongs to the whole batch is found here, rows that are sampled among it: `lengths`,
        `weights` and `needed` of the batch's rows hold from here on. By default nothing is to find.
        """
        return None

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """How a row is computed: (tokens, tokens before them that they see too) of each piece."""
        ...

    def consult(self, turns: list[list[int]]) -> None:
        """Ask frozen models about this rank's micro-batches of the step, before any is trained on.

        By default there is nobody to ask.
        """
        return None

    def batch(self, rows: list[int]) -> Batch | PromptTree:
        """What `loss` puts through the model for these rows."""
        ...

    def loss(
        self, model: Transformer, rows: list[int], denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The rows' share of the loss, and sums to be logged.

        The share is their sum over the whole batch's denominator.
        """
        ...
