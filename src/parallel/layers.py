"""FairScale's parallel layers around parameters of the shard's own size.

FairScale builds the full matrix on every rank to initialise its shard, and ignores the meta device.
These are given their part, whose shape `src/models/layout.py` knows.

Communication is the caller's, once for all the layers that share it:
`copy_to_model_parallel_region` before the column layers (one all-reduce in backward serves q, k
and v), `reduce_from_model_parallel_region` after the row layers.
"""

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from torch import Tensor, nn

from src.kernels import cpu, runtime
from src.parallel import deterministic
from src.parallel.mappings import (
    WHOLE,
    Region,
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from src.parallel.setup import has_products_in
from src.parallel.shared_memory import summed

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "ParallelEmbedding",
    "VocabParallelEmbedding",
    "copy_to_model_parallel_region",
    "gather_from_model_parallel_region",
    "reduce_from_model_parallel_region",
]


def parameter(shape: tuple[int, ...], copies: int) -> nn.Parameter:
    """An uninitialised parameter; see `with_copies`."""
    return with_copies(nn.Parameter(torch.empty(shape)), copies)


def copies_of(weight: nn.Parameter) -> int:
    """On how many ranks the parameter is the same."""
    return weight.copies  # type: ignore[attr-defined]  # not torch's, ours


def with_copies(weight: nn.Parameter, copies: int) -> nn.Parameter:
    """The parameter, marked as the same on `copies` ranks: the gradient norm counts it once."""
    weight.copies = copies  # type: ignore[attr-defined]  # not torch's, ours
    return weight


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over a group of ranks.

    For a weight of which several ranks hold a copy.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return summed(grad, ctx.group), None


def sum_gradient(weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The weight; its gradient is summed over the ranks that hold the same, if there are others."""
    if group is None or not weight.requires_grad:
        return weight
    return _SumGradient.apply(weight, group)


PACKED_SHARE = 8  # weights are packed when they take at most this part of the machine's memory
# On a GPU, rows of x up to which our own kernel multiplies. Of more than one nothing is measured:
# benchmarks/decode_kernels.py compares the two.
SKINNY_ROWS = 1


_product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None


def set_product(product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None) -> None:
    """What linear layers compute x Wᵀ + b by; None: as they do by themselves."""
    global _product
    _product = product


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None
) -> Tensor:
    """x Wᵀ + b, by what `set_product` asks for, or else by `exact_linear`: [N, in] → [N, out]."""
    if _product is not None:
        return _product(x, weight, bias)
    return exact_linear(x, weight, bias, packed)


def exact_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None
) -> Tensor:
    """x Wᵀ + b, by what is quickest for so many rows: [N, in] → [N, out].

    packed: while the CPU generates, the weight's copy in the order in which products read it, or
    the weight itself where there is no room for that. With --deterministic there is one way for
    any number of rows.
    """
    by_rows = not deterministic.is_on()
    if packed is not None:
        if by_rows and x.size(0) <= cpu.FEW[x.dtype] and cpu.takes(x, weight, bias):
            return cpu.few_rows(x, weight, bias)
        if packed.is_mkldnn:
            product = torch.ops.mkldnn._linear_pointwise
            return deterministic.by_tiles(
                lambda rows: product(rows, packed, bias, "none", [], ""), x
            )
    if by_rows and runtime.takes(x) and _is_skinny(x, weight):
        from src.kernels.product import vector_product

        return vector_product(x, weight, bias)
    return deterministic.linear(x, weight, bias)


def _is_skinny(x: Tensor, weight: Tensor) -> bool:
    """Whether the product has few rows, a plain weight in half precision, and no gradient."""
    return (
        x.dim() == 2
        and x.size(0) <= SKINNY_ROWS
        and x.dtype in (torch.bfloat16, torch.float16)
        and not torch.is_grad_enabled()
        and type(weight) in (Tensor, nn.Parameter)
        and weight.dtype == x.dtype
        and weight.is_contiguous()
    )


class _Stack(torch.autograd.Function):
    """Several weights that lie one after the other in memory, as one.

    Nothing is copied; the gradient is split.
    """

    @staticmethod
    def forward(ctx, whole: Tensor, *parts: Tensor) -> Tensor:
        ctx.sizes = [part.size(0) for part in parts]
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, *grad.split(ctx.sizes)


class _Adapter(Protocol):
    """What `LoRA` is to the stack whose layers it wraps."""

    def adapted(
        self, x: Tensor, base: "Stacked", adapters: Sequence[tuple[int, nn.Module]]
    ) -> Tensor: ...


class Stacked:
    """Column layers that share their input, as one product.

    Their weights are made views of one tensor, uninitialised.
    """

    packed: Tensor | None = None

    def __init__(self, layers: list["ColumnParallelLinear"], device: torch.device) -> None:
        self.layers, self.sizes = layers, [layer.weight.size(0) for layer in layers]
        self.weight = self._joined("weight", device)
        self.bias = None if layers[0].bias is None else self._joined("bias", device)

    def _joined(self, name: str, device: torch.device) -> Tensor:
        first = getattr(self.layers[0], name)
        whole = torch.empty(sum(self.sizes), *first.shape[1:], dtype=first.dtype, device=device)
        for layer, part in zip(self.layers, whole.split(self.sizes)):
            copies = getattr(layer, name).copies
            setattr(layer, name, with_copies(nn.Parameter(part), copies))
        return whole

    def _with_gradient(self, whole: Tensor, name: str) -> Tensor:
        parts = [getattr(layer, name) for layer in self.layers]
        if not (torch.is_grad_enabled() and parts[0].requires_grad):
            return whole
        return _Stack.apply(
            whole, *(sum_gradient(part, layer.replicas) for part, layer in zip(parts, self.layers))
        )

    def is_plain(self, modules: Sequence[nn.Module]) -> bool:
        """Whether the modules are the layers themselves, without adapters."""
        return all(map(operator.is_, modules, self.layers))

    def __call__(self, x: Tensor, modules: Sequence[nn.Module]) -> Tensor:
        """What the modules make of x, side by side: [N, in] → [N, Σ out].

        They are the layers themselves, or adapters around them, which add their part.
        """
        if not self.is_plain(modules):
            starts = accumulate(self.sizes[:-1], initial=0)
            adapters = [
                (start, module)
                for start, module, layer in zip(starts, modules, self.layers)
                if module is not layer
            ]
            return cast(_Adapter, adapters[0][1]).adapted(x, self, adapters)
        bias = None if self.bias is None else self._with_gradient(self.bias, "bias")
        return linear(x, self._with_gradient(self.weight, "weight"), bias, self.packed)


class Projections:
    """Column layers that share their input: one product where they are stacked, else one each.

    The layers come with every call, since adapters may take their places in the model.
    """

    stacked: Stacked | None = None

    def stack(self, layers: list["ColumnParallelLinear"], device: torch.device) -> None:
        self.stacked = Stacked(layers, device)

    def apart(self, x: Tensor, *modules: nn.Module) -> Sequence[Tensor]:
        """What each module makes of x."""
        if self.stacked is None:
            return [module(x) for module in modules]
        return self.stacked(x, modules).split(self.stacked.sizes, -1)

    def joined(self, x: Tensor, *modules: nn.Module) -> Tensor:
        """The same, side by side: [N, in] → [N, Σ out]."""
        if self.stacked is None:
            return torch.cat([module(x) for module in modules], -1)
        return self.stacked(x, modules)

    def gated(self, x: Tensor, *modules: nn.Module) -> Tensor | None:
        """SwiGLU of the first module's output and the second's, where one kernel makes all of it.

        That is for a decode step's few rows, of plain weights without adapters; None elsewhere.
        """
        stacked = self.stacked
        if stacked is None or not stacked.is_plain(modules):
            return None
        if _product is not None or deterministic.is_on():
            return None
        few = x.size(0) <= cpu.FEW.get(x.dtype, 0)
        if stacked.packed is not None and few and cpu.decodes(x, stacked.weight):
            return cpu.few_rows_gated(x, stacked.weight)
        if runtime.takes(x) and _is_skinny(x, stacked.weight):
            from src.kernels.product import vector_product

            return vector_product(x, stacked.weight, paired=True)
        return None


def stacks_of(model: nn.Module) -> list[Stacked]:
    """The stacks of a model's layers, or of a part's."""
    return [
        value.stacked
        for module in model.modules()
        for value in module.__dict__.values()
        if isinstance(value, Projections) and value.stacked is not None
    ]


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """y_local = x W_localᵀ + b_local: [..., in] → [..., out / n].

    replicas: the ranks with the same rows (of a kv head that several share), whose gradients are
    summed.
    """

    row_parallel, packed = False, None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.replicas = weight, bias, replicas

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else sum_gradient(self.bias, self.replicas)
        return linear(x, sum_gradient(self.weight, self.replicas), bias, self.packed)


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """This rank's part of y = Σ over ranks of x_local W_localᵀ, which the caller sums.

    [..., in / n] → [..., out].
    """

    row_parallel, replicas, packed = True, None, None

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = weight, None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, packed=self.packed)


@contextmanager
def packed_weights(model: nn.Module, parallel) -> Iterator[None]:
    """A copy of each weight in the order in which products read them: on the CPU, for a while.

    The weights stay as they are meanwhile, and no gradients are taken. Only where the copies are
    small beside the machine's memory: they take as much as the weights. Layers that come in turn
    (`src/models/streaming.py`) have copies while they are computed.
    """
    holders = _packable(model) if parallel.device.type == "cpu" else []
    have_room = _have_room(holders)

    def pack(holders: list) -> None:
        for holder in holders:
            weight = holder.weight.detach()
            packs = have_room and has_products_in(weight.dtype)
            holder.packed = torch.ops.mkldnn._reorder_linear_weight(weight) if packs else weight

    def unpack(holders: list) -> None:
        for holder in holders:
            holder.packed = None

    hooks = []
    for layer in _streamed(model) if holders else []:
        of_layer = _packable(layer)
        holders = [holder for holder in holders if holder not in of_layer]
        hooks += [
            layer.register_forward_pre_hook(lambda *_, those=of_layer: pack(those)),
            layer.register_forward_hook(lambda *_, those=of_layer: unpack(those)),
        ]
    try:
        pack(holders)
        yield
    finally:
        unpack(holders)
        for hook in hooks:
            hook.remove()


def _streamed(model: nn.Module) -> Iterable[nn.Module]:
    """The layers that come in turn, if they do."""
    return cast(nn.ModuleList, model.layers) if getattr(model, "streamed", None) else ()


def _have_room(holders: list) -> bool:
    """Whether the copies of all ranks of this machine are small beside its memory."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    size = sum(holder.weight.nbytes for holder in holders) * ranks_here
    return size * PACKED_SHARE <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _packable(model: nn.Module) -> list:
    """What multiplies by a plain weight of a dtype that is packed, or has a kernel for few rows."""
    if not torch.backends.mkldnn.is_available():
        return []
    stacks = stacks_of(model)
    in_stacks = {id(layer) for stack in stacks for layer in stack.layers}
    layers = [
        module
        for module in model.modules()
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding))
        and id(module) not in in_stacks
    ]
    return [
        holder
        for holder in (*stacks, *layers)
        if type(holder.weight) in (Tensor, nn.Parameter) and holder.weight.dtype in cpu.FEW
    ]


class ParallelEmbedding(fairscale_layers.ParallelEmbedding):
    """Embedding split along the embedding axis, as in Meta's released shards."""

    def __init__(self, weight: nn.Parameter, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.weight, self.embedding_dim = weight, embedding_dim

    def forward(self, tokens: Tensor, region: Region = WHOLE) -> Tensor:
        """Ids [N] → [N, embedding_dim], as activations lie in the region."""
        whole = gather_from_model_parallel_region(F.embedding(tokens, self.weight))
        return region.own(whole[..., : self.embedding_dim])  # without the last rank's padding


class VocabParallelEmbedding(fairscale_layers.VocabParallelEmbedding):
    """Embedding split along the vocabulary, to share its weight with the output layer."""

    packed: Tensor | None = None

    def __init__(self, weight: nn.Parameter, rank: int) -> None:
        nn.Module.__init__(self)
        self.weight, self.start = weight, rank * weight.size(0)

    def forward(self, tokens: Tensor, region: Region = WHOLE) -> Tensor:
        """Ids [N] → [N, dim]: this rank's entries, zeros for the others', summed over the ranks."""
        local = tokens - self.start
        is_other = (local < 0) | (local >= self.weight.size(0))
        rows = F.embedding(local.masked_fill(is_other, 0), self.weight)
        rows = rows.masked_fill(is_other.unsqueeze(-1), 0.0)
        return region.leave(rows)


class ReplicatedLinear(nn.Linear):
    """A linear layer that every rank holds whole (the verifier's scalar head, experts' router)."""

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.weight = weight
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return deterministic.linear(x, self.weight)
