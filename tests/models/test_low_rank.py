"""A layer with its adapters is W x + b + s · B A x, and so are its gradients, in fp64 and fp32.

The references are the formula in plain autograd, and differences of the function itself.
"""

import pytest
import torch
import torch.nn.functional as F

from src.models.low_rank import adapted_linear
from src.models.quantize import KINDS, dense, quantized
from src.parallel.setup import has_products_in

ROWS, IN, RANK, SCALE = 7, 64, 3, 0.7
# the columns of the layers that are stacked, and which of them have an adapter
STACKS = {
    "one layer": ([10], [0]),
    "q, k and v": ([12, 4, 4], [0, 1, 2]),
    "k has none": ([12, 4, 6], [0, 2]),
    "only v": ([12, 4, 6], [2]),
}
EACH_STACK = pytest.mark.parametrize("stack", STACKS)
DROPOUT = pytest.mark.parametrize("dropout", (False, True), ids=("whole", "dropout"))


def drawn(stack, dropout, dtype=torch.float64):
    """x, W, b, the factors A one below the other, each B, where it adds, and what dropout keeps."""
    sizes, adapted = STACKS[stack]
    generator = torch.Generator().manual_seed(len(sizes) + len(adapted))

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, weight, bias = draw(ROWS, IN), draw(sum(sizes), IN), draw(sum(sizes))
    a, b = draw(RANK * len(adapted), IN), [draw(sizes[i], RANK) for i in adapted]
    starts = [sum(sizes[:i]) for i in adapted]
    kept = [draw(ROWS, IN) > -0.5 for _ in adapted] if dropout else []
    return x, weight, bias, a, b, starts, kept


def formula(x, weight, bias, a, b, starts, kept):
    """Each adapter's part laid among zeros, and added."""
    y = x @ weight.t() + bias
    for i, (down, up, start) in enumerate(zip(a.split(RANK), b, starts)):
        left = x * kept[i] if kept else x
        added = SCALE * left @ (up @ down).t()
        y = y + F.pad(added, (start, y.size(1) - start - up.size(0)))
    return y


def with_gradients(function, x, a, b, up):
    """Its value and the gradients of x, of A and of each B."""
    inputs = [t.clone().requires_grad_() for t in (x, a, *b)]
    y = function(inputs[0], inputs[1], inputs[2:])
    y.backward(up)
    return [y.detach(), *(t.grad for t in inputs)]


@EACH_STACK
@DROPOUT
def test_gradients_are_those_of_the_function(stack, dropout):
    x, weight, bias, a, b, starts, kept = drawn(stack, dropout)

    def ours(x, a, *b):
        return adapted_linear(x, weight, bias, a, b, starts, SCALE, kept)

    inputs = [t.requires_grad_() for t in (x, a, *b)]
    assert torch.autograd.gradcheck(ours, inputs, fast_mode=True)


@EACH_STACK
@DROPOUT
def test_value_and_gradients_in_fp32(stack, dropout):
    x, weight, bias, a, b, starts, kept = drawn(stack, dropout, torch.float32)
    up = torch.ones(ROWS, weight.size(0))
    up[:, ::2] = -0.5

    def ours(x, a, b):
        return adapted_linear(x, weight, bias, a, b, starts, SCALE, kept)

    wanted = with_gradients(
        lambda x, a, b: formula(x, weight.double(), bias.double(), a, b, starts, kept),
        x.double(), a.double(), [part.double() for part in b], up.double(),
    )  # fmt: skip
    values = with_gradients(ours, x, a, b, up)
    for got, want in zip(values, wanted, strict=True):
        assert float((got - want).abs().max()) <= 1e-6 * float(want.abs().max())
    with torch.no_grad():
        assert torch.equal(ours(x, a, b), values[0])


@pytest.mark.parametrize("frozen", ("x", "a", "b"))
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen):
    x, weight, bias, a, b, starts, kept = drawn("k has none", True, torch.float32)
    up = torch.ones(ROWS, weight.size(0))

    def gradients(without=None):
        inputs = {"x": x.clone(), "a": a.clone(), "b": b[1].clone()}
        for name, tensor in inputs.items():
            tensor.requires_grad_(name != without)
        factors = [b[0], inputs["b"]]
        y = adapted_linear(inputs["x"], weight, bias, inputs["a"], factors, starts, SCALE, kept)
        y.backward(up)
        return {name: tensor.grad for name, tensor in inputs.items()}

    all_of_them, some = gradients(), gradients(frozen)
    assert some.pop(frozen) is None
    assert all(torch.equal(gradient, all_of_them[name]) for name, gradient in some.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_quantised_weight_is_what_it_was_rounded_to(kind, dtype):
    x, weight, bias, a, b, starts, kept = drawn("one layer", False, dtype)
    weight, up = quantized(weight, kind), torch.ones(ROWS, weight.size(0), dtype=dtype)

    def ours(weight):
        return lambda x, a, b: adapted_linear(x, weight, bias, a, b, starts, SCALE, kept)

    got = with_gradients(ours(weight), x, a, b, up)
    wanted = with_gradients(ours(dense(weight)), x, a, b, up)
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def test_a_sum_is_rounded_once_in_bf16():
    """The product, then the sum: never the adapter's part by itself, nor its multiple."""
    x, weight, bias, a, b, starts, kept = drawn("q, k and v", False, torch.bfloat16)
    y = adapted_linear(x, weight, bias, a, b, starts, SCALE, kept)
    product, low = F.linear(x, weight, bias).double(), F.linear(x, a).double()
    parts = [
        SCALE * part @ up.double().t() for part, up in zip(low.split(RANK, -1), b, strict=True)
    ]
    exact = product + torch.cat(parts, -1)
    assert ((y.double() - exact).abs() <= 1.01 * 2**-8 * exact.abs()).all()
    assert y.dtype == torch.bfloat16


def test_only_the_input_and_the_small_product_wait_for_backward():
    x, weight, bias, a, b, starts, _ = drawn("q, k and v", False, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted_linear(x, weight, bias, a.requires_grad_(), b, starts, SCALE)
    shapes = {tuple(tensor.shape) for tensor in saved}
    assert shapes == {(ROWS, IN), (ROWS, 3 * RANK), a.shape, *(up.shape for up in b)}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_generation_adds_to_the_packed_product(dtype):
    if not has_products_in(dtype):
        pytest.skip("this processor has no products in bf16, and packs no weights for them")
    x, weight, _, a, b, starts, _ = drawn("q, k and v", False, dtype)
    x = torch.cat([x, x])  # as many rows as the packed weight is for
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    with torch.no_grad():
        got = adapted_linear(x, weight, None, a, b, starts, SCALE, packed=packed)
        want = adapted_linear(x, weight, None, a, b, starts, SCALE)
    torch.testing.assert_close(got, want)
