"""A frozen layer's product with low-rank ones added into its output.

y = W x + b, and in the columns of each adapter s · Bᵢ A x more: one pass over the output for each
adapter instead of a product, its scale, its place among zeros and a sum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from src.models.quantize import dense
from src.parallel import deterministic
from src.parallel.layers import linear


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`, but one part is itself, not a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def _adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Sequence[Tensor],
    kept: Sequence[Tensor],
    starts: Sequence[int],
    scale: float,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y = linear(x, weight, bias, packed)
    if kept:
        parts = zip(kept, a.chunk(len(b)))
        low = joined([deterministic.linear(x * mask, part) for mask, part in parts], -1)
    else:
        low = deterministic.linear(x, a)
    for start, up, part in zip(starts, b, low.chunk(len(b), -1)):
        columns = y.narrow(1, start, up.size(0))
        if deterministic.is_on():
            columns.add_(deterministic.linear(part.contiguous(), up), alpha=scale)
        else:
            columns.addmm_(part, up.t(), alpha=scale)
    return y, low


# One operator for selective recomputation, which keeps an operator's result, and would not know
# what to do with a product that others are added into.
torch.library.define(
    "rlhf::adapted_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor[] b, Tensor[] kept, int[] starts,"
    " float scale) -> (Tensor, Tensor)",
)
torch.library.impl("rlhf::adapted_linear", "CompositeExplicitAutograd", _adapted_linear)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, kept, starts, scale, *b):
        y, low = torch.ops.rlhf.adapted_linear(x, dense(weight), bias, a, b, kept, starts, scale)
        ctx.save_for_backward(x, a, low, *kept, *b)
        ctx.weight, ctx.starts, ctx.scale = weight, starts, scale
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, a, low, *rest = ctx.saved_tensors
        n = len(ctx.starts)
        kept, b = rest[:-n], rest[-n:]
        needs_x, _, _, needs_a, _, _, _, *needs_b = ctx.needs_input_grad
        grads = [grad.narrow(1, start, up.size(0)) for start, up in zip(ctx.starts, b)]
        grad_b = [
            (g.t() @ part).mul_(ctx.scale) if needed else None
            for g, part, needed in zip(grads, low.chunk(n, -1), needs_b)
        ]
        grad_low = joined([g @ up for g, up in zip(grads, b)], -1).mul_(ctx.scale)
        grad_x = grad @ dense(ctx.weight) if needs_x else None
        grad_a = None
        if kept:
            parts = list(zip(kept, grad_low.chunk(n, -1), a.chunk(n)))
            if needs_a:
                grad_a = joined([g.t() @ (x * mask) for mask, g, _ in parts])
            if grad_x is not None:
                for mask, g, down in parts:
                    grad_x += (g @ down).mul_(mask)
        else:
            grad_a = grad_low.t() @ x if needs_a else None
            if grad_x is not None:
                grad_x.addmm_(grad_low, a)
        return grad_x, None, None, grad_a, None, None, None, *grad_b


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Sequence[Tensor],
    starts: Sequence[int],
    scale: float,
    kept: Sequence[Tensor] = (),
    packed: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b, and s · (x Aᵢᵀ) Bᵢᵀ added to the columns from starts[i] on: [N, in] → [N, out].

    a: all factors Aᵢ, of one rank, one below the other, [Σ rank, in]; b: each Bᵢ, [its columns,
    rank]. kept: for each adapter what dropout leaves of x, True or False, [N, in]; without
    dropout there are none. weight, bias: frozen; packed: as in `linear`, without gradients only.
    """
    if torch.is_grad_enabled():
        return _AdaptedLinear.apply(x, weight, bias, a, kept, starts, scale, *b)
    return _adapted_linear(x, weight, bias, a, b, kept, starts, scale, packed)[0]
