"""Products of a few rows with a weight in codes of 4 or 8 bits, which nobody dequantises first.

A decode step would else write, and read again, every weight in full for one token of each sequence.
"""

import torch
from torch import Tensor

from src.kernels.runtime import dense_rows, power_of_two, tl, triton

MOST_ROWS = 64  # of x, up to which the kernel multiplies; not measured on a GPU yet
BLOCK = 64  # numbers of a row of the weight that share a scale


@triton.jit
def product_by_codes_kernel(
    x,
    codes,
    scales,
    levels,
    bias,
    out,
    x_row,
    rows,
    dim,
    width,
    blocks,
    HAS_BIAS: tl.constexpr,
    PER_BYTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some columns of x Wᵀ + b, of all rows; a block of the weight's numbers at a time.

    The numbers of a byte are apart in x: each has a product of its own.
    """
    BYTES: tl.constexpr = BLOCK // PER_BYTE
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < rows, column < width
    byte = tl.arange(0, BYTES)
    dtype: tl.constexpr = x.dtype.element_ty
    first_block = column.to(tl.int64) * blocks
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(0, blocks):
        scale = tl.load(scales + first_block + block, mask=is_column, other=0.0)
        places = (first_block + block)[None, :] * BYTES + byte[:, None]  # [bytes, columns]
        code = tl.load(codes + places, mask=is_column[None, :], other=0).to(tl.int32)
        for part in tl.static_range(PER_BYTE):
            i = block * BLOCK + byte * PER_BYTE + part
            inside = is_row[:, None] & (i < dim)[None, :]
            numbers = tl.load(x + row[:, None] * x_row + i[None, :], mask=inside, other=0.0)
            level = tl.load(levels + code * PER_BYTE + part)
            weight = (level * scale[None, :]).to(dtype)
            total = tl.dot(numbers, weight, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    places = out + row[:, None] * width + column[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


COLUMNS = 32  # of the output, by one program


def product_by_codes(
    x: Tensor, codes: Tensor, scales: Tensor, levels: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x Wᵀ + b, summed in fp32, without gradients: [n, in] → [n, out], n up to `MOST_ROWS`.

    W is rounded to x's dtype. codes: bytes, [out, blocks · 64 / numbers in a byte]; scales: fp32,
    [out, blocks]; levels: what a byte stands for, fp32, [256, numbers in a byte]. A row's numbers
    past the last of x do not count.
    """
    x, (rows, dim) = dense_rows(x), x.shape
    width, per_byte = codes.size(0), levels.numel() // 256
    out = x.new_empty(rows, width)
    product_by_codes_kernel[(-(-width // COLUMNS),)](
        x,
        codes,
        scales,
        levels,
        out if bias is None else bias,
        out,
        x.stride(0),
        rows,
        dim,
        width,
        scales.size(1),
        bias is not None,
        per_byte,
        max(16, power_of_two(rows)),
        COLUMNS,
        BLOCK,
    )
    return out


def plain_product_by_codes(
    x: Tensor, codes: Tensor, scales: Tensor, levels: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`product_by_codes` in plain PyTorch."""
    numbers = levels.view(256, -1)[codes.long()].view(*scales.shape, BLOCK)
    weight = (numbers * scales.unsqueeze(-1)).to(x.dtype).flatten(1)[:, : x.size(1)]
    return torch.nn.functional.linear(x, weight, bias)
