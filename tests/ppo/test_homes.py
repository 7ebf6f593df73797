"""Where rollouts go: to a model that has them already, else to the emptiest."""

import itertools
import random

import pytest

from src.parallel.layout import Layout
from src.ppo.homes import Homes

LAYOUTS = [
    Layout(8),
    Layout(4, tp=2),
    Layout(2, tp=4),
    Layout(2, 2, 2),
    Layout(1, 2, 4),
    Layout(3, first=2),
    Layout(2, tp=2, first=4),
    Layout(1, tp=2),
]


def some_homes(layout: Layout, n: int = 24) -> Homes:
    return Homes(layout, tuple(i % layout.models for i in range(n)))


@pytest.mark.parametrize("source, target", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_rollout_gets_to_one_model_from_a_rank_that_has_it(source, target):
    homes = some_homes(source)
    rng = random.Random(3)
    sizes = [rng.randint(1, 9) for _ in homes.models]
    new = homes.nearest_in(target, sizes)
    for place in range(len(sizes)):
        holders = [rank for rank in range(8) if place in homes.places(rank)]
        assert holders == [*homes.ranks(place)]
        asking = [rank for rank in range(8) if place in new.places(rank)]
        assert len(asking) == target.model_size and asking == [*new.ranks(place)]
        for rank in asking:
            giver = homes.giver(place, rank)
            assert giver in holders and (giver == rank or rank not in holders)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_the_same_layout_nothing_moves(layout):
    homes = some_homes(layout)
    assert homes.nearest_in(layout, [5] * len(homes.models)) == homes


def test_smaller_models_on_the_same_ranks_share_what_their_ranks_have():
    homes = some_homes(Layout(2, tp=4))
    new = homes.nearest_in(Layout(8), [1] * 24)
    assert all(model // 4 == home for model, home in zip(new.models, homes.models))
    assert sorted(new.models.count(model) for model in range(8)) == [3] * 8


def test_those_who_had_none_are_filled_up_evenly_by_tokens():
    homes = some_homes(Layout(2, first=0), 6)
    new = homes.nearest_in(Layout(3, first=5), [9, 1, 1, 1, 3, 3])
    assert new.models == (0, 1, 2, 1, 2, 1)
