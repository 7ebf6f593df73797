"""Distillation: beside TRL's loss on transformers' models, and the same at any layout."""

import pytest
import torch

from src.trainer.batches import epoch_batches
from tests.trainer import worker
from tests.trainer.conftest import everywhere
from tests.trainer.tiny import VOCAB, apart, some_sequences, theirs

TOLERANCE = 1e-5
RUNS = worker.DISTILLATION_RUNS


def reference_loss(folder, rows: list[int], beta: float) -> torch.Tensor:
    """The mean over response tokens of TRL's divergence, by transformers' models."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher = theirs(folder / "lm"), theirs(folder / "teacher")
    total, tokens = 0.0, 0
    for s in (some_sequences(worker.ROWS)[i] for i in rows):
        ids = torch.tensor([s.tokens])
        places = slice(s.prompt_length - 1, len(s.tokens) - 1)
        with torch.no_grad():  # of the teacher's vocabulary what the student has
            logits = [
                model(input_ids=ids).logits[:, places, :VOCAB].double()
                for model in (student, teacher)
            ]
        total += GKDTrainer.generalized_jsd_loss(*logits, beta=beta, reduction="sum")
        tokens += s.response_length
    return float(total) / tokens


@everywhere(["distilled, forward", "distilled, reverse", "distilled, js"])
def test_the_first_loss_is_trl_s(results, layout, folder, run):
    rows = epoch_batches(worker.ROWS, worker.BATCH, worker.SEED, 1)[0]
    got = results[layout][run]["history"][0]["loss"]
    assert got == pytest.approx(reference_loss(folder, rows, RUNS[run][0]), rel=TOLERANCE)


@everywhere(RUNS)
def test_a_run_takes_the_same_steps_at_any_layout(results, layout, run):
    got, one = results[layout][run], results["one rank"][run]
    assert apart(one["weights"], one["first"]) > 30 * TOLERANCE
    for step, other in zip(got["history"], one["history"]):
        assert step["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=TOLERANCE)
    assert apart(got["weights"], one["weights"]) < TOLERANCE
    assert got["alike"]


@everywhere([run for run in RUNS if run.startswith("distilled, js,")])
def test_where_the_teacher_lies_and_how_rows_are_cut_changes_nothing(results, layout, run):
    a, b = results[layout][run], results[layout]["distilled, js"]
    assert apart(a["weights"], b["weights"]) < TOLERANCE


def test_the_likeliest_tokens_alone_come_near_the_whole(results):
    """They are of 64 six: the loss is less, and of the same sign of change."""
    top, whole = (results["one rank"][f"distilled, {x}"]["history"] for x in ("top 6", "forward"))
    assert 0 < top[0]["loss"] < whole[0]["loss"]
    assert top[-1]["loss"] < top[0]["loss"]


def test_a_share_of_the_rows_is_the_student_s_own(results):
    steps = results["one rank"]["distilled, own answers"]["history"]
    shares = [step["on_policy"] for step in steps]
    assert 0 < sum(shares) / len(shares) < 1 and len(set(shares)) > 1
    assert all(step["generated_tokens"] > 0 for step in steps if step["on_policy"])
