"""A model in training to consolidated shards: merged weights, and the LoRA adapter beside them in PEFT's format."""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from src.checkpoint.folder import (
    check_replaceable,
    check_space,
    copy_side_files,
    fresh_temporary,
    publish,
    temporary_of,
)
from src.checkpoint.source import Checkpoint, generalised, to_halves, to_hf_name
from src.checkpoint.write import shard_name, write_params
from src.errors import UserError
from src.models.llama import ROTARY
from src.models.lora import lora_layers
from src.models.transformer import Transformer
from src.parallel.setup import Parallel, agreed


@torch.no_grad()
def merged_weights(model: Transformer) -> dict[str, Tensor]:
    """This rank's plain weights on the host, adapters added in: what a checkpoint without LoRA would hold."""
    adapted = dict(lora_layers(model))
    weights = {}
    for name, parameter in model.named_parameters():
        if name.endswith((".lora_a", ".lora_b")):
            continue
        stem = name.removesuffix(".base.weight")
        if stem in adapted:
            name, parameter = f"{stem}.weight", parameter.float() + adapted[stem].delta()
        weights[name] = parameter.detach().to(device="cpu", dtype=model.norm.weight.dtype, copy=True)
    return weights


@torch.no_grad()
def whole_adapter(model: Transformer, parallel: Parallel) -> dict[str, Tensor]:
    """The adapter's factors whole, by PEFT's names; empty without LoRA. A collective over the model-parallel ranks."""
    adapter = {}
    for stem, layer in lora_layers(model):
        hf = to_hf_name(f"{stem}.weight").removesuffix(".weight")
        factors = {"lora_A": (layer.lora_a, 1), "lora_B": (layer.lora_b, 0)}
        for factor, (parameter, dim) in factors.items():
            whole = parameter.detach()
            if parameter.model_parallel and parallel.mp_size > 1:
                parts = [torch.empty_like(whole) for _ in range(parallel.mp_size)]
                dist.all_gather(parts, whole.contiguous(), group=parallel.mp_group)
                whole = torch.cat(parts, dim)
            if factor == "lora_B" and generalised(f"{stem}.weight") in ROTARY:
                whole = to_halves(whole, model.config.head_dim)
            adapter[f"base_model.model.{hf}.{factor}.weight"] = whole.cpu().contiguous()
    if adapter and model.config.head == "score":
        adapter["base_model.model.score.weight"] = model.score.weight.detach().cpu().contiguous()
    return adapter


def save_model(
    model: Transformer, parallel: Parallel, save_dir: str, beside: Path, tokenizer: Path | None = None
) -> None:
    """Write the model to `save_dir` from all its ranks; `beside`: the folder it came from, whose side files go along.

    tokenizer: the file in use, where it does not lie there. The folder appears whole or not at all, and replaces an older
    one only then. Raises UserError on every rank when any cannot write.
    """
    folder = Path(save_dir).resolve()
    target, adapter = temporary_of(folder), whole_adapter(model, parallel)

    def write() -> None:
        try:
            if parallel.dp_rank == 0:
                torch.save(merged_weights(model), target / shard_name(parallel.mp_rank))
            if parallel.is_main:
                write_params(model.config, target)
                copy_side_files(beside, target, tokenizer)
                if adapter:
                    _write_adapter(model, adapter, target / "adapter", beside)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise UserError(f"{target}: writing failed ({str(error).splitlines()[0]}); {folder} is as it was") from error

    if parallel.is_main:
        fresh_temporary(folder)
    dist.barrier()
    try:
        agreed(write)
    except UserError:
        if parallel.is_main:
            shutil.rmtree(target, ignore_errors=True)
        raise
    if parallel.is_main:
        publish(folder)
    dist.barrier()


def check_save(save_dir: str, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Raise UserError, before any work, when a model like the checkpoint's could not be saved to `save_dir`."""
    folder = check_replaceable(save_dir)
    numbers = sum(torch.Size(spec.shape).numel() for spec in checkpoint.table.values())
    check_space(folder, numbers * dtype.itemsize)


def _write_adapter(model: Transformer, adapter: dict[str, Tensor], folder: Path, base: Path) -> None:
    folder.mkdir()
    layer = lora_layers(model)[0][1]
    scored = model.config.head == "score"
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scored else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": layer.rank,
        "lora_alpha": layer.scale * layer.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({key.split(".")[-3] for key in adapter if "lora_" in key}),
        "modules_to_save": ["score"] if scored else None,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
