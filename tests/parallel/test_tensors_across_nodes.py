"""Ranks that share tensors belong on one node: who is warned, and when."""

import logging

import pytest

from src.parallel.setup import warn_of_tensors_across_nodes


@pytest.mark.parametrize(
    "mp, world, per_node, warned",
    [
        (1, 16, 8, False),
        (4, 16, 8, False),
        (8, 64, 8, False),  # a whole node
        (16, 64, 8, True),  # two nodes
        (3, 12, 4, True),  # divides the run, but no node
        (2, 2, 1, True),
        (8, 8, 8, False),  # one node
        (3, 3, 2, True),
    ],
)
def test_rank_zero_warns_when_tensors_are_shared_across_nodes(
    mp, world, per_node, warned, monkeypatch, caplog
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node))
    # By hand: the nodes of the ranks of each group, as launchers number them.
    groups = [range(first, first + mp) for first in range(0, world, mp)]
    assert any(len({rank // per_node for rank in group}) > 1 for group in groups) == warned
    with caplog.at_level(logging.WARNING):
        for rank in range(world):
            warn_of_tensors_across_nodes(mp, rank, world)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == warned
    if warned:
        assert f"--model_parallel_size {mp}:" in messages[0]
        assert f"a divisor of {per_node} " in messages[0]


def test_without_a_launcher_there_is_one_node(monkeypatch, caplog):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    warn_of_tensors_across_nodes(8, 0, 8)
    assert not caplog.records
