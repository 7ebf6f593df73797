"""The root-mean-square norm over the last axis (arXiv 1910.07467), in fp32 whatever the dtype.

Forward and backward for training, and with the residual's sum for decoding.
"""

from torch import Tensor

from src.kernels.runtime import tl, triton


@triton.jit
def normed(x, weight, eps, DIM: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """Rows x [rows, WIDTH], zeros past DIM: x̂ · w, x̂ and the product rounded to the dtype."""
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)
    return ((x * r[:, None]).to(dtype).to(tl.float32) * w[None, :]).to(dtype), r


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain PyTorch."""
    r = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (x.float() * r).type_as(x) * weight
