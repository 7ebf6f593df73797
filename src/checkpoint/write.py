"""Checkpoints out: Meta's consolidated shards, and Hugging Face folders.

Nothing is ever held whole but one output file.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from src.checkpoint.files import save_tensors
from src.checkpoint.folder import (
    check_space,
    copy_side_files,
    find_tokenizer,
    keep_special_ids,
    whole_folder,
)
from src.checkpoint.gguf_tokenizer import write_tokenizer
from src.checkpoint.names import hf_tensors, module_of
from src.checkpoint.shards import Place
from src.checkpoint.source import Checkpoint
from src.errors import UserError
from src.models.config import ModelConfig, params_of
from src.models.hf_config import hf_config
from src.models.stages import cut_in_stages

MAX_FILE_BYTES = 5 * 10**9  # of an output file
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def write_params(config: ModelConfig, folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(params_of(config), indent=1) + "\n")


def cast(checkpoint: Checkpoint, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor of the checkpoint in another dtype; UserError when it isn't finite, there or here.

    dtype: its own where None.
    """
    checkpoint.check_finite(name, tensor)
    if dtype is None or tensor.dtype == dtype:
        return tensor
    out = tensor.to(dtype)
    if dtype == torch.float16 and not torch.stack(torch.aminmax(out)).isfinite().all():
        raise UserError(
            f"{checkpoint.folder}: {name} holds {tensor.abs().max():g}, above what fp16 can; "
            "write bf16 or fp32"
        )
    return out


def split(
    checkpoint: Checkpoint,
    save_path: Path,
    n: int,
    dtype: torch.dtype | None = None,
    stages: int = 1,
) -> None:
    """Write `n` consolidated shards with `params.json` and the tokenizer's files.

    dtype: to write in, each tensor's own by default; stages: how many a shard's layers are of, and
    n all of theirs together. Peak memory: one shard. Raises UserError for more stages than layers.
    """
    cut = cut_in_stages(checkpoint.config, stages, flag="--stages")
    names = [
        [name for name in checkpoint.table if cut.holders(name, tied=False) == [stage]]
        for stage in range(stages)
    ]
    modules = [list(dict.fromkeys(map(module_of, of_stage))) for of_stage in names]
    facts = {"stages": modules} if stages > 1 else {}
    check_space(save_path, sum(checkpoint.bytes_of(name, dtype) for name in checkpoint.table))
    ranks = n // stages
    with whole_folder(save_path, **facts) as folder:
        for number in range(n):
            stage, rank = divmod(number, ranks)
            progress = tqdm(names[stage], desc=f"shard {number + 1} of {n}", unit="tensor")
            # Cloned: a slice of a mapped file would drag its whole storage into torch.save.
            shard = {
                name: cast(checkpoint, name, checkpoint.local(name, rank, ranks), dtype).clone(
                    memory_format=torch.contiguous_format
                )
                for name in progress
            }
            torch.save(shard, folder / Place(stages, stage, rank).file_name)
            del shard  # before the next one is made
        write_params(checkpoint.config, folder)
        tokenizer = find_tokenizer(checkpoint.folder, checkpoint.adapter_folder)
        is_adapters = tokenizer is not None and tokenizer.parent == checkpoint.adapter_folder
        if checkpoint.gguf is not None and not is_adapters:  # all in one file, nothing lies beside
            write_tokenizer(checkpoint.gguf, folder)
        else:
            copy_side_files(checkpoint.folder, folder, checkpoint.adapter_folder)
            keep_special_ids(checkpoint.folder, folder, checkpoint.adapter_folder)


def merge(
    checkpoint: Checkpoint,
    save_dir: Path,
    special_ids: dict[str, int | list[int] | None],
    dtype: torch.dtype | None = None,
    side_files: Callable[[Path], None] | None = None,
) -> None:
    """Write a Hugging Face folder that `transformers` loads, every tensor bit for bit.

    special_ids: "bos_token_id", "eos_token_id" and "pad_token_id"; dtype: to write in, each
    tensor's own by default; side_files(folder) writes the tokenizer's files, which are copied by
    default. Peak memory: one output file.
    """
    files = list(_by_file(checkpoint, dtype))
    total = sum(checkpoint.bytes_of(name, dtype) for name in checkpoint.table)
    check_space(save_dir, total)
    with whole_folder(save_dir) as folder:
        weight_map: dict[str, str] = {}
        progress = tqdm(total=len(checkpoint.table), desc="merging", unit="tensor")
        for number, names in enumerate(files, 1):
            file_name = (
                "model.safetensors"
                if len(files) == 1
                else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            )
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensor = cast(checkpoint, name, checkpoint.read(name), dtype)
                tensors |= hf_tensors(name, tensor, checkpoint.config)
                progress.update()
            save_tensors(tensors, folder / file_name)
            weight_map |= dict.fromkeys(tensors, file_name)
        progress.close()
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        if side_files is None:
            copy_side_files(checkpoint.folder, folder, checkpoint.adapter_folder)
        else:
            side_files(folder)
        config = hf_config(checkpoint.config, DTYPE_NAMES[dtype or checkpoint.dtype], special_ids)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        generation_config = folder / "generation_config.json"
        if not generation_config.exists() and checkpoint.config.head == "lm":
            known = {key: value for key, value in special_ids.items() if value is not None}
            generation_config.write_text(json.dumps(known, indent=1) + "\n")


def _by_file(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Iterator[list[str]]:
    """Names of the tensors of each output file, none above 5 GB (but a larger single tensor)."""
    names: list[str] = []
    size = 0
    for name in checkpoint.table:
        if names and size + checkpoint.bytes_of(name, dtype) > MAX_FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += checkpoint.bytes_of(name, dtype)
    yield names
