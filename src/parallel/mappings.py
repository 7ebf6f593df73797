"""What happens between ranks that share a model, forward and backward.

Megatron's f and g (arXiv 1909.08053, section 3). FairScale has the same, bound to
`torch.distributed`; these go through shared memory where the ranks share a machine.
"""

import torch
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)
from torch import Tensor

from src.parallel.shared_memory import gathered, summed


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
