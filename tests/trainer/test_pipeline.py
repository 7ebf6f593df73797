"""Training steps through the stages of a pipeline are those of one process, and of transformers."""

from types import SimpleNamespace

import pytest
import torch

from src.errors import UserError
from src.models.config import ModelConfig
from src.models.stages import cut_in_stages
from src.parallel.pipeline import _Stage
from src.trainer.batches import epoch_batches
from tests.trainer import worker
from tests.trainer.conftest import PIPELINES
from tests.trainer.test_steps import TOLERANCE, reference, solver_loss
from tests.trainer.tiny import apart, theirs

RUNS = [
    (pipeline, run)
    for pipeline, file in PIPELINES.items()
    for run in dict.fromkeys((*worker.DEEP_RUNS, *worker.PIPELINED))
    if worker.runs_divided(run, int(file.split("-")[2]))
]

# What objectives log beside the loss.
LOGGED = ("accuracy", "margin", "reward/", "logprob", "kl", "loss/", "balance", "response", "on_p")


def same_steps(got: dict, one: dict, steps: int = 5) -> None:
    assert len(got["history"]) == len(one["history"]) == steps
    for step, other in zip(got["history"], one["history"]):
        for name in ("loss", "grad_norm"):
            assert step[name] == pytest.approx(other[name], rel=TOLERANCE)
        assert step["skipped"] == 0
    assert apart(got["first"], one["first"]) < TOLERANCE
    assert apart(got["weights"], one["weights"]) < TOLERANCE


@pytest.mark.parametrize("pipeline, run", RUNS)
def test_steps_of_a_pipeline_are_those_of_one_process(pipelined, results, pipeline, run):
    got, one = pipelined[pipeline][run], results["one rank"][run]
    steps = 2 if run in worker.PREFERENCE_RUNS else 5
    same_steps(got, one, steps)
    for step, other in zip(got["history"], one["history"]):
        for name in (name for name in other if name.startswith(LOGGED)):
            assert step[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("run", ["deep", "tied"])
def test_one_process_takes_the_steps_of_transformers(results, folder, run):
    """The others' are tested in test_steps.py."""
    batches = epoch_batches(worker.ROWS, worker.BATCH, worker.SEED, 1)
    want = reference(theirs(folder / run).double(), solver_loss, batches)
    got = results["one rank"][run]
    for step, (loss, norm) in zip(got["history"], want["steps"]):
        assert step["loss"] == pytest.approx(loss, rel=TOLERANCE)
        assert step["grad_norm"] == pytest.approx(norm, rel=TOLERANCE)
    wanted = {name: x for name, x in want["weights"].items() if name in got["weights"]}
    assert apart({name: got["weights"][name] for name in wanted}, wanted) < TOLERANCE


@pytest.mark.parametrize("pipeline, run", RUNS)
def test_weights_that_ranks_share_stay_the_same_bits(pipelined, pipeline, run):
    """Among them an embedding that is also the output layer, on the first and the last stage."""
    assert pipelined[pipeline][run]["alike"]


def test_what_is_passed_on_as_it_came_is_no_buffer_that_is_used_again():
    """Such as the gradient of routers' decisions: a send reads what it was given, also later."""
    buffer, own = torch.arange(6.0), torch.arange(3.0)
    passed_on, made = SimpleNamespace(tensor=buffer[:4]), SimpleNamespace(tensor=own)
    received = [SimpleNamespace(buffer=buffer[:5]), SimpleNamespace(buffer=None)]
    stage = SimpleNamespace(sending=None)
    assert _Stage._sent(stage, [passed_on, made], received) == [passed_on, made]
    buffer.zero_()
    assert passed_on.tensor.tolist() == [0, 1, 2, 3] and made.tensor is own


LLAMA = ModelConfig(4096, 32, 32, 32, 128, 11008, 32000)
HEAD = 32000 * 4096 / (4 * 4096**2 + 3 * 4096 * 11008)  # what it costs, in layers


@pytest.mark.parametrize("ranks", range(1, 33))
@pytest.mark.parametrize("vocabulary", [32000, 152064, 1000])
def test_no_cut_has_a_dearest_stage_that_costs_less(ranks, vocabulary):
    config = ModelConfig(4096, 32, 32, 32, 128, 11008, vocabulary)
    head = HEAD * vocabulary / 32000
    stages = cut_in_stages(config, ranks)
    sizes = [len(stages.layers(stage)) for stage in range(ranks)]
    assert sum(sizes) == 32 and min(sizes) >= 1
    assert [layer for s in range(ranks) for layer in stages.layers(s)] == list(range(32))
    dearest = max([*sizes[:-1], sizes[-1] + head])
    if ranks > 1:  # by trying: so many layers on the last, the others as even as can be
        tried = [max(-(-(32 - n) // (ranks - 1)), n + head) for n in range(1, 34 - ranks)]
        assert dearest == pytest.approx(min(tried))


def test_tensors_are_where_their_stages_are():
    stages = cut_in_stages(LLAMA, 2, per_rank=2)
    assert stages.bounds == (0, 8, 16, 24, 32) and list(stages.of_rank(1)) == [1, 3]
    assert stages.holders("layers.17.attention.wq.weight", tied=False) == [0]
    assert stages.holders("layers.31.attention.wq.weight", tied=False) == [1]
    assert stages.holders("norm.weight", tied=False) == [1]
    assert stages.holders("tok_embeddings.weight", tied=False) == [0]
    assert stages.holders("tok_embeddings.weight", tied=True) == [0, 1]


def test_more_stages_than_layers_are_refused():
    with pytest.raises(UserError, match="--pipeline_parallel_size 33 makes 33 stages, and the mod"):
        cut_in_stages(LLAMA, 33)
    with pytest.raises(UserError, match="8 x --stages_per_rank 5 makes 40 stages, and the model"):
        cut_in_stages(LLAMA, 8, 5)
