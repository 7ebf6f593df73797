"""Learning rates, batches, and the optimizer's handling of half-precision weights."""

import math
import sys

import pytest
import torch

from src.errors import UserError
from src.logs import RunLog
from src.trainer import optimizer as optimizer_module
from src.trainer.batches import epoch_batches, shares_of
from src.trainer.fit import check_compiler, fit
from src.trainer.optimizer import Optimizer, lr_at, sums_of_squares
from src.trainer.solver import SolverObjective
from tests.trainer.tiny import ours, some_sequences, training


@pytest.mark.parametrize("total, warmup", [(10, 0.3), (7, 0.03), (100, 0.0), (1, 0.5), (3, 0.99)])
def test_learning_rates(total, warmup):
    warm = math.ceil(total * warmup)
    for step in range(total):
        rate = {
            name: lr_at(step, total, 0.2, warmup, name) for name in ("constant", "linear", "cosine")
        }
        if step < warm:
            assert all(r == pytest.approx(0.2 * (step + 1) / warm) for r in rate.values())
            continue
        rest = total - warm
        assert rate["constant"] == 0.2
        assert rate["linear"] == pytest.approx(0.2 * (total - step) / rest)
        assert rate["cosine"] == pytest.approx(
            0.2 * math.cos(math.pi / 2 * (step - warm) / rest) ** 2
        )


def test_the_schedule_s_landmarks():
    assert lr_at(0, 100, 1.0, 0.0, "cosine") == 1.0  # no step is spent at zero
    assert [lr_at(s, 10, 1.0, 0.3, "linear") for s in (0, 2, 3, 9)] == pytest.approx(
        [1 / 3, 1, 1, 1 / 7]
    )
    assert lr_at(5, 10, 1.0, 0.0, "cosine") == pytest.approx(0.5)


def test_every_row_once_per_epoch_in_an_order_fixed_by_seed_and_epoch():
    epochs = [epoch_batches(23, 5, seed=7, epoch=epoch) for epoch in (1, 2)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
        assert sorted(i for batch in batches for i in batch) == list(range(23))
    assert epochs[0] != epochs[1], "not reshuffled"
    assert epochs[0] != epoch_batches(23, 5, seed=8, epoch=1), "the seed does not matter"
    assert epochs[0] == epoch_batches(23, 5, seed=7, epoch=1)
    assert epochs[0][0] != sorted(epochs[0][0]), "not shuffled"


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("max_batch_size", [1, 2, 8])
def test_ranks_share_a_batch_without_loss_in_micro_batches(parallel, dp_size, max_batch_size):

    lengths, batch = [5, 9, 2, 2, 7, 1, 8, 3], [0, 2, 3, 4, 6, 7, 1]
    shares = shares_of(batch, lengths, dp_size, max_batch_size)
    assert len(shares) == dp_size
    assert sorted(i for share in shares for micro in share for i in micro) == sorted(batch)
    assert all(len(micro) <= max_batch_size for share in shares for micro in share)
    rows = [sum(map(len, share)) for share in shares]
    assert max(rows) - min(rows) <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.0},
        {"epochs": 0},
        {"max_batch_size": 0},
        {"accumulation_steps": 0},
        {"warmup": 1.0},
        {"warmup": -0.1},
    ],
)
def test_settings_out_of_range_are_refused(change):
    good = {"lr": 1e-3, "epochs": 1, "max_batch_size": 1}
    training(**good)
    with pytest.raises(UserError, match=f"--{next(iter(change))} "):
        training(**good | change)


def push(model, optimizer: Optimizer, lr: float, scale: float = 1.0) -> dict[str, float]:
    """A step down a constant slope on the last norm's weight."""
    optimizer.backward(model.norm.weight.sum() * scale)
    return optimizer.step(lr)


def test_fp32_masters_keep_updates_that_bf16_would_lose(folder, parallel):
    model = ours(folder / "lm", parallel, torch.bfloat16)
    optimizer = Optimizer(model, parallel)
    weight, start = model.norm.weight, model.norm.weight.detach().float().clone()
    push(model, optimizer, 1e-4)
    assert torch.equal(weight.float(), start), "one step is too small to be seen in bf16"
    for _ in range(99):
        push(model, optimizer, 1e-4)
    # Adam's step on a constant slope is the learning rate: 100 of them make 0.01.
    masters = dict(optimizer.local.rounded)
    assert set(masters) == set(optimizer.parameters)
    assert torch.allclose(masters[weight], start - 0.01, atol=2e-5)
    for parameter, master in masters.items():
        assert master.dtype == torch.float32 and torch.equal(parameter, master.bfloat16())
    assert not torch.equal(weight.float(), start)


def test_bf16_steps_leave_weights_that_are_the_masters_rounded(folder, parallel):
    model = ours(folder / "lm", parallel, torch.bfloat16)
    optimizer, objective = (
        Optimizer(model, parallel),
        SolverObjective(some_sequences(4), parallel.device),
    )
    for _ in range(3):
        for rows in ([0, 1], [2, 3]):
            optimizer.backward(objective.loss(model, rows, sum(objective.weights))[0])
        assert optimizer.step(1e-3)["grad_norm"] > 0
    for parameter, master in optimizer.local.rounded:
        assert torch.equal(parameter, master.bfloat16()) and not torch.equal(
            parameter.float(), master
        )


def test_micro_batches_add_up_in_fp32(folder, parallel):
    """300 gradients of 1: bf16 would stop counting at 256."""
    model = ours(folder / "lm", parallel, torch.bfloat16)
    optimizer = Optimizer(model, parallel)
    for _ in range(300):
        optimizer.backward(model.norm.weight.sum())
    norm = optimizer.step(1e-3)["grad_norm"]
    assert norm == pytest.approx(300 * math.sqrt(model.config.dim), rel=1e-6)


def test_fp16_halves_its_loss_scale_on_overflow_and_doubles_it_after_a_long_run(
    folder, parallel, monkeypatch
):
    monkeypatch.setattr(optimizer_module, "GOOD_STEPS_TO_DOUBLE", 3)
    model = ours(folder / "lm", parallel, torch.float16)
    optimizer = Optimizer(model, parallel)
    assert optimizer.loss_scale == 2.0**16  # more than the largest fp16: a slope of 1 overflows
    before = model.norm.weight.detach().clone()
    first = push(model, optimizer, 1e-2)
    assert first["skipped"] == 1 and not math.isfinite(first["grad_norm"])
    assert optimizer.loss_scale == 2.0**15 and torch.equal(model.norm.weight, before)
    second = push(model, optimizer, 1e-2)
    assert second["skipped"] == 0 and second["grad_norm"] == pytest.approx(
        math.sqrt(model.config.dim)
    ), "not unscaled"
    assert torch.allclose(model.norm.weight.float(), before.float() - 1e-2, atol=1e-3)
    master = dict(optimizer.local.rounded)[model.norm.weight]
    clipped = 1 / math.sqrt(
        model.config.dim
    )  # Adam would hide a gradient that is still scaled; its mean does not
    assert torch.allclose(
        optimizer.adam.state[master]["exp_avg"], torch.full_like(master, 0.1 * clipped), rtol=1e-4
    )
    assert optimizer.loss_scale == 2.0**15
    push(model, optimizer, 1e-2)
    push(model, optimizer, 1e-2)
    assert optimizer.loss_scale == 2.0**16 and push(model, optimizer, 1e-2)["skipped"] == 1


def test_other_dtypes_have_no_loss_scale(folder, parallel):
    optimizer = Optimizer(ours(folder / "lm", parallel), parallel)
    optimizer.parameters[0].grad = torch.full_like(optimizer.parameters[0], torch.nan)
    assert optimizer.step(1e-3)["skipped"] == 1 and optimizer.loss_scale == 1.0


def test_too_many_skipped_steps_in_a_row_stop_the_run(folder, parallel):
    model = ours(folder / "lm", parallel)
    optimizer = Optimizer(model, parallel)
    for scale in (
        torch.nan,
        torch.nan,
        1.0,
        torch.nan,
        torch.inf,
    ):  # a good step starts the count anew
        push(model, optimizer, 1e-3, scale)
        optimizer.check_skipped(3, "rows [1, 2]")
    push(model, optimizer, 1e-3, torch.nan)
    with pytest.raises(
        UserError, match=r"3 steps in a row \(--max_skipped_steps\), the last on rows \[1, 2\]"
    ):
        optimizer.check_skipped(3, "rows [1, 2]")


def test_gradients_do_not_leak_into_the_next_step(folder, parallel):
    model = ours(folder / "lm", parallel)
    optimizer = Optimizer(model, parallel)
    assert push(model, optimizer, 1e-3)["grad_norm"] == push(model, optimizer, 1e-3)["grad_norm"]


def test_fit_says_which_step_was_skipped_and_goes_on(folder, parallel, capsys):
    class Poisoned(SolverObjective):
        def loss(self, model, rows, denominator):
            loss, stats = super().loss(model, rows, denominator)
            calls.append(rows)
            return loss * (torch.nan if len(calls) == 2 else 1.0), stats

    calls = []
    model = ours(folder / "lm", parallel)
    objective = Poisoned(some_sequences(12), parallel.device)
    with RunLog(None, "test", {}, rank=0) as log:
        history = fit(
            model,
            Optimizer(model, parallel),
            objective,
            training(lr=1e-3, epochs=1, max_batch_size=4),
            parallel,
            log,
            lambda at, number: None,
        )
    assert [step["skipped"] for step in history] == [0, 1, 0]
    assert (
        "WARNING step 2: the gradient norm is nan, the step is skipped" in capsys.readouterr().err
    )
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("by_rows", [True, False])
def test_the_gradient_norm_is_fp64_s_on_the_cpu_s_way_and_on_the_gpu_s(by_rows):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(*shape, generator=generator) * scale
        for shape, scale in (((700, 900), 1.0), ((1300,), 1e-3), ((4, 30, 50), 30.0), ((1,), 1e-9))
    ]
    wanted = torch.stack([x.double().square().sum() for x in tensors])
    squares = sums_of_squares(tensors, by_rows)
    assert squares.dtype == torch.float64
    assert torch.allclose(squares, wanted, rtol=1e-7 if by_rows else 1e-12, atol=0)
    plain = torch.stack([x.square().sum() for x in tensors]).double()
    assert not torch.allclose(plain, wanted, rtol=1e-12, atol=0), "fp32 would not do"


def test_compiling_for_a_gpu_without_a_c_compiler_is_refused(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    check_compiler("cpu")
    with pytest.raises(UserError, match="no gcc or clang: install gcc"):
        check_compiler("cuda")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UserError, match="no no-such-compiler"):
        check_compiler("cuda")
    monkeypatch.setenv("CC", sys.executable)
    check_compiler("cuda")
