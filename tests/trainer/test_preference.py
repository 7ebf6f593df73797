"""Preference losses: beside TRL on the same batch and weights, beside formulas, at any layout."""

import math

import numpy as np
import pytest
import torch

from src.checkpoint.names import hf_tensors
from src.data.encoding import Comparison, Labelled
from src.models.batch import Sequence
from src.settings.preference import LOSSES, PAIR_LOSSES, WITHOUT_REFERENCE
from src.trainer import losses as losses_module
from src.trainer.losses import RESPONSE_LOSSES, Sides, log1mexp
from src.trainer.preference import Mismatched, PreferenceObjective, mismatched
from src.trainer.reference import LiveReference
from tests.trainer import trl_losses, worker
from tests.trainer.conftest import everywhere
from tests.trainer.tiny import apart, ours, some_sequences, theirs

TOLERANCE = 1e-5
KNOBS = worker.KNOBS
ROWS = 4


def two_sided(seed: int = 0, length: int | None = None) -> list[Comparison]:
    """Rows with one output on each side, of one prompt; length: of all chosen ones, if given."""
    rows = []
    for i in range(ROWS):
        chosen, rejected = some_sequences(2, seed=50 * seed + i)
        prompt = chosen.tokens[: chosen.prompt_length]
        answer = rejected.tokens[rejected.prompt_length :]
        good = chosen.tokens[chosen.prompt_length :]
        good = good if length is None else [*range(3, length + 2), 2]
        sides = [Sequence([*prompt, *x], len(prompt)) for x in (good, answer)]
        rows.append(Comparison.of_sides(sides[:1], sides[1:]))
    return rows


def our_gradients(model) -> dict[str, torch.Tensor]:
    """In transformers' names and row order, each of stacked weights by itself."""
    found = {}
    for name, p in model.named_parameters():
        found |= hf_tensors(name, p.grad, model.config)
    return found


def ours_of(folder, parallel, rows, weighted, point=False) -> trl_losses.Found:
    model = ours(folder / "lm", parallel)
    has_reference = not {name for _, name in weighted} <= set(WITHOUT_REFERENCE)
    reference = LiveReference(ours(folder / "reference", parallel), True, parallel)
    off_prompt = mismatched(rows, 0, 99)
    of_kto = Mismatched(off_prompt, reference, parallel, 3) if point else None
    objective = PreferenceObjective(
        rows, weighted, KNOBS, reference if has_reference else None, parallel, True, of_kto
    )
    batch = list(range(len(rows)))
    objective.begin(0, batch, model)
    objective.consult([batch])
    loss, _ = objective.loss(model, batch, len(rows))
    loss.backward()
    return float(loss.detach()), our_gradients(model)


def same(got: trl_losses.Found, want: trl_losses.Found) -> None:
    assert got[0] == pytest.approx(want[0], rel=TOLERANCE)
    assert apart(got[1], want[1]) < TOLERANCE


@pytest.mark.parametrize("loss", trl_losses.DPO_TYPES)
def test_loss_and_gradients_are_trl_s(folder, parallel, tmp_path, loss):
    rows = two_sided(1)
    models = theirs(folder / "lm"), theirs(folder / "reference")
    want = trl_losses.dpo(*models, rows, [loss], KNOBS, tmp_path)
    same(ours_of(folder, parallel, rows, [(1.0, loss)]), want)


def test_several_losses_with_weights_are_trl_s(folder, parallel, tmp_path):
    """Its sft is the mean over the micro-batch's chosen tokens; ours over the step's."""
    rows = two_sided(2)
    models = theirs(folder / "lm"), theirs(folder / "reference")
    want = trl_losses.dpo(*models, rows, ["dpo", "sft"], KNOBS, tmp_path)
    same(ours_of(folder, parallel, rows, [(1.0, "dpo"), (0.5, "sft")]), want)


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_losses_without_a_reference_are_trl_s(folder, parallel, loss):
    rows = two_sided(3)
    want = trl_losses.without_reference(theirs(folder / "lm"), rows, loss, KNOBS)
    same(ours_of(folder, parallel, rows, [(1.0, loss)]), want)


@pytest.mark.parametrize("kind, seed", [("labels", 12), ("pairs", 8)])
def test_kto_is_trl_s(folder, parallel, tmp_path, kind, seed):
    """With its reference point above 0, so that it counts."""
    compared = two_sided(seed)
    labels = [True, False, True, True]
    rows = compared
    if kind == "labels":
        rows = [Labelled([row.responses[not ok]], [ok]) for row, ok in zip(compared, labels)]
    sequences = [s for row in rows for s in row.responses]
    of_sequences = labels if kind == "labels" else [True, False] * ROWS
    off_prompt = mismatched(rows, 0, 99)
    # TRL has an answer to another prompt for each sequence; a mean over twice the same is the same.
    for_each = [off_prompt[i] for i, row in enumerate(rows) for _ in row.responses]
    model, reference = theirs(folder / "lm"), theirs(folder / "reference")
    want = trl_losses.kto(model, reference, sequences, of_sequences, for_each, KNOBS, tmp_path)
    same(ours_of(folder, parallel, rows, [(1.0, "kto")], point=True), want)
    frozen = LiveReference(ours(folder / "reference", parallel), True, parallel)
    point = Mismatched(off_prompt, frozen, parallel, 3)
    assert point([*range(ROWS)], ours(folder / "lm", parallel)) > 0.1


def numpy_losses(name: str, x: dict[str, np.ndarray]) -> np.ndarray:
    """Each pair loss as its paper writes it, in numpy."""
    k, sigmoid = KNOBS, lambda v: 1 / (1 + np.exp(-v))
    r_w, r_l = x["chosen"] - x["ref_chosen"], x["rejected"] - x["ref_rejected"]
    h, e = r_w - r_l, k.label_smoothing
    n_w, n_l = x["chosen_tokens"], x["rejected_tokens"]
    p_w, p_l = np.exp(x["chosen"] / n_w), np.exp(x["rejected"] / n_l)
    odds = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    return {
        "dpo": lambda: -np.log(sigmoid(k.beta * h)),
        "ipo": lambda: (r_w / n_w - r_l / n_l - 1 / (2 * k.beta)) ** 2,
        "cdpo": lambda: (
            -(1 - e) * np.log(sigmoid(k.beta * h)) - e * np.log(1 - sigmoid(k.beta * h))
        ),
        "robust": lambda: (
            (-(1 - e) * np.log(sigmoid(k.beta * h)) + e * np.log(sigmoid(-k.beta * h)))
            / (1 - 2 * e)
        ),
        "sppo": lambda: (r_w - 0.5 / k.beta) ** 2 + (r_l + 0.5 / k.beta) ** 2,
        "hinge": lambda: np.maximum(0, 1 - k.beta * h),
        "orpo": lambda: -np.log(p_w) - k.beta * np.log(sigmoid(np.log(odds))),
        "simpo": lambda: (
            -np.log(sigmoid(k.beta * (np.log(p_w) - np.log(p_l)) - k.gamma_beta_ratio * k.beta))
        ),
        "apo_zero": lambda: 1 - sigmoid(k.beta * r_w) + sigmoid(k.beta * r_l),
        "apo_down": lambda: sigmoid(k.beta * r_w) + 1 - sigmoid(k.beta * h),
    }[name]()


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_pair_loss_is_its_paper_s_formula(name):
    rng = np.random.default_rng(3)
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    x = {key: -rng.uniform(0.5, 30, 50) for key in names}
    x |= {
        key: rng.integers(1, 20, 50).astype(float) for key in ("chosen_tokens", "rejected_tokens")
    }
    sides = Sides(**{key: torch.tensor(value) for key, value in x.items()})
    got = losses_module.PAIR_LOSSES[name](sides, KNOBS).numpy()
    assert np.allclose(got, numpy_losses(name, x), rtol=1e-9)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_pair_loss_has_finite_gradients_at_any_log_probability(name):
    """Certain responses, whose log-probability is 0, among them, and impossible ones."""
    values = [0.0, -1e-12, -1e-3, -1.0, -50.0, -5e4]
    grid = torch.tensor([(a, b) for a in values for b in values], dtype=torch.float64)
    chosen, rejected = (grid[:, i].clone().requires_grad_() for i in (0, 1))
    other, ones = torch.zeros(len(grid), dtype=torch.float64), torch.ones(len(grid)).double()
    sides = Sides(chosen, rejected, other, other, ones, ones)
    loss = losses_module.PAIR_LOSSES[name](sides, KNOBS)
    grads = torch.autograd.grad(loss.sum(), (chosen, rejected))
    assert bool(loss.isfinite().all()) and all(bool(g.isfinite().all()) for g in grads)


def test_log1mexp_is_exact_at_both_ends():
    x = torch.tensor([-1e-15, -1e-6, -0.5, -0.7, -40.0], dtype=torch.float64)
    want = [math.log(-math.expm1(v)) if v > -0.69 else math.log1p(-math.exp(v)) for v in x.tolist()]
    assert torch.allclose(log1mexp(x), torch.tensor(want, dtype=torch.float64), rtol=1e-12)


def test_kto_is_its_paper_s_formula_and_pulls_both_ways():
    ratios = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64, requires_grad=True)
    labels, kl = torch.tensor([True, False, False]), torch.tensor(0.4)
    got = RESPONSE_LOSSES["kto"](ratios, labels, kl, KNOBS)
    want = [
        weight * (1 - 1 / (1 + math.exp(-KNOBS.beta * sign * (r - 0.4))))
        for r, sign, weight in ((0.3, 1, 1.5), (-2.0, -1, 0.7), (1.0, -1, 0.7))
    ]
    assert got.tolist() == pytest.approx(want, rel=1e-7)
    (grad,) = torch.autograd.grad(got.sum(), ratios)
    assert (grad > 0).tolist() == [False, True, True]


def test_every_loss_of_the_flag_is_there():
    assert set(losses_module.PAIR_LOSSES) == set(PAIR_LOSSES)
    assert set(LOSSES) == {*losses_module.PAIR_LOSSES, *RESPONSE_LOSSES, losses_module.SFT}


@everywhere(worker.PREFERENCE_RUNS)
def test_a_run_takes_the_same_steps_at_any_layout(results, layout, run):
    got, one = results[layout][run], results["one rank"][run]
    near = {
        "kl": 1e-4,
        "margin": 1e-4,
        "reward/chosen": 1e-4,
        "reward/rejected": 1e-4,
    }  # differences
    assert any(step["grad_norm"] > worker.MAX_GRAD_NORM for step in one["history"])
    for step, other in zip(got["history"], one["history"]):
        for name in other:
            if name.startswith(("loss", "grad_norm", "reward", "logprob", "kl", "margin")):
                assert step[name] == pytest.approx(
                    other[name], rel=TOLERANCE, abs=near.get(name, 1e-6)
                ), name
    assert apart(got["weights"], one["weights"]) < TOLERANCE
    assert got["alike"]
    if "kto" in run:
        assert max(step["kl_reference_point"] for step in one["history"]) > 0.1


WHOLE = {
    "dpo and sft, micro-batches": "dpo and sft",
    "kto, micro-batches, zero 0": "kto loss",
    "dpo, packed by tokens": "dpo loss",
    "dpo, each prompt anew": "dpo loss",
    "dpo, in small chunks of logits": "dpo loss",
}


@everywhere(WHOLE)
def test_how_rows_are_cut_and_packed_changes_nothing(results, layout, run):
    a, b = results[layout][run], results["one rank"][WHOLE[run]]
    assert apart(a["weights"], b["weights"]) < TOLERANCE
    for step, same_step in zip(a["history"], b["history"]):
        assert step["loss"] == pytest.approx(same_step["loss"], rel=TOLERANCE)


@everywhere(["dpo, the reference kept", "kto, the reference kept"])
def test_a_kept_reference_gives_the_bits_of_a_live_one(results, layout, run):
    kept, live = results[layout][run], results[layout][run.split(",")[0] + " loss"]
    assert [s["loss"] for s in kept["history"]] == [s["loss"] for s in live["history"]]
    assert all(torch.equal(kept["weights"][n], live["weights"][n]) for n in live["weights"])
