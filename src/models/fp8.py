"""`--fp8`: the products of linear layers in 8-bit floating point, forward and backward.

arXiv 2209.05433: activations and weights in e4m3, gradients in e5m2, which has the wider range;
each tensor with one scale, of its largest number at the moment. Sums are fp32's, weights stay as
they are (bf16 with fp32 masters). Only in the blocks of a model in training mode, on whole
sequences, so that what PPO scores and what it learns from are the same products and rollouts are
bf16's; the embedding, the output layer, routers, adapters and experts stay in bf16.
"""

import torch
from torch import Tensor

from src.errors import UserError
from src.models.attention import Packed
from src.models.context import Divided
from src.models.transformer import Transformer
from src.parallel import deterministic, layers

WEIGHT, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
CAPABILITY = (9, 0)  # of the first GPUs that are asked to: H100
ROWS = 16  # the library wants sizes that are multiples of this
LEAST = 256  # a matrix narrower than this is not worth it (an adapter's factor)


def check_device(device: torch.device) -> None:
    """Raise UserError where there are no such products."""
    if device.type != "cuda":
        name, has = "the CPU", False
    else:
        name = torch.cuda.get_device_name(device)
        has = torch.cuda.get_device_capability(device) >= CAPABILITY
    if not has:
        raise UserError(
            f"--fp8: {name} has no products in fp8; they need a GPU of compute capability 9.0 "
            "(H100) or later: leave --fp8 out"
        )


def use_fp8(model: Transformer) -> None:
    """From now on, for the linear layers of the model's blocks, while it is in training mode."""
    for block in model.layers:
        block.register_forward_pre_hook(_enter)
        block.register_forward_hook(_leave, always_call=True)


def _enter(block: torch.nn.Module, inputs: tuple) -> None:
    if block.training and type(inputs[1]) in (Packed, Divided):  # else it generates
        layers.set_product(linear)


def _leave(block: torch.nn.Module, inputs: tuple, output: object) -> None:
    layers.set_product(None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: [N, in] → [N, out], in fp8 if the matrix is large enough and of fitting sizes."""
    if min(weight.shape) < LEAST or any(size % ROWS for size in weight.shape):
        return deterministic.linear(x, weight, bias)
    y = _Linear.apply(x, weight)
    return y if bias is None else y + bias


class _Linear(torch.autograd.Function):
    """y = x Wᵀ; dx = g W and dW = gᵀ x. What backward needs of x is kept in fp8, too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        rows, x_scale = quantized(x, WEIGHT)
        matrix, scale = quantized(weight, WEIGHT)
        ctx.save_for_backward(rows, x_scale, weight)
        return product(rows, matrix.t(), x_scale, scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, x_scale, weight = ctx.saved_tensors
        g, g_scale = quantized(grad, GRADIENT)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            matrix, scale = quantized(weight, WEIGHT)
            dx = product(g, by_columns(matrix), g_scale, scale, grad.dtype)
        if ctx.needs_input_grad[1]:
            missing = -len(rows) % ROWS  # here rows are what is summed over
            g, rows = (with_zeros(part, missing) for part in (g, rows))
            dw = product(g.t().contiguous(), by_columns(rows), g_scale, x_scale, weight.dtype)
        return dx, dw


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in 8 bits, contiguous, and the scale, fp32: the largest number is the type's."""
    most = torch.finfo(dtype).max
    scale = (x.abs().amax().float() / most).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale).clamp(-most, most).to(dtype).contiguous(), scale


def product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """a b times both scales, [m, k] [k, n] → [m, n]; b's columns are contiguous.

    fast: a Hopper sums in fewer bits. Elsewhere the same product of what the codes stand for.
    """
    if a.is_cuda:
        return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)
    return (a.float() @ b.float()).mul_(a_scale * b_scale).to(dtype)


def by_columns(x: Tensor) -> Tensor:
    """The same matrix, each column contiguous."""
    return x.t().contiguous().t()


def with_zeros(x: Tensor, rows: int) -> Tensor:
    """So many rows of zeros behind it; fp8 has no `F.pad` everywhere."""
    return torch.cat((x, x.new_zeros(rows, x.size(1)))) if rows else x
