"""Rates from measurements, machines in files, and one launch of the real cases."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from src.errors import UserError
from src.models.config import ModelConfig
from src.planner import calibrate, check
from src.planner.calibrate import fitted, launched, nonnegative
from src.planner.hardware import GPUS, Hardware, published
from src.planner.job import PPO, SFT, VERIFIER
from src.planner.trial import Case
from src.planner.work import MicroBatch, Work, sizes_of

RATES = dict(products=2e11, attention=1e11, elements=1e10, weights=2e10, layer=1e-4, call=1e-3)


def test_rates_are_found_again():
    """From exact seconds, the rates that made them."""
    rng = np.random.default_rng(0)
    of_unit = [1 / 2e11, 1 / 1e11, 1 / 1e10, 1 / 2e10, 1e-4, 1e-3]
    works = [Work(*(rng.uniform(1, 9, 6) * [1e10, 1e9, 1e8, 1e8, 2, 1])) for _ in range(12)]
    found = fitted([(work, float(np.dot(work.numbers, of_unit))) for work in works])
    assert asdict(found) == pytest.approx(RATES, rel=1e-3)
    assert works[0].seconds(found) == pytest.approx(np.dot(works[0].numbers, of_unit), rel=1e-4)


def test_no_rate_is_below_zero():
    """Where least squares would have one: the best without it, by all subsets."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = rng.uniform(0, 1, (8, 3)), rng.uniform(0.5, 1.5, 8)
        x = nonnegative(a, b)
        scaled = a / b[:, None]
        best = np.inf
        for kept in range(1, 8):
            columns = [i for i in range(3) if kept >> i & 1]
            y, *_ = np.linalg.lstsq(scaled[:, columns], np.ones(8), rcond=None)
            if (y >= 0).all():
                best = min(best, float(((scaled[:, columns] @ y - 1) ** 2).sum()))
        assert (x >= 0).all()
        assert float(((scaled @ x - 1) ** 2).sum()) == pytest.approx(best, rel=1e-6)


def test_a_machine_comes_back_from_its_file(tmp_path):
    path = str(tmp_path / "machine.yaml")
    for name in GPUS:
        hardware = published(name, 8)
        hardware.write(path, "a test")
        assert Hardware.read(path) == hardware
    for broken, message in (
        ("[1]", "no hardware, but"),
        ("name: x", "missing"),
        ((tmp_path / "machine.yaml").read_text() + "more: 1\n", "does not know more"),
        ((tmp_path / "machine.yaml").read_text().replace("per_node: 8", "per_node: 0"), "per_node"),
    ):
        (tmp_path / "broken.yaml").write_text(broken)
        with pytest.raises(UserError, match=message):
            Hardware.read(str(tmp_path / "broken.yaml"))


def test_operations_are_those_of_the_products():
    """Counted from the tensors, in both directions; at tp 4 a quarter."""
    from src.models.layout import layer_table
    from src.planner.work import backward_of, head_training, layers_forward

    config = ModelConfig(256, 4, 8, 8, 32, 704, 4096)
    matrices = sum(np.prod(s.shape) for s in layer_table(config).values() if len(s.shape) > 1)
    batch = MicroBatch.of_rows(3, 50, 50)
    for tp in (1, 4):
        sizes = sizes_of(config, tp)
        forward = layers_forward(config, sizes, batch, 2)
        whole = forward + backward_of(forward, sizes) + head_training(sizes, batch, 2)
        assert whole.products * tp == 6 * 150 * (4 * matrices + 4096 * 256)
        assert forward.attention * tp == 4 * 4 * 256 * 3 * 50 * 51 / 2


SIZES = dict(dim=64, n_layers=4, n_heads=4, n_kv_heads=4, hidden_dim=172, vocab_size=1024)
SHORT = dict(ppo_epochs=1, mini_batches=2)


@pytest.fixture(scope="module")
def tried():
    """Every kind of case once, on two ranks, with the rates of tiny models."""
    roles = dict(actor_train="tp2", actor_gen="dp2", critic_train="pp2", critic_inf="tp2")
    apart = dict(ref_inf="dp1 on 0", rew_inf="dp1 on 1")
    cases = [
        *(
            Case(SFT, SIZES, dict(model=text), 8, 48, 40, 2, recompute, turns=1)
            for text, recompute in (
                ("dp2", "none"),
                ("dp2 zero3", "none"),
                ("tp2", "full"),
                ("tp2 sp", "none"),
                ("pp2", "none"),
            )
        ),
        Case(VERIFIER, SIZES, dict(model="dp2"), 8, 48, 40, 2, turns=1),
        Case(PPO, SIZES, roles | apart, 8, 32, 16, 2, turns=1, more=SHORT),
        Case(
            PPO, SIZES, dict(actor_train="dp2", critic_train="dp2"), 8, 32, 16, 4, "none", 1, SHORT
        ),
    ]
    return cases, launched(2, [asdict(case) for case in cases], rates=False)


def test_cases_run_and_take_the_bytes_that_are_predicted(tried):
    cases, results = tried
    hardware = replace(published("h100", 2), kind="cpu")
    for case, found in zip(cases, results["cases"]):
        plan, there = check.predicted(case, hardware, 2), found["bytes"]
        held = sum(sum(kinds.values()) for kinds in plan.held.values())
        if "dp1 on" not in str(case.layouts):  # else no rank holds both
            assert held == pytest.approx(there["weights"] + there["optimizer"], rel=0.01), case
        assert plan.bytes == pytest.approx(there["all"], rel=0.12), case
        phases = check.compared(plan, found)
        assert all(took > 0 for _, _, took in phases), phases
        assert {name for name, *_ in phases} >= (
            {"actor_gen", "actor_train", "critic_train"} if case.task == PPO else {"passes"}
        )


def test_a_launch_that_fails_is_named(monkeypatch):
    broken = Case(SFT, SIZES, dict(model="tp3"), 8, 8, 8, 2)
    with pytest.raises(UserError, match="measuring on 1 ranks failed"):
        launched(1, [asdict(broken)], rates=False)


def test_rates_of_this_machine_are_measured(monkeypatch, tmp_path, parallel):
    """On tiny models: all are there, above zero, and make a machine."""
    batches, generated = [(1, 16, 8), (2, 32, 16), (4, 64, 8)], [(1, 8, 4), (4, 16, 4)]
    tiny = calibrate.Timed([SIZES], batches, generated, (2**8, 2**10))
    monkeypatch.setitem(calibrate.ON, "cpu", tiny)
    monkeypatch.setattr(calibrate, "TURNS", 1)
    found = calibrate.hardware_from(calibrate.measured_rates(tmp_path, parallel))
    assert found.per_node == 1 and found.kind == "cpu" and found.memory > 1e9
    assert found.peak > 1e9 and found.numbers > 1e5
    for rates in (found.score, found.train, found.decode):
        assert all(x > 0 for x in (rates.products, rates.attention, rates.elements, rates.weights))


def test_fp32_has_its_own_rate_and_is_what_a_measured_processor_computes_in():
    from src.planner.inputs import hardware_of, planned_job
    from src.settings.declaration import build
    from src.settings.plan import PlanSettings

    given = dict(model_type="qwen2.5-0.5b", gpus=8, gpu="h100")
    for dtype, peak in ((None, 989e12), ("fp16", 989e12), ("fp32", 67e12)):
        settings = build(PlanSettings, given | dict(dtype=dtype))
        assert hardware_of(settings.machine, settings.job.dtype).peak == peak
    settings = build(PlanSettings, given)
    assert planned_job(settings, published("h100", 8)).dtype == torch.bfloat16
    measured = replace(published("h100", 8), kind="cpu")
    assert planned_job(settings, measured).dtype == torch.float32


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_case_of_the_check_can_be_predicted_on_any_node(ranks):
    """And is one that its ranks can run: a layer for each stage, rows for each model."""
    hardware = replace(published("h100", ranks), kind="cpu")
    jobs = check.jobs_on(ranks) if ranks > 1 else {}
    cases = [*check.cases_on(ranks), *(case for job in jobs.values() for case in job)]
    assert len(cases) >= (4 if ranks == 1 else 40)
    for case in cases:
        plan = check.predicted(case, hardware, ranks)
        assert plan.total > 0 and plan.bytes > 0
        if case.task != PPO:
            assert case.batch % plan.layouts["model"].dp == 0


def test_experts_are_read_by_as_many_tokens_as_meet_them():
    from src.models.hf_config import PRESETS
    from src.planner.work import read_weights

    config = PRESETS["mixtral-8x7b-instruct-v0.1"]
    sizes = sizes_of(config, 1)
    assert sizes.experts == 3 * 8 * 4096 * 14336
    for tokens in (1, 4, 1000):
        missed = sizes.experts * (6 / 8) ** tokens
        assert read_weights(sizes, tokens) == pytest.approx(sizes.stored - missed)


@pytest.mark.parametrize(
    "first, size, count, inside",
    [(0, 8, 1, True), (4, 8, 1, False), (0, 2, 4, True), (0, 3, 8, False), (6, 3, 1, False)],
)
def test_a_link_is_the_worst_of_its_groups(first, size, count, inside):
    hardware = published("h100", 8)
    assert hardware.links(first, size, count) is (hardware.node if inside else hardware.network)


def test_prompts_are_dealt_out_with_their_samples():
    """As `Rollouts._generate` deals them out."""
    from src.planner.search import generated_by_model

    for batch, samples, dp in ((512, 8, 48), (512, 8, 128), (64, 4, 16), (64, 4, 64), (60, 1, 7)):
        unit = samples if batch // samples >= dp else 1
        homes = [i // unit % dp for i in range(batch)]
        most = max(homes.count(model) for model in range(dp))
        assert generated_by_model(batch, samples, dp) == (most, unit)
