"""Tensors that move from one layout to another, between ranks and in memory."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from src.models.layout import TensorSpec, tensor_table
from src.models.lora import lora_layers, lora_table, merged, merged_parts
from src.models.places import Layout, pieces_of, within
from src.models.quantize import dense
from src.models.transformer import Transformer
from src.parallel.setup import Parallel


def layout_of(model: Transformer, parallel: Parallel, name: str = "") -> Layout:
    """How a model's tensors, or the one of that name, lie on the ranks of its division."""
    shares = model.shard_stage >= 2
    layout = Layout(parallel.mp_size, parallel.dp_size, shares, parallel.pp_size)
    if parallel.pp_size == 1 or not name:
        return layout
    return layout.held_by(model.stages.holders(name, model.config.tie_word_embeddings))


def is_spread(model: Transformer) -> bool:
    """Whether a model's weights lie otherwise than by tensor parallelism alone."""
    return bool(model.shard_stage) or model.stages.count > 1


def specs_of(model: Transformer) -> dict[str, TensorSpec]:
    """How each trained parameter is cut, by its name in the model."""
    layers = lora_layers(model)
    table = {
        **tensor_table(model.config),
        **(lora_table(model.config, layers[0][1].config) if layers else {}),
    }
    return {
        name: table[name.replace(".base.", ".")]
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def exchanged(
    part: Tensor,
    spec: TensorSpec,
    source: Layout,
    target: Layout,
    rank: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """This rank's part of a weight in the target layout, from what ranks hold in the source's.

    A collective over the group, whose ranks both layouts count. Each sends every other what that
    one's new part overlaps with; nobody holds the whole. part: of a rank that holds nothing, an
    empty tensor of the dtype and device.
    """
    if source == target:
        return part
    own, box = source.box(spec, rank), target.box(spec, rank)
    new = part.new_zeros(target.local_shape(spec, rank))
    operations, receives = [], []
    # What this rank has goes to whoever needs it.
    for other in range(dist.get_world_size(group)):
        if other == rank:
            continue
        asked = target.box(spec, other), source.owners(spec, other), source.box(spec, other)
        for owner, _, overlap in pieces_of(*asked):
            if owner == rank:
                piece = part[within(overlap, own)].contiguous()
                operations.append(dist.P2POp(dist.isend, piece, group=group, group_peer=other))
    # What it needs comes from whoever has it, itself among them.
    for owner, _, overlap in pieces_of(box, source.owners(spec, rank), own):
        place = new[within(overlap, box)]
        if owner is None or owner == rank:
            place.copy_(part[within(overlap, own)])
        else:
            buffer = torch.empty_like(place, memory_format=torch.contiguous_format)
            operations.append(dist.P2POp(dist.irecv, buffer, group=group, group_peer=owner))
            receives.append((place, buffer))
    waits = dist.batch_isend_irecv(operations) if operations else []
    for wait in waits:
        wait.wait()
    for place, buffer in receives:
        place.copy_(buffer)
    return new


def tensor_parallel_parts(
    model: Transformer,
    parallel: Parallel,
    layout: Layout | None = None,
    plain: Callable[[str, Tensor], Tensor] = lambda _, weight: dense(weight),
) -> Iterator[tuple[str, Tensor]]:
    """`merged_parts` of all stages, of ranks that share weights all rows each.

    A collective of all ranks, unless each has its part already. layout: another one to have the
    parts of; plain: see `merged_parts`.
    """
    target = layout or Layout(parallel.mp_size, parallel.dp_size, pp=parallel.pp_size)
    if layout is None:
        target = target.held_by(range(parallel.pp_size))
    if layout_of(model, parallel) == target:
        yield from merged_parts(model, plain)
        return
    parts = merged(model, plain)
    empty = torch.empty(0, dtype=model.dtype, device=parallel.device)
    for name, spec in tensor_table(model.config).items():
        part = parts[name]() if name in parts else empty
        source = layout_of(model, parallel, name)
        yield name, exchanged(part, spec, source, target, parallel.rank, parallel.world)
