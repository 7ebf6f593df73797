"""Weights that data-parallel ranks share: ZeRO stages 2 and 3 by PyTorch's `fully_shard` (FSDP2).

Each rank keeps some rows of every tensor-parallel part. A block's weights are put together when
its forward or backward comes, and its gradients are summed and dealt out again, in fp32. What is
kept of trained weights is fp32, whatever is computed in: they are their own masters.
"""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from src.parallel.layers import copies_of, with_copies
from src.parallel.setup import Parallel
from src.parallel.shared_memory import gather_into, gathered, scatter_sum_into


class _Gather:
    """FSDP's all-gather by the quickest way that there is."""

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op=False
    ) -> dist.Work | None:
        return gather_into(output_tensor, input_tensor, group, async_op)


class _ScatterSum(_Gather):
    """FSDP's reduce-scatter by the quickest way that there is; always a sum.

    What it sums is a buffer of FSDP's, which would stay until the next one.
    """

    def __call__(  # type: ignore[override]  # FSDP's own signature
        self, output_tensor: Tensor, input_tensor: Tensor, group, op, async_op=False
    ) -> dist.Work | None:
        work = scatter_sum_into(output_tensor, input_tensor, group, async_op)
        if work is None:
            input_tensor.untyped_storage().resize_(0)
        return work


def shard(model, parallel: Parallel, stage: int, offload: bool = False) -> None:
    """Let the data-parallel ranks share the model's weights. On the meta device; to be filled.

    stage: 2 keeps what was put together from a step's first forward to its last backward, 3 lets go
    of it block by block. offload: a rank's share rests in host memory, and so do its gradients.
    """
    compute = model.dtype
    model.computes_in, model.shard_stage = compute, stage
    if not model.part.layers:  # this rank has nothing of the model
        return
    # Seconds to import, which runs without shared weights need not spend.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    # What a part returns may be a view: nothing here writes over it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    copies = {name: copies_of(weight) for name, weight in model.named_parameters()}
    mesh = DeviceMesh.from_group(parallel.dp_group, parallel.device.type, mesh_dim_names=("dp",))
    pinned = parallel.device.type == "cuda"
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pinned) if offload else OffloadPolicy(),
    }
    *parts, _ = sharded_parts(model)
    for part in parts:
        fully_shard(part, reshard_after_forward=stage == 3, **options)
    # The end of the model is used by its loss, after its forward.
    fully_shard(model, reshard_after_forward=False, **options)
    if not model.config.tie_word_embeddings:
        model.tok_embeddings.set_unshard_in_backward(False)  # the ids are all that it takes
    for part in sharded_parts(model):
        # Gradients add up, as everywhere here: nothing is averaged.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        if parallel.device.type == "cpu":
            part.set_custom_all_gather(_Gather())
            part.set_custom_reduce_scatter(_ScatterSum())
            # Nothing comes beside computing here: not the next part's weights, then, either.
            part.set_modules_to_backward_prefetch([part])
    model.to_empty(device=torch.device("cpu") if offload else parallel.device)
    for name, weight in model.named_parameters():
        with_copies(weight, copies[name])


def sharded_parts(model) -> list[Any]:
    """What `shard` made `fully_shard` look after: the blocks, and the model around them.

    Before these an embedding that is not the output layer, too.
    """
    if not model.shard_stage or not model.part.layers:
        return []
    embedding = [] if model.config.tie_word_embeddings else [model.tok_embeddings]
    return [*embedding, *model.layers, model]


def own(weight: Tensor) -> Tensor:
    """What this rank keeps of a weight or a gradient: its rows, or all of what is not shared.

    The same tensor each time, as optimizers want it, where a DTensor's `to_local` would make a new
    one.
    """
    return getattr(weight, "_local_tensor", weight)


@torch.no_grad()
def whole(weight: Tensor) -> Tensor:
    """All rows of a weight. A collective of the data-parallel ranks, if they share it."""
    if own(weight) is weight:
        return weight
    mesh = weight.device_mesh  # type: ignore[attr-defined]  # a DTensor's
    group, rows, part = mesh.get_group(), weight.size(0), own(weight).to(mesh.device_type)
    padded = part.new_zeros(share_of_rows(rows, dist.get_world_size(group)), *part.shape[1:])
    padded[: part.size(0)] = part
    return gathered(padded, group).flatten(0, 1)[:rows]


def share_of_rows(rows: int, n: int) -> int:
    """How many of the rows each of n ranks keeps, but for the last ones."""
    return -(-rows // n)


@torch.no_grad()
def fill(weight: Tensor, local: Tensor) -> None:
    """Copy this rank's rows of a tensor-parallel part to where the rank keeps them."""
    if own(weight) is not weight:
        group = weight.device_mesh.get_group()  # type: ignore[attr-defined]  # a DTensor's
        share = share_of_rows(weight.size(0), dist.get_world_size(group))
        local = local[dist.get_rank(group) * share :][:share]
    own(weight).copy_(local)


def let_go_after_backward(model, yes: bool) -> None:
    """Whether the next backward lets go of the weights that it put together."""
    for part in sharded_parts(model):
        part.set_reshard_after_backward(yes, recurse=False)


def let_go(model) -> None:
    """Of what was put together: after weights have changed, it is not them any more."""
    for part in sharded_parts(model):
        part.reshard()
