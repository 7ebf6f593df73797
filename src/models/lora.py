"""Low-rank adaptation (arXiv 2106.09685): one wrapper for every parallel linear layer.

y = W x + (alpha / rank) · B A x. On a column-parallel layer A is replicated and B is cut like W; on
a row-parallel layer A is cut like W and B is replicated. B starts at zero, so that the adapted
model starts as the base model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from src.errors import UserError
from src.models.config import ModelConfig
from src.models.experts import GroupedLinear, grouped_linear
from src.models.init import random_tensor
from src.models.layout import TensorSpec, tensor_table
from src.models.low_rank import adapted_linear, joined
from src.models.quantize import dense
from src.models.transformer import Transformer, build_part
from src.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    Stacked,
    copies_of,
    copy_to_model_parallel_region,
    sum_gradient,
    with_copies,
)
from src.parallel.setup import Parallel
from src.parallel.sharding import own, whole

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


@dataclass(frozen=True)
class LoRAConfig:
    """rank and alpha are the paper's.

    dropout: of the adapter's input, in training; targets: names out of TARGETS.
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise UserError(
                f"--lora_targets {','.join(self.targets)}: choose from {','.join(TARGETS)}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoRA(nn.Module):
    """A parallel linear layer with a low-rank adapter beside it. The base weight is frozen."""

    # [rank, in] and [out, rank], with experts in front where there are any; `add_lora` sets them
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(
        self,
        base: ColumnParallelLinear | RowParallelLinear | GroupedLinear,
        spec: TensorSpec,
        config: LoRAConfig,
        parallel: Parallel,
    ) -> None:
        """spec: of the whole base weight."""
        super().__init__()
        self.base, self.spec, self.config, self.parallel = base, spec, config, parallel

    def forward(self, x: Tensor, *ends: Tensor) -> Tensor:
        if not isinstance(self.base, GroupedLinear):
            return self.adapted(x, self.base, [(0, self)])
        a, b = self._whole_a(self.lora_a), self._whole_b()
        kept = self._kept(x)
        low = grouped_linear(x if kept is None else x * kept, a, *ends)  # [N, rank]
        return torch.add(self.base(x, *ends), grouped_linear(low, b, *ends), alpha=self._scale)

    @staticmethod
    def adapted(
        x: Tensor,
        base: ColumnParallelLinear | RowParallelLinear | Stacked,
        adapters: Sequence[tuple[int, nn.Module]],
    ) -> Tensor:
        """What a layer, or a stack of them, makes of x with its adapters: [N, in] → [N, out].

        adapters: each behind the first column of its layer in the output.
        """
        starts = [start for start, _ in adapters]
        layers = [cast(LoRA, adapter) for _, adapter in adapters]
        # Stacked, the factors A are one product, and their gradient is summed over the ranks once.
        a = joined([layer.lora_a for layer in layers])
        a, b = layers[0]._whole_a(a), [layer._whole_b() for layer in layers]
        kept = [mask for layer in layers if (mask := layer._kept(x)) is not None]
        scale, packed = layers[0]._scale, base.packed
        return adapted_linear(x, base.weight, base.bias, a, b, starts, scale, kept, packed)

    # The factor that every rank holds whole gets its gradient summed over them: a rank's share of
    # the rows (A) or columns (B) gives a part of it. The caller reduces a row layer's output,
    # adapter included.

    def _whole_a(self, a: Tensor) -> Tensor:
        return a if self.base.row_parallel else copy_to_model_parallel_region(a)

    def _whole_b(self) -> Tensor:
        b = sum_gradient(self.lora_b, self.base.replicas)
        return copy_to_model_parallel_region(b) if self.base.row_parallel else b

    @property
    def _dropout(self) -> float:
        return self.config.dropout if self.training else 0.0

    @property
    def _scale(self) -> float:
        """What B A x is multiplied by; what dropout leaves counts for what it takes."""
        return self.config.scale / (1 - self._dropout)

    def _kept(self, x: Tensor) -> Tensor | None:
        """What dropout leaves of x, True or False; None: all.

        The mask is drawn whole on every rank, from the same state: the same at any degree.
        """
        if not self._dropout:
            return None
        whole = torch.rand(*x.shape[:-1], self.spec.shape[-1], device=x.device)
        kept = whole >= self._dropout
        if self.base.row_parallel:
            spec = replace(self.spec, shape=tuple(kept.shape), dim=kept.dim() - 1)
            kept = spec.cut(kept, self.parallel.mp_rank, self.parallel.mp_size)
        return kept

    def delta(self) -> Tensor:
        """What the adapter adds to what this rank keeps of the base weight, in fp32.

        Where data-parallel ranks share the weights, a collective of theirs.
        """
        # Experts are shared as wholes, both their factors; of a matrix B has W's rows.
        a = own(self.lora_a) if self.lora_a.dim() == 3 else whole(self.lora_a)
        return self.config.scale * (own(self.lora_b).float() @ a.float())


def lora_table(config: ModelConfig, lora: LoRAConfig) -> dict[str, TensorSpec]:
    """The adapter's tensors: `layers.0.attention.wq.lora_a` and so on, whole shapes and cuts."""
    table: dict[str, TensorSpec] = {}
    for name, spec in tensor_table(config).items():
        stem = name.removesuffix(".weight")
        if stem.rsplit(".", 1)[-1] in lora.targets:
            *experts, out_features, in_features = spec.shape
            a = TensorSpec((*experts, lora.rank, in_features))
            b = TensorSpec((*experts, out_features, lora.rank))
            # The factor with the axis along which the weight is cut is cut like it.
            if spec.dim == len(experts) + 1:
                a = replace(spec, shape=a.shape)
            else:
                b = replace(spec, shape=b.shape)
            table |= {f"{stem}.lora_a": a, f"{stem}.lora_b": b}
    return table


def add_lora(
    model: Transformer,
    lora: LoRAConfig,
    seed: int,
    parallel: Parallel,
    start_from: dict[str, Tensor] | None = None,
) -> None:
    """Wrap the target layers of a loaded model and freeze everything else.

    But not a score head, which is new. start_from: whole factors of an adapter to go on from, by
    our names; by default A is random and B zero.
    """
    wrap_lora(model, lora, parallel)
    for name, local in adapter_parts(model, lora, seed, parallel, start_from):
        stem, factor = name.rsplit(".", 1)
        layer = model.get_submodule(stem)
        local = local.to(device=parallel.device, dtype=model.dtype)
        # A copy: a cut may be a view of the whole.
        weight = nn.Parameter(local.clone(memory_format=torch.contiguous_format))
        setattr(layer, factor, with_copies(weight, copies_of(getattr(layer, factor))))


def wrap_lora(model: Transformer, lora: LoRAConfig, parallel: Parallel) -> None:
    """`add_lora` up to the factors' values: they are on the meta device."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "score.weight")
    base_table = tensor_table(model.config)
    for name, spec in own_lora_table(model, lora).items():
        stem, factor = name.rsplit(".", 1)
        parent_name, child = stem.rsplit(".", 1)
        parent = model.get_submodule(parent_name)
        layer = getattr(parent, child)
        if not isinstance(layer, LoRA):
            layer = LoRA(layer, base_table[f"{stem}.weight"], lora, parallel)
            setattr(parent, child, layer)
        n = parallel.mp_size
        empty = torch.empty(spec.local_shape(n), dtype=model.dtype, device="meta")
        setattr(layer, factor, with_copies(nn.Parameter(empty), spec.copies(n)))


def own_lora_table(model: Transformer, lora: LoRAConfig) -> dict[str, TensorSpec]:
    """`lora_table` of the layers that this rank computes."""
    own = tuple(f"layers.{number}." for layers in model.part.layers for number in layers)
    table = lora_table(model.config, lora)
    return {name: spec for name, spec in table.items() if name.startswith(own)}


def adapter_parts(
    model: Transformer,
    lora: LoRAConfig,
    seed: int,
    parallel: Parallel,
    start_from: dict[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, this rank's part) of every factor of an adapter, as `add_lora` says."""
    for name, spec in own_lora_table(model, lora).items():
        if start_from is not None:
            whole_factor = start_from[name]
        elif name.endswith("lora_b"):
            whole_factor = torch.zeros(spec.shape)
        else:
            whole_factor = random_tensor(name, spec, spec.shape[-1] ** -0.5, seed)
        yield name, spec.cut(whole_factor, parallel.mp_rank, parallel.mp_size)


def sharing(model: Transformer, head: str, parallel: Parallel) -> Transformer:
    """A model without adapter whose weights are the frozen ones of `model`: the same tensors.

    There is no switch to forget: a reference is simply a model without the adapter. model: one with
    an adapter; head: "lm", or "score", whose weight is left on the meta device, to be filled in.
    """
    new = build_part(model.config.with_head(head), parallel, model.dtype, model.stages)
    for name, module in list(new.named_modules()):
        if name == "score" or next(module.parameters(recurse=False), None) is None:
            continue
        original = model.get_submodule(name)
        frozen = original.base if isinstance(original, LoRA) else original
        parent, _, child = name.rpartition(".")
        setattr(new.get_submodule(parent), child, frozen)
    for part, original_part in zip(new.stackable(), model.stackable()):
        part.projections = original_part.projections
    return new.train(model.training)


def default_targets(config: ModelConfig) -> tuple[str, ...]:
    """All linear layers; of a model with experts those of attention alone.

    The experts' adapters would outweigh the rest.
    """
    return TARGETS[:4] if config.n_experts else TARGETS


def freeze_layers(model: Transformer, n: int) -> None:
    """Freeze the embedding (a tied output layer with it) and the first n layers; none for 0."""
    if n:
        for name, weight in model.named_parameters():
            stem = name.split(".")
            is_below = stem[0] == "layers" and int(stem[1]) < n
            if is_below or stem[0] == "tok_embeddings":
                weight.requires_grad_(False)


def merged_parts(
    model: Transformer, plain: Callable[[str, Tensor], Tensor] = lambda _, weight: dense(weight)
) -> Iterator[tuple[str, Tensor]]:
    """(name, what this rank keeps) of every weight with its adapter added in.

    A collective where data-parallel ranks share the weights. Names are those of a model without
    adapters. plain(name, weight) gives the weight under a quantised one: by default what it was
    rounded to.
    """
    for name, part in merged(model, plain).items():
        yield name, part()


def merged(
    model: Transformer, plain: Callable[[str, Tensor], Tensor] = lambda _, weight: dense(weight)
) -> dict[str, Callable[[], Tensor]]:
    """How to get each of `merged_parts`, by its name."""
    adapted = dict(lora_layers(model))

    def part(stem: str, name: str, parameter: nn.Parameter) -> Tensor:
        weight = plain(name, own(parameter.detach()))
        if stem in adapted:
            weight = weight.float() + adapted[stem].delta()
        return weight.to(model.dtype)

    stems = {
        name.replace(".base.", "."): (name.removesuffix(".base.weight"), parameter)
        for name, parameter in model.named_parameters()
        if not name.endswith((".lora_a", ".lora_b"))
    }
    return {name: partial(part, stem, name, parameter) for name, (stem, parameter) in stems.items()}


def lora_layers(model: Transformer) -> list[tuple[str, LoRA]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRA)]
