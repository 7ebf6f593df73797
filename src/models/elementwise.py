"""What stands between the matrix products, in few passes over memory, forward and backward.

As few as plain PyTorch allows: on the CPU these passes cost as much as the products. Autograd would
make two to three times as many of them, and keep what they need in memory. On a GPU they are Triton
kernels (src/kernels).
"""

import os
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.errors import UserError
from src.kernels import cpu, runtime
from src.parallel.mappings import copy_to_model_parallel_region

_compiled: dict[str, Callable] = {}  # filled by `compile_elementwise`


def compile_elementwise() -> None:
    """From now on, let torch.compile make one kernel each, either way, of norms and of SwiGLU.

    The products are libraries' kernels in any case, and packed sequences of ever new lengths do not
    make one whole graph. Raises UserError where there is no compiler.
    """
    if not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "--compile: on the CPU torch.compile needs a C++ compiler: install g++, or leave "
            "--compile out"
        )
    from src.kernels.norm import plain_rms_norm
    from src.kernels.swiglu import plain_swiglu

    _compiled["rms_norm"] = torch.compile(plain_rms_norm, dynamic=True)
    _compiled["swiglu"] = torch.compile(plain_swiglu, dynamic=True)


class _RMSNorm(torch.autograd.Function):
    """y = x̂ · w with x̂ = x · r, r = (mean(x²) + ε)^(−½) (arXiv 1910.07467).

    dx = r (g w − x̂ mean(g w x̂)) and dw = Σ over rows of g x̂.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        mean = norm.square_().div_(x.size(-1))
        r = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, r = ctx.saved_tensors
        rows, dim = x.reshape(-1, x.size(-1)).float(), x.size(-1)
        r = r.view(-1, 1)
        # g x, of which dw and the mean are one matrix product each
        product = grad.reshape(rows.shape) * rows
        dw = (product.t() @ r).view(dim).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            mean = (product @ weight.float().unsqueeze(1)).mul_(r * r / dim)
            dx = torch.mul(grad.reshape(rows.shape), weight, out=product)
            dx = dx.addcmul_(rows, mean, value=-1).mul_(r).to(x.dtype).view(x.shape)
        return dx, dw, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, times the weight.

    In fp32 whatever the dtype, as Meta's.
    """
    if _compiled and torch.is_grad_enabled():
        return _compiled["rms_norm"](x, weight, eps)
    if runtime.takes(x):
        from src.kernels import norm

        return norm.rms_norm(x, weight, eps)
    if cpu.decodes(x, weight):
        return cpu.add_rms_norm(x, None, weight, eps)[1]
    return _RMSNorm.apply(x, weight, eps)


class RMSNorm(nn.RMSNorm):
    """`rms_norm` with a weight of its own."""

    eps: float

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        nn.Module.__init__(self)
        self.normalized_shape, self.eps, self.elementwise_affine = tuple(weight.shape), eps, True
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def add_rms_norm(x: Tensor, delta: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """x + delta (x itself without one), and its norm: one kernel where no gradient is wanted."""
    if delta is None:
        return x, norm(x)
    if runtime.takes(x) and not torch.is_grad_enabled():
        from src.kernels import norm as kernels

        return kernels.add_rms_norm(x, delta, norm.weight, norm.eps)
    if cpu.decodes(x, delta, norm.weight):
        return cpu.add_rms_norm(x, delta, norm.weight, norm.eps)
    total = x + delta
    return total, norm(total)


class HeadNorm(RMSNorm):
    """RMSNorm of each of this rank's heads: [N, heads, head_dim].

    All heads of all ranks have one weight, whose gradient is summed over them.
    """

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, copy_to_model_parallel_region(self.weight), self.eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joined: Tensor) -> Tensor:
        ctx.save_for_backward(joined)
        gate, up = joined.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (joined,) = ctx.saved_tensors
        gate, up = joined.chunk(2, -1)
        # Both gradients are written in place, side by side.
        out = torch.empty_like(joined)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


def swiglu(joined: Tensor) -> Tensor:
    """silu(gate) · up (arXiv 2002.05202); joined: gate and up side by side, [N, 2 F] → [N, F]."""
    if _compiled and torch.is_grad_enabled():
        return _compiled["swiglu"](joined)
    if runtime.takes(joined):
        from src.kernels import swiglu as kernels

        return kernels.swiglu(joined)
    if cpu.decodes(joined):
        return cpu.swiglu(joined)
    return _SwiGLU.apply(joined)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rotary: Tensor) -> Tensor:
        ctx.save_for_backward(rotary)
        return _turn(x, rotary)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _turn(grad.contiguous(), ctx.saved_tensors[0].conj()), None


def _turn(x: Tensor, rotary: Tensor) -> Tensor:
    # [N, heads, head_dim] → [N, heads, head_dim / 2], complex
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary.unsqueeze(1)).flatten(-2).type_as(x)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn interleaved pairs (Meta's convention).

    x: [N, heads, head_dim]; rotary: [N, head_dim / 2], complex.
    """
    if runtime.takes(x):
        from src.kernels import rotation

        return rotation.rotate(x, rotary)
    return _Rotate.apply(x, rotary)
