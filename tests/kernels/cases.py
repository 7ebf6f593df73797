"""What `test_kernels.py` runs in Triton's interpreter, where bf16 is cut off instead of rounded."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pkgutil import resolve_name
from threading import Barrier

import pytest
import torch
from torch import nn

from src.generation.sampling import Sampling, _threshold
from src.kernels import runtime
from src.kernels.attention import Variant, paged_attention, plain_paged_attention, variant
from src.kernels.codes import plain_product_by_codes, product_by_codes
from src.kernels.norm import add_rms_norm, plain_add_rms_norm, plain_rms_norm, rms_norm
from src.kernels.product import plain_vector_product, vector_product
from src.kernels.rotation import (
    plain_rotate,
    plain_rotate_and_write,
    rotate,
    rotate_and_write,
)
from src.kernels.swiglu import plain_swiglu, swiglu
from src.kernels.threshold import plain_threshold, threshold
from src.models.batch import Batch, Sequence, response_loss
from src.models.config import ModelConfig
from src.models.quantize import KINDS, levels_of_bytes, quantized
from src.models.transformer import CHECKPOINTING as RECOMPUTED
from src.models.transformer import build
from src.parallel.layers import SKINNY_ROWS, linear

assert hasattr(runtime.triton, "__version__")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(ours, wanted):
    assert ours.shape == wanted.shape and torch.isfinite(ours).all()
    error = (ours.double() - wanted.double()).abs().max()
    assert error <= TOLERANCE[ours.dtype] * wanted.double().abs().max().clamp_min(1e-3), error


class Pages:
    """Keys and values of sequences in pages that lie anywhere, what was not written being NaN."""

    def __init__(self, lengths, kv_heads, dim, dtype=torch.float32, page=16):
        used = [-(-length // page) for length in lengths]
        order = torch.randperm(sum(used) + 2, generator=torch.Generator().manual_seed(1)).tolist()
        shape = (len(order), kv_heads, page, dim)
        self.keys, self.values = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        # of a wider table, as the engine's rows are; what is not used is no page at all
        wide = torch.full((len(lengths), 2 * max(used) + 3), -(10**6), dtype=torch.int32)
        self.table, self.lengths = wide[:, : max(used) + 2], torch.tensor(lengths)
        self.rows = []
        for i, length in enumerate(lengths):
            row = [order.pop() for _ in range(used[i])]
            self.table[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
            k, v = (drawn(length, kv_heads, dim, dtype=dtype, seed=10 * i + j) for j in (1, 2))
            for store, new in ((self.keys, k), (self.values, v)):
                for t in range(length):
                    store[row[t // page], :, t % page] = new[t]
            self.rows.append((k.double(), v.double()))


def attended(q, pages, window):
    """In fp64, sequence by sequence and head by head."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for i, (k, v) in enumerate(pages.rows):
        k, v = (x[-window:] if window else x for x in (k, v))
        group = q.size(1) // k.size(1)
        for head in range(q.size(1)):
            if len(k):
                scores = k[:, head // group] @ q[i, head].double() / q.size(2) ** 0.5
                out[i, head] = scores.softmax(0) @ v[:, head // group]
    return out


def check_attention(
    lengths, heads, kv_heads, dim, window=0, dtype=torch.float32, how=None, page=16
):
    pages = Pages(lengths, kv_heads, dim, dtype, page)
    q = drawn(len(lengths), heads, dim, dtype=dtype)
    wanted = attended(q, pages, window)
    inputs = (q, pages.keys, pages.values, pages.table, pages.lengths, window)
    close(paged_attention(*inputs, how=how), wanted)
    close(plain_paged_attention(*inputs), wanted)


@pytest.mark.parametrize("dim", (4, 12, 20, 64, 80, 96, 128, 256))
def test_attention_of_every_familys_heads(dim):
    for heads, kv_heads in ((3, 3), (4, 2), (4, 1), (7, 1), (8, 1)):
        check_attention([5, 0, 40], heads, kv_heads, dim)


@pytest.mark.parametrize("length", (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 300, 1024, 4097))
def test_attention_of_every_length(length):
    check_attention([length], 4, 1, 12)
    check_attention([length], 1, 1, 12)
    check_attention([length], 1, 1, 12, how=Variant(64, 1, 4, 1, False))


@pytest.mark.parametrize("window", (1, 15, 16, 17, 50, 1000))
def test_attention_of_a_window(window):
    for heads in (2, 7):
        check_attention([1, 16, 49, 50, 51, 130], heads, 1, 20, window)


@pytest.mark.parametrize("splits", (1, 2, 16))
def test_attention_in_splits(splits):
    for product, heads in ((False, 2), (True, 4)):
        how = Variant(16, splits, 4, 1, product)
        check_attention([0, 3, 33, 200], heads, 1, 64, how=how)
        check_attention([200], heads, 1, 64, 70, how=how)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_attention_in_half_precision(dtype):
    check_attention([0, 33, 200], 2, 1, 64, dtype=dtype)
    if dtype == torch.float16:  # the interpreter's products take no bf16
        check_attention([0, 33, 200], 8, 1, 64, dtype=dtype)


def test_attention_of_longer_pages():
    check_attention([1, 47, 48, 49, 150], 4, 2, 12, page=48)


def test_attention_of_many_sequences_is_not_split():
    q, keys = torch.empty(256, 32, 128), torch.empty(1, 32, 16, 128)
    assert variant(q.bfloat16(), keys, 256) == Variant(16, 1, 2, 3, False)
    assert variant(q[:1], keys, 256).splits > 1


def angles(n, dim, seed=0):
    """Complex numbers that do not only turn: Qwen v1 scales its queries."""
    return torch.polar(drawn(n, dim // 2, seed=seed).abs() + 0.5, drawn(n, dim // 2, seed=seed + 1))


def turned(x, rotary):
    """Pairs of columns in fp64: [n, heads, dim] and [n, dim / 2]."""
    cos, sin = rotary.real.double().unsqueeze(1), rotary.imag.double().unsqueeze(1)
    a, b = x.double()[..., ::2], x.double()[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def normed(x, weight, eps):
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_norm", (False, True))
@pytest.mark.parametrize("heads, kv_heads, dim", ((3, 3, 4), (4, 1, 12), (7, 1, 20), (8, 2, 128)))
def test_keys_and_values_are_written_to_their_pages(heads, kv_heads, dim, has_norm, dtype):
    positions = torch.tensor([0, -1, 15, 16, 40])
    n = len(positions)
    qkv = drawn(n, (heads + 2 * kv_heads) * dim + 6, dtype=dtype)[:, 6:]
    rotary, table = (angles(n, dim), angles(n, dim, 7)), torch.randperm(3 * n).view(n, 3).int()
    table[1] = 10**6  # the row that is not there has no pages
    q_norm, k_norm = (drawn(dim, dtype=dtype, seed=i) if has_norm else None for i in (3, 4))
    q, k, v = qkv.unflatten(1, (-1, dim)).split((heads, kv_heads, kv_heads), 1)
    if has_norm:
        q, k = normed(q, q_norm, 1e-2), normed(k, k_norm, 1e-2)
    q, k = turned(q, rotary[0]), turned(k, rotary[1])
    for function in (rotate_and_write, plain_rotate_and_write):
        keys, values = (torch.full((3 * n, kv_heads, 16, dim), 7.0, dtype=dtype) for _ in "kv")
        places = (rotary, keys, values, table, positions)
        close(function(qkv, *places, heads, kv_heads, q_norm, k_norm, 1e-2), q)
        for store, new in ((keys, k), (values, v)):
            for row, position in enumerate(positions.tolist()):
                if position >= 0:
                    place = store[table[row, position // 16], :, position % 16]
                    close(place, new[row])
                    place.fill_(7.0)
            assert (store == 7).all()  # nothing else was touched


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", (12, 64, 2304))
def test_the_residual_is_added_and_normed(dim, dtype):
    x, weight = drawn(5, dim + 3, dtype=dtype)[:, 3:], drawn(dim, dtype=dtype, seed=2)
    for delta in (None, drawn(5, dim, dtype=dtype, seed=1)):
        total = x if delta is None else x + delta
        before = x.clone()
        for function in (add_rms_norm, plain_add_rms_norm):
            ours = function(x, delta, weight, 1e-2)
            close(ours[0], total)
            close(ours[1], normed(total, weight, 1e-2))
        assert torch.equal(x, before)


def gradients(function, up, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, up.to(out.dtype))


# More rows than one program takes, and rows wider than a block. What else there is, strides and
# dtypes and frozen weights, is tested by tests/models/test_elementwise.py, which runs beside this.
@pytest.mark.parametrize("shape", ((100, 3, 64), (20, 2304)))
def test_gradients_of_many_rows(shape):
    x, up, weight = drawn(*shape), drawn(*shape, seed=1), drawn(shape[-1], seed=2)
    norms = (partial(function, eps=1e-2) for function in (rms_norm, plain_rms_norm))
    cases = [(*norms, up, x, weight), (swiglu, plain_swiglu, up[..., ::2], x)]
    if len(shape) == 3:
        turns = (partial(function, rotary=angles(100, 64)) for function in (rotate, plain_rotate))
        cases.append((*turns, up, x))
    for ours, plain, up, *inputs in cases:
        for a, b in zip(gradients(ours, up, *inputs), gradients(plain, up, *inputs)):
            close(a, b)


@pytest.mark.usefixtures("parallel")
def test_a_models_gradients_with_and_without_recomputation(monkeypatch):
    config = ModelConfig(16, 2, 4, 2, 8, 32, 20, max_seq_len=16, qk_norm=True)
    model = build(config, 0, 1, torch.float32).to_empty(device="cpu")
    for i, weight in enumerate(model.parameters()):
        weight.data = 0.3 * drawn(*weight.shape, seed=i)
    batch = Batch.of([Sequence([1, 5, 9, 3, 2], 2), Sequence([1, 4, 2], 1)], "cpu")
    found, called = {}, Counter()
    for name in ("norm.rms_norm", "swiglu.swiglu", "rotation.rotate"):
        kernel = resolve_name(f"src.kernels.{name}")

        def counted(*inputs, name=name, kernel=kernel):
            called[name] += 1
            return kernel(*inputs)

        monkeypatch.setattr(f"src.kernels.{name}", counted)
    for kernels, recompute in ((False, "none"), *((True, how) for how in ("none", *RECOMPUTED))):
        monkeypatch.setattr(runtime, "takes", lambda x, kernels=kernels: kernels)
        model.recompute = recompute
        model.zero_grad()
        response_loss(model, batch, lambda logprobs, *_: -logprobs.sum()).backward()
        found[kernels, recompute] = [weight.grad for weight in model.parameters()]
    # Three forwards of two layers with four norms, and one at the end; two recompute the layers.
    assert called == {"norm.rms_norm": 27 + 16, "swiglu.swiglu": 10, "rotation.rotate": 20}
    for how in ("none", *RECOMPUTED):
        for a, b in zip(found[True, how], found[False, "none"]):
            close(a, b)
        assert all(map(torch.equal, found[True, how], found[True, "none"]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n, inside, outside", ((1, 40, 7), (1, 2100, 6), (3, 300, 5), (8, 64, 8)))
def test_products_of_few_rows(n, inside, outside, dtype):
    x = drawn(n, inside + 3, dtype=dtype)[:, 3:]
    weight, bias = (drawn(2 * outside, *more, dtype=dtype) for more in ((inside,), ()))
    product = x.double() @ weight.double().t()
    gate, up = product.chunk(2, -1)
    for function in (vector_product, plain_vector_product):
        close(function(x, weight), product)
        close(function(x, weight, bias), product + bias.double())
        close(function(x, weight, paired=True), gate / (1 + (-gate).exp()) * up)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))  # the interpreter takes no bf16
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, inside, outside", ((1, 64, 33), (3, 200, 7), (17, 130, 40)))
def test_products_by_codes(n, inside, outside, kind, dtype):
    weight = quantized(drawn(outside, inside, dtype=dtype), kind)
    whole = weight.dequantized(dtype).double()
    x, bias = drawn(n, inside + 3, dtype=dtype, seed=1)[:, 3:], drawn(outside, dtype=dtype, seed=2)
    coded = weight.codes, weight.scales, levels_of_bytes(kind, x.device)
    for function in (product_by_codes, plain_product_by_codes):
        close(function(x, *coded), x.double() @ whole.t())
        close(function(x, *coded, bias), x.double() @ whole.t() + bias.double())


class Unlike(torch.Tensor):
    pass


def test_which_products_the_kernel_makes(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(
        "src.kernels.product.vector_product",
        lambda *inputs: calls.append(inputs) or vector_product(*inputs),
    )
    x, weight, bias = (drawn(*s, dtype=torch.float16) for s in ((SKINNY_ROWS, 40), (7, 40), (7,)))
    with torch.no_grad():
        close(linear(x, weight, bias), x.double() @ weight.double().t() + bias.double())
        assert len(calls) == 1
        close(linear(x, nn.Parameter(weight)), x.double() @ weight.double().t())
        assert len(calls) == 2
        linear(drawn(SKINNY_ROWS + 1, 40, dtype=torch.float16), weight)  # more rows
        linear(x, drawn(40, 7, dtype=torch.float16).t())  # other strides
        linear(x.float(), weight.float())  # full precision
        linear(x, weight.as_subclass(Unlike))  # a weight that multiplies in its own way
    linear(x, weight)  # with gradients
    assert len(calls) == 2


def on_two_ranks(z, *how):
    """`plain_threshold` of the halves of z, which agree on sums as ranks would."""
    parts, met = [None, None], Barrier(2, timeout=60)

    def rank(i, columns):
        def summed(x):
            parts[i] = x
            met.wait()
            total = parts[0] + parts[1]
            met.wait()
            return total

        return plain_threshold(columns, *how, summed)

    halves = z.split(z.size(1) // 2 + 5, 1)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2), halves)
    assert torch.equal(first, second)
    return first


@pytest.mark.usefixtures("parallel")
@pytest.mark.parametrize("top_k", (0, 1, 5, 5000))
def test_thresholds_are_where_sorting_finds_them(top_k, monkeypatch):
    monkeypatch.setattr("src.kernels.threshold.BLOCK", 1024)  # quicker, interpreted
    z = 4 * drawn(6, 600)
    z[1] = z[1].round()  # many are equal, -0.0 and 0.0 among them
    z[2] = 0.0  # all are
    z[3, ::2] = -torch.inf
    z[4, 7] = 20.0  # one has nearly all the mass
    z[5] *= 1e-3
    top, is_possible = z.amax(1), z > -torch.inf
    for top_p, min_p in ((1e-6, 0.0), (0.3, 0.2), (0.99, 0.0), (1.0, 0.01)):
        sampling, how = Sampling(top_k=top_k, top_p=top_p, min_p=min_p), (top_k, top_p, min_p)
        kept = is_possible & (z >= _threshold(z, sampling, top).unsqueeze(1))
        for function in (threshold, plain_threshold, on_two_ranks):
            ours = is_possible & (z >= function(z, top, *how).unsqueeze(1))
            assert torch.equal(ours, kept), how


@pytest.mark.usefixtures("parallel")
def test_the_threshold_of_a_vocabulary_that_takes_several_blocks():
    z = torch.cat((3 * drawn(2, 5000), torch.full((2, 1), torch.nan)), 1)[:, :5000]
    top = z.amax(1)
    for top_k, top_p in ((0, 0.8), (700, 0.95)):
        wanted = _threshold(z, Sampling(top_k=top_k, top_p=top_p), top)
        assert torch.equal(threshold(z, top, top_k, top_p, 0.0), wanted)
