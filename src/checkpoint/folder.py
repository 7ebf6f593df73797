"""Whole folders or nothing: a checkpoint is written beside its place and renamed into it."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from src.checkpoint.source import TOKENIZER_FILES
from src.errors import UserError

_OURS = ("consolidated*", "params.json", "model*.safetensors*", "config.json", "adapter", "ppo_state.json", *TOKENIZER_FILES)


def check_replaceable(path: str) -> Path:
    """Raise UserError when `path` holds anything but a checkpoint: saving replaces the folder as a whole."""
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"{folder}: is a file, a folder is needed to save to")
    if folder.is_dir():
        ours = {file for pattern in _OURS for file in folder.glob(pattern)}
        foreign = sorted(file.name for file in set(folder.iterdir()) - ours)
        if foreign:
            raise UserError(
                f"{folder}: holds {', '.join(foreign[:3])}, which is no part of a checkpoint; saving would remove it: "
                "choose an empty or new folder"
            )
    return folder


def temporary_of(folder: Path) -> Path:
    """Where a folder is written before it is whole."""
    return folder.parent / f".tmp-{folder.name}"


def publish(folder: Path) -> None:
    """Put the finished temporary folder in its place, replacing an older one only now that the new one is whole."""
    new, old = temporary_of(folder), folder.parent / f".old-{folder.name}"
    for file in [*(f for f in new.rglob("*") if f.is_file()), new]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def fresh_temporary(folder: Path) -> Path:
    """An empty temporary folder for `folder`."""
    new = temporary_of(folder)
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(parents=True)
    return new


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write into the yielded folder; it takes `folder`'s place at the end, and vanishes if anything fails."""
    new = fresh_temporary(folder)
    try:
        yield new
        publish(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def copy_side_files(source: Path, target: Path) -> None:
    """The tokenizer's and generation's files that lie beside the weights."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
