"""What happens between ranks that share a model, forward and backward.

Megatron's f and g (arXiv 1909.08053, section 3), and those of its sequence parallelism (arXiv
2205.05198, section 4.2.2). FairScale has the first, bound to `torch.distributed`; these go through
shared memory where the ranks share a machine.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)
from torch import Tensor

from src.parallel.shared_memory import gathered, scattered_sum, summed

Exchange = Callable[[Tensor], Tensor]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return summed(grad, get_model_parallel_group())


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return summed(x, get_model_parallel_group())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.cat(list(gathered(x, get_model_parallel_group())), -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.chunk(get_model_parallel_world_size(), -1)[get_model_parallel_rank()]


def copy_to_model_parallel_region(x: Tensor) -> Tensor:
    """The identity, whose gradient is summed over the ranks of a model."""
    has_gradient = torch.is_grad_enabled() and get_model_parallel_world_size() > 1
    return _Copy.apply(x) if has_gradient else x


def reduce_from_model_parallel_region(x: Tensor) -> Tensor:
    """The sum over the ranks of a model; its gradient is every rank's."""
    return x if get_model_parallel_world_size() == 1 else _Reduce.apply(x)


def gather_from_model_parallel_region(x: Tensor) -> Tensor:
    """The ranks' parts side by side, [..., n] → [..., n · ranks]; each gets its part's gradient."""
    return x if get_model_parallel_world_size() == 1 else _Gather.apply(x)


class LinearExchange(torch.autograd.Function):
    """A linear function between ranks; `back` is what its gradient goes through."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Exchange, back: Exchange) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.back(grad), None, None


class Region(Protocol):
    """How activations lie between the products that a model's ranks share, and get into them."""

    def enter(self, x: Tensor) -> Tensor:
        """All tokens, for products whose ranks each give a part of x's gradient."""
        ...

    def leave(self, x: Tensor) -> Tensor:
        """The sum over the ranks, as activations lie here."""
        ...

    def whole(self, x: Tensor) -> Tensor:
        """All tokens, for what every rank computes alike, its gradient too."""
        ...

    def own(self, x: Tensor) -> Tensor:
        """Of what every rank has alike, as activations lie here: the inverse of `whole`."""
        ...

    def of(self, tokens: int) -> "Region":
        """The same for another number of tokens."""
        ...


class WholeTokens:
    """Every rank holds all tokens: a `Region`."""

    def enter(self, x: Tensor) -> Tensor:
        return copy_to_model_parallel_region(x)

    def leave(self, x: Tensor) -> Tensor:
        return reduce_from_model_parallel_region(x)

    def whole(self, x: Tensor) -> Tensor:
        return x

    def own(self, x: Tensor) -> Tensor:
        return x

    def of(self, tokens: int) -> "WholeTokens":
        return self


WHOLE = WholeTokens()


class SplitTokens:
    """Each of the model's n ranks holds m = ⌈tokens / n⌉ of the tokens in turn: a `Region`.

    Zeros stand behind the last. Norms and sums then take 1/n of the work and of the memory; what
    goes between the ranks are as many bytes as without. The gradient of a weight that meets split
    tokens (a norm's) is a rank's part: the optimizer sums them up.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens, self.group = tokens, get_model_parallel_group()
        self.rank, self.size = get_model_parallel_rank(), get_model_parallel_world_size()
        self.m = -(-tokens // self.size)

    def enter(self, x: Tensor) -> Tensor:
        return LinearExchange.apply(x, self.gathered, self.scattered_sum)

    def leave(self, x: Tensor) -> Tensor:
        return LinearExchange.apply(x, self.scattered_sum, self.gathered)

    def whole(self, x: Tensor) -> Tensor:
        return LinearExchange.apply(x, self.gathered, self.part_of)

    def own(self, x: Tensor) -> Tensor:
        return LinearExchange.apply(x, self.part_of, self.gathered)

    def of(self, tokens: int) -> "SplitTokens":
        return SplitTokens(tokens)

    # The same without gradients.

    def gathered(self, x: Tensor) -> Tensor:
        """[m, …] → [tokens, …]."""
        return gathered(x, self.group).flatten(0, 1)[: self.tokens]

    def scattered_sum(self, x: Tensor) -> Tensor:
        """[tokens, …] → [m, …]."""
        whole = padded(x, self.size * self.m)
        return scattered_sum(whole.unflatten(0, (self.size, self.m)), self.group)

    def part_of(self, x: Tensor) -> Tensor:
        """[tokens, …] → [m, …]."""
        return padded(x[self.rank * self.m : (self.rank + 1) * self.m], self.m)


def padded(x: Tensor, rows: int) -> Tensor:
    """x with zeros behind it, up to so many rows."""
    missing = rows - x.size(0)
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x
