"""What a decode step could reach on a GPU: one CUDA graph, and drafts of fused Triton kernels.

    python benchmarks/decode_kernels.py

With the 7B shape in bf16, random weights, no sampling, 192 tokens in every sequence's cache. Each
row says how far its logits are from those of the plain step. A step of the drafts has ten kernels a
layer. `TRITON_INTERPRET=1` with small sizes runs the same on a CPU, where only the errors matter.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from common import config_of, copy_rate, free_memory, random_model, seconds
from torch import Tensor

from src.cli import run
from src.generation.cache import Cache, Decode
from src.models.transformer import Transformer
from src.parallel.setup import start, stop

ON_GPU = torch.cuda.is_available()


@triton.jit
def add_norm_kernel(x, delta, weight, out, dim, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr):
    """A row of x: x += delta, out = norm(x) · weight."""
    row = tl.program_id(0) * dim
    i = tl.arange(0, BLOCK)
    inside = i < dim
    value = tl.load(x + row + i, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + row + i, mask=inside, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
        tl.store(x + row + i, value.to(x.dtype.element_ty), mask=inside)
    r = 1.0 / tl.sqrt(tl.sum(value * value, 0) / dim + eps)
    normed = (value * r).to(x.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + i, (normed * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_keep_kernel(
    qkv,
    lengths,
    cos,
    sin,
    q_out,
    keys,
    values,
    cache_length,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One head of one row: q turned, k turned and v into the cache."""
    row, head = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, HALF)
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF + 2 * pair
    a, b = tl.load(source).to(tl.float32), tl.load(source + 1).to(tl.float32)
    position = tl.load(lengths + row)
    c, s = tl.load(cos + position * HALF + pair), tl.load(sin + position * HALF + pair)
    turned_a, turned_b = a * c - b * s, a * s + b * c
    if head < HEADS:
        target = q_out + (row * HEADS + head) * 2 * HALF + 2 * pair
        tl.store(target, turned_a.to(q_out.dtype.element_ty))
        tl.store(target + 1, turned_b.to(q_out.dtype.element_ty))
    else:
        kv_head = (head - HEADS) % KV_HEADS
        place = ((row * KV_HEADS + kv_head).to(tl.int64) * cache_length + position) * 2 * HALF
        if head < HEADS + KV_HEADS:
            tl.store(keys + place + 2 * pair, turned_a.to(keys.dtype.element_ty))
            tl.store(keys + place + 2 * pair + 1, turned_b.to(keys.dtype.element_ty))
        else:
            tl.store(values + place + 2 * pair, a.to(values.dtype.element_ty))
            tl.store(values + place + 2 * pair + 1, b.to(values.dtype.element_ty))


@triton.jit
def attention_kernel(
    q,
    keys,
    values,
    lengths,
    out,
    lse,
    scale,
    cache_length,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A slot, a kv head, a part of its length: the length is read on the device."""
    slot, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(lengths + slot).to(tl.int32) + 1
    share = ((n + SPLITS - 1) // SPLITS + BLOCK - 1) // BLOCK * BLOCK
    first = split * share
    end = tl.minimum(first + share, n)
    g, d = tl.arange(0, PADDED), tl.arange(0, DIM)
    rows = (slot * KV_HEADS + head) * GROUP + g
    is_head = (g < GROUP)[:, None]
    query = tl.load(q + rows[:, None] * DIM + d[None, :], mask=is_head, other=0.0)
    query = query.to(tl.float32) * scale
    largest = tl.full([PADDED], -1e30, tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    mean = tl.zeros([PADDED, DIM], tl.float32)
    base = (slot * KV_HEADS + head).to(tl.int64) * cache_length * DIM
    for i in tl.range(first, end, BLOCK, num_stages=STAGES):
        p = i + tl.arange(0, BLOCK)
        inside = (p < end)[:, None]
        places = base + p[:, None] * DIM + d[None, :]
        k = tl.load(keys + places, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values + places, mask=inside, other=0.0).to(tl.float32)
        scores = tl.sum(query[:, None, :] * k[None, :, :], 2)  # [heads, positions]
        scores = tl.where((p < end)[None, :], scores, -1e30)
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink, weight = tl.exp(largest - larger), tl.exp(scores - larger[:, None])
        total = total * shrink + tl.sum(weight, 1)
        mean = mean * shrink[:, None] + tl.sum(weight[:, :, None] * v[None, :, :], 1)
        largest = larger
    mean = mean / tl.maximum(total, 1e-30)[:, None]
    rows = ((slot * KV_HEADS + head) * SPLITS + split) * GROUP + g
    tl.store(out + rows[:, None] * DIM + d[None, :], mean.to(out.dtype.element_ty), mask=is_head)
    if SPLITS > 1:
        log_total = tl.where(total > 0, largest + tl.log(tl.maximum(total, 1e-30)), -1e30)
        tl.store(lse + rows, log_total, mask=g < GROUP)


@triton.jit
def join_kernel(parts, lse, out, GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """The splits of one query head, weighted by their sums of exponentials."""
    i = tl.program_id(0)
    split, d = tl.arange(0, SPLITS), tl.arange(0, DIM)
    rows = (i // GROUP * SPLITS + split) * GROUP + i % GROUP
    weight = tl.load(lse + rows)
    weight = tl.exp(weight - tl.max(weight, 0))
    part = tl.load(parts + rows[:, None] * DIM + d[None, :])
    joined = tl.sum(part * (weight / tl.sum(weight, 0))[:, None], 0)
    tl.store(out + i * DIM + d, joined.to(out.dtype.element_ty))


@triton.jit
def vector_product_kernel(
    x, weight, out, k, n, PAIRED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out = W x for a few rows of W; PAIRED: silu(W₁ x) · (W₂ x), of W's two halves."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < n)[:, None]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    up_total = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(0, k, BLOCK):
        column = i + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < k, other=0.0).to(tl.float32)[None, :]
        mask = inside & (column < k)[None, :]
        places = rows[:, None].to(tl.int64) * k + column[None, :]
        total += tl.load(weight + places, mask=mask, other=0.0).to(tl.float32) * value
        if PAIRED:
            half = tl.cast(n, tl.int64) * k
            up = tl.load(weight + half + places, mask=mask, other=0.0).to(tl.float32)
            up_total += up * value
    result = tl.sum(total, 1)
    if PAIRED:
        result = result.to(out.dtype.element_ty).to(tl.float32)
        gated = (result * tl.sigmoid(result)).to(out.dtype.element_ty).to(tl.float32)
        result = gated * tl.sum(up_total, 1).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=rows < n)


@triton.jit
def swiglu_kernel(joined, out, n, width, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = i // width, i % width
    inside = i < n * width
    gate = tl.load(joined + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(joined + row * 2 * width + width + column, mask=inside, other=0.0)
    gated = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + i, (gated * up.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    out, dim = torch.empty_like(x), x.size(1)
    block = triton.next_power_of_2(dim)
    add_norm_kernel[(x.size(0),)](
        x, x if delta is None else delta, weight, out, dim, eps, delta is not None, block
    )
    return out


class Variant(NamedTuple):
    """How the attention kernel is compiled."""

    block: int
    splits: int
    warps: int
    stages: int


FEW_SEQUENCES = (Variant(32, 4, 4, 1), Variant(64, 4, 4, 2))
MANY_SEQUENCES = (Variant(32, 1, 4, 1), Variant(16, 1, 2, 3), Variant(32, 1, 2, 3))


def attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, how: Variant) -> Tensor:
    """q: [n, heads, head_dim]; keys, values: [n, kv heads, length, head_dim]; lengths: [n]."""
    n, heads, dim = q.shape
    kv_heads, length = keys.size(1), keys.size(2)
    group, out = heads // kv_heads, torch.empty_like(q)
    parts, lse = out, out
    if how.splits > 1:
        parts = q.new_empty(n * heads * how.splits, dim, dtype=torch.float32)
        lse = q.new_empty(n * heads * how.splits, dtype=torch.float32)
    attention_kernel[(n, kv_heads, how.splits)](
        q,
        keys,
        values,
        lengths,
        parts,
        lse,
        dim**-0.5,
        length,
        kv_heads,
        group,
        triton.next_power_of_2(group),
        dim,
        how.block,
        how.splits,
        how.stages,
        num_warps=how.warps,
    )
    if how.splits > 1:
        join_kernel[(n * heads,)](parts, lse, out, group, dim, how.splits)
    return out


def product(x: Tensor, weight: Tensor, paired: bool = False) -> Tensor:
    """x Wᵀ, of one row by Triton; paired: SwiGLU of its two halves."""
    n = weight.size(0) // (2 if paired else 1)
    if x.size(0) == 1:
        out = x.new_empty(1, n)
        grid = (triton.cdiv(n, 2),)
        vector_product_kernel[grid](x, weight, out, x.size(1), n, paired, 2, 1024)
        return out
    y = F.linear(x, weight)
    if not paired:
        return y
    out = x.new_empty(x.size(0), n)
    swiglu_kernel[(triton.cdiv(out.numel(), 1024),)](y, out, x.size(0), n, 1024)
    return out


def fused_step(
    model: Transformer, cache: Cache, last: Tensor, lengths: Tensor, how: Variant
) -> Tensor:
    """The logits after each sequence's newest token; `Decode` with the kernels above."""
    config = model.config
    table = model._rotary
    assert table is not None  # the plain step came before
    cos, sin = table.real.contiguous(), table.imag.contiguous()
    heads, kv_heads = config.n_heads, config.n_kv_heads
    x, delta = model.tok_embeddings(last).contiguous().clone(), None
    for i, block in enumerate(model.layers):
        h = add_norm(x, delta, block.attention_norm.weight, config.norm_eps)
        qkv = product(h, block.attention.projections.stacked.weight)
        q = x.new_empty(x.size(0), heads, config.head_dim)
        rotate_and_keep_kernel[(x.size(0), heads + 2 * kv_heads)](
            qkv,
            lengths,
            cos,
            sin,
            q,
            cache.keys[i],
            cache.values[i],
            cache.length,
            heads,
            kv_heads,
            config.head_dim // 2,
            num_warps=1,
        )
        out = attention(q, cache.keys[i], cache.values[i], lengths, how)
        delta = product(out.flatten(1), block.attention.wo.weight)
        h = add_norm(x, delta, block.ffn_norm.weight, config.norm_eps)
        gated = product(h, block.feed_forward.projections.stacked.weight, paired=True)
        delta = product(gated, block.feed_forward.w2.weight)
    return product(add_norm(x, delta, model.norm.weight, config.norm_eps), model.vocabulary_weight)


def replayed(work: Callable[[], Tensor], rounds: int = 20) -> tuple[float, Tensor]:
    """Seconds of one replay of the work's CUDA graph, and what it gave; without a GPU of a call."""
    result = work()
    if not ON_GPU:
        return seconds(work), result
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    graph.replay()
    took = []
    for _ in range(rounds):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        graph.replay()
        end_event.record()
        torch.cuda.synchronize()
        took.append(start_event.elapsed_time(end_event) / 1e3)
    return median(took), result.clone()


def steps(model: Transformer, device: torch.device, bandwidth: float, batches: list[int]) -> None:
    config = model.config
    weights = sum(p.nbytes for name, p in model.named_parameters() if "tok_embeddings" not in name)
    size = model.norm.weight.element_size()
    token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * size
    print("| step | ms | of the memory roofline | error of the logits |\n|---|---|---|---|")
    for n in batches:
        torch.manual_seed(0)
        cache = Cache(model, n, 224)
        for store in (*cache.keys, *cache.values):
            store.normal_()
        lengths = torch.full((n,), 192, device=device)
        last = torch.arange(n, device=device) % 500 + 1

        def plain(cache: Cache = cache, lengths=lengths, last=last, n=n) -> Tensor:
            layout = Decode(cache, lengths, lengths, [(0, n, cache.length)])
            return model.logits(model(last, layout))

        least = (weights + n * token * 193) / bandwidth
        took, logits = replayed(plain)
        print(f"| batch {n}, plain, in a graph | {1e3 * took:.2f} | {least / took:.2f} | 0 |")
        for how in FEW_SEQUENCES if n < 64 else MANY_SEQUENCES:
            took, result = replayed(partial(fused_step, model, cache, last, lengths, how))
            error = float((result - logits).float().norm() / logits.float().norm())
            print(
                f"| batch {n}, fused, {how.splits} splits of {how.block}, {how.warps} warps, "
                f"{how.stages} stages | {1e3 * took:.2f} | {least / took:.2f} | {error:.1e} |",
                flush=True,
            )
        del cache, plain
        free_memory()


def attentions(device: torch.device, dtype: torch.dtype, n: int, dim: int, length: int) -> None:
    """Of one layer: PyTorch's kernels with a mask, and the draft's variants."""
    bandwidth = copy_rate(device)
    print("\n| attention of one layer | us | of the cache's bytes |\n|---|---|---|")
    for heads, kv_heads in ((32, 32), (32, 8)):
        q = torch.randn(n, heads, dim, device=device).to(dtype)
        k, v = (
            torch.randn(n, kv_heads, length + 31, dim, device=device).to(dtype) for _ in range(2)
        )
        lengths = torch.full((n,), length, device=device)
        mask = torch.zeros(n, 1, 1, length + 31, dtype=dtype, device=device)
        mask[..., length + 1 :] = -torch.inf
        grouped = q.unflatten(1, (kv_heads, -1))
        least = 2 * n * kv_heads * (length + 1) * dim * k.element_size() / bandwidth
        label = f"{n} × {length} tokens, {heads}/{kv_heads} heads"

        library = partial(F.scaled_dot_product_attention, grouped, k, v, attn_mask=mask)
        for has_cudnn in (True, False) if ON_GPU else (False,):
            torch.backends.cuda.enable_cudnn_sdp(has_cudnn)
            took, reference = replayed(library)
            name = "cuDNN" if has_cudnn else "PyTorch's own"
            print(f"| {label}, {name} | {1e6 * took:.0f} | {least / took:.2f} |")
        variants = [
            Variant(block, 1, warps, stages)
            for block in (16, 32, 64)
            for warps in (2, 4, 8)
            for stages in (1, 3)
        ]
        rows = []
        for how in variants if ON_GPU else variants[:2]:
            took, result = replayed(partial(attention, q, k, v, lengths, how), 5)
            error = float((result - reference.flatten(1, 2)).float().norm() / reference.norm())
            rows.append((took, error, how))
        for took, error, how in sorted(rows)[:5]:
            print(f"| {label}, {how}, error {error:.0e} | {1e6 * took:.0f} | {least / took:.2f} |")


@torch.no_grad()
def main(
    dim: int = 4096,
    n_layers: int = 32,
    n_heads: int = 32,
    hidden_dim: int = 11008,
    batches: str = "1,8,64,256",
):
    """Measure and print.

    Args:
        dim: width of the model.
        n_layers: its layers.
        n_heads: its heads.
        hidden_dim: width of its feed-forward layers.
        batches: sequences in a step, several separated by commas.
    """
    parallel = start()
    device = parallel.device
    name = torch.cuda.get_device_name(device) if ON_GPU else "CPU"
    bandwidth = copy_rate(device)
    print(f"Device: {name}, torch {torch.__version__}, Triton {triton.__version__}.")
    print(f"Copies at {bandwidth / 1e9:.0f} GB/s.\n")
    dtype = torch.bfloat16 if ON_GPU else torch.float32  # the interpreter's bf16 is another one
    config = config_of(dim, n_layers, dim // n_heads, hidden_dim)
    model = random_model(config, parallel, dtype).eval()
    steps(model, device, bandwidth, [int(n) for n in batches.split(",")])
    del model
    free_memory()
    attentions(device, dtype, 256 if ON_GPU else 3, config.head_dim, 192)
    stop()


if __name__ == "__main__":
    run(main)
