"""Ranks that divide a batch's tokens attend, average and join as one that has them all."""

import json

import pytest

from src.errors import UserError
from src.models.config import ModelConfig
from src.models.context import check_heads
from src.parallel.context import repeats_of
from tests.launch import launch
from tests.models import context_worker


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_divided_batch_is_the_whole_one(tmp_path, ranks):
    launch(ranks, "tests/models/context_worker.py", tmp_path / "out.json", ranks)
    apart = json.loads((tmp_path / "out.json").read_text())
    layouts, heads, windows = (
        len(x) for x in (context_worker.LAYOUTS, context_worker.HEADS, context_worker.WINDOWS)
    )
    assert len(apart) == layouts * heads * windows + layouts
    assert max(apart.values()) < 1e-6, apart


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("kv_heads", range(1, 9))
@pytest.mark.parametrize("group", range(1, 9))
def test_each_query_head_meets_a_copy_of_its_kv_head(ranks, kv_heads, group):
    """For every number of heads that the ranks divide, and with no more copies than it takes."""
    heads, repeats = kv_heads * group, repeats_of(kv_heads, ranks)
    assert all(kv_heads * fewer % ranks for fewer in range(1, repeats))
    if heads % ranks:
        return
    copies = [head for head in range(kv_heads) for _ in range(repeats)]
    of_rank, with_each = len(copies) // ranks, heads // len(copies)
    assert len(copies) % ranks == 0 and heads % len(copies) == 0
    for head in range(heads):
        rank, place = divmod(head, heads // ranks)
        assert copies[rank * of_rank + place // with_each] == head // group


def test_heads_that_the_ranks_do_not_divide_are_refused():
    config = ModelConfig(64, 2, 12, 4, 16, 96, 500)
    check_heads(config, tensor_ranks=2, context_ranks=3)
    message = "--context_parallel_size 4: does not divide the 6 query heads that a rank has"
    with pytest.raises(UserError, match=message):
        check_heads(config, tensor_ranks=2, context_ranks=4)
