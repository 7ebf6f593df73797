"""Products of a few rows with a large weight, which is read once: for decoding at small batches.

A library's matrix product of one row reaches about two thirds of the memory's rate
(docs/performance.md).
"""

import torch.nn.functional as F
from torch import Tensor

from src.kernels.runtime import dense_rows, power_of_two, tl, triton
from src.kernels.swiglu import plain_swiglu


@triton.jit
def vector_product_kernel(
    x,
    weight,
    bias,
    out,
    x_row,
    rows,
    dim,
    width,
    HAS_BIAS: tl.constexpr,
    PAIRED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A few columns of x Wᵀ + b; PAIRED: silu(x W₁ᵀ) · (x W₂ᵀ), of W's two halves.

    Every row of x meets the same rows of the weight: they come from memory once, and are read by
    the others from the cache.
    """
    pair = tl.arange(0, ROWS * COLUMNS)  # of a row of x and a column of the output
    row, column = pair // COLUMNS, tl.program_id(0) * COLUMNS + pair % COLUMNS
    is_pair = (row < rows) & (column < width)
    total = tl.zeros([ROWS * COLUMNS, BLOCK], tl.float32)
    up_total = tl.zeros([ROWS * COLUMNS, BLOCK], tl.float32)
    places = weight + column[:, None].to(tl.int64) * dim
    for first in range(0, dim, BLOCK):
        i = first + tl.arange(0, BLOCK)[None, :]
        inside = is_pair[:, None] & (i < dim)
        value = tl.load(x + row[:, None] * x_row + i, mask=inside, other=0.0).to(tl.float32)
        total += value * tl.load(places + i, mask=inside, other=0.0).to(tl.float32)
        if PAIRED:
            half = tl.cast(width, tl.int64) * dim
            up_total += value * tl.load(places + half + i, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + column, mask=is_pair, other=0.0).to(tl.float32)
    if PAIRED:
        gate = result.to(dtype).to(tl.float32)
        gated = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        result = gated * tl.sum(up_total, 1).to(dtype).to(tl.float32)
    tl.store(out + row * width + column, result.to(dtype), mask=is_pair)


COLUMNS = 2  # of the output, by one program
BLOCK = 1024  # numbers of a row of the weight that are read at a time, for one row of x


def vector_product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, paired: bool = False
) -> Tensor:
    """x Wᵀ + b in fp32 whatever the dtype, without gradients: [n, in] → [n, out], n up to 8.

    weight: contiguous, [out, in]. paired: without a bias, W is gate and up one after the other,
    [2 out, in], and what comes out is SwiGLU of the two products.
    """
    x, (rows, dim) = dense_rows(x), x.shape
    width = weight.size(0) // (2 if paired else 1)
    out, padded = x.new_empty(rows, width), power_of_two(rows)
    vector_product_kernel[(-(-width // COLUMNS),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        x.stride(0),
        rows,
        dim,
        width,
        bias is not None,
        paired,
        padded,
        COLUMNS,
        max(256, BLOCK // padded),  # as many sums at any number of rows
    )
    return out


def plain_vector_product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, paired: bool = False
) -> Tensor:
    """`vector_product` in plain PyTorch."""
    out = F.linear(x, weight, bias)
    return plain_swiglu(out) if paired else out
