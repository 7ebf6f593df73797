"""SwiGLU (arXiv 2002.05202) of gate and up side by side, with its gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

from src.kernels.runtime import dense_rows, tl, triton


@triton.jit
def swiglu_kernel(joined, out, joined_row, width, BLOCK: tl.constexpr):
    """A block of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, places = column < width, joined + row * joined_row + column
    gate = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(places + width, mask=inside, other=0.0).to(tl.float32)
    gated = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (gated * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(grad, joined, out, grad_row, joined_row, width, BLOCK: tl.constexpr):
    """Both gradients of a block of one row: g up σ (1 + gate (1 − σ)) and g gate σ."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, places = column < width, joined + row * joined_row + column
    gate = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(places + width, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_row + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = g * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    places = out + row * 2 * width + column
    tl.store(places, grad_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(places + width, (g * gate * sigmoid).to(out.dtype.element_ty), mask=inside)


BLOCK = 1024


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joined: Tensor) -> Tensor:
        width = joined.size(-1) // 2
        out = joined.new_empty(*joined.shape[:-1], width)
        joined = dense_rows(joined).reshape(-1, 2 * width)
        grid = (joined.size(0), -(-width // BLOCK))
        swiglu_kernel[grid](joined, out, joined.stride(0), width, BLOCK)
        ctx.save_for_backward(joined)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (joined,) = ctx.saved_tensors
        width = joined.size(-1) // 2
        out = joined.new_empty(*grad.shape[:-1], 2 * width)
        grad = dense_rows(grad).reshape(-1, width)
        grid = (joined.size(0), -(-width // BLOCK))
        swiglu_backward_kernel[grid](
            grad, joined, out, grad.stride(0), joined.stride(0), width, BLOCK
        )
        return out


def swiglu(joined: Tensor) -> Tensor:
    """silu(gate) · up, with gradients; joined: gate and up side by side, […, 2 F] → […, F]."""
    return _SwiGLU.apply(joined)


def plain_swiglu(joined: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch."""
    gate, up = joined.chunk(2, -1)
    return F.silu(gate) * up
