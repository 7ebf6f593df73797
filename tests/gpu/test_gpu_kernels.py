"""Every Triton kernel on the device against plain PyTorch on the CPU in fp32.

`TRITON_INTERPRET=1 pytest tests/gpu/test_gpu_kernels.py --device cpu` runs them without a GPU; with
--device cpu alone plain PyTorch stands for them.
"""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from src.kernels import attention, norm, product, rotation, swiglu, threshold
from src.kernels.codes import plain_product_by_codes, product_by_codes
from src.models.quantize import KINDS, levels_of_bytes, quantized
from tests.gpu.models import CPU, apart

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
PAGE = 16


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that bf16 holds."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.bfloat16().float()


def angles(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.polar(drawn(n, dim // 2, seed=seed).abs() + 0.5, drawn(n, dim // 2, seed=seed + 1))


def moved(x, device, dtype):
    """To the device, and numbers to the dtype; what is no tensor stays."""
    if isinstance(x, tuple):
        return tuple(moved(part, device, dtype) for part in x)
    if not isinstance(x, Tensor):
        return x
    return x.to(device, dtype if x.dtype == torch.float32 else x.dtype, copy=True)


def compare(device, dtype, module, name: str, *inputs, trained: int = 0) -> None:
    """`module.name` on the device and its plain twin on the CPU, on copies of the inputs.

    trained: of how many of the first inputs the gradients are compared too.
    """
    plain = getattr(module, f"plain_{name}")
    is_run = device.type == "cuda" or "TRITON_INTERPRET" in os.environ
    results = []
    for function, where, kind in (
        (getattr(module, name) if is_run else plain, device, dtype),
        (plain, CPU, torch.float32),
    ):
        given = [moved(x, where, kind) for x in inputs]
        for x in given[:trained]:
            x.requires_grad_()
        out = function(*given)
        outs = list(out) if isinstance(out, tuple) else [out]
        if trained:
            up = drawn(*out.shape, seed=9).to(where, kind)
            outs += torch.autograd.grad(out, given[:trained], up)
        # what it may have written to
        results.append(outs + [x for x in given[trained:] if isinstance(x, Tensor)])
    for ours, wanted in zip(*results, strict=True):
        if not wanted.is_complex():
            assert apart(ours, wanted) <= LIMITS[dtype]


@EACH_DTYPE
@pytest.mark.parametrize(
    "shape", ((7, 64), (300, 4096), (50, 8, 128), (3, 12), (1, 14336)), ids=str
)
def test_norms(device, dtype, shape):
    weight = drawn(shape[-1], seed=2)
    compare(device, dtype, norm, "rms_norm", drawn(*shape), weight, 1e-5, trained=2)
    if len(shape) == 2:
        for delta in (None, drawn(*shape, seed=1)):
            compare(device, dtype, norm, "add_rms_norm", drawn(*shape), delta, weight, 1e-5)


@EACH_DTYPE
@pytest.mark.parametrize("rows, width", ((5, 86), (300, 11008), (1, 4864), (8, 12)))
def test_swiglu(device, dtype, rows, width):
    compare(device, dtype, swiglu, "swiglu", drawn(rows, 2 * width), trained=1)


@EACH_DTYPE
@pytest.mark.parametrize("rows, heads, dim", ((33, 5, 12), (300, 32, 128), (1, 14, 64), (9, 3, 80)))
def test_rotation(device, dtype, rows, heads, dim):
    compare(
        device, dtype, rotation, "rotate", drawn(rows, heads, dim), angles(rows, dim), trained=1
    )


@EACH_DTYPE
@pytest.mark.parametrize("rows", (1, 2, 3, 8))
@pytest.mark.parametrize("inside, outside", ((40, 14), (4096, 11008), (4864, 896)))
def test_products_of_few_rows(device, dtype, rows, inside, outside):
    x, weight = drawn(rows, inside), drawn(2 * outside, inside, seed=1)
    check = partial(compare, device, dtype, product, "vector_product", x, weight)
    check()
    check(drawn(2 * outside, seed=2))
    if dtype == torch.float32:
        check(None, True)
    else:  # the gate's and the up's product are rounded first, there or here
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(LIMITS, dtype, 2e-2)
            check(None, True)


@EACH_DTYPE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", (1, 8, 33, 64))
def test_products_by_codes(device, dtype, rows, kind):
    if dtype == torch.bfloat16 and "TRITON_INTERPRET" in os.environ:
        pytest.skip("the interpreter's products take no bf16")
    weight = quantized(drawn(1300, 896, seed=1), kind)
    coded = weight.codes, weight.scales, levels_of_bytes(kind, CPU)

    def bound(function):
        return lambda x, bias: function(x, *(part.to(x.device) for part in coded), bias)

    functions = SimpleNamespace(
        product=bound(product_by_codes), plain_product=bound(plain_product_by_codes)
    )
    compare(device, dtype, functions, "product", drawn(rows, 896), drawn(1300, seed=2))


@pytest.mark.parametrize("width", (97, 32000, 151936))
@pytest.mark.parametrize("top_k, top_p, min_p", ((20, 1.0, 0.0), (0, 0.8, 0.01), (50, 0.95, 0.02)))
def test_thresholds(device, top_k, top_p, min_p, width):
    z = 3 * drawn(5, width)  # with many equal ones
    compare(device, torch.float32, threshold, "threshold", z, z.amax(1), top_k, top_p, min_p)


def pages(lengths: list[int], kv_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and the table; past a sequence's length the table has numbers of no page."""
    used = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(used) + 3, generator=torch.Generator().manual_seed(1)).int()
    table = torch.full((len(lengths), max(used) + 2), -(10**6), dtype=torch.int32)
    for row, part in zip(table, order.split([*used, 3])):
        row[: len(part)] = part
    shape = (len(order), kv_heads, PAGE, dim)
    return drawn(*shape, seed=3), drawn(*shape, seed=4), table


@EACH_DTYPE
@pytest.mark.parametrize("window", (0, 50))
@pytest.mark.parametrize(
    "heads, kv_heads, dim",
    ((32, 32, 128), (28, 4, 128), (8, 1, 64), (14, 2, 64), (4, 4, 12), (6, 2, 80), (4, 2, 256)),
)
def test_attention_over_pages(device, dtype, heads, kv_heads, dim, window):
    if device.type == "cpu" and dtype == torch.bfloat16 and heads // kv_heads > 2:
        pytest.skip("the interpreter's matrix products take no bf16")
    for lengths in ([1], [4097], [0, 1, 15, 16, 17, 200, 1030], [40 + i % 90 for i in range(64)]):
        if device.type == "cpu" and sum(lengths) > 2000:
            continue  # minutes, in the interpreter
        keys, values, table = pages(lengths, kv_heads, dim)
        inputs = (drawn(len(lengths), heads, dim), keys, values, table, torch.tensor(lengths))
        compare(device, dtype, attention, "paged_attention", *inputs, window)


@EACH_DTYPE
@pytest.mark.parametrize("has_norm", (False, True))
@pytest.mark.parametrize(
    "heads, kv_heads, dim", ((32, 32, 128), (28, 4, 128), (7, 1, 20), (4, 2, 12))
)
def test_keys_and_values_are_written(device, dtype, heads, kv_heads, dim, has_norm):
    positions = torch.tensor([0, -1, 15, 16, 40, 199])
    n = len(positions)
    keys, values, table = pages([200] * n, kv_heads, dim)
    norms = [drawn(dim, seed=i) if has_norm else None for i in (5, 6)]
    inputs = (drawn(n, (heads + 2 * kv_heads) * dim), (angles(n, dim), angles(n, dim, 7)))
    inputs += (keys, values, table, positions, heads, kv_heads, *norms, 1e-5)
    compare(device, dtype, rotation, "rotate_and_write", *inputs)
