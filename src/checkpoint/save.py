"""A model in training to consolidated shards: merged weights, and beside them the LoRA adapter."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from src.checkpoint.adapter import write_adapter
from src.checkpoint.folder import (
    SCORES_FILE,
    check_replaceable,
    check_space,
    copy_side_files,
    fresh_temporary,
    keep_special_ids,
    publish,
    temporary_of,
)
from src.checkpoint.json_file import read_json
from src.checkpoint.manifest import described
from src.checkpoint.nodes import Nodes
from src.checkpoint.sending import Transfer, host_group, send_files
from src.checkpoint.shards import Place
from src.checkpoint.source import Checkpoint
from src.checkpoint.write import write_params
from src.errors import UserError
from src.models.exchange import exchanged, is_spread, parts_in, placement_of
from src.models.layout import tensor_table
from src.models.lora import LoRAConfig, lora_layers, lora_table, merged_parts
from src.models.places import Placement
from src.models.quantize import Quantized
from src.models.transformer import Transformer
from src.parallel.layout import Layout
from src.parallel.setup import Parallel, agreed
from src.parallel.sharding import own as kept_rows


def saved_dtype(base: Checkpoint, name: str, dtype: torch.dtype, own: bool) -> torch.dtype:
    """What a weight that was computed in `dtype` is saved in.

    own: the checkpoint's own, where that is narrower: a bf16 model that was trained on the CPU, in
    fp32, is a bf16 model again.
    """
    of_base = base.dtype_of(name)
    return of_base if own and of_base.itemsize < dtype.itemsize else dtype


@torch.no_grad()
def merged_weights(
    model: Transformer, parallel: Parallel, base: Checkpoint | None = None, own: bool = False
) -> dict[str, Tensor]:
    """This rank's plain weights on the host, adapters added in: a checkpoint without LoRA.

    Where ranks share the weights otherwise than by tensor parallelism all come here, and the first
    get those of all.

    own: in `base`'s own dtypes, see `saved_dtype`. Under a quantised weight lies the base's own,
    unquantised, which is read again from `base`. Raises UserError for what fp16 cannot hold.
    """

    def plain(name: str, weight: Tensor) -> Tensor:
        if not isinstance(weight, Quantized):
            return weight
        assert base is not None, "a quantised model is saved with the checkpoint it came from"
        unquantised = base.local(name, parallel.mp_rank, parallel.mp_size, merged=False)
        return unquantised.to(parallel.device)

    weights: dict[str, Tensor] = {}
    problems: list[str] = []
    parts, layout = merged_parts(model, plain), parallel.layout
    if is_spread(model):
        parts = parts_in(model, parallel, Layout(tp=layout.tp, first=layout.first), plain=plain)
    for name, weight in parts:
        if is_spread(model) and not has_shard(parallel):
            continue  # the first ranks get all
        dtype = weight.dtype if base is None else saved_dtype(base, name, weight.dtype, own)
        weights[name] = weight.to(device="cpu", dtype=dtype, copy=True)
        if dtype == torch.float16 != weight.dtype and weights[name].isinf().any():
            problems.append(
                f"{name} holds {weight.abs().max():g}, above what fp16 can; give --dtype fp32, to "
                "compute and to save in"
            )
    if problems:
        raise UserError(problems[0])
    return weights


@torch.no_grad()
def whole_adapter(model: Transformer, parallel: Parallel, lora: LoRAConfig) -> dict[str, Tensor]:
    """The adapter's factors whole, by our names, and a score head: on the first rank.

    A collective of all. lora: see `trained_lora`.
    """
    table = dict(lora_table(model.config, lora))
    if model.config.head == "score":
        table["score.weight"] = tensor_table(model.config)["score.weight"]
    parameters = dict(model.named_parameters())
    adapter: dict[str, Tensor] = {}
    for name, spec in table.items():
        held = parameters.get(name)
        local = torch.empty(0, dtype=model.dtype, device=parallel.device)
        local = local if held is None else kept_rows(held.detach())
        source = placement_of(model, parallel, name)
        whole = exchanged(local, spec, source, Placement(1), parallel.rank, parallel.world)
        adapter[name] = whole.to("cpu", model.dtype)
    return adapter


def trained_lora(model: Transformer, parallel: Parallel) -> LoRAConfig | None:
    """The adapter that a model is trained with, on whatever stages; a collective of all ranks."""
    layers = lora_layers(model)
    lora = layers[0][1].config if layers else None
    if parallel.layout.pp == 1 and parallel.layout.size == parallel.world_size:
        return lora
    every: list[LoRAConfig | None] = [None] * parallel.world_size
    dist.all_gather_object(every, lora)
    return next((config for config in every if config is not None), None)


def has_shard(parallel: Parallel) -> bool:
    """Whether this rank writes a shard: of the first model's ranks; the others hold the same."""
    return parallel.is_member and parallel.dp_rank == parallel.pp_rank == 0


def save_model(
    model: Transformer,
    parallel: Parallel,
    save_dir: str,
    base: Checkpoint,
    side_files: Callable[[Path], None] | None = None,
    notes: dict[str, dict] | None = None,
    own_dtype: bool = True,
) -> None:
    """Write the model to `save_dir` from all its ranks.

    base: what it came from; side_files(folder) writes the tokenizer's files, which are copied from
    there by default; notes: JSON files to lie beside the weights, by name; own_dtype: in the base's
    own, see `saved_dtype`. The folder appears whole or not at all, and replaces an older one only
    then; where nodes share none, on the first rank's, and the others send what they wrote there.
    Raises UserError on every rank when any cannot write.
    """
    folder = Path(save_dir).resolve()
    target = temporary_of(folder)
    nodes = Nodes.find(folder, parallel)
    # By all ranks together, before one can fail to write.
    lora = trained_lora(model, parallel)
    adapter = {} if lora is None else whole_adapter(model, parallel, lora)
    weights: dict[str, Tensor] = {}
    if is_spread(model):
        weights = agreed(lambda: merged_weights(model, parallel, base, own_dtype))

    def write() -> dict[str, dict]:
        """This rank's share of the files, and the manifest's entries of its tensors."""
        written = {}
        try:
            if has_shard(parallel):
                shard = Place(rank=parallel.mp_rank).file_name
                of_rank = weights or merged_weights(model, parallel, base, own_dtype)
                torch.save(of_rank, target / shard)
                written[shard] = described(target / shard)
            if parallel.is_main:
                write_params(model.config, target)
                if side_files is None:
                    copy_side_files(base.folder, target, base.adapter_folder)
                    keep_special_ids(base.folder, target, base.adapter_folder)
                else:
                    side_files(target)
                # the moments of the base's scores: this model's are others
                (target / SCORES_FILE).unlink(missing_ok=True)
                for name, note in (notes or {}).items():
                    (target / name).write_text(json.dumps(note) + "\n")
                if lora is not None:
                    write_adapter(
                        model.config,
                        lora,
                        adapter,
                        target / "adapter",
                        base.folder,
                    )
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise UserError(
                f"{target}: writing failed ({str(error).splitlines()[0]}); {folder} is as it was"
            ) from error
        return written

    layout = parallel.layout
    writing = {0, *range(layout.first, layout.first + layout.tp)}
    writes = nodes.is_first and not writing.isdisjoint(nodes.ranks(nodes.node))
    if writes:
        fresh_temporary(folder)
    dist.barrier()  # nobody writes before the folder is there
    try:
        written = agreed(write)
        written_by_rank: list[dict[str, dict]] = [{}] * parallel.world_size
        dist.all_gather_object(written_by_rank, written)
        # To the first rank's node, of files that other nodes' ranks wrote.
        transfers = [
            Transfer(name, rank, 0, entry)
            for rank, of_rank in enumerate(written_by_rank)
            for name, entry in of_rank.items()
            if nodes.of_rank[rank] != nodes.of_rank[0]
        ]
        if transfers:
            with host_group(parallel) as group:
                send_files(transfers, target, target, group)
    except UserError:
        if writes:
            shutil.rmtree(target, ignore_errors=True)
        raise
    if writes and nodes.node != nodes.of_rank[0]:
        shutil.rmtree(target)
    if parallel.is_main:  # each rank hashed its own shard: rank 0 only collects
        publish(folder, {name: entry for part in written_by_rank for name, entry in part.items()})
    dist.barrier()  # nobody goes on before the folder is in its place


def read_score_moments(folder: Path) -> tuple[float, float] | None:
    """What a verifier's scores are to be centred and scaled by; None where it does not say.

    Raises UserError for other than two such numbers.
    """
    path = folder / SCORES_FILE
    if not path.is_file():
        return None
    raw = read_json(path)
    mean: Any = raw.get("mean")
    std: Any = raw.get("std")
    if any(type(x) not in (int, float) or not math.isfinite(x) for x in (mean, std)) or std <= 0:
        raise UserError(
            f"{path}: holds mean {mean!r} and std {std!r}; "
            "a number and a positive number are expected"
        )
    return float(mean), float(std)


def check_save(
    save_dir: str,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    own_dtype: bool = True,
    folders: int = 1,
) -> None:
    """Raise UserError when a model like the checkpoint's could not be saved to `save_dir`.

    dtype: that it is computed in; own_dtype: see `saved_dtype`; folders: how many such the run will
    save, side by side.
    """
    folder = check_replaceable(save_dir)
    size = sum(
        checkpoint.bytes_of(name, saved_dtype(checkpoint, name, dtype, own_dtype))
        for name in checkpoint.table
    )
    check_space(folder, folders * size)
