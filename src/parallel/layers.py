"""FairScale's parallel layers with a shard-sized constructor.

FairScale builds the full matrix on every rank to initialise its shard, and ignores the meta device. These allocate the
shard alone, uninitialised: weights come from a checkpoint (`src/checkpoint`) or from `src/models/init`.
"""

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from fairscale.nn.model_parallel.initialize import get_model_parallel_rank, get_model_parallel_world_size
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region, reduce_from_model_parallel_region
from fairscale.nn.model_parallel.utils import divide_and_check_no_remainder
from torch import Tensor, nn

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "ParallelEmbedding",
    "VocabParallelEmbedding",
    "copy_to_model_parallel_region",
    "reduce_from_model_parallel_region",
]


def _shard(full: int) -> int:
    return divide_and_check_no_remainder(full, get_model_parallel_world_size())


def _parameter(*shape: int, sharded: bool = True) -> nn.Parameter:
    """An uninitialised parameter of this rank's shape, marked for the gradient norm: replicated ones count once."""
    parameter = nn.Parameter(torch.empty(*shape))
    parameter.model_parallel = sharded
    return parameter


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """y_local = x W_localᵀ: [..., in] → [..., out / n].

    The caller passes x through `copy_to_model_parallel_region` once for all the projections that share it (q, k, v),
    so that one all-reduce in backward serves them all.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = _parameter(_shard(out_features), in_features)
        self.bias = _parameter(_shard(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """y = Σ over ranks of x_local W_localᵀ: [..., in / n] → [..., out], the same on every rank. FairScale's forward."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.input_is_parallel = True
        self.weight = _parameter(out_features, _shard(in_features))
        self.bias = None


class ParallelEmbedding(fairscale_layers.ParallelEmbedding):
    """Embedding split along the embedding axis, as in Meta's released shards. FairScale's forward."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.weight = _parameter(num_embeddings, _shard(embedding_dim))


class VocabParallelEmbedding(fairscale_layers.VocabParallelEmbedding):
    """Embedding split along the vocabulary, so that it can share its weight with the output layer. FairScale's forward."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        rows = _shard(num_embeddings)
        self.vocab_start_index = get_model_parallel_rank() * rows
        self.vocab_end_index = self.vocab_start_index + rows
        self.weight = _parameter(rows, embedding_dim)


class ReplicatedLinear(nn.Linear):
    """A linear layer that every rank holds whole (the verifier's scalar head)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = _parameter(out_features, in_features, sharded=False)
        self.bias = None


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis, in fp32 whatever the input's dtype (as Meta's)."""

    def __init__(self, dim: int, eps: float) -> None:
        nn.Module.__init__(self)
        self.normalized_shape, self.eps, self.elementwise_affine = (dim,), eps, True
        self.weight = _parameter(dim, sharded=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).type_as(x) * self.weight
