"""Tensors that move from one layout to another, between ranks and in memory.

Each rank sends every other what that one's new part overlaps with of its own; nobody holds the
whole. Large tensors go in parts, and one bucket of these is on its way while the next is begun.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from src.models.layout import TensorSpec, tensor_table
from src.models.lora import lora_layers, lora_table, merged, merged_parts
from src.models.places import Box, Placement, common, is_empty, pieces_of, within
from src.models.quantize import dense
from src.models.stages import Stages
from src.models.transformer import Transformer
from src.parallel.layout import Layout
from src.parallel.setup import Parallel

BUCKET = 2**26  # bytes that are on their way at a time, beside both layouts' own parts
Slices = tuple[slice, ...]


def placement_in(layout: Layout, sharded: bool = False) -> Placement:
    """How a tensor lies that all of a model's stages hold; `held_by` says which ones do."""
    return Placement(layout.tp, layout.models, sharded, layout.pp, first=layout.first)


def placement_of(model: Transformer, parallel: Parallel, name: str = "") -> Placement:
    """How a model's tensors, or the one of that name, lie on the ranks of its division."""
    placement = placement_in(parallel.layout, model.shard_stage >= 2)
    return held_in(placement, model.stages, name, model.config.tie_word_embeddings)


def held_in(placement: Placement, stages: Stages, name: str, tied: bool) -> Placement:
    """The same for the tensor of that name, which some stages hold."""
    if placement.pp == 1 or not name:
        return placement
    return placement.held_by(stages.holders(name, tied))


def is_spread(model: Transformer) -> bool:
    """Whether a model's weights lie otherwise than by tensor parallelism alone."""
    return bool(model.shard_stage) or model.stages.count > 1


def specs_of(model: Transformer) -> dict[str, TensorSpec]:
    """How each trained parameter is cut, by its name in the model."""
    layers = lora_layers(model)
    table = {
        **tensor_table(model.config),
        **(lora_table(model.config, layers[0][1].config) if layers else {}),
    }
    return {
        name: table[name.replace(".base.", ".")]
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@dataclass(frozen=True)
class Move:
    """How one tensor is cut, and on which ranks it lies before and after."""

    spec: TensorSpec
    source: Placement
    target: Placement


@dataclass(frozen=True)
class _Item:
    """What a rank does for some rows of a tensor.

    Where they are in its part and to whom they go; where in the new one and from whom; both.
    """

    name: str
    sends: list[tuple[Slices, int]]
    receives: list[tuple[Slices, int]]
    copies: list[tuple[Slices, Slices]]


class Exchange:
    """One rank's part in moving tensors from one layout to another; planned once, done often."""

    def __init__(
        self,
        moves: Mapping[str, Move],
        rank: int,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
        bucket: int = BUCKET,
    ) -> None:
        """rank: this one's number in the group, whose ranks the placements count.

        moves: by name, in an order that all ranks have; bucket: bytes under way at a time.
        """
        self.moves, self.rank, self.group = moves, rank, group
        self.dtype, self.device = dtype, device
        self.buckets: list[list[_Item]] = [[]]
        self.sent = 0  # bytes by this rank, each time
        # One third is on its way while another is begun, and one has just come.
        third = max(bucket // 3 // dtype.itemsize, 1)
        room = third
        for name, move in moves.items():
            for rows in _cut_by_rows(move.spec.shape, third):
                if _numel(rows) > room < third:
                    self.buckets.append([])
                    room = third
                room -= _numel(rows)
                self.buckets[-1].append(self._item(name, move, rows))

    def _item(self, name: str, move: Move, rows: Box) -> _Item:
        spec, source, target, rank = move.spec, move.source, move.target, self.rank
        own, new = source.box(spec, rank), target.box(spec, rank)
        item = _Item(name, [], [], [])
        # What this rank has goes to whoever needs it.
        if not is_empty(common(rows, own)):
            for other in range(dist.get_world_size(self.group)):
                box = common(rows, target.box(spec, other))
                if other == rank or is_empty(box):
                    continue
                owners, has = source.owners(spec, other), source.box(spec, other)
                for owner, _, overlap in pieces_of(box, owners, has):
                    if owner == rank:
                        item.sends.append((within(overlap, own), other))
                        self.sent += _numel(overlap) * self.dtype.itemsize
        # What it needs comes from whoever has it, itself among them.
        for owner, _, overlap in pieces_of(common(rows, new), source.owners(spec, rank), own):
            place = within(overlap, new)
            if owner is None or owner == rank:
                item.copies.append((within(overlap, own), place))
            else:
                item.receives.append((place, owner))
        return item

    @torch.no_grad()
    def __call__(
        self, parts: Mapping[str, Callable[[], Tensor]], into: Mapping[str, Tensor]
    ) -> None:
        """Fill `into` from all ranks' parts, with zeros behind. A collective of those concerned.

        parts: how to get this rank's, asked for once each, in their order, of any dtype; into:
        tensors of the target's local shapes; both without what the rank does not hold.
        """
        for target, tensor in into.items():
            move = self.moves[target]
            if _numel(move.target.box(move.spec, self.rank)) < tensor.numel():
                tensor.zero_()
        under_way: deque[_UnderWay] = deque()
        name: str | None = None
        part = torch.empty(0)
        for bucket in self.buckets:
            begun = _UnderWay(self.group)
            for item in bucket:
                if item.name != name and item.name in parts:
                    part = parts[item.name]().to(self.device, self.dtype)
                name = item.name
                begun.add(item, part, into.get(name, part))
            begun.start()
            under_way.append(begun)
            if len(under_way) > 1:
                under_way.popleft().finish()
        while under_way:
            under_way.popleft().finish()


class _UnderWay:
    """The exchanges of one bucket, from their beginning to their end."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.operations: list[dist.P2POp] = []
        self.landed: list[tuple[Tensor, Tensor]] = []  # (where it belongs, where it came)
        self.local: list[tuple[Tensor, Tensor]] = []
        self.works: list[dist.Work] = []

    def add(self, item: _Item, part: Tensor, new: Tensor) -> None:
        pieces: dict[str, Tensor] = {}  # several ranks may need the same
        for box, peer in item.sends:
            piece = pieces.setdefault(str(box), part[box].contiguous())
            self.operations.append(dist.P2POp(dist.isend, piece, group=self.group, group_peer=peer))
        for box, peer in item.receives:
            place = new[box]
            buffer = (
                place
                if place.is_contiguous()
                else torch.empty_like(place, memory_format=torch.contiguous_format)
            )
            if buffer is not place:
                self.landed.append((place, buffer))
            self.operations.append(
                dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=peer)
            )
        self.local += [(new[to], part[box]) for box, to in item.copies]

    def start(self) -> None:
        """Begin to send and to receive, and copy what is here already meanwhile."""
        self.works = dist.batch_isend_irecv(self.operations) if self.operations else []
        for place, piece in self.local:
            place.copy_(piece)
        self.local = []

    def finish(self) -> None:
        """Until all has come and gone."""
        for work in self.works:
            work.wait()
        for place, buffer in self.landed:
            place.copy_(buffer)
        self.operations, self.landed, self.works = [], [], []


def _numel(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _cut_by_rows(shape: tuple[int, ...], most: int) -> Iterator[Box]:
    """A tensor as boxes of whole rows with at most so many numbers each, or of one row."""
    rows, of_row = shape[0], math.prod(shape[1:])
    step = max(most // of_row, 1)
    for first in range(0, rows, step):
        yield (first, min(first + step, rows)), *((0, size) for size in shape[1:])


def exchanged(
    part: Tensor,
    spec: TensorSpec,
    source: Placement,
    target: Placement,
    rank: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """This rank's part of a weight in the target placement, from what ranks hold in the source's.

    A collective of the group's ranks that hold it before or after. part: of a rank that holds
    nothing, an empty tensor of the dtype and device.
    """
    if source == target:
        return part
    new = part.new_empty(target.local_shape(spec, rank))
    exchange = Exchange({"": Move(spec, source, target)}, rank, group, part.dtype, part.device)
    exchange({"": lambda: part}, {"": new})
    return new


def moves_of(
    model: Transformer,
    parallel: Parallel,
    layout: Layout,
    held_by: Callable[[str], Iterable[int]] = lambda name: (0,),
) -> dict[str, Move]:
    """From where a model's weights are to another layout, whose pipeline's ranks hold each."""
    target = placement_in(layout)
    return {
        name: Move(spec, placement_of(model, parallel, name), target.held_by(held_by(name)))
        for name, spec in tensor_table(model.config).items()
    }


def parts_in(
    model: Transformer,
    parallel: Parallel,
    layout: Layout,
    held_by: Callable[[str], Iterable[int]] = lambda name: (0,),
    plain: Callable[[str, Tensor], Tensor] = lambda _, weight: dense(weight),
) -> Iterator[tuple[str, Tensor]]:
    """Each of a model's weights as another layout has it, one after the other: this rank's part.

    A collective of all ranks, unless each has its part already. Parts are empty on ranks that hold
    none. held_by: which of the layout's ranks of a pipeline hold a name; plain: see `merged_parts`.
    """
    moves = moves_of(model, parallel, layout, held_by)
    if all(move.source == move.target for move in moves.values()):
        yield from merged_parts(model, plain)
        return
    parts = merged(model, plain)
    empty = torch.empty(0, dtype=model.dtype, device=parallel.device)
    for name, move in moves.items():
        part = parts[name]() if name in parts else empty
        yield (
            name,
            exchanged(part, move.spec, move.source, move.target, parallel.rank, parallel.world),
        )
