"""The root-mean-square norm over the last axis (arXiv 1910.07467), in fp32 whatever the dtype.

For training, with its gradients; and with the residual's sum, for decoding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from src.kernels.runtime import dense_rows, multiprocessors, power_of_two, tl, triton


@triton.jit
def normed(x, weight, eps, DIM: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """Rows x [rows, WIDTH], zeros past DIM → x̂ · w, rounded as x̂ is, and x̂ / x."""
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)
    return ((x * r[:, None]).to(dtype).to(tl.float32) * w[None, :]).to(dtype), r


@triton.jit
def norm_kernel(
    x,
    delta,
    weight,
    total,
    out,
    scales,
    rows,
    inner,
    x_outer,
    x_inner,
    eps,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    KEEP_SCALES: tl.constexpr,
):
    """Some rows: total = x + delta, out = norm(total) · weight. x has two axes of rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows)[:, None] & (column < DIM)
    place, dense = row // inner * x_outer + row % inner * x_inner, row[:, None] * DIM + column
    value = tl.load(x + place[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + dense, mask=inside, other=0.0).to(tl.float32)
        value = value.to(out.dtype.element_ty).to(tl.float32)
        tl.store(total + dense, value.to(out.dtype.element_ty), mask=inside)
    result, r = normed(value, weight, eps, DIM, WIDTH, out.dtype.element_ty)
    tl.store(out + dense, result, mask=inside)
    if KEEP_SCALES:
        tl.store(scales + row, r, mask=row < rows)


@triton.jit
def norm_backward_kernel(
    grad,
    x,
    weight,
    scales,
    dx,
    partial,
    rows,
    inner,
    grad_outer,
    grad_inner,
    x_outer,
    x_inner,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """dx = r (g w − x̂ mean(g w x̂)) of every n-th block of rows, and their part of dw = Σ g x̂."""
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (column < DIM)[None, :]
        outer, nth = row // inner, row % inner
        places = (outer * grad_outer + nth * grad_inner)[:, None] + column[None, :]
        g = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        places = (outer * x_outer + nth * x_inner)[:, None] + column[None, :]
        r = tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
        x_hat = tl.load(x + places, mask=inside, other=0.0).to(tl.float32) * r
        mean = tl.sum(g * w * x_hat, 1)[:, None] / DIM
        result = ((g * w - x_hat * mean) * r).to(dx.dtype.element_ty)
        tl.store(dx + row[:, None] * DIM + column[None, :], result, mask=inside)
        if HAS_WEIGHT:
            dw += g * x_hat
    if HAS_WEIGHT:
        places = partial + tl.program_id(0) * DIM + column
        tl.store(places, tl.sum(dw, 0), mask=column < DIM)


TILE = 2048  # elements of a program, at least: several rows where these are short
PROGRAMS = 4  # of the backward pass, on each multiprocessor: so many sums it leaves


def tile(dim: int) -> tuple[int, int, int]:
    """Padded width, rows of a program, and its warps."""
    width = power_of_two(dim)
    rows = max(1, TILE // width)
    return width, rows, max(1, min(16, rows * width // 512))


def row_axes(x: Tensor) -> Tensor:
    """[…, dim] as [outer, inner, dim], of any strides but the last axis's; else copied."""
    x = dense_rows(x)
    return x if x.dim() == 3 else x.reshape(-1, 1, x.size(-1))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = x.new_empty(x.shape)
        x, dim = row_axes(x), x.size(-1)
        (outer, inner, _), (width, block, warps) = x.shape, tile(dim)
        rows = outer * inner
        scales = x.new_empty(rows, dtype=torch.float32)
        norm_kernel[(-(-rows // block),)](
            x,
            x,
            weight,
            out,
            out,
            scales,
            rows,
            inner,
            *x.stride()[:2],
            eps,
            dim,
            width,
            block,
            False,
            True,
            num_warps=warps,
        )
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scales = ctx.saved_tensors
        (outer, inner, dim), has_weight = x.shape, ctx.needs_input_grad[1]
        width, block, warps = tile(dim)
        rows, dx = outer * inner, x.new_empty(grad.shape)
        # The same order of sums at every run: no atomics.
        programs = min(-(-rows // block), PROGRAMS * multiprocessors(x.device))
        partial = x.new_empty(programs if has_weight else 0, dim, dtype=torch.float32)
        grad = row_axes(grad)
        norm_backward_kernel[(programs,)](
            grad,
            x,
            weight,
            scales,
            dx,
            partial,
            rows,
            inner,
            *grad.stride()[:2],
            *x.stride()[:2],
            dim,
            width,
            block,
            has_weight,
            num_warps=warps,
        )
        return dx, partial.sum(0).to(weight.dtype) if has_weight else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis, with gradients: […, dim] and [dim]."""
    return _RMSNorm.apply(x, weight, eps)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain PyTorch."""
    return F.rms_norm(x.float(), (x.size(-1),), eps=eps).type_as(x) * weight


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + delta, and its `rms_norm`, without gradients: [n, dim] each.

    Without a delta the sum is x itself.
    """
    x, (n, dim) = dense_rows(x), x.shape
    width, block, warps = tile(dim)
    total, out = x if delta is None else x.new_empty(n, dim), x.new_empty(n, dim)
    norm_kernel[(-(-n // block),)](
        x,
        x if delta is None else delta.contiguous(),
        weight,
        total,
        out,
        out,
        n,
        1,
        x.stride(0),
        0,
        eps,
        dim,
        width,
        block,
        delta is not None,
        False,
        num_warps=warps,
    )
    return total, out


def plain_add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain PyTorch."""
    total = x if delta is None else x + delta
    return total, plain_rms_norm(total, weight, eps)
