"""Training steps of ranks that divide the tokens of their rows are those of one process."""

import pytest

from tests.trainer import worker
from tests.trainer.conftest import CONTEXTS
from tests.trainer.test_steps import TOLERANCE
from tests.trainer.tiny import apart

RUNS = [
    (division, run)
    for division, file in CONTEXTS.items()
    for run in (*worker.IN_CONTEXT, *worker.DEEP_RUNS)
    if worker.runs_divided(run, *map(int, file.split("-")[2:]))
]


@pytest.mark.parametrize("division, run", RUNS)
def test_steps_are_those_of_one_process(in_context, one_rank, division, run):
    got, one = in_context[division][run], one_rank[run]
    assert len(got["history"]) == len(one["history"])
    for step, other in zip(got["history"], one["history"]):
        for name in ("loss", "grad_norm", "accuracy", "kl_reference_point", "balance_loss"):
            if name in other:
                assert step[name] == pytest.approx(other[name], rel=TOLERANCE), name
        assert step["skipped"] == 0
    assert apart(got["first"], one["first"]) < TOLERANCE
    assert apart(got["weights"], one["weights"]) < TOLERANCE
    assert apart(one["weights"], one["first"]) > 10 * TOLERANCE


@pytest.mark.parametrize("division, run", RUNS)
def test_replicated_weights_stay_the_same_bits(in_context, division, run):
    assert in_context[division][run]["alike"]
