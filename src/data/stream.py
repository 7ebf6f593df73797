"""The order in which tokens of shards are trained on: rows, numbered from 0, without end.

Each folder's documents are one string of tokens, end to end, and a row is `max_seq_len` of them;
its first token is the last of the row before, so that every token but the string's first is
predicted by one before it, once in an epoch. The last row is as long as what is left. Rows of a
folder come in a random order, another in each epoch; folders take turns by their weights. What a
row is follows from the seed and its number alone, at once: nothing is drawn, counted or kept on
the way to it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch

from src.data.shards import Shards
from src.data.sources import parts_of
from src.errors import UserError
from src.models.batch import Batch, Ranges
from src.parallel.context import ALONE, ContextGroup

_ROUNDS = 6


@dataclass(frozen=True)
class Span:
    """A sequence: the tokens of a part from `start` to before `stop`."""

    part: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Blended:
    """A folder of a blend. weight: its share of the rows, relative to the others' weights."""

    shards: Shards
    weight: Fraction


@dataclass(frozen=True)
class Stream:
    """Rows of several folders.

    max_seq_len: tokens of a row; document_mask: whether a document sees itself alone, its positions
    from 0: a row is then several sequences, cut where documents end, without those of one token,
    which have nothing to predict. Else it is one sequence.
    """

    parts: Sequence[Blended]
    max_seq_len: int
    document_mask: bool
    seed: int

    @classmethod
    def open(
        cls,
        text: str,
        max_seq_len: int,
        document_mask: bool = True,
        seed: int = 0,
        part: int = 0,
        parts: int = 1,
    ) -> "Stream":
        """The rows of the folders of shards that a text names, as `parts_of` reads it.

        Without weights each folder has its own number of rows as its weight, so that an epoch has
        each row once. part, parts: see `Shards.open`, whose UserError it raises.
        """
        found = []
        for named in parts_of(text):
            shards = Shards.open(named.location, part, parts)
            rows = rows_in(shards.tokens, max_seq_len)
            if rows == 0:
                raise UserError(f"{shards.folder}: holds one token, and nothing to predict")
            weight = Fraction(rows) if named.weight is None else named.weight
            found.append(Blended(shards, weight))
        return cls(found, max_seq_len, document_mask, seed)

    @cached_property
    def rows_of(self) -> list[int]:
        """The rows of each part."""
        return [rows_in(part.shards.tokens, self.max_seq_len) for part in self.parts]

    @property
    def rows(self) -> int:
        """Of an epoch: as many as all parts have."""
        return sum(self.rows_of)

    @property
    def tokens(self) -> int:
        """Of all parts."""
        return sum(part.shards.tokens for part in self.parts)

    def place(self, number: int) -> tuple[int, int, int]:
        """The part that a row is of, its number there, and that part's epoch, from 0.

        Of the first n rows each part has its share, to within one for each part before it.
        """
        part, index = self._turn(number)
        epoch, place = divmod(index, self.rows_of[part])
        key = f"{self.seed}/part {part}/epoch {epoch}"
        return part, permuted(place, self.rows_of[part], key), epoch

    def _turn(self, number: int) -> tuple[int, int]:
        """The part whose turn it is, and how many turns it has had."""
        left = sum(part.weight for part in self.parts)
        for i, part in enumerate(self.parts[:-1]):
            share = part.weight / left
            turns = int(number * share)
            if int((number + 1) * share) > turns:
                return i, turns
            number, left = number - turns, left - part.weight
        return len(self.parts) - 1, number

    def spans(self, number: int) -> list[Span]:
        """A row's sequences."""
        part, row, _ = self.place(number)
        return self.spans_at(part, row)

    def spans_at(self, part: int, row: int) -> list[Span]:
        """The sequences of a part's row, by its number in the part."""
        shards = self.parts[part].shards
        start = row * (self.max_seq_len - 1)
        stop = min(start + self.max_seq_len, shards.tokens)
        if not self.document_mask:
            return [Span(part, start, stop)]
        cuts = [start, *shards.ends(start, stop - 1), stop]
        return [Span(part, a, b) for a, b in zip(cuts, cuts[1:]) if b - a > 1]

    def batch(
        self, spans: Sequence[Span], device: torch.device, context: ContextGroup = ALONE
    ) -> Batch:
        """Some sequences, of which every token but the first is a response token.

        context: the ranks that divide the tokens.
        """
        parts = [self.parts[span.part].shards.read(span.start, span.stop) for span in spans]
        tokens = torch.from_numpy(np.concatenate(parts)).to(device)
        ranges: list[Ranges] = [((1, len(span)),) for span in spans]
        return Batch(tokens, list(map(len, spans)), ranges, context)


def rows_in(tokens: int, max_seq_len: int) -> int:
    """How many rows a string of tokens makes, which share their ends."""
    return -(-(tokens - 1) // (max_seq_len - 1))


def permuted(place: int, size: int, key: str) -> int:
    """Where a place of `size` many goes in a random permutation that a key names.

    A Feistel network over the next larger power of four, as often as it takes to come to a place
    that there is (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    base = hashlib.blake2b(key.encode(), digest_size=8)
    while True:
        left, right = place >> half, place & mask
        for turn in range(_ROUNDS):
            hashed = base.copy()
            hashed.update(b"%d/%d" % (turn, right))
            left, right = right, left ^ int.from_bytes(hashed.digest(), "big") & mask
        place = left << half | right
        if place < size:
            return place
