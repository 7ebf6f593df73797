"""Experts' products and how rows get to them: the same by PyTorch's grouped product and by hand.

And nothing of it waits for the host. Whole models with experts: test_parity.py.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.models.config import ModelConfig
from src.models.experts import _Grouped, _Reordered, grouped_linear
from src.models.lora import LoRAConfig, add_lora
from src.models.transformer import build

# What of PyTorch has a result, or a shape, that the host must wait for.
WAITING = ("nonzero", "bincount", "item", "_local_scalar_dense", "unique", "masked_select", "equal")
COUNTS = {
    "all": [3, 1, 4, 2],
    "some without rows": [0, 5, 0, 5],
    "one has all": [0, 0, 7, 0],
    "no rows": [0] * 4,
}


def drawn(counts, dtype, out=24, width=16):
    generator = torch.Generator().manual_seed(sum(counts))

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return draw(sum(counts), width), draw(len(counts), out, width), draw(sum(counts), out)


def with_gradients(function, x, weight, up):
    x, weight = (t.clone().requires_grad_() for t in (x, weight))
    y = function(x, weight)
    y.backward(up)
    return [y.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_grouped_product_and_the_one_by_hand_are_equal(counts, dtype):
    x, weight, up = drawn(counts, dtype)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    ours = with_gradients(lambda x, w: grouped_linear(x, w, ends), x, weight, up)
    by_hand = with_gradients(lambda x, w: _Grouped.apply(x, w, counts), x, weight, up)
    assert all(torch.equal(*pair) for pair in zip(ours, by_hand, strict=True))
    for e, (rows, y) in enumerate(zip(x.split(counts), ours[0].split(counts))):
        torch.testing.assert_close(y, rows @ weight[e].t(), msg=f"expert {e}")


@pytest.mark.parametrize(
    "dtype, out, width, by_pytorch",
    (
        (torch.float32, 24, 20, True),
        (torch.float32, 24, 6, False),
        (torch.float32, 6, 24, False),
        (torch.bfloat16, 24, 8, True),
        (torch.bfloat16, 24, 20, False),
        (torch.float64, 24, 16, False),
    ),
)
def test_rows_of_whole_16_bytes_take_pytorch_s_product(dtype, out, width, by_pytorch):
    x, weight, _ = drawn([2, 3], dtype, out, width)
    with Operations() as operations:
        y = grouped_linear(x, weight, torch.tensor([2, 5], dtype=torch.int32))
    assert (operations.of["aten::_grouped_mm"] == 1) == by_pytorch
    torch.testing.assert_close(y[2:], x[2:] @ weight[1].t())


def test_the_gradient_of_copied_rows_is_the_sum_over_the_copies():
    n, k = 5, 3
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(n * k, generator=generator)
    places = order.argsort()
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    up = torch.randn(n * k, 4, generator=generator, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    _Reordered.apply(ours, order // k, places).backward(up)
    theirs[order // k].backward(up)
    torch.testing.assert_close(ours.grad, theirs.grad)
    back = _Reordered.apply(_Reordered.apply(x, order // k, places), places, order)
    assert torch.equal(back, x.repeat_interleave(k, 0))
    rows = up.clone().requires_grad_()
    _Reordered.apply(rows, places, order).backward(up)
    assert torch.equal(rows.grad[places], up)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.of[op.name()] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapted", (False, True), ids=("plain", "adapters"))
@pytest.mark.parametrize("rows", (1, 3))
@torch.no_grad()
def test_a_step_in_bf16_needs_no_answer_from_the_device(rows, adapted, parallel):
    """As a CUDA graph asks: on the meta device there are no values that the host could ask for."""
    config = ModelConfig(
        16, 1, 2, 2, 8, 32, 20, n_experts=4, experts_per_token=2, norm_topk_prob=True
    )
    model = build(config, 0, 1, torch.bfloat16)
    if adapted:
        model.to_empty(device="cpu")
        add_lora(model, LoRAConfig(8, targets=("w1", "w2", "w3")), 0, parallel)
    experts = model.layers[0].feed_forward.to("meta")
    with Operations() as operations:
        out, router = experts(torch.empty(rows, 16, dtype=torch.bfloat16, device="meta"))
    assert out.shape == (rows, 16) and router.shape == (rows, 2, 4)
    assert operations.of["aten::_grouped_mm"] == (9 if adapted else 3)
    called = {name.split("::")[1].split(".")[0] for name in operations.of}
    assert not called & set(WAITING)
