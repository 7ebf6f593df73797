"""Which of a layout's models has which rollouts, and how rollouts get to another layout's."""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from src.parallel.layout import Layout
from src.parallel.setup import Parallel


@dataclass(frozen=True)
class Homes:
    """The models of a layout, by number, that have the rollouts, by the rollouts' places.

    All ranks of a model have its rollouts.
    """

    layout: Layout
    models: tuple[int, ...]

    def places(self, rank: int) -> list[int]:
        """Of the rollouts that a rank has, in order."""
        if rank not in self.layout.ranks:
            return []
        model = self._model(rank)
        return [place for place, home in enumerate(self.models) if home == model]

    def giver(self, place: int, asker: int) -> int:
        """The rank that a rank gets a rollout from: itself, if it has it."""
        size, home = self.layout.model_size, self.models[place]
        if asker in self.layout.ranks and self._model(asker) == home:
            return asker
        return self.layout.first + home * size + asker % size  # they take turns

    def ranks(self, place: int) -> range:
        """Those that have a rollout."""
        first = self.layout.first + self.models[place] * self.layout.model_size
        return range(first, first + self.layout.model_size)

    def _model(self, rank: int) -> int:
        return (rank - self.layout.first) // self.layout.model_size

    def nearest_in(self, layout: Layout, sizes: list[int]) -> "Homes":
        """Homes in another layout: models whose ranks have a rollout already, the emptiest first.

        Where there is none, the emptiest of all. sizes: tokens of each rollout.
        """
        size, filled = layout.model_size, [0] * layout.models
        near: dict[int, list[int]] = {}
        models = []
        for place, (home, tokens) in enumerate(zip(self.models, sizes)):
            if home not in near:
                has, first = self.ranks(place), layout.first
                spans = [(first + m * size, first + (m + 1) * size) for m in range(layout.models)]
                near[home] = [
                    m for m, (a, b) in enumerate(spans) if has.start <= a and b <= has.stop
                ]
            model = min(near[home] or range(layout.models), key=filled.__getitem__)
            filled[model] += tokens
            models.append(model)
        return Homes(layout, tuple(models))


def moved(
    columns: list[Tensor], sizes: list[int], source: Homes, target: Homes, parallel: Parallel
) -> list[Tensor]:
    """What a rank's rollouts are in the target's homes: numbers of each, end to end, by column.

    columns: of one dtype, [numbers of this rank's rollouts in `source`] each; sizes: numbers of
    each rollout. Each goes from one rank that has it to those that need it; all ranks come here.
    """
    rank = parallel.rank
    x = torch.stack(columns)  # [columns, numbers]
    pieces = _pieces(x, source.places(rank), sizes)
    wanted = target.places(rank)
    new = x.new_empty(len(columns), sum(sizes[place] for place in wanted))
    slots = _pieces(new, wanted, sizes)

    # What goes between two ranks goes in one piece, in the order of places on both sides.
    gives: dict[int, list[int]] = {}
    for place in pieces:
        for other in target.ranks(place):
            if other != rank and source.giver(place, other) == rank:
                gives.setdefault(other, []).append(place)
    gets: dict[int, list[int]] = {}
    for place in wanted:
        gets.setdefault(source.giver(place, rank), []).append(place)

    # One's own is copied, the rest sent and received.
    operations, landed = [], []
    for place in gets.pop(rank, []):
        slots[place].copy_(pieces[place])
    for other, places in sorted(gives.items()):
        sent = torch.cat([pieces[place] for place in places], 1)
        operations.append(dist.P2POp(dist.isend, sent, group=parallel.world, group_peer=other))
    for other, places in sorted(gets.items()):
        buffer = x.new_empty(len(columns), sum(sizes[place] for place in places))
        landed.append((places, buffer))
        operations.append(dist.P2POp(dist.irecv, buffer, group=parallel.world, group_peer=other))
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    for places, buffer in landed:
        for place, piece in _pieces(buffer, places, sizes).items():
            slots[place].copy_(piece)
    return list(new)


def _pieces(x: Tensor, places: list[int], sizes: list[int]) -> dict[int, Tensor]:
    """Each rollout's numbers in [columns, numbers], by its place."""
    ends = list(accumulate(sizes[place] for place in places))
    return {place: x[:, end - sizes[place] : end] for place, end in zip(places, ends)}
