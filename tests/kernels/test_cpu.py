"""The CPU's kernels in C, beside plain PyTorch in fp64."""

import ctypes
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from src.generation.sampling import uniforms
from src.kernels import cpu
from src.kernels.attention import plain_paged_attention
from src.kernels.cpu import FEW_BY_CODES
from src.kernels.norm import plain_add_rms_norm
from src.kernels.rotation import plain_rotate_and_write
from src.models.quantize import KINDS, Quantized, levels_of_bytes, quantized

PAGE = 16
HEADS = [(4, 4), (8, 2), (8, 1), (7, 1), (14, 2)]  # query and kv heads: ratios 1, 4, 8, 7
DIMS = [4, 12, 20, 64, 80, 96, 128, 256]
LENGTHS = [0, 1, 2, 15, 16, 17, 100, 333]

pytestmark = pytest.mark.skipif(
    cpu.library() is None, reason="there is no C compiler: PyTorch's operators do the work"
)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def case(lengths, heads, kv_heads, dim, dtype, seed=0):
    """Queries, pages in random order of which only what is seen has numbers, and their table."""
    g = torch.Generator().manual_seed(seed)
    width = max(-(-n // PAGE) for n in lengths) + 1
    n_pages = len(lengths) * width
    q = torch.randn(len(lengths), heads, dim, generator=g).to(dtype)
    keys, values = (
        torch.randn(n_pages, kv_heads, PAGE, dim, generator=g).to(dtype) for _ in range(2)
    )
    table = torch.randperm(n_pages, generator=g).view(len(lengths), width).int()
    for row, length in zip(table, lengths):
        for i, page in enumerate(row):
            for store in (keys, values):
                store[page, :, max(0, length - i * PAGE) :] = torch.nan
    return q, keys, values, table, torch.tensor(lengths)


@pytest.mark.parametrize("window", (0, 1, 5, 64))
@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("dim", DIMS)
def test_attention_over_pages(dim, heads, kv_heads, window):
    q, keys, values, table, lengths = case(LENGTHS, heads, kv_heads, dim, torch.float32)
    wanted = plain_paged_attention(
        q.double(), keys.double(), values.double(), table, lengths, window
    )
    out = cpu.paged_attention(q, keys, values, table, lengths, window)
    assert (out.double() - wanted).abs().max() < 3e-6
    assert (out[0] == 0).all()  # it sees nothing


def test_attention_over_long_sequences():
    """Lengths up to 4,097, in fp32 and bf16."""
    for dtype, error in ((torch.float32, 3e-6), (torch.bfloat16, 4e-3)):
        q, keys, values, table, lengths = case([1, 1000, 4096, 4097], 4, 2, 64, dtype)
        wanted = plain_paged_attention(
            q.double(), keys.double(), values.double(), table, lengths, 0
        )
        out = cpu.paged_attention(q, keys, values, table, lengths, 0)
        assert out.dtype == dtype and (out.double() - wanted).abs().max() < error


def test_attention_does_not_depend_on_the_batch():
    """Bit for bit: alone, beside others, by a table that is a part of a wider one, on two threads.

    Neither do products of few rows.
    """
    q, keys, values, table, lengths = case(LENGTHS, 4, 2, 64, torch.float32)
    together = cpu.paged_attention(q, keys, values, table, lengths)
    x, weight = q[:3, 0].contiguous(), torch.randn(50, 64)
    products = cpu.few_rows(x, weight)
    assert torch.equal(cpu.few_rows(x[1:2].contiguous(), weight)[0], products[1])
    torch.set_num_threads(2)
    assert torch.equal(cpu.paged_attention(q, keys, values, table, lengths), together)
    assert torch.equal(cpu.few_rows(x, weight), products)
    for i, length in enumerate(LENGTHS):
        width = -(-length // PAGE)
        alone = cpu.paged_attention(
            q[i : i + 1], keys, values, table[i : i + 1, :width], lengths[i : i + 1]
        )
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("dtype, error", ((torch.float32, 2e-6), (torch.bfloat16, 4e-3)))
@pytest.mark.parametrize("rows", (1, 2, 3, 4))
def test_products_of_few_rows(rows, dtype, error):
    g = torch.Generator().manual_seed(rows)
    for n, size in ((1, 1), (7, 5), (33, 64), (50, 97)):
        x, weight, bias = (
            torch.randn(shape, generator=g).to(dtype) for shape in ((rows, size), (n, size), (n,))
        )
        for b in (None, bias):
            wanted = torch.nn.functional.linear(
                x.double(), weight.double(), None if b is None else b.double()
            )
            out = cpu.few_rows(x, weight, b)
            assert out.dtype == dtype
            assert ((out.double() - wanted).abs() / (1 + wanted.abs())).max() < error * size**0.5
        if n % 2 == 0:  # as gate and up: the bits of the two kernels one after the other
            gated = cpu.few_rows_gated(x, weight)
            assert torch.equal(gated, cpu.swiglu(cpu.few_rows(x, weight)))


@pytest.mark.parametrize("size", (1, 7, 255, 256, 257, 1000, 4099))
def test_draws_are_the_inverse_of_the_cumulated_mass(size):
    """Beside NumPy in double precision, at the same numbers; with holes, and far below the top."""
    n = 400
    g = torch.Generator().manual_seed(size)
    z = (
        torch.randn(n, size, generator=g)
        * torch.tensor([0.1, 3.0, 30.0, 300.0]).repeat(n // 4)[:, None]
    )
    z[torch.rand(n, size, generator=g) < 0.3] = -torch.inf
    z[:, size // 2] = 0.0  # something is left of every row
    samples, steps = torch.arange(n) * 3, torch.arange(n) % 5
    top = z.amax(-1)
    tokens, logprobs = cpu.draw(z, top, 11, samples, steps)
    p = np.exp((z - top[:, None]).double().numpy())
    cumulated = p.cumsum(-1)
    target = uniforms(11, samples, steps).numpy() * cumulated[:, -1]
    wanted = (cumulated > target[:, None]).argmax(-1)
    rows = np.arange(n)
    # a number so near a border may fall on either side of it
    edges = np.abs(cumulated - target[:, None]).min(-1) / cumulated[:, -1]
    assert ((tokens.numpy() == wanted) | (edges < 1e-6)).all() and (edges < 1e-6).sum() < 5
    assert (p[rows, tokens] > 0).all()
    mass = np.log(p[rows, tokens] / cumulated[:, -1])
    assert np.abs(logprobs.numpy() - mass).max() < 2e-6 * (1 + np.abs(mass).max())


def test_draws_do_not_depend_on_the_batch():
    """Alone, beside others and on two threads."""
    z, samples, steps = torch.randn(9, 700), torch.arange(9), torch.full((9,), 4)
    together = cpu.draw(z, z.amax(-1), 3, samples, steps)
    torch.set_num_threads(2)
    for other, part in zip(cpu.draw(z, z.amax(-1), 3, samples, steps), together):
        assert torch.equal(other, part)
    for i in range(9):
        part = slice(i, i + 1)
        row = z[part].contiguous()
        alone = cpu.draw(row, row.amax(-1), 3, samples[part], steps[part])
        assert torch.equal(alone[0], together[0][part]) and torch.equal(alone[1], together[1][part])


@pytest.mark.parametrize("dtype, error", ((torch.float32, 2e-6), (torch.bfloat16, 4e-3)))
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_few_rows_by_codes(kind, dtype, error):
    """Beside the dequantised weight in fp64; rows that are no multiple of a block long, too."""
    levels_of_bytes(kind, torch.device("cpu"))  # made once, by dequantising each byte
    g = torch.Generator().manual_seed(3)
    for rows, n, size in ((1, 1, 64), (3, 7, 5), (16, 33, 128), (5, 50, 200)):
        x, plain, bias = (
            torch.randn(shape, generator=g).to(dtype) for shape in ((rows, size), (n, size), (n,))
        )
        weight = quantized(plain, kind)
        whole, calls = weight.dequantized(dtype).double(), []
        for b in (None, bias):
            wanted = torch.nn.functional.linear(
                x.double(), whole, None if b is None else b.double()
            )
            with torch.no_grad(), mock.patch.object(Quantized, "dequantized", calls.append):
                out = torch.nn.functional.linear(x, weight, b)
            assert out.dtype == dtype and not calls
            assert ((out.double() - wanted).abs() / (1 + wanted.abs())).max() < error * size**0.5
    with torch.no_grad():  # more rows, or a gradient: by the weight as a whole
        many = x.repeat(FEW_BY_CODES, 1)
        assert torch.equal(
            torch.nn.functional.linear(many, weight),
            torch.nn.functional.linear(many, weight.dequantized(dtype)),
        )
    assert torch.equal(
        torch.nn.functional.linear(x, weight),
        torch.nn.functional.linear(x, weight.dequantized(dtype)),
    )


def test_rounding_to_bf16_is_torch():
    """Of sums that lie between two numbers, ties and infinities among them."""
    x = torch.cat((torch.randn(2000) * 10, torch.tensor([1.00390625, 1.01171875, torch.inf])))
    high = x.bfloat16()
    # x · 1 with a bias: the sum of two bf16 numbers is exact in fp32
    bias = (x - high.float()).nan_to_num(0).bfloat16()
    out = torch.stack(
        [
            cpu.few_rows(torch.ones(1, 1).bfloat16(), h.view(1, 1), b.view(1))[0, 0]
            for h, b in zip(high, bias)
        ]
    )
    assert torch.equal(out, (high.float() + bias.float()).bfloat16())


def test_what_it_takes():
    x = torch.randn(4, 6)
    assert cpu.takes(x, None, x) and cpu.takes(x.bfloat16())
    assert not cpu.takes(x.t()) and not cpu.takes(x.half()) and not cpu.takes(x.double())
    assert not cpu.takes(x, x.bfloat16())


@pytest.mark.parametrize("compiler", ("none", "broken"))
def test_without_a_compiler_pytorch_does_it(compiler, tmp_path):
    """A machine whose compiler is missing, or fails, generates all the same."""
    command = tmp_path / "cc"
    if compiler == "broken":
        command.write_text("#!/bin/sh\necho 'no OpenMP here' >&2\nexit 1\n")
        command.chmod(0o700)
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "import torch; from src.kernels import cpu\n"
        "assert cpu.library() is None and not cpu.takes(torch.ones(2))\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path)}
    environment.pop("CC", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reason = "there is no C compiler" if compiler == "none" else "no OpenMP here"
    assert reason in done.stderr


def test_compiled_once(tmp_path, monkeypatch):
    """The second process finds what the first has compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cpu.library.__wrapped__()
    compiled = [*tmp_path.rglob("*.so")]
    assert isinstance(first, ctypes.CDLL) and len(compiled) == 1
    when = compiled[0].stat().st_mtime_ns
    cpu.library.__wrapped__()
    assert [*tmp_path.rglob("*.so")] == compiled and compiled[0].stat().st_mtime_ns == when


@pytest.mark.parametrize("dtype, error", ((torch.float32, 2e-6), (torch.bfloat16, 0)))
@pytest.mark.parametrize("rows, dim", ((1, 5), (3, 64), (7, 97)))
def test_norm_and_residual(rows, dim, dtype, error):
    """bf16: rounded where the plain code rounds, so the same numbers, but for sums near a tie."""
    g = torch.Generator().manual_seed(dim)
    x, delta, weight = (
        torch.randn(shape, generator=g).to(dtype) for shape in ((rows, dim), (rows, dim), (dim,))
    )
    for d in (None, delta):
        total, out = cpu.add_rms_norm(x, d, weight, 1e-5)
        wanted_total, wanted = plain_add_rms_norm(x, d, weight, 1e-5)
        assert torch.equal(total, wanted_total) and out.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(out, wanted, atol=error, rtol=error)
        else:
            assert (out != wanted).float().mean() < 0.02
            torch.testing.assert_close(out, wanted, atol=0, rtol=2**-7)


@pytest.mark.parametrize("dtype, error", ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)))
def test_swiglu(dtype, error):
    g = torch.Generator().manual_seed(0)
    joined = (torch.randn(5, 2 * 37, generator=g) * 4).to(dtype)
    joined[0, :4] = torch.tensor([0.0, -0.0, 100.0, -100.0])
    gate, up = joined.double().chunk(2, -1)
    wanted = torch.nn.functional.silu(gate) * up
    out = cpu.swiglu(joined)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, atol=1e-6, rtol=2 * error)


@pytest.mark.parametrize("dtype, error", ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)))
@pytest.mark.parametrize("has_norms", (False, True))
@pytest.mark.parametrize("heads, kv_heads, dim", ((4, 4, 4), (8, 2, 12), (7, 1, 64)))
def test_rotation_and_cache_write(heads, kv_heads, dim, has_norms, dtype, error):
    """By a table whose rows are no neighbours too; queries and keys have their own rotations."""
    g = torch.Generator().manual_seed(dim)
    positions = torch.tensor([0, 15, -1, 16, 40])
    n, pages = len(positions), 17
    qkv = torch.randn(n, (heads + 2 * kv_heads) * dim, generator=g).to(dtype)
    rotary = [
        torch.polar(torch.ones(n, dim // 2), torch.randn(n, dim // 2, generator=g))
        for _ in range(2)
    ]
    table = torch.randperm(pages - 1, generator=g)[: 3 * n].int().view(3, n).t() + 1  # [n, 3]
    norms = [torch.randn(dim, generator=g).to(dtype) if has_norms else None for _ in range(2)]
    stores = [torch.zeros(pages, kv_heads, PAGE, dim, dtype=dtype) for _ in range(4)]
    given = qkv, rotary
    rest = table, positions, heads, kv_heads, *norms, 1e-5
    wanted = plain_rotate_and_write(*given, *stores[:2], *rest)
    q = cpu.rotate_and_write(*given, *stores[2:], *rest)
    torch.testing.assert_close(q, wanted, atol=error, rtol=error)
    torch.testing.assert_close(stores[2], stores[0], atol=error, rtol=error)
    assert torch.equal(stores[3], stores[1]) and stores[1].any()


def test_outside_of_a_decode_step_norms_keep_their_bits():
    x = torch.randn(4, 8)
    assert not cpu.decodes(x)
    with cpu.decode_step():
        assert cpu.decodes(x)
        with cpu.decode_step():
            assert cpu.decodes(x)
        assert cpu.decodes(x)
    assert not cpu.decodes(x)
