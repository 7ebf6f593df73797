"""What `test_kernels.py` runs in Triton's interpreter, where bf16 is cut off instead of rounded."""

import pytest
import torch

from src.kernels import runtime
from src.kernels.attention import Variant, paged_attention, plain_paged_attention, variant
from src.kernels.norm import add_rms_norm, plain_add_rms_norm, plain_rms_norm, rms_norm
from src.kernels.rotation import (
    plain_rotate,
    plain_rotate_and_write,
    rotate,
    rotate_and_write,
)
from src.kernels.swiglu import plain_swiglu, swiglu
from src.models import elementwise
from src.models.batch import Batch, Sequence, response_loss
from src.models.config import ModelConfig
from src.models.transformer import CHECKPOINTING as RECOMPUTED
from src.models.transformer import build

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
    for product, heads in ((False, 2), (True, 8)):
        how = Variant(16, splits, 4, 1, product)
        check_attention([0, 3, 33, 200], heads, heads // 2, 64, how=how)
        check_attention([200], heads, heads // 2, 64, 70, how=how)


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
    cases = [(rms_norm, plain_rms_norm, up, (x, weight), (1e-2,)),
             (swiglu, plain_swiglu, up[..., ::2], (x,), ())]  # fmt: skip
    if len(shape) == 3:
        cases.append((rotate, plain_rotate, up, (x,), (angles(100, 64),)))
    for ours, plain, up, inputs, rest in cases:
        wanted = gradients(lambda *x: plain(*x, *rest), up, *inputs)
        for a, b in zip(gradients(lambda *x: ours(*x, *rest), up, *inputs), wanted):
            close(a, b)


@pytest.mark.usefixtures("parallel")
def test_a_models_gradients_with_and_without_recomputation(monkeypatch):
    config = ModelConfig(16, 2, 4, 2, 8, 32, 20, max_seq_len=16, qk_norm=True)
    model = build(config, 0, 1, torch.float32).to_empty(device="cpu")
    for i, weight in enumerate(model.parameters()):
        weight.data = 0.3 * drawn(*weight.shape, seed=i)
    batch = Batch.of([Sequence([1, 5, 9, 3, 2], 2), Sequence([1, 4, 2], 1)], "cpu")
    found = {}
    for kernels, recompute in ((False, "none"), *((True, how) for how in ("none", *RECOMPUTED))):
        monkeypatch.setattr(elementwise, "_has_kernels", lambda x, kernels=kernels: kernels)
        model.recompute = recompute
        model.zero_grad()
        response_loss(model, batch, lambda logprobs, *_: -logprobs.sum()).backward()
        found[kernels, recompute] = [weight.grad for weight in model.parameters()]
    for how in ("none", *RECOMPUTED):
        for a, b in zip(found[True, how], found[False, "none"]):
            close(a, b)
        assert all(map(torch.equal, found[True, how], found[True, "none"]))
