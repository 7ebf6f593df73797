"""Products in fp8, by their codes' meaning on the CPU, beside fp64 and beside bf16's training."""

import pytest
import torch

from src.errors import UserError
from src.models import fp8
from src.models.attention import Packed
from src.models.batch import Batch, Sequence, response_loss
from src.models.config import ModelConfig
from src.models.transformer import build
from src.parallel import layers
from src.settings.declaration import build as build_settings
from src.settings.scripts import SolverTrainSettings

CONFIG = ModelConfig(64, 2, 4, 2, 16, 96, 50, max_seq_len=64)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fp8, "LEAST", 16)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def test_values_and_gradients_are_fp64_s_within_the_format_s_rounding():
    x, weight, grad = drawn(50, 64, seed=0), drawn(96, 64, seed=1), drawn(50, 96, seed=2)
    x[3] *= 40  # one scale for all
    bias = drawn(96, seed=3)
    exact = x @ weight.t() + bias, grad @ weight, grad.t() @ x, grad.sum(0)
    inputs = [t.bfloat16().requires_grad_() for t in (x, weight, bias)]
    out = fp8.linear(*inputs)
    found = out, *torch.autograd.grad(out, inputs, grad.bfloat16())
    # Half a step is 1/16 of a number in e4m3 at most, 1/8 in e5m2. Errors spread evenly up to that
    # have a root mean square of it / sqrt(3), and those of two factors add up as squares.
    forward, backward = (2 / 16**2 / 3) ** 0.5, ((1 / 16**2 + 1 / 8**2) / 3) ** 0.5
    for ours, wanted, most in zip(found, exact, (forward, backward, backward, 0.01)):
        assert ours.dtype == torch.bfloat16
        assert apart(ours.detach(), wanted) < most
    assert all(apart(ours.detach(), wanted) > 0.01 for ours, wanted in zip(found[:3], exact))


def test_scales_bring_any_size_into_the_format_s_range():
    for factor in (1e-30, 1.0, 1e30):
        x = (drawn(8, 16, seed=0) * factor).bfloat16()
        for dtype, most in ((fp8.WEIGHT, 1 / 16), (fp8.GRADIENT, 1 / 8)):
            codes, scale = fp8.quantized(x, dtype)
            back = codes.double() * scale.double()
            large = x.double().abs() > x.double().abs().max() / 100
            assert ((back / x.double() - 1).abs()[large] <= most + 0.01).all()
    codes, scale = fp8.quantized(torch.zeros(4, 4), fp8.WEIGHT)
    assert not codes.float().any() and scale > 0


def test_the_library_s_product_is_that_of_what_the_codes_stand_for():
    (a, sa), (b, sb) = (fp8.quantized(drawn(32, 64, seed=i).bfloat16(), fp8.WEIGHT) for i in (0, 1))
    wanted = fp8.product(a, b.t(), sa, sb, torch.float32)
    try:
        found = torch._scaled_mm(a, b.t(), sa, sb, out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError):
        pytest.skip("this PyTorch has no fp8 products on the CPU")
    assert apart(found, wanted.double()) < 0.01


def test_narrow_and_odd_matrices_stay_in_bf16(monkeypatch):
    monkeypatch.setattr(fp8, "LEAST", 32)
    for shape in ((16, 64), (64, 16), (40, 63), (33, 64)):
        x, weight = drawn(5, shape[1], seed=0).bfloat16(), drawn(*shape, seed=1).bfloat16()
        assert torch.equal(fp8.linear(x, weight), x @ weight.t())


def trained(with_fp8: bool, recompute: str = "none") -> list[float]:
    """Losses of 40 steps on one small batch, bf16 with fp32 gradients."""
    model = build(CONFIG, 0, 1, torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
        if weight.dim() == 1:
            weight.data.fill_(1)
    if with_fp8:
        fp8.use_fp8(model)
    model.recompute = recompute
    draw = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, 50, (n,), generator=draw).tolist() for n in (20, 9, 14)]
    batch = Batch.of([Sequence(t, 4) for t in tokens], torch.device("cpu"))
    masters = [p.detach().float() for p in model.parameters()]
    adam = torch.optim.AdamW(masters, lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(40):
        loss = response_loss(model, batch, lambda logprobs, *_: -logprobs.sum()) / len(
            batch.targets
        )
        loss.backward()
        for parameter, master in zip(model.parameters(), masters):
            master.grad, parameter.grad = parameter.grad.float(), None
        adam.step()
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), masters):
                parameter.copy_(master)
        losses.append(float(loss.detach()))
        assert layers._product is None
    return losses


@pytest.mark.usefixtures("parallel")
def test_a_model_trains_as_in_bf16():
    plain, ours, recomputed = trained(False), trained(True), trained(True, "full")
    assert plain[0] > 3 * plain[-1], "it learns"
    assert ours[:5] != plain[:5], "it is fp8"
    # The area under the curves, and step by step, where a loss that falls by a fifth a step is
    # up to half a step behind.
    assert abs(sum(ours) / sum(plain) - 1) < 0.04
    assert max(abs(a / b - 1) for a, b in zip(ours, plain)) < 0.15
    assert recomputed == ours


@pytest.mark.usefixtures("parallel")
def test_only_whole_sequences_in_training_mode(monkeypatch):
    model = build(CONFIG, 0, 1, torch.bfloat16).to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    calls, real = [], fp8.linear
    monkeypatch.setattr(fp8, "linear", lambda *inputs: calls.append(1) or real(*inputs))

    class Generating(Packed):
        pass

    fp8.use_fp8(model)
    tokens, counts = torch.tensor([3, 4, 5, 6]), []
    for layout, training in ((Packed, True), (Packed, False), (Generating, True)):
        calls.clear()
        model.train(training)
        model.logits(model(tokens, layout([4])))
        counts.append(len(calls))
    assert counts == [CONFIG.n_layers * 7, 0, 0]


def test_what_does_not_go_together_is_refused(monkeypatch):
    with pytest.raises(UserError, match="--fp8: the CPU has no products in fp8"):
        fp8.check_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="NVIDIA A100 has no products in fp8"):
        fp8.check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8.check_device(torch.device("cuda"))
    needed = {"ckpt_dir": "a", "train_file": "b", "save_dir": "c", "fp8": True}
    for more, message in (
        ({"dtype": "fp32"}, "--fp8: is for --dtype bf16, and it is fp32"),
        ({"deterministic": True}, "--fp8 --deterministic: "),
        ({"lora_rank": 4, "quantize": "nf4"}, "--fp8: has no effect with --quantize nf4"),
    ):
        with pytest.raises(UserError, match=message):
            build_settings(SolverTrainSettings, {**needed, **more})
    assert build_settings(SolverTrainSettings, needed).run.fp8
