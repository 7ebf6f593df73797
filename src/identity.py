"""What makes a run the same run when its command is given again: the settings that matter, and what the files they name hold."""

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path

from src.checkpoint.folder import NOTES, TOKENIZERS, find_tokenizer
from src.checkpoint.manifest import MANIFEST, TENSORS, digest, has_manifest
from src.errors import UserError

TOKENIZER_SUFFIXES = (".model", ".tiktoken")


def identity(settings: dict, free: Collection[str]) -> dict:
    """A script's flags but for those in `free`; of those that name files and folders, what is in them: they may lie elsewhere later.

    Raises UserError for what cannot be read.
    """
    return {
        name: {"path": value, "holds": held(value)}
        if name.endswith(("_dir", "_file")) and value is not None
        else value
        for name, value in settings.items()
        if name not in free
    }


def held(text: str) -> str:
    """A digest of what a path leads to: of a file's content, of a checkpoint's folder as far as it belongs to the checkpoint.

    Weights are known by their manifest's hashes, or by names, sizes and times. With a tokenizer's file counts what describes it beside
    it; of FILE.py:FUNCTION the file and the name; what is not there is its own name.
    """
    path, function = Path(text), ""
    if not path.exists() and ":" in text:
        path, function = Path(text.rpartition(":")[0]), text.rpartition(":")[2]
    if not path.exists():
        return text
    try:
        return hashlib.sha256("\n".join([function, *_described(path)]).encode()).hexdigest()
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from None


def _described(path: Path) -> Iterator[str]:
    if path.is_dir():
        told = has_manifest(path)
        for file in sorted(path.iterdir()):
            if file.is_file() and (
                file.name in (*NOTES, MANIFEST) or (file.suffix in TENSORS and not told)
            ):
                yield f"{file.name} {_of_file(file)}"
        if (path / "adapter").is_dir():
            yield from _described(path / "adapter")
        tokenizer = find_tokenizer(path)
        if tokenizer is not None and tokenizer.parent != path:
            yield from _described(tokenizer)
        return
    yield _of_file(path)
    if path.suffix in TENSORS or path.name in TOKENIZERS or path.suffix in TOKENIZER_SUFFIXES:
        yield from (
            f"{name} {digest(path.parent / name)}"
            for name in NOTES
            if (path.parent / name).is_file()
        )


def _of_file(file: Path) -> str:
    if file.suffix in TENSORS:
        status = file.stat()
        return f"{status.st_size} {status.st_mtime_ns}"
    return digest(file)


def differences(before: object, now: dict) -> list[str]:
    """In words, what `identity` has become another; [] when nothing."""
    before, said = before if isinstance(before, dict) else {}, []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        paths = [
            value["path"] if isinstance(value, dict) and "path" in value else value
            for value in (old, new)
        ]
        if old == new or (
            isinstance(old, dict) and isinstance(new, dict) and old.get("holds") == new.get("holds")
        ):
            continue
        same = paths[0] == paths[1] and paths[0] is not None
        said.append(
            f"--{name} {paths[0]} holds something else now"
            if same
            else f"--{name} {paths[0]} → {paths[1]}"
        )
    return said
