"""Whole folders or nothing: a checkpoint is written beside its place and renamed into it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.checkpoint.manifest import MANIFEST, described_all, sync, write_manifest
from src.errors import UserError

TOKENIZERS = (
    "tokenizer.model",
    "tokenizer.json",
    "qwen.tiktoken",
)  # in the order in which they are looked for
TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

SCORES_FILE = (
    "score_normalization.json"  # what a verifier's scores are centred and scaled by, where they are
)

NOTES = (  # what is small
    "params.json",
    "config.json",
    "adapter_config.json",
    "ppo_state.json",
    SCORES_FILE,
    *TOKENIZER_FILES,
)
_OURS = (
    "consolidated*",
    "model*.safetensors*",
    "adapter",
    MANIFEST,
    *(name for name in NOTES if name != "adapter_config.json"),
)

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def check_replaceable(path: str) -> Path:
    """The folder to save to, resolved. Raises UserError when it holds anything but a checkpoint, or cannot be replaced.

    Saving writes a folder beside it and renames that into its place.
    """
    folder = Path(path).resolve()
    if folder.is_file():
        raise UserError(f"{folder}: is a file, a folder is needed to save to")
    if folder.is_mount():
        raise UserError(
            f"{folder}: is a mount point, which cannot be replaced as a whole: name a folder inside it"
        )
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{folder}: {above} is not a folder that can be written to")
    if folder.is_dir():
        ours = {file for pattern in _OURS for file in folder.glob(pattern)}
        foreign = sorted(file.name for file in set(folder.iterdir()) - ours)
        adapter = folder / "adapter"
        if adapter.is_dir():
            foreign += sorted(
                f"adapter/{f.name}" for f in adapter.iterdir() if f.name not in _ADAPTER
            )
        if foreign:
            raise UserError(
                f"{folder}: holds {', '.join(foreign[:3])}, which is no part of a checkpoint; saving would remove it: "
                "choose an empty or new folder"
            )
    return folder


def check_apart(saved: dict[str, str], others: dict[str, str | None]) -> None:
    """Raise UserError when a folder to save to (flag → path) is, holds or lies in another one, or holds what is read or logged.

    What lies in a folder that is saved to is lost when it is replaced.
    """
    paths = {
        flag: Path(path).resolve() for flag, path in (saved | others).items() if path is not None
    }
    for flag in saved:
        for other, path in paths.items():
            inside = paths[flag] in (path, *path.parents)
            if other != flag and (inside or (other in saved and path in paths[flag].parents)):
                raise UserError(
                    f"--{flag} {saved[flag]} and --{other} {(saved | others)[other]} overlap: saving would remove what the other "
                    "holds; choose another folder"
                )


def beside(save_dir: str, what: str) -> str:
    """The folder OUT-what that belongs to a folder OUT, however that is spelled."""
    path = os.path.normpath(save_dir)
    return f"{path if Path(path).name not in ('', '..') else os.path.abspath(path)}-{what}"


def check_space(folder: Path, needed: int, what: str = "") -> None:
    """Raise UserError when the disk has less than `needed` bytes free for a new folder beside the old; what: for whom."""
    folder = folder.resolve()
    above = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(above).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / 1e9:.3f} GB are needed{what and ' ' + what} and {free / 1e9:.3f} GB are free: make room or save elsewhere"
        )


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer's file in a checkpoint's folder, or beside the folder, where Meta's downloads have it."""
    places = [place / name for place in (folder, folder.resolve().parent) for name in TOKENIZERS]
    return next((path for path in places if path.is_file()), None)


def temporary_of(folder: Path) -> Path:
    """Where a folder is written before it is whole."""
    return folder.parent / f".tmp-{folder.name}"


def publish(folder: Path, known: dict[str, dict] | None = None) -> None:
    """Put the finished temporary folder in its place, replacing an older one only now that the new one is whole.

    known: manifest entries of files that were hashed already.
    """
    new, old = temporary_of(folder), folder.parent / f".old-{folder.name}"
    for file in (f for f in new.rglob("*") if f.is_file()):
        sync(file)
    write_manifest(new, described_all(new, known))
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
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


def copy_side_files(source: Path, target: Path, tokenizer: Path | None = None) -> None:
    """The tokenizer's, generation's and scores' files that lie with the weights; `tokenizer`: the one in use, where it is another.

    Another tokenizer goes alone: beside the weights' own, it would not be the one that is found again.
    """
    tokenizer = tokenizer or find_tokenizer(source)
    own = tokenizer is None or tokenizer.resolve().parent == source.resolve()
    for name in (*(TOKENIZER_FILES if own else ("generation_config.json",)), SCORES_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not own:
        name = (
            "qwen.tiktoken" if tokenizer.suffix == ".tiktoken" else f"tokenizer{tokenizer.suffix}"
        )
        shutil.copyfile(tokenizer, target / name)
