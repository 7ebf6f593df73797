"""Tensors that move from one layout to another, between ranks and in memory."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from src.models.layout import TensorSpec, tensor_table
from src.models.lora import lora_layers, lora_table, merged_parts
from src.models.places import Layout, pieces_of, within
from src.models.transformer import Transformer
from src.parallel.setup import Parallel


def layout_of(model: Transformer, parallel: Parallel) -> Layout:
    """How a model lies on the ranks of its division."""
    return Layout(parallel.mp_size, parallel.dp_size, model.shard_stage >= 2)


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
    one's new part overlaps with; nobody holds the whole.
    """
    if source == target or spec.dim is None and not source.sharded and not target.sharded:
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
    model: Transformer, parallel: Parallel, layout: Layout | None = None
) -> Iterator[tuple[str, Tensor]]:
    """`merged_parts`, of data-parallel ranks that share weights all rows each.

    A collective of all ranks then. layout: another one to have the parts of.
    """
    source = layout_of(model, parallel)
    target = layout or Layout(source.tp, source.dp)
    table = tensor_table(model.config)
    for name, part in merged_parts(model):
        yield name, exchanged(part, table[name], source, target, parallel.rank, parallel.world)
