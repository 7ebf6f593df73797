"""A layout as text and back, and what is refused."""

import itertools

import pytest

from src.errors import UserError
from src.parallel.layout import Layout


@pytest.mark.parametrize(
    "text, layout",
    [
        ("dp2 pp2 tp2", Layout(2, 2, 2)),
        ("tp2 dp2 pp2", Layout(2, 2, 2)),
        ("tp4 sp", Layout(2, tp=4, sp=True)),
        ("zero3", Layout(8, zero=3)),
        ("tp2 on 0-3", Layout(2, tp=2)),
        ("tp2 on 4-7", Layout(2, tp=2, first=4)),
        ("dp1 on 5", Layout(first=5)),
        ("pp2 vp3 cp2 tp1", Layout(2, 2, 1, cp=2, vp=3)),
    ],
)
def test_what_is_not_named_is_one_but_dp(text, layout):
    assert Layout.parsed(text, 8, "--actor_train") == layout
    assert Layout.parsed(str(layout), 8, "--actor_train") == layout


def test_a_layout_without_zero_takes_the_run_s():
    assert Layout.parsed("tp2", 4, "--actor_train", 2) == Layout(2, tp=2, zero=2)
    assert Layout.parsed("tp2 zero0", 4, "--actor_train", 2) == Layout(2, tp=2, zero=0)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "names no degree"),
        ("on 0-3", "'on' is no degree"),
        ("tp", "'tp' is no degree"),
        ("tp0", "'tp0' is no degree"),
        ("tp-2", "'tp-2' is no degree"),
        ("zero4", "'zero4' is no degree"),
        ("tp2, dp4", "'tp2,' is no degree"),
        ("tp2 tp4", "says tp twice"),
        ("sp sp", "says sp twice"),
        ("tp3", "makes up 3 ranks, and it is to take 8 (0-7)"),
        ("tp2 dp2", "makes up 4 ranks, and it is to take 8 (0-7)"),
        ("tp4 on 0-1", "makes up 4 ranks, and it is to take 2 (0-1)"),
        ("tp2 on 6-8", "the run has ranks 0 to 7; 6-8 are not among them"),
        ("tp2 on 3-2", "the run has ranks 0 to 7; 3-2 are not among them"),
        ("tp2 on 0,1", "'0,1' are no ranks"),
        ("tp99999999", "'tp99999999' is no degree"),
    ],
)
def test_what_makes_no_layout_is_named(text, said):
    with pytest.raises(UserError) as refusal:
        Layout.parsed(text, 8, "--ref_inf")
    assert str(refusal.value).startswith(f"--ref_inf '{text}'") and said in str(refusal.value)


def test_overlaps_are_those_of_the_ranks():
    spans = [Layout(dp=n, first=first) for first in range(4) for n in range(1, 5)]
    for a, b in itertools.product(spans, spans):
        assert a.overlaps(b) == bool({*a.ranks} & {*b.ranks})
