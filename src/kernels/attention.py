"""Attention of one new token per sequence, over keys and values that lie in pages.

The grid follows from shapes alone, and lengths are read on the device, so a CUDA graph can hold it.
Where sequences and heads are too few to fill the GPU each length is cut into splits (arXiv
2311.01282), which a second kernel joins.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from src.kernels.runtime import dense_rows, power_of_two, tl, triton
from src.parallel import deterministic


@triton.jit
def attention_kernel(
    q,
    keys,
    values,
    table,
    lengths,
    out,
    log_sums,
    scale,
    q_row,
    q_head,
    page_stride,
    head_stride,
    token_stride,
    table_row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A sequence, a kv head with the GROUP heads that share it, and a split of its keys."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - WINDOW, 0)
    share = ((length - begin + SPLITS - 1) // SPLITS + BLOCK - 1) // BLOCK * BLOCK
    first = begin + split * share
    end = tl.minimum(first + share, length)

    g, d = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    is_head, is_column = (g < GROUP)[:, None], (d < DIM)[None, :]
    columns = row * q_row + (head * GROUP + g)[:, None] * q_head + d[None, :]
    query = tl.load(q + columns, mask=is_head & is_column, other=0.0)
    if not PRODUCT:
        query = query.to(tl.float32) * scale
    largest = tl.full([PADDED], -1e30, tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    mean = tl.zeros([PADDED, WIDTH], tl.float32)
    for i in tl.range(first, end, BLOCK, num_stages=STAGES):
        p = i + tl.arange(0, BLOCK)
        inside = p < end
        page = tl.load(table + row * table_row + p // PAGE, mask=inside, other=0).to(tl.int64)
        token = page * page_stride + head * head_stride + p % PAGE * token_stride
        places, is_there = token[:, None] + d[None, :], inside[:, None] & is_column
        k = tl.load(keys + places, mask=is_there, other=0.0)
        v = tl.load(values + places, mask=is_there, other=0.0)
        if PRODUCT:
            scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        else:
            scores = tl.sum(query[:, None, :] * k.to(tl.float32)[None, :, :], 2)
        scores = tl.where(inside[None, :], scores, -1e30)  # [heads, keys]
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink, weight = tl.exp(largest - larger), tl.exp(scores - larger[:, None])
        total = total * shrink + tl.sum(weight, 1)
        if PRODUCT:
            part = tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        else:
            part = tl.sum(weight[:, :, None] * v.to(tl.float32)[None, :, :], 1)
        mean = mean * shrink[:, None] + part
        largest = larger

    mean = mean / tl.maximum(total, 1e-30)[:, None]  # without keys: zeros
    rows = ((row * KV_HEADS + head) * SPLITS + split) * GROUP + g
    mask = is_head & is_column
    tl.store(out + rows[:, None] * DIM + d[None, :], mean.to(out.dtype.element_ty), mask=mask)
    if SPLITS > 1:
        log_sum = tl.where(total > 0, largest + tl.log(tl.maximum(total, 1e-30)), -1e30)
        tl.store(log_sums + rows, log_sum, mask=g < GROUP)


@triton.jit
def join_kernel(
    parts,
    log_sums,
    out,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The splits of one query head, weighted by their sums of exponentials."""
    i = tl.program_id(0)
    split, d = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    rows = (i // GROUP * SPLITS + split) * GROUP + i % GROUP
    weight = tl.load(log_sums + rows)
    weight = tl.exp(weight - tl.max(weight, 0))
    mask = (d < DIM)[None, :]
    part = tl.load(parts + rows[:, None] * DIM + d[None, :], mask=mask, other=0.0)
    joined = tl.sum(part * (weight / tl.sum(weight, 0))[:, None], 0)
    tl.store(out + i * DIM + d, joined.to(out.dtype.element_ty), mask=d < DIM)


class Variant(NamedTuple):
    """How the kernel is compiled: keys in a block, splits (a power of two), warps, stages.

    product: by matrix products, for heads that share keys.
    """

    block: int
    splits: int
    warps: int
    stages: int
    product: bool


PROGRAMS = 512  # sequences × kv heads × splits that are enough to fill a GPU
LEAST_SPLIT = 64  # tokens that are worth a program of their own
MOST_SPLITS = 64
BLOCK_BYTES = 8192  # of the keys that a program loads at a time


def variant(q: Tensor, keys: Tensor, max_pages: int) -> Variant:
    """What suits these shapes.

    Blocks of 16 keys, 2 warps and 3 stages are measured, for many sequences of heads that do not
    share keys (docs/performance.md); the others are not.
    """
    (n, heads, dim), (_, kv_heads, page, _) = q.shape, keys.shape
    # With --deterministic a sequence's sums do not depend on how many others there are.
    wanted = 1 if deterministic.is_on() else PROGRAMS // (n * kv_heads)
    splits = max(1, min(wanted, max_pages * page // LEAST_SPLIT, MOST_SPLITS))
    splits = 1 << (splits.bit_length() - 1)
    product = heads // kv_heads > 2
    many = splits == 1 and not product
    fitting = BLOCK_BYTES // (power_of_two(dim) * q.element_size())
    block = 16 if many else max(16, min(64, fitting))
    # The first stage loads numbers of pages; of a product's the last holds what it reads.
    stages = (5 if product else 3) - (block > fitting)
    return Variant(block, splits, 2 if many else 4, stages, product)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    window: int = 0,
    how: Variant | None = None,
) -> Tensor:
    """Each query's mean of the values that it sees, in fp32 whatever the dtype.

    q: [n, heads, head_dim]; keys, values: [pages, kv heads, PAGE, head_dim] of one layer, with the
    same strides; table: which page holds each PAGE tokens of each sequence, [n, max_pages] int32,
    of which nothing is read past a sequence's length; lengths: the tokens of each, the new one
    included, [n] int64 (0: zeros come out); window: how many last tokens are seen (0: all).
    Returns [n, heads, head_dim].
    """
    n, heads, dim = q.shape
    kv_heads, page = keys.size(1), keys.size(2)
    group, q, lengths = heads // kv_heads, dense_rows(q), lengths.contiguous()
    how = how or variant(q, keys, table.size(1))
    out = q.new_empty(n, heads, dim)
    parts = log_sums = out
    if how.splits > 1:
        parts = q.new_empty(n * heads * how.splits, dim, dtype=torch.float32)
        log_sums = q.new_empty(n * heads * how.splits, dtype=torch.float32)
    width = power_of_two(dim)
    attention_kernel[(n, kv_heads, how.splits)](
        q,
        keys,
        values,
        table,
        lengths,
        parts,
        log_sums,
        dim**-0.5,
        q.stride(0),
        q.stride(1),
        *keys.stride()[:3],
        table.stride(0),
        kv_heads,
        group,
        max(16, power_of_two(group)) if how.product else power_of_two(group),
        dim,
        max(16, width) if how.product else width,  # 16: a matrix product's least size
        page,
        window,
        how.product,
        how.block,
        how.splits,
        how.stages,
        num_warps=how.warps,
    )
    if how.splits > 1:
        join_kernel[(n * heads,)](parts, log_sums, out, group, dim, width, how.splits)
    return out


def plain_paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, window: int = 0
) -> Tensor:
    """`paged_attention` in plain PyTorch, by way of copies of all pages of the table."""
    kv_heads = keys.size(1)
    at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
    tokens = torch.arange(table.size(1) * keys.size(2), device=q.device)
    seen = tokens < lengths.unsqueeze(1)
    if window:
        seen &= tokens >= (lengths - window).unsqueeze(1)
    # Unseen places of the table, and of pages, may hold anything.
    used = seen.unflatten(1, (-1, keys.size(2))).any(-1)
    pages = torch.where(used, table, 0).long()
    seen = seen[:, None, :, None]  # [n, 1, tokens, 1]
    # [n, max_pages, kv heads, PAGE, head_dim] → [n, kv heads, tokens, head_dim]
    k, v = (
        store[pages].transpose(1, 2).flatten(2, 3).to(at_least_fp32).masked_fill(~seen, 0.0)
        for store in (keys, values)
    )
    grouped = q.to(at_least_fp32).unflatten(1, (kv_heads, -1))
    scores = grouped @ k.transpose(2, 3) * q.size(-1) ** -0.5
    weights = scores.masked_fill(~seen.transpose(2, 3), -torch.inf).softmax(-1)
    weights = weights.masked_fill(~seen.transpose(2, 3), 0.0)  # of no token: no weight, not NaN
    return (weights @ v).flatten(1, 2).to(q.dtype)
