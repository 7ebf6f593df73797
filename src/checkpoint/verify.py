"""What is wrong with a checkpoint, all of it, and what was looked at."""

from dataclasses import dataclass
from pathlib import Path

import torch

from src.checkpoint.adapter import Adapter
from src.checkpoint.files import TensorFile
from src.checkpoint.folder import find_tokenizer
from src.checkpoint.manifest import has_manifest, problems, read_manifest
from src.checkpoint.source import Checkpoint
from src.checkpoint.steps import number_of, step_facts
from src.errors import UserError


@dataclass
class Report:
    """What was looked at, in a line, and what is wrong, a line each."""

    summary: str
    problems: list[str]


def _hashes(folder: Path) -> tuple[str, list[str]]:
    try:
        if not has_manifest(folder):
            return "no manifest to compare hashes with", []
        manifest = read_manifest(folder)
    except UserError as error:
        return "", [str(error)]
    return f"{len(manifest['files'])} hashes compared", problems(folder, manifest)


def model_report(folder: Path, config_file: str | None = None) -> Report:
    """A model's weights: opened (which checks names and shapes), every number looked at."""
    said, found = _hashes(folder)
    try:
        checkpoint = Checkpoint.open(str(folder), config_file)
    except UserError as error:
        return Report("", [*found, str(error)])
    count = 0
    for name in checkpoint.table:
        try:
            count += checkpoint.check_finite(name, checkpoint.read(name)).numel()
        except (UserError, RuntimeError) as error:
            found.append(f"{folder}: {name}: {str(error).splitlines()[0]}")
    inner = folder / "adapter"
    if inner.is_dir():
        found += adapter_report(inner, None, checkpoint).problems
    tokenizer = find_tokenizer(checkpoint.folder)
    parts = [
        f"{len(checkpoint.table)} tensors, {count:,} numbers, all finite",
        f"{checkpoint.config.family}, {checkpoint.config.n_layers} layers, head {checkpoint.config.head}",
        said,
        f"tokenizer {tokenizer.name}" if tokenizer else "no tokenizer",
    ]
    return Report(f"{folder}: {'; '.join(parts)}", found)


def adapter_report(folder: Path, base_dir: str | None, base: Checkpoint | None = None) -> Report:
    """A LoRA adapter: its factors' names and shapes against the model it belongs to, every number looked at."""
    said, found = _hashes(folder)
    try:
        if base is None and base_dir is None:
            raise UserError(
                f"{folder}: is an adapter; give the model that it belongs to as --base_dir"
            )
        config = (base or Checkpoint.open(base_dir)).config
        adapter = Adapter.open(str(folder), config)
    except UserError as error:
        return Report("", [*found, str(error)])
    return Report(
        f"{folder}: an adapter of rank {adapter.lora.rank}, {len(adapter.tensors)} factors, all finite; {said}",
        found,
    )


def step_report(folder: Path) -> Report:
    """A saved step of a training run: all files as written, every number finite."""
    try:
        said, found = (
            f"{len(step_facts(folder)['files'])} hashes compared",
            problems(folder, read_manifest(folder)),
        )
    except UserError as error:
        return Report("", [str(error)])
    if not found:
        found = [
            problem
            for file in sorted(folder.glob("*.safetensors"))
            for problem in _not_finite(file)
        ]
    return Report(f"{folder}: step {number_of(folder)}; {said}; all numbers finite", found)


def _not_finite(path: Path) -> list[str]:
    try:
        file = TensorFile(path)
    except UserError as error:
        return [str(error)]
    bad = []
    for key in file.keys:
        tensor = file.read(key)
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not torch.stack(torch.aminmax(tensor)).isfinite().all()
        ):
            bad.append(f"{path}: NaN or infinity in {key}")
    return bad
