"""Rotary position embeddings: pairs of a head's columns, turned as complex numbers (Meta's order).

For training, with its gradient; and for decoding, where the new keys and values go to their pages
in the same pass.
"""

import torch
from torch import Tensor

from src.kernels.norm import normed, plain_rms_norm
from src.kernels.runtime import dense_rows, power_of_two, tl, triton


@triton.jit
def turned(x, rotary, DIM: tl.constexpr, WIDTH: tl.constexpr, BACK: tl.constexpr):
    """Heads x [heads, WIDTH] in fp32, by the complex numbers at `rotary`, or their conjugates."""
    column = tl.arange(0, WIDTH)
    numbers = tl.load(rotary + column, mask=column < DIM, other=0.0)
    cos, sin = tl.split(tl.reshape(numbers, [1, WIDTH // 2, 2]))
    if BACK:
        sin = -sin
    a, b = tl.split(tl.reshape(x, [x.shape[0], WIDTH // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [x.shape[0], WIDTH])


@triton.jit
def rotate_kernel(
    x,
    rotary,
    out,
    heads,
    x_row,
    x_head,
    rotary_row,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BACK: tl.constexpr,
):
    """Some heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (column < DIM)
    places = x + row * x_row + head * x_head + column
    value = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    result = turned(value, rotary + row * rotary_row, DIM, WIDTH, BACK)
    places = out + (row * heads + head) * DIM + column
    tl.store(places, result.to(out.dtype.element_ty), mask=inside)


TILE = 4096  # elements of a program, at most


def _turn(x: Tensor, rotary: Tensor, back: bool) -> Tensor:
    n, heads, dim = x.shape
    x, out, width = dense_rows(x), x.new_empty(x.shape), power_of_two(dim)
    rotary = torch.view_as_real(dense_rows(rotary))
    block = min(power_of_two(heads), max(1, TILE // width))
    rotate_kernel[(n, -(-heads // block))](
        x,
        rotary,
        out,
        heads,
        *x.stride()[:2],
        rotary.stride(0),
        dim,
        width,
        block,
        back,
        num_warps=max(1, min(8, block * width // 512)),
    )
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rotary: Tensor) -> Tensor:
        ctx.save_for_backward(rotary)
        return _turn(x, rotary, back=False)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _turn(grad, ctx.saved_tensors[0], back=True), None


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn interleaved pairs, with a gradient for x.

    x: [N, heads, head_dim]; rotary: [N, head_dim / 2], complex.
    """
    return _Rotate.apply(x, rotary)


def plain_rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """`rotate` in plain PyTorch."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary.unsqueeze(1)).flatten(-2).type_as(x)


@triton.jit
def headwise(
    x,
    weight,
    eps,
    rotary,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """A head's norm, if it has one, and its rotation: [1, WIDTH] in its own dtype."""
    value = x.to(tl.float32)
    if HAS_NORM:
        value = normed(value, weight, eps, DIM, WIDTH, x.dtype)[0].to(tl.float32)
    return turned(value, rotary, DIM, WIDTH, False).to(x.dtype)


@triton.jit
def rotate_and_write_kernel(
    qkv,
    q_rotary,
    k_rotary,
    q_norm,
    k_norm,
    q,
    keys,
    values,
    table,
    positions,
    eps,
    qkv_row,
    q_rotary_row,
    k_rotary_row,
    page_stride,
    head_stride,
    token_stride,
    table_row,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """One head of one row: of the queries, of the keys, or of the values."""
    row, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, WIDTH)[None, :]
    inside = column < DIM
    x = tl.load(qkv + row * qkv_row + head * DIM + column, mask=inside, other=0.0)
    if head < HEADS:
        query = headwise(x, q_norm, eps, q_rotary + row * q_rotary_row, DIM, WIDTH, HAS_NORM)
        tl.store(q + (row * HEADS + head) * DIM + column, query, mask=inside)
    else:
        position = tl.load(positions + row).to(tl.int32)
        is_there = position >= 0
        page = tl.load(table + row * table_row + position // PAGE, mask=is_there, other=0)
        place = page.to(tl.int64) * page_stride + (head - HEADS) % KV_HEADS * head_stride
        place += position % PAGE * token_stride
        if head < HEADS + KV_HEADS:
            key = headwise(x, k_norm, eps, k_rotary + row * k_rotary_row, DIM, WIDTH, HAS_NORM)
            tl.store(keys + place + column, key, mask=inside & is_there)
        else:
            tl.store(values + place + column, x, mask=inside & is_there)


def rotate_and_write(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    positions: Tensor,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Turn each row's queries and its key, and write key and value to their place in the pages.

    qkv: [n, (heads + 2 kv_heads) · head_dim], side by side as the stacked product gives them;
    rotary: complex, for queries and for keys, [n, head_dim / 2] each; keys, values: [pages,
    kv heads, PAGE, head_dim] of one layer, with the same strides; table: the page of each PAGE
    tokens of each row, [n, max_pages] int32; positions: where each new key lies, [n] int64 (−1:
    nowhere, nothing is written). q_norm, k_norm: weights [head_dim] of norms of each head before
    it is turned, with their eps. Returns the queries, [n, heads, head_dim].
    """
    n, dim, qkv = qkv.size(0), keys.size(3), dense_rows(qkv)
    positions = positions.contiguous()
    q_rotary, k_rotary = (torch.view_as_real(dense_rows(part)) for part in rotary)
    q, width = qkv.new_empty(n, heads, dim), power_of_two(dim)
    rotate_and_write_kernel[(n, heads + 2 * kv_heads)](
        qkv,
        q_rotary,
        k_rotary,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        q,
        keys,
        values,
        table,
        positions,
        eps,
        qkv.stride(0),
        q_rotary.stride(0),
        k_rotary.stride(0),
        *keys.stride()[:3],
        table.stride(0),
        heads,
        kv_heads,
        dim,
        width,
        keys.size(2),
        q_norm is not None,
        num_warps=1,
    )
    return q


def plain_rotate_and_write(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    positions: Tensor,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`rotate_and_write` in plain PyTorch."""
    parts = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))
    q, k, v = parts.split((heads, kv_heads, kv_heads), 1)
    if q_norm is not None and k_norm is not None:
        q, k = plain_rms_norm(q, q_norm, eps), plain_rms_norm(k, k_norm, eps)
    q, k = plain_rotate(q, rotary[0]), plain_rotate(k, rotary[1])
    rows = (positions >= 0).nonzero().squeeze(1)
    at = positions[rows]
    pages, places = table[rows, at // keys.size(2)].long(), at % keys.size(2)
    keys[pages, :, places], values[pages, :, places] = k[rows], v[rows]
    return q
