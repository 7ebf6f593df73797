"""Which part of each tensor a rank holds, and how another placement's parts are got of it.

A part is a box: a range along each axis of the whole tensor. A rank holds it at the start of its
local tensor, with zeros behind it where the cut left less than a full share. So a tensor moves
from any layout to any other, between ranks or out of files, by what boxes have in common.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from src.models.layout import TensorSpec

Box = tuple[tuple[int, int], ...]  # [start, stop) along each axis of the whole tensor


@dataclass(frozen=True)
class Placement:
    """A tensor of a model on dp · pp · tp ranks, in this order: neighbours are tensor-parallel.

    first: the number of the first of them; sharded: data-parallel ranks hold the rows of a
    tensor-parallel part among them, as `fully_shard` deals them out (ZeRO 3), and not the same
    each; holders: the ranks of a pipeline (of `pp`) that have the tensor. Ranks beyond these hold
    nothing.
    """

    tp: int
    dp: int = 1
    sharded: bool = False
    pp: int = 1
    holders: tuple[int, ...] = (0,)
    first: int = 0

    def held_by(self, holders: Iterable[int]) -> "Placement":
        """The same for a tensor of other ranks of the pipeline."""
        return replace(self, holders=tuple(holders))

    def local_shape(self, spec: TensorSpec, rank: int) -> tuple[int, ...]:
        """Shape of what the rank holds, zeros behind its box and all."""
        shape = spec.local_shape(self.tp)
        first, last = self._rows(shape[0], rank)
        return last - first, *shape[1:]

    def box(self, spec: TensorSpec, rank: int) -> Box:
        """What the rank holds of the whole tensor."""
        return _box(self, spec, rank)

    def _rows(self, rows: int, rank: int) -> tuple[int, int]:
        """[first, last) of a tensor-parallel part's rows."""
        dp_rank, rest = divmod(rank - self.first, self.pp * self.tp)
        if not 0 <= dp_rank < self.dp or rest // self.tp not in self.holders:
            return 0, 0
        if not self.sharded:
            return 0, rows
        share = -(-rows // self.dp)
        return min(dp_rank * share, rows), min((dp_rank + 1) * share, rows)

    def owners(self, spec: TensorSpec, near: int = 0) -> list[tuple[int, Box]]:
        """(rank, box) of the parts that make up the whole, each number once.

        near: a rank, whose own copy of the model it is, where there are several; those that have
        none take turns.
        """
        number, size = near - self.first, self.dp * self.pp * self.tp
        replica, rest = divmod(number if 0 <= number < size else near % size, self.pp * self.tp)
        replicas = range(self.dp) if self.sharded else [replica]
        stage = rest // self.tp
        stage = stage if stage in self.holders else self.holders[0]
        tp_ranks = [0] if spec.dim is None else [rank for rank, *_ in spec.owners(self.tp)]
        if spec.dim is None and not self.sharded:
            tp_ranks = [rest % self.tp]
        ranks = [
            self.first + (dp * self.pp + stage) * self.tp + rank
            for dp in replicas
            for rank in tp_ranks
        ]
        return [(rank, box) for rank in ranks if not is_empty(box := self.box(spec, rank))]


@lru_cache(2**16)
def _box(placement: Placement, spec: TensorSpec, rank: int) -> Box:
    box = [(0, size) for size in spec.shape]
    if spec.dim is not None:
        box[spec.dim] = spec.local_range((rank - placement.first) % placement.tp, placement.tp)
    # Of the local rows, this rank's, as far as they are no padding.
    first, last = placement._rows(spec.local_shape(placement.tp)[0], rank)
    start, stop = box[0]
    box[0] = min(start + first, stop), min(start + last, stop)
    return tuple(box)


def common(a: Box, b: Box) -> Box:
    """The numbers that are in both boxes."""
    pairs = zip(a, b)
    return tuple((max(x[0], y[0]), max(max(x[0], y[0]), min(x[1], y[1]))) for x, y in pairs)


def is_empty(box: Box) -> bool:
    return any(start >= stop for start, stop in box)


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where a box's numbers are in a local tensor that holds `outer`."""
    return tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(box, outer))


def pieces_of(
    box: Box, owners: list[tuple[int, Box]], local: Box | None = None
) -> Iterator[tuple[int | None, Box, Box]]:
    """(owner, its box, what both have) of what makes up a box.

    local: what the asking rank has itself; what of a piece is all in it has owner None.
    """
    if is_empty(box):
        return
    if local is not None and common(box, local) == box:
        yield None, local, box
        return
    for owner, owned in owners:
        overlap = common(box, owned)
        if is_empty(overlap):
            continue
        if local is not None and common(overlap, local) == overlap:
            yield None, local, overlap
        else:
            yield owner, owned, overlap
