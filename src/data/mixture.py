"""Rows of several sources, in proportions.

An epoch holds as many rows as can be drawn in the proportions given without any row coming twice:
of sources of n_i rows and weights w_i, which add up to 1, that is N = min n_i / w_i rows, N w_i of
each.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeVar, cast

from src.data.kept import Joined, Sequences
from src.data.sources import Source, parts_of
from src.errors import UserError

Found = TypeVar("Found", bound=Sequence[Any])


@dataclass(frozen=True)
class Mixture:
    """How many rows there are of each source, which stand one after the other, and its weight.

    weights: None: an epoch holds all rows.
    """

    sizes: tuple[int, ...]
    weights: tuple[Fraction, ...] | None = None

    @property
    def drawn(self) -> tuple[int, ...]:
        """How many rows of each source an epoch holds."""
        if self.weights is None:
            return self.sizes
        # In fractions: the source that runs out first gives each of its rows.
        whole = min(size / weight for size, weight in zip(self.sizes, self.weights))
        return tuple(math.floor(whole * weight) for weight in self.weights)

    @property
    def n_rows(self) -> int:
        """How many rows an epoch holds."""
        return sum(self.drawn)


def read_mixture(
    source: Source, read: Callable[[Source], tuple[Found, list[str]]]
) -> tuple[Found, list[str], Mixture]:
    """What `read` makes of the rows of all sources that are named, and how they are mixed.

    read: from a source to its rows and notes; without weights it is given all at once. Raises
    UserError where a weight is so small that no row of its source would be drawn.
    """
    parts = parts_of(source.text)
    if parts[0].weight is None:
        rows, notes = read(source)
        return rows, notes, Mixture((len(rows),))
    read_parts = [read(replace(source, text=part.location)) for part in parts]
    notes = [note for _, of_part in read_parts for note in of_part]
    sizes = tuple(len(rows) for rows, _ in read_parts)
    mixture = Mixture(sizes, tuple(part.weight for part in parts if part.weight))
    for part, size, drawn in zip(parts, sizes, mixture.drawn):
        notes.append(f"{part.location}: an epoch draws {drawn} of {size} rows")
        if not drawn:
            others = ", ".join(p.location for p in parts if p is not part)
            raise UserError(
                f"{source}: not one row of {part.location} would be drawn, so few are there of "
                f"{others}; give {part.location} a larger weight, or leave it out"
            )
    every = [rows for rows, _ in read_parts]
    if all(isinstance(rows, list) for rows in every):
        return cast(Found, list(itertools.chain.from_iterable(every))), notes, mixture
    return cast(Found, Joined(cast(list[Sequences], every))), notes, mixture
