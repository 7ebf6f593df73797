"""Optimizers beside plain AdamW, in one process: averages of 8 bits, and what is refused.

Whole steps at every division are tests/trainer/test_steps.py's.
"""

import pytest
import torch

from src.errors import UserError
from src.trainer import adam, averages
from src.trainer.averages import MEAN, SQUARE, Method, dequantized, levels, quantized
from src.trainer.optimizer import Optimizer
from src.trainer.solver import SolverObjective
from tests.trainer.tiny import apart, ours, some_sequences, training, whole_weights

STEPS = 8
CPU = torch.device("cpu")


def stepped(folder, parallel, method: Method, dtype=torch.float32):
    """A model after some steps on one batch, and its optimizer."""
    model = ours(folder / "lm", parallel, dtype)
    optimizer = Optimizer(model, parallel, weight_decay=0.1, method=method)
    objective = SolverObjective(some_sequences(8), parallel.device)
    for _ in range(STEPS):
        loss, _ = objective.loss(model, list(range(8)), sum(objective.weights))
        optimizer.backward(loss)
        optimizer.step(1e-3)
    return model, optimizer


@pytest.fixture
def small_parts(monkeypatch):
    """As much of the machinery for large tensors as a small model can have."""
    monkeypatch.setattr(averages, "SMALLEST", 1024)
    monkeypatch.setattr(adam, "NUMBERS_AT_ONCE_CPU", 512)


@pytest.mark.parametrize("name", [MEAN, SQUARE])
def test_codes_are_the_nearest_levels(name):
    """By a search over all 256, at numbers of any size but those below fp32's normal ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 2048, generator=generator) * 10.0 ** torch.arange(-16, 2, 2)[:, None]
    x[:, ::97] = 0
    x = (x if name == MEAN else x.square()).flatten()[:-7]
    codes, scales = quantized(x, name)
    padded = torch.nn.functional.pad(x, (0, 7)).view(-1, 256)
    assert torch.equal(scales, padded.abs().amax(1))
    of_each = scales.repeat_interleave(256)[: x.numel()].double()
    stand_for = levels(name, CPU).double()
    off = (x.double() / of_each.clamp_min(1e-300) - stand_for[codes.long()]).abs()
    least = (x.double() / of_each.clamp_min(1e-300) - stand_for[:, None]).abs().amin(0)
    assert torch.allclose(off, least, atol=1e-7), "1e-7: fp32's rounding of the quotient"
    assert torch.equal(
        dequantized(codes, scales, name), levels(name, CPU)[codes.long()] * of_each.float()
    )
    assert (dequantized(codes, scales, name)[x == 0] == 0).all()


@pytest.mark.parametrize("offload", [False, True])
def test_averages_of_8_bits_stay_close_to_those_of_fp32(folder, parallel, small_parts, offload):
    start = whole_weights(ours(folder / "lm", parallel), parallel)
    exact, _ = stepped(folder, parallel, Method())
    method = Method("adamw8bit", offload=offload)
    (model, optimizer), (again, other) = (stepped(folder, parallel, method) for _ in "ab")
    got, want = whole_weights(model, parallel), whole_weights(exact, parallel)
    moved, off = apart(want, start), apart(got, want)
    assert 0 < off < 0.15 * moved, "an eighth of the way: as 8 bits of both averages are"
    assert all(torch.equal(got[n], x) for n, x in whole_weights(again, parallel).items())
    kinds = {p: set(state) - {"step"} for p, state in optimizer.local.state.items()}
    for parameter, state in optimizer.local.state.items():
        is_small = parameter.numel() < averages.SMALLEST
        assert (kinds[parameter] == {MEAN, SQUARE}) == is_small
        assert state[MEAN].dtype == (torch.float32 if is_small else torch.uint8)
        for name, x in state.items():
            assert torch.equal(x, other.local.state[by_place(optimizer, other)[parameter]][name])
    assert len({len(each) for each in kinds.values()}) == 2


def by_place(a: Optimizer, b: Optimizer) -> dict:
    return {p: q for (p, _), (q, _) in zip(a.kept(), b.kept())}


def test_padding_stays_exactly_zero(parallel, small_parts):
    """Codes of 8 bits included, whose other numbers in a block are large."""
    weight = torch.nn.Parameter(torch.randn(64, 48))
    with torch.no_grad():
        weight[:, 40:] = 0
    spec = adam.TensorSpec((64, 48))
    places = adam.Places(parallel, {weight: spec}, adam.Placement(1))
    group = {"params": [weight], "kind": "adamw8bit", "weight_decay": 0.1}
    optimizer = adam.MasterAdamW([group], Method("adamw8bit"), places, lr=1e-2)
    for _ in range(STEPS):
        weight.grad = torch.randn(64, 48)
        weight.grad[:, 40:] = 0
        optimizer.step()
    assert not weight[:, 40:].any() and weight[:, :40].all()
    assert optimizer.state[weight][MEAN].dtype == torch.uint8


def test_a_square_that_codes_round_to_zero_does_not_blow_up_its_step(parallel, small_parts):
    """Beside one 10⁸ times as large in its block, and with a gradient of 0 after others.

    AdamW's step is of the size of lr.
    """
    weight = torch.nn.Parameter(torch.zeros(16, 256))
    places = adam.Places(parallel, {weight: adam.TensorSpec((16, 256))}, adam.Placement(1))
    group = {"params": [weight], "kind": "adamw8bit", "weight_decay": 0.0}
    optimizer = adam.MasterAdamW([group], Method("adamw8bit"), places, lr=1e-2)
    for step in range(STEPS):
        weight.grad = torch.full_like(weight, 1e-4 if step < STEPS - 1 else 0.0)
        weight.grad[:, 0] = 1.0
        optimizer.step()
    assert weight.abs().max() < 2e-2 * STEPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon"])
def test_state_in_host_memory_has_the_bits_of_state_on_the_device(
    folder, parallel, small_parts, kind, on_cpu, dtype
):
    if kind == "muon" and on_cpu:
        pytest.skip("refused")
    plain, _ = stepped(folder, parallel, Method(kind), dtype)
    model, optimizer = stepped(folder, parallel, Method(kind, True, on_cpu), dtype)
    want = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, want[name]), name
    for parameter, master in optimizer.local.rounded:
        assert torch.equal(parameter, master.to(dtype))
    assert len(optimizer.local.rounded) == (len(want) if on_cpu or dtype != torch.float32 else 0)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(cpu_adam=True), "--cpu_adam: updates weights where .* give --offload_optimizer too"),
        (
            dict(cpu_adam=True, offload_optimizer=True, optimizer="muon"),
            "--cpu_adam: does not go with --optimizer muon, .* or --optimizer adamw",
        ),
        (
            dict(zero=3, offload_params=True, offload_optimizer=True),
            "--offload_optimizer: has no effect with --offload_params",
        ),
        (
            dict(zero=3, offload_params=True, cpu_adam=True),
            "--cpu_adam: has no effect with --offload_params",
        ),
        (
            dict(optimizer="muon", resume_changed=["optimizer"]),
            "--resume_changed optimizer: it decides what a saved step holds",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        training(**flags)


def test_settings_say_the_method():
    plan = training(optimizer="adamw8bit", offload_optimizer=True, cpu_adam=True)
    assert Method.of(plan.optimizer, plan.run) == Method("adamw8bit", True, True)
    plain = training()
    assert Method.of(plain.optimizer, plain.run) == averages.PLAIN
