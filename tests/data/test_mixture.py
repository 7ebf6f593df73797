"""Rows of several sources in proportions: how many, which, and that no row comes twice."""

from collections import Counter
from fractions import Fraction

import pytest

from src.data.mixture import Mixture, read_mixture
from src.data.rows import read_prompt_rows, write_jsonl
from src.data.sources import Source
from src.errors import UserError
from src.trainer.batches import EndlessBatches, epoch_batches


def largest(sizes: tuple[int, ...], weights: list[str]) -> list[int]:
    """By trial, in whole numbers: one source is used up, and the others have enough for it."""
    whole = [round(float(weight) * 100) for weight in weights]
    for used_up, weight in zip(sizes, whole):
        counts = [used_up * other // weight for other in whole]
        if all(n <= size for n, size in zip(counts, sizes)):
            return counts
    raise AssertionError("no source is the first to be used up")


@pytest.mark.parametrize(
    "sizes, weights",
    [
        ((70, 30), ["0.7", "0.3"]),
        ((100, 100), ["0.7", "0.3"]),
        ((10, 1000), ["0.1", "0.9"]),
        ((12, 7, 50), ["1", "2", "3"]),
        ((100, 3), ["0.99", "0.01"]),
    ],
)
def test_an_epoch_holds_as_many_rows_as_can_be_in_the_proportions(sizes, weights):
    mixture = Mixture(sizes, tuple(map(Fraction, weights)))
    assert list(mixture.drawn) == largest(sizes, weights)
    assert any(n == size for n, size in zip(mixture.drawn, sizes)), "one source is used up"
    assert Mixture(sizes).drawn == sizes


def test_no_row_comes_twice_and_each_epoch_is_drawn_anew():
    mixture = Mixture((40, 200), (Fraction(2), Fraction(1)))  # 40 and 20 of them
    epochs = [epoch_batches(mixture, 8, seed=1, epoch=epoch) for epoch in range(1, 41)]
    for batches in epochs:
        rows = [row for batch in batches for row in batch]
        assert [len(batch) for batch in batches] == [8] * 7 + [4]
        assert len(set(rows)) == len(rows) == mixture.n_rows == 60
        assert Counter(row < 40 for row in rows) == {True: 40, False: 20}
    assert epochs[0] == epoch_batches(mixture, 8, seed=1, epoch=1)
    assert epochs[0] != epoch_batches(mixture, 8, seed=2, epoch=1)
    # Of the second source an epoch has a tenth: 40 of them leave out (9/10)^40 = 1.5 %.
    drawn = Counter(row for batches in epochs for batch in batches for row in batch if row >= 40)
    assert len(drawn) > 180 and max(drawn.values()) < 15
    mixed = {row < 40 for row in epochs[0][0]}
    assert mixed == {True, False}, "sources do not come one after the other"


def test_without_weights_batches_are_what_they_were():
    assert epoch_batches(Mixture((5, 7)), 4, 3, 2) == epoch_batches(12, 4, 3, 2)


def test_endless_batches_take_epochs_of_the_mixture_one_after_the_other():
    mixture = Mixture((6, 60), (Fraction(1), Fraction(1)))
    endless = EndlessBatches(mixture, 12, "7/x")
    for batch in (next(endless) for _ in range(20)):
        assert sorted(batch)[:6] == list(range(6)) and len(set(batch)) == 12
    other = EndlessBatches(mixture, 12, "7/x")
    other.wind_to(20)
    assert next(other) == next(endless)


def test_sources_are_read_one_by_one_and_stand_one_after_the_other(tmp_path):
    for name, n in (("a", 30), ("b", 10)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"instruction": f"{name}{i}"} for i in range(n)])

    def read(source: Source) -> tuple[list[str], list[str]]:
        rows = read_prompt_rows(source)
        return [row["instruction"] for row in rows if row["instruction"] != "b9"], ["note"]

    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    rows, notes, mixture = read_mixture(Source(f"{a}:0.7,{b}:0.3"), read)
    assert rows == [f"a{i}" for i in range(30)] + [f"b{i}" for i in range(9)]
    assert mixture.sizes == (30, 9) and mixture.drawn == (21, 9)
    drawn = [f"{a}: an epoch draws 21 of 30 rows", f"{b}: an epoch draws 9 of 9 rows"]
    assert notes == ["note", "note", *drawn]
    rows, notes, mixture = read_mixture(Source(f"{a},{b}"), read)
    assert len(rows) == mixture.n_rows == 39 and notes == ["note"]
    with pytest.raises(UserError, match=f"not one row of {a} would be drawn"):
        read_mixture(Source(f"{a}:0.0001,{b}:0.9999"), read)
