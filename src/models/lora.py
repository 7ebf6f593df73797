"""Low-rank adaptation (arXiv 2106.09685): one wrapper for every parallel linear layer.

y = W x + (alpha / rank) · B A x. On a column-parallel layer A is replicated and B is cut like W; on a row-parallel layer
A is cut like W and B is replicated. B starts at zero, so that the adapted model starts as the base model.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from src.models.config import ModelConfig
from src.models.init import random_tensor
from src.models.layout import TensorSpec, tensor_table
from src.models.transformer import Transformer
from src.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_model_parallel_region,
    reduce_from_model_parallel_region,
)
from src.parallel.setup import Parallel

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


class LoRA(nn.Module):
    """A parallel linear layer with a low-rank adapter beside it. The base weight is frozen."""

    def __init__(self, base: ColumnParallelLinear | RowParallelLinear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.rank, self.scale = base, rank, scale
        self.row_parallel = isinstance(base, RowParallelLinear)
        out_local, in_local = base.weight.shape
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, in_local))
        self.lora_b = nn.Parameter(base.weight.new_empty(out_local, rank))
        self.lora_a.model_parallel, self.lora_b.model_parallel = self.row_parallel, not self.row_parallel

    def forward(self, x: Tensor) -> Tensor:
        # The caller has copied a column layer's x to the ranks and sums its gradient over them, so the adapter's part of that
        # gradient stays partial like the base's; only A, which every rank holds whole, needs its own gradient summed.
        if self.row_parallel:
            low = reduce_from_model_parallel_region(F.linear(x, self.lora_a))
        else:
            low = F.linear(x, copy_to_model_parallel_region(self.lora_a))
        return self.base(x) + F.linear(low, self.lora_b) * self.scale

    def delta(self) -> Tensor:
        """What the adapter adds to this rank's base weight, in fp32; no communication."""
        return self.scale * (self.lora_b.float() @ self.lora_a.float())


def lora_table(config: ModelConfig, rank: int, targets: tuple[str, ...] = TARGETS) -> dict[str, TensorSpec]:
    """The adapter's tensors: `layers.0.attention.wq.lora_a` and so on, whole shapes and cuts."""
    table = {}
    for name, spec in tensor_table(config).items():
        stem = name.removesuffix(".weight")
        if stem.rsplit(".", 1)[-1] in targets:
            out_features, in_features = spec.shape
            row = spec.dim == 1
            table[f"{stem}.lora_a"] = TensorSpec((rank, in_features), 1 if row else None, spec.unit, spec.what)
            table[f"{stem}.lora_b"] = TensorSpec((out_features, rank), None if row else 0, spec.unit, spec.what)
    return table


def add_lora(model: Transformer, rank: int, alpha: float, seed: int, parallel: Parallel) -> None:
    """Wrap the target layers of a loaded model and freeze everything else (but a score head, which is new)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "score.weight")
    for name, spec in lora_table(model.config, rank).items():
        stem, factor = name.rsplit(".", 1)
        parent, child = stem.rsplit(".", 1)
        parent = model.get_submodule(parent)
        if not isinstance(getattr(parent, child), LoRA):
            setattr(parent, child, LoRA(getattr(parent, child), rank, alpha / rank))
        parameter = getattr(getattr(parent, child), factor)
        if factor == "lora_b":
            parameter.data.zero_()
            continue
        whole = random_tensor(name, spec, spec.shape[1] ** -0.5, seed)
        if spec.dim is not None:
            start, stop = spec.local_range(parallel.mp_rank, parallel.mp_size)
            whole = whole.narrow(spec.dim, start, stop - start)
        parameter.data.copy_(whole)


def lora_layers(model: Transformer) -> list[tuple[str, LoRA]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRA)]
