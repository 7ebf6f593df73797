"""FairScale's parallel layers around parameters of the shard's own size.

FairScale builds the full matrix on every rank to initialise its shard, and ignores the meta device. These are given
their part, whose shape `src/models/layout.py` knows.

Communication is the caller's, once for all the layers that share it: `copy_to_model_parallel_region` before the column
layers (one all-reduce in backward serves q, k and v), `reduce_from_model_parallel_region` after the row layers.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region, reduce_from_model_parallel_region
from torch import Tensor, nn

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "ParallelEmbedding",
    "VocabParallelEmbedding",
    "copy_to_model_parallel_region",
    "reduce_from_model_parallel_region",
]


def parameter(shape: tuple[int, ...], copies: int) -> nn.Parameter:
    """An uninitialised parameter; `copies`: on how many ranks it is the same, which the gradient norm counts once."""
    made = nn.Parameter(torch.empty(shape))
    made.copies = copies
    return made


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over a group: for a weight of which several ranks hold a copy."""

    @staticmethod
    def forward(ctx, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_gradient(weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The weight; its gradient is summed over the ranks that hold the same, if there are others."""
    return weight if group is None or not weight.requires_grad else _SumGradient.apply(weight, group)


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """y_local = x W_localᵀ + b_local: [..., in] → [..., out / n].

    replicas: the ranks with the same rows (of a kv head that several share), whose gradients are summed.
    """

    row_parallel = False

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None, replicas: dist.ProcessGroup | None = None) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.replicas = weight, bias, replicas

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else sum_gradient(self.bias, self.replicas)
        return F.linear(x, sum_gradient(self.weight, self.replicas), bias)


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """This rank's part of y = Σ over ranks of x_local W_localᵀ: [..., in / n] → [..., out]. The caller sums."""

    row_parallel, replicas = True, None

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = weight, None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class ParallelEmbedding(fairscale_layers.ParallelEmbedding):
    """Embedding split along the embedding axis, as in Meta's released shards. FairScale's forward."""

    def __init__(self, weight: nn.Parameter, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.embedding_dim = embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[..., : self.embedding_dim]  # the last rank's padding, if any, is cut off


class VocabParallelEmbedding(fairscale_layers.VocabParallelEmbedding):
    """Embedding split along the vocabulary, so that it can share its weight with the output layer. FairScale's forward."""

    def __init__(self, weight: nn.Parameter, rank: int) -> None:
        nn.Module.__init__(self)
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.weight = weight
        self.vocab_start_index = rank * weight.size(0)
        self.vocab_end_index = self.vocab_start_index + weight.size(0)


class ReplicatedLinear(nn.Linear):
    """A linear layer that every rank holds whole (the verifier's scalar head, the experts' router)."""

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = weight, None


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis, in fp32 whatever the input's dtype (as Meta's)."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        nn.Module.__init__(self)
        self.normalized_shape, self.eps, self.elementwise_affine = tuple(weight.shape), eps, True
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).type_as(x) * self.weight


class HeadNorm(RMSNorm):
    """RMSNorm of each of this rank's heads, one weight for all heads of all ranks: its gradient is summed over them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).type_as(x) * copy_to_model_parallel_region(self.weight)
