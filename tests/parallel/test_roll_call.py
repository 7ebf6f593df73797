"""Who is missing is named once, by one of those that wait, and only then."""

from datetime import timedelta

import torch.distributed as dist

from src.parallel import setup
from src.parallel.roll_call import RollCall

LIMIT = 10.0


class Counted:
    """A process group of which only the number of its collectives is known."""

    def __init__(self, group_name: str) -> None:
        self.group_name, self.count = group_name, 0

    def _get_sequence_number_for_group(self) -> int:
        return self.count


def ranks_of_a_run():
    """Four ranks of two models of two: each rank's groups and its part in the roll call."""
    calls = []
    for rank in range(4):
        model, column = rank // 2 * 2, rank % 2
        groups = [
            (Counted("all"), [0, 1, 2, 3]),
            (Counted(f"model {model}"), [model, model + 1]),
            (Counted(f"column {column}"), [column, column + 2]),
        ]
        calls.append(RollCall(groups, rank, 4, LIMIT))
    return calls


def look(calls, store, now, without=()):
    found = [None if call.rank in without else call.look(store, now) for call in calls]
    return {rank: message for rank, message in enumerate(found) if message}


def begin(calls, kind: int, ranks):
    for rank in ranks:
        calls[rank].groups[kind][0].count += 1


def test_the_rank_that_did_not_come_is_named_by_the_first_that_waits():
    calls, store = ranks_of_a_run(), dist.HashStore()
    for now in (0.0, 3.0):
        begin(calls, 0, range(4))
        assert not look(calls, store, now)
    begin(calls, 1, (0, 2, 3))  # rank 1 stays away from its model's
    assert not look(calls, store, 4.0) and not look(calls, store, 13.0)
    found = look(calls, store, 14.0)
    assert list(found) == [0] and found[0].startswith("error: rank 1 of 4 did not come to")
    assert not look(calls, store, 15.0), "once"


def test_ranks_that_say_nothing_are_named_too():
    calls, store = ranks_of_a_run(), dist.HashStore()
    begin(calls, 0, (1, 2))
    assert not look(calls, store, 0.0, without=(0, 3))  # those are gone
    found = look(calls, store, 10.0, without=(0, 3))
    assert list(found) == [1] and "ranks 0, 3 of 4 did not come to" in found[1]


def test_nobody_is_named_where_all_compute_or_one_is_late_but_comes():
    calls, store = ranks_of_a_run(), dist.HashStore()
    begin(calls, 0, range(4))
    for now in (0.0, 100.0):
        assert not look(calls, store, now), "all are at the same place"
    begin(calls, 0, (0, 1, 2))
    assert not look(calls, store, 101.0)
    begin(calls, 0, (3,))
    assert not look(calls, store, 110.0) and not look(calls, store, 130.0)


def test_groups_that_are_made_later_are_watched_too():
    """A role in a layout of its own: ranks 0 and 1 share it, and rank 1 stays away."""
    calls, store = ranks_of_a_run(), dist.HashStore()
    begin(calls, 0, range(4))
    assert not look(calls, store, 0.0)
    for rank in (0, 1):
        calls[rank].add([(Counted("reward"), [0, 1])])
    begin(calls, 3, (0, 1))
    assert not look(calls, store, 1.0)
    begin(calls, 3, (0,))
    assert not look(calls, store, 2.0)
    found = look(calls, store, 12.0)
    assert list(found) == [0] and "rank 1 of 4 did not come to" in found[0]


def test_a_division_that_is_made_later_is_added(parallel, monkeypatch):
    """By `laid_out`, where ranks are looked after."""
    monkeypatch.setattr(setup.roll_call, "call", RollCall([], 0, 1, LIMIT))
    limit = timedelta(seconds=LIMIT)
    division = setup._divided.__wrapped__(0, 1, parallel.layout, parallel.device, limit)
    groups = [group for group, _ in setup.roll_call.call.groups]
    assert {id(division.mp_group), id(division.dp_group)} <= set(map(id, groups))
    assert all(ranks == [0] for _, ranks in setup.roll_call.call.groups)
