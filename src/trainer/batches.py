"""Which rows make up a step, and which of them are this rank's: functions of seed and number."""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from src.data.mixture import Mixture
from src.models.batch import micro_batches

PerRow = list[int] | dict[int, int]  # a number of each row, or of those that are at work


class Steps(Protocol):
    """Which rows each step takes. in_epoch: steps of an epoch; total: of the run."""

    @property
    def in_epoch(self) -> int: ...

    @property
    def total(self) -> int: ...

    def batch(self, step: int) -> list[int]:
        """The rows of a step, by its number from 0."""
        ...


class EpochSteps:
    """Every row once in an epoch, whose last batch may be smaller."""

    def __init__(self, rows: int | Mixture, batch_size: int, epochs: int, seed: int) -> None:
        """rows: as `epoch_batches` has them."""
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        n_rows = rows if isinstance(rows, int) else rows.n_rows
        self.in_epoch = -(-n_rows // batch_size)
        self.total = self.in_epoch * epochs
        self._epoch, self._batches = 0, list[list[int]]()

    def batch(self, step: int) -> list[int]:
        epoch = step // self.in_epoch + 1
        if epoch != self._epoch:
            self._batches = epoch_batches(self.rows, self.batch_size, self.seed, epoch)
            self._epoch = epoch
        return self._batches[step % self.in_epoch]


@dataclass(frozen=True)
class StreamSteps:
    """The next rows of those that are numbered without end, up to the last of all epochs.

    most: steps that are taken in place of epochs.
    """

    n_rows: int
    batch_size: int
    epochs: int
    most: int | None = None

    @property
    def in_epoch(self) -> int:
        return -(-self.n_rows // self.batch_size)

    @property
    def total(self) -> int:
        return -(-self.n_rows * self.epochs // self.batch_size) if self.most is None else self.most

    def batch(self, step: int) -> list[int]:
        first = step * self.batch_size
        last = first + self.batch_size
        return list(
            range(first, min(last, self.n_rows * self.epochs) if self.most is None else last)
        )


def epoch_batches(rows: int | Mixture, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's rows, each once, in random batches, in an order fixed by seed and epoch alone.

    rows: how many, all of which an epoch has, or how they are mixed. Batches are not sorted by
    length, which would sort them by content: packing makes that needless. Inside a batch,
    `shares_of` puts rows alike in length into the same micro-batch.
    """
    order = _shuffled(rows, seed, epoch)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _shuffled(rows: int | Mixture, seed: int | str, epoch: int) -> list[int]:
    order = list(range(rows)) if isinstance(rows, int) else _drawn(rows, seed, epoch)
    random.Random(f"{seed}/epoch {epoch}").shuffle(order)
    return order


def _drawn(mixture: Mixture, seed: int | str, epoch: int) -> list[int]:
    """The rows of an epoch of a mixture: of each source its share, drawn anew."""
    drawn, first = list[int](), 0
    for number, (size, n) in enumerate(zip(mixture.sizes, mixture.drawn)):
        rng = random.Random(f"{seed}/epoch {epoch}/source {number}")
        drawn += sorted(rng.sample(range(first, first + size), n))
        first += size
    return drawn


class EndlessBatches:
    """Batches of row numbers without end. Every epoch is drawn anew; batches are full."""

    def __init__(self, rows: int | Mixture, batch_size: int, seed: str) -> None:
        """rows: as `epoch_batches` has them."""
        self.taken, self._batches = 0, self._endless(rows, batch_size, seed)

    @staticmethod
    def _endless(rows: int | Mixture, batch_size: int, seed: str) -> Iterator[list[int]]:
        waiting: list[int] = []
        for epoch in itertools.count(1):
            waiting += _shuffled(rows, seed, epoch)
            while len(waiting) >= batch_size:
                yield waiting[:batch_size]
                waiting = waiting[batch_size:]

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        self.taken += 1
        return next(self._batches)

    @property
    def part(self) -> tuple[Callable, Callable]:
        """How to get and set what a saved run must keep of it."""
        return (lambda: self.taken), self.wind_to

    def wind_to(self, taken: int) -> None:
        """Forward to where so many have been taken."""
        while self.taken < taken:
            next(self)


class EndlessRows(EndlessBatches):
    """The next of rows that are numbered without end."""

    def __init__(self, batch_size: int) -> None:
        self.taken, self.batch_size = 0, batch_size

    def __next__(self) -> list[int]:
        first = self.taken * self.batch_size
        self.taken += 1
        return list(range(first, first + self.batch_size))

    def wind_to(self, taken: int) -> None:
        self.taken = taken


def shares_of(
    batch: list[int],
    lengths: PerRow,
    dp_size: int,
    max_batch_size: int,
    max_tokens: int | None = None,
) -> list[list[list[int]]]:
    """Each data-parallel rank's rows of a batch, in micro-batches.

    Row after row, the longest first, goes to the rank with the fewest tokens, while that has not
    got its share of rows.
    """
    order = sorted(batch, key=lambda i: (-lengths[i], i))
    most = -(-len(batch) // dp_size)
    shares: list[list[int]] = [[] for _ in range(dp_size)]
    for i in order:
        open_shares = (share for share in shares if len(share) < most)
        min(open_shares, key=lambda share: sum(lengths[j] for j in share)).append(i)
    return [
        [[rows[i] for i in group] for group in micro_batches(of_rank, max_batch_size, max_tokens)]
        for rows in shares
        for of_rank in [[lengths[i] for i in rows]]
    ]


def turns_of(shares: list[list[list[int]]], rank: int, together: bool) -> list[list[int] | None]:
    """One data-parallel rank's micro-batches; `together`, then None while others have more.

    Ranks that share weights put them together for each micro-batch, so that all have as many turns.
    """
    idle = max(map(len, shares)) - len(shares[rank]) if together else 0
    return [*shares[rank], *[None] * idle]
