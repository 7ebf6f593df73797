"""A checkpoint's slices into this rank's model."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from src.checkpoint.adapter import Adapter
from src.checkpoint.source import Checkpoint
from src.models.init import random_tensor
from src.models.layout import TensorSpec, tensor_table
from src.models.lora import (
    TARGETS,
    LoRA,
    LoRAConfig,
    adapter_parts,
    add_lora,
    sharing,
    wrap_lora,
)
from src.models.quantize import plain_parts, quantized
from src.models.stages import cut_in_stages
from src.models.transformer import Transformer, build_part
from src.parallel.layers import copies_of, with_copies
from src.parallel.setup import Parallel, agreed
from src.parallel.sharding import fill, shard


@torch.no_grad()
def load_model(
    checkpoint: Checkpoint,
    parallel: Parallel,
    dtype: torch.dtype,
    head: str | None = None,
    seed: int = 0,
    quantize: str | None = None,
    lora: LoRAConfig | None = None,
    zero: int = 0,
    offload: bool = False,
    stages_per_rank: int = 1,
    streamed: bool = False,
) -> Transformer:
    """This rank's model with the checkpoint's weights, each read, cast and put in place by itself.

    head: "score" on a language model's checkpoint leaves `output` aside and starts the scalar head
    from N(0, 1/(dim + 1)) (N Implementation Details of RLHF with PPO); every other weight must come
    from the checkpoint. quantize: nf4 or int8, the frozen kind of the linear layers' weights. lora:
    the adapter to train, which goes on from the checkpoint's if that has one. An adapter that is
    not trained is added to the weights, or, when these are quantised, stays beside them. zero: from
    stage 2 on the data-parallel ranks share the weights, in host memory with `offload`. Of a
    pipeline each rank gets its `stages_per_rank` stages. streamed: the layers, which are not
    trained, rest in host memory, where they go as they are read. Raises UserError, on every rank,
    when a weight is not finite.
    """
    config = checkpoint.config.with_head(head or checkpoint.config.head)
    if config.head == "lm" and checkpoint.config.head != "lm":
        raise ValueError(f"{checkpoint.folder} has no output layer")
    layout = parallel.layout
    if layout.models == 1 and not offload:
        zero = 0  # there is nobody to share with
    table, rank, n = tensor_table(config), parallel.mp_rank, layout.tp
    per_rank = stages_per_rank if layout.pp > 1 else 1
    model = build_part(config, parallel, dtype, cut_in_stages(config, layout.pp, per_rank))
    held = {name for name, _ in model.named_parameters()}  # of the stages of this rank
    # The adapter that stays an adapter; any other is added to the weights as they are read.
    adapter = checkpoint.adapter if quantize or lora else None
    kept = lora
    if lora is None and adapter is not None:
        kept = replace(adapter.lora, dropout=0.0)
    start_from = None if adapter is None else adapter.tensors

    def rests_on(name: str) -> torch.device:
        """Where a weight is kept."""
        is_streamed = streamed and name.startswith("layers.")
        return torch.device("cpu") if is_streamed else parallel.device

    def read() -> None:
        for name in (name for name in table if name in held):
            if name == "score.weight" and checkpoint.config.head != "score":
                local = random_tensor(
                    name, TensorSpec((1, config.dim)), (config.dim + 1) ** -0.5, seed
                )
            else:
                local = checkpoint.check_finite(
                    name, checkpoint.local(name, rank, n, merged=adapter is None)
                )
            put(model, name, local, parallel.device, quantize, rests_on(name))
        if kept is not None:
            for name, local in adapter_parts(model, kept, seed, parallel, start_from):
                put(model, name, local, parallel.device, None, rests_on(name))

    # q, k, v become neighbours in memory, and w1, w3, for one product each: plain weights only.
    if zero < 2 and not quantize:
        model.stack_projections(rests_on("layers."))
    if kept is not None:
        wrap_lora(model, kept, parallel)
    if zero >= 2:
        shard(model, parallel, zero, offload)
    agreed(read)
    checkpoint.release()
    if streamed:
        model.stream_layers(parallel.device)
    return model.requires_grad_(False) if kept and lora is None else model


@torch.no_grad()
def load_sharing(
    model: Transformer,
    parallel: Parallel,
    head: str,
    seed: int = 0,
    lora: LoRAConfig | None = None,
    adapter: Adapter | None = None,
) -> Transformer:
    """A role on the trunk of a model in training with LoRA.

    It has that model's frozen weights themselves, and an adapter and a head of its own. lora: an
    adapter to start from nothing; adapter: one to go on from, with its score head, if it has one.
    """
    role = sharing(model, head, parallel)
    if head == "score" and role.part.last:
        dim, name = model.config.dim, "score.weight"
        fresh = random_tensor(name, TensorSpec((1, dim)), (dim + 1) ** -0.5, seed)
        score = fresh if adapter is None or adapter.score is None else adapter.score
        put(role, name, score, parallel.device)
    if adapter is not None:  # PPO knows no dropout (docs/ppo.md)
        add_lora(role, replace(adapter.lora, dropout=0.0), seed, parallel, adapter.tensors)
    elif lora is not None:
        add_lora(role, lora, seed, parallel)
    return role


def allocate(model: Transformer, device: torch.device) -> None:
    """Memory for a model that was just built, still to be filled; projections are stacked."""
    model.stack_projections(device)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                empty = torch.empty_like(weight, device=device)
                allocated = nn.Parameter(empty, requires_grad=weight.requires_grad)
                setattr(module, name, with_copies(allocated, copies_of(weight)))


def put(
    model: Transformer,
    name: str,
    local: Tensor,
    device: torch.device,
    quantize: str | None = None,
    rests_on: torch.device | None = None,
) -> None:
    """Put a rank's part of a weight in its place in a model that was just built, in its dtype.

    rests_on: where it is kept, if not on the device, which quantises it in any case.
    """
    module_name, attribute = name.rsplit(".", 1)
    module = model.get_submodule(module_name)
    if isinstance(module, LoRA) and attribute in ("weight", "bias"):
        module = module.base
    unfilled = getattr(module, attribute)
    if not unfilled.is_meta:  # allocated already: a part of stacked weights, or a rank's rows
        fill(unfilled, local)
        return
    rests_on = rests_on or device
    kind = quantize if name.split(".")[-2] in TARGETS and attribute == "weight" else None
    # a copy: a slice of a mapped file would keep the file's pages
    where = device if kind else rests_on
    local = torch.empty(local.shape, dtype=unfilled.dtype, device=where).copy_(local)
    if kind:
        weight = quantized(local, kind)
        for part in plain_parts(weight):
            part.data = part.to(rests_on)
    else:
        weight = nn.Parameter(local, requires_grad=unfilled.requires_grad)
    # on how many ranks it is the same, which the gradient norm counts once
    weight.copies = unfilled.copies  # type: ignore[attr-defined]  # not torch's, ours
    setattr(module, attribute, weight)
