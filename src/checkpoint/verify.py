"""What is wrong with a checkpoint, all of it, and what was looked at."""

from dataclasses import dataclass
from pathlib import Path

import torch

from src.checkpoint.adapter import ADAPTER_CONFIG, Adapter
from src.checkpoint.files import TensorFile
from src.checkpoint.folder import find_tokenizer
from src.checkpoint.manifest import has_manifest, of_folder, problems, read_manifest
from src.checkpoint.source import Checkpoint
from src.checkpoint.steps import is_step, number_of, step_facts
from src.errors import UserError


@dataclass
class Report:
    """What was looked at, in a line, and what is wrong, a line each."""

    summary: str
    problems: list[str]


def _hashes(folder: Path) -> tuple[str, list[str]]:
    """What was compared, in words, and what is wrong."""
    try:
        if not has_manifest(folder):
            return "no manifest to compare hashes with", []
        manifest = read_manifest(folder)
    except UserError as error:
        return "", [str(error)]
    return f"{len(manifest['files'])} hashes compared", problems(folder, manifest)


def model_report(folder: Path, config_file: str | None = None) -> Report:
    """A model's weights: opened (which checks names and shapes), every number looked at."""
    compared, lines = _hashes(folder)
    try:
        checkpoint = Checkpoint.open(str(folder), config_file, gguf=True, alone=True)
    except UserError as error:
        return Report("", [*lines, str(error)])
    count = 0
    for name in checkpoint.table:
        try:
            count += checkpoint.check_finite(name, checkpoint.read(name)).numel()
        except (UserError, RuntimeError) as error:
            lines.append(f"{folder}: {name}: {str(error).splitlines()[0]}")
    inner = folder / "adapter"
    if inner.is_dir():
        lines += adapter_report(inner, None, checkpoint).problems
    tokenizer = None if checkpoint.gguf else find_tokenizer(checkpoint.folder)
    parts = [
        f"{len(checkpoint.table)} tensors, {count:,} numbers, all finite",
        f"{checkpoint.config.family}, {checkpoint.config.n_layers} layers, "
        f"head {checkpoint.config.head}",
        *([f"{checkpoint.stages} stages"] if checkpoint.stages > 1 else []),
        compared,
        f"tokenizer {tokenizer.name}" if tokenizer else "no tokenizer beside it",
        *([checkpoint.spelling.described] if checkpoint.spelling.described else []),
    ]
    return Report(f"{folder}: {'; '.join(parts)}", lines)


def adapter_report(folder: Path, base_dir: str | None, base: Checkpoint | None = None) -> Report:
    """A LoRA adapter: names and shapes against its model's, every number looked at.

    base_dir or base: the model that it belongs to.
    """
    compared, lines = _hashes(folder)
    try:
        if base is None:
            if base_dir is None:
                raise UserError(
                    f"{folder}: is an adapter; give the model that it belongs to as --base_dir"
                )
            base = Checkpoint.open(base_dir, alone=True)
        adapter = Adapter.open(str(folder), base.config)  # which looks at the numbers
    except UserError as error:
        return Report("", [*lines, str(error)])
    return Report(
        f"{folder}: an adapter of rank {adapter.lora.rank}, {len(adapter.tensors)} factors, "
        f"all finite; {compared}",
        lines,
    )


def step_report(folder: Path) -> Report:
    """A saved step of a training run: all files as written, every number finite."""
    try:
        manifest = step_facts(folder)
        count, total = len(of_folder(manifest)), len(manifest["files"])
        compared = f"{count} hashes compared"
        if "node" in manifest:
            node = manifest["nodes"][manifest["node"]]
            compared += f" ({count} of {total} files are this node's, {node})"
        lines = problems(folder, manifest)
    except UserError as error:
        return Report("", [str(error)])
    if not lines:  # of damaged files the numbers say nothing
        files = sorted(folder.glob("*.safetensors"))
        lines = [problem for file in files for problem in _not_finite(file)]
    return Report(f"{folder}: step {number_of(folder)}; {compared}; all numbers finite", lines)


def _not_finite(path: Path) -> list[str]:
    """A line for each tensor with NaN or infinity in it, or one for a file that cannot be read."""
    try:
        file = TensorFile(path)
    except UserError as error:
        return [str(error)]
    lines = []
    for key in file.keys:
        tensor = file.read(key)
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not torch.stack(torch.aminmax(tensor)).isfinite().all()
        ):
            lines.append(f"{path}: NaN or infinity in {key}")
    return lines


def reports_of(folder: Path, config_file: str | None, base_dir: str | None) -> list[Report]:
    """A report of whatever it is, or of each of a run's saved steps.

    base_dir: the model that an adapter belongs to. Raises UserError for what cannot be read.
    """
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        steps = [path for path in paths if is_step(path) and path.is_dir()]
        if (folder / ADAPTER_CONFIG).is_file():
            in_base = base_dir is not None and Path(base_dir).resolve() == folder.resolve()
            weights = [model_report(folder, config_file)] if in_base else []
            return [*weights, adapter_report(folder, base_dir)]
        if steps or (folder.is_dir() and is_step(folder.resolve())):
            return [step_report(step) for step in steps or [folder.resolve()]]
        return [model_report(folder, config_file)]
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
