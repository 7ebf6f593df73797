"""PPO with each role and phase in a layout of its own: the same as one process, to fp32's sums."""

import pytest
import torch

from src.parallel.layout import Layout
from src.parallel.setup import start
from tests.launch import launch
from tests.ppo.layouts_worker import CASES, Case, one_case
from tests.trainer.tiny import apart

TOLERANCE = 1e-5
RANKS = 8


@pytest.fixture(scope="module")
def everywhere(folder, tmp_path_factory):
    """A case → what the ranks found."""
    out = tmp_path_factory.mktemp("layouts") / "results.pt"
    launch(RANKS, "tests/ppo/layouts_worker.py", str(folder), str(out), timeout=900)
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def alone(folder):
    """A case → what one process finds, once for the same settings."""
    known = {}

    def of(case: Case) -> dict:
        key = str((case.settings, case.iterations))
        if key not in known:
            known[key] = one_case(folder, start(1), case, {})
        return known[key]

    return of


def farthest(a, b) -> float:
    """The largest difference, relative to 1 or to the larger number."""
    return max((abs(x - y) / max(1.0, abs(x)) for x, y in zip(a, b, strict=True)), default=0.0)


@pytest.mark.parametrize("name", CASES)
def test_rollouts_are_those_of_one_process(name, everywhere, alone):
    got, want = everywhere[name]["rollouts"], alone(CASES[name])["rollouts"]
    assert [r["place"] for r in got] == [r["place"] for r in want]
    for row, expected in zip(got, want):
        assert row.keys() == expected.keys()
        for key, x in expected.items():
            if isinstance(x, float) or (isinstance(x, list) and x and isinstance(x[0], float)):
                both = [v if isinstance(v, list) else [v] for v in (row[key], x)]
                assert farthest(*both) < TOLERANCE, (name, row["place"], key)
            else:
                assert row[key] == x, (name, row["place"], key)


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_one_process(name, everywhere, alone):
    got, want = everywhere[name]["weights"], alone(CASES[name])["weights"]
    assert got.keys() == want.keys()
    for role in want:
        assert apart(got[role], want[role]) < TOLERANCE, (name, role)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_know_the_same_numbers(name, everywhere, alone):
    """Also those that have no part of a role: the log is rank 0's, and a saved step, too."""
    (want,) = alone(CASES[name])["stats"]
    for rank, stats in enumerate(everywhere[name]["stats"]):
        assert stats.keys() == want.keys(), rank
        for key, x in want.items():
            assert stats[key] == pytest.approx(x, rel=2e-5, abs=2e-6), (name, rank, key)
    (state,) = alone(CASES[name])["state"]
    for of_rank in everywhere[name]["state"]:
        for role, numbers in state.items():
            for key, x in numbers.items():
                assert of_rank[role][key] == pytest.approx(x, rel=1e-5), (role, key)


@pytest.mark.parametrize("name", CASES)
def test_the_first_ratio_is_one(name, everywhere):
    assert all(everywhere[name]["ratio starts at one"])


def test_nobody_holds_what_its_layout_leaves_out(everywhere):
    held = everywhere["asked"]["held"]
    whole = {role: max(rank[role] for rank in held) for role in held[0]}
    for rank, of_roles in enumerate(held):
        assert (of_roles["reference"] > 0) == (rank < 4)
        assert (of_roles["reward"] > 0) == (rank >= 4)
        assert of_roles["policy"] == whole["policy"]
    assert sum(of_roles["policy"] for of_roles in held) < 3 * 4 * whole["policy"]
    lonely = everywhere["reward on one rank"]["held"]
    assert [rank["reward"] > 0 for rank in lonely] == [rank == 5 for rank in range(RANKS)]


def test_what_moves_is_logged(everywhere):
    """Bytes of all ranks: each new part less what its rank had before."""
    costs = everywhere["asked"]["costs"]
    assert costs["seconds/relayout"] > 0 and costs["gb/relayout"] > 0
    assert "gb/value_relayout" not in costs
    costs = everywhere["values elsewhere"]["costs"]
    assert costs["gb/value_relayout"] > 0 and costs["seconds/value_relayout"] > 0
    assert "gb/relayout" not in costs


def test_what_has_ranks_of_its_own_goes_on_at_the_same_time(everywhere):
    assert everywhere["side by side"] == ["reference and reward", "policy and value"]


def test_there_are_enough_assignments():
    layouts = {tuple(case.by_name.items()) for case in CASES.values()}
    assert len(layouts) >= 21
    for case in CASES.values():
        for name, text in case.by_name.items():
            Layout.parsed(text, RANKS, name)
