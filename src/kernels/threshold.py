"""Where top-k, top-p and min-p cut each row of logits off, without a word from the host.

By bisection, into fifths, of the integers that stand in the order of the floats: a fixed number of
steps, each of which counts what lies above four pivots, or sums its probabilities.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from src.kernels.runtime import dense_rows, tl, triton

LEAST = -2139095041  # what stands for minus infinity
STEPS = 14  # until of all 32-bit integers one is left


@triton.jit
def reordered(bits):
    """The bits of floats as int32 in the floats' order, and the other way round."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def amounts(z, top, pivots, width, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    """How many logits of a row lie above each of four pivots, or their Σ exp(z − top) in fp64."""
    found = tl.zeros([4, BLOCK], tl.int32 if COUNTED else tl.float64)
    for first in tl.range(0, width, BLOCK, num_stages=3):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(z + column, mask=column < width, other=-float("inf"))
        key = reordered(value.to(tl.int32, bitcast=True))
        is_above = (key[None, :] > pivots[:, None]) & (column < width)[None, :]
        if COUNTED:
            found += is_above.to(tl.int32)
        else:
            found += tl.where(is_above, tl.exp(value - top).to(tl.float64)[None, :], 0.0)
    return tl.sum(found, 1)


@triton.jit
def lowest(
    z,
    top,
    first,
    high,
    limit,
    width,
    COUNTED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The lowest integer, from the first on, above which lies less than the limit."""
    nth, low = tl.arange(0, 4) + 1, first - 1
    for _ in range(STEPS):
        span = high - low
        pivots = (low + span * nth // 5).to(tl.int32)
        found = amounts(z, top, pivots, width, COUNTED, BLOCK)
        reached = tl.sum((found >= limit).to(tl.int64), 0)
        high = low + span * (reached + 1) // 5
        low = low + span * reached // 5
    return tl.maximum(high, first)  # less than first: all together are less than the limit


@triton.jit
def threshold_kernel(
    z,
    tops,
    out,
    z_row,
    width,
    top_k,
    log_min_p,
    TOP_P: tl.constexpr,
    HAS_K: tl.constexpr,
    LEAST: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. Bounds are int64: nothing overflows between them."""
    row = tl.program_id(0)
    z, top = z + row.to(tl.int64) * z_row, tl.load(tops + row)
    highest = reordered(top.to(tl.int32, bitcast=True)).to(tl.int64)
    result = tl.full([], LEAST, tl.int64)
    if HAS_K:
        result = lowest(z, top, result, highest, top_k, width, True, STEPS, BLOCK)
    if TOP_P < 1:
        # The mass of what top-k keeps: of logits that equal its last one only so many as it counts.
        pivots = tl.zeros([4], tl.int32) + result.to(tl.int32)
        total = tl.max(amounts(z, top, pivots, width, False, BLOCK), 0)
        if HAS_K:
            count = tl.max(amounts(z, top, pivots, width, True, BLOCK), 0)
            kth = reordered(result.to(tl.int32)).to(tl.float32, bitcast=True)
            total += (top_k - count) * tl.exp(kth - top).to(tl.float64)
        result = lowest(z, top, result, highest, total * TOP_P, width, False, STEPS, BLOCK)
    threshold = reordered(result.to(tl.int32)).to(tl.float32, bitcast=True)
    tl.store(out + row, tl.maximum(threshold, top + log_min_p))


BLOCK = 2048


@functools.cache
def log_fp32(x: float) -> float:
    """log x as fp32 has it, once: no step waits for it."""
    return float(torch.tensor(x).log())


def threshold(z: Tensor, top: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The smallest logit that top-k, then top-p, then min-p, keep in each row.

    A token stays while the mass above it is below top_p, of those that top-k left; equal ones stay
    together. z: fp32 logits of the whole vocabulary, [n, vocabulary]; top: each row's largest, [n].
    top_k 0, top_p 1 and min_p 0 keep all. Returns [n].
    """
    z, out = dense_rows(z), torch.empty_like(top)
    log_min_p = log_fp32(min_p)
    if not top_k and top_p == 1:
        return top + log_min_p
    threshold_kernel[(z.size(0),)](
        z,
        top,
        out,
        z.stride(0),
        z.size(1),
        top_k,
        log_min_p,
        top_p,  # as a constant, since arguments are fp32
        top_k > 0,
        LEAST,
        STEPS,
        BLOCK,
        num_warps=16,
    )
    return out


def plain_threshold(
    z: Tensor,
    top: Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
    summed: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """`threshold` in plain PyTorch, also where each rank has a part of the vocabulary.

    z: this rank's columns; top: over all of them; summed: the sum over the ranks of a tensor
    [n, pivots], called 15 times for top-k and for top-p each.
    """
    keys, p = _reordered(z.view(torch.int32)), (z - top.unsqueeze(1)).exp()

    def amounts(pivots: Tensor, counted: bool) -> Tensor:
        above = [keys > pivot.unsqueeze(1) for pivot in pivots.unbind(1)]
        parts = [a.sum(1) if counted else (p * a).sum(1, dtype=torch.float64) for a in above]
        return summed(torch.stack(parts, 1))

    def lowest(first: Tensor, limit: Tensor, counted: bool) -> Tensor:
        low, high, nth = first - 1, highest, torch.arange(1, 5, device=z.device)
        for _ in range(STEPS):
            span = high - low
            found = amounts(low.unsqueeze(1) + span.unsqueeze(1) * nth // 5, counted)
            reached = (found >= limit.unsqueeze(1)).sum(1)
            low, high = low + span * reached // 5, low + span * (reached + 1) // 5
        return torch.maximum(high, first)

    highest = _reordered(top.view(torch.int32)).long()
    result = torch.full_like(highest, LEAST)
    limit = torch.full_like(highest, top_k)
    if top_k:
        result = lowest(result, limit, counted=True)
    if top_p < 1:
        total = amounts(result.unsqueeze(1), counted=False).squeeze(1)
        if top_k:
            count = amounts(result.unsqueeze(1), counted=True).squeeze(1)
            kth = _reordered(result.int()).view(torch.float32)
            total += (limit - count) * (kth - top).exp().double()
        result = lowest(result, total * top_p, counted=False)
    found = _reordered(result.int()).view(torch.float32)
    return torch.maximum(found, top + log_fp32(min_p))


def _reordered(bits: Tensor) -> Tensor:
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
