"""What makes a run the same run when its command is given again.

That is the settings that matter, and what the files that they name hold.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.checkpoint.folder import NOTES, TOKENIZERS, find_tokenizer
from src.checkpoint.manifest import MANIFEST, TENSORS, digest, has_manifest
from src.data.shards import INDEX, blend_of
from src.errors import UserError
from src.settings.declaration import CONTENT, MAY_CHANGE, Settings, declared, flat

TOKENIZER_SUFFIXES = (".model", ".tiktoken")


def identity(settings: Settings, **more: Any) -> dict[str, Any]:
    """What of a script's settings must not change, by name; of files and folders, what they hold.

    more: what else a run of another kind would have another value of. Raises UserError for what
    cannot be read.
    """
    values, record = flat(settings), dict(more)
    for name, setting in declared(type(settings)).items():
        value = values[name]
        if MAY_CHANGE in setting.marks:
            continue
        if CONTENT in setting.marks and value is not None:  # it may lie elsewhere later
            record[name] = {"path": value, "holds": held(value)}
        else:
            record[name] = value
    return record


def held(text: str) -> str:
    """A digest of what a path leads to: a file's content, or what of a folder is the checkpoint.

    Weights are known by their manifest's hashes, or by names, sizes and times. With a tokenizer's
    file counts what describes it beside it; of FILE.py:FUNCTION the file and the name; of shards of
    tokens their indices, and the weights of a blend; what is not there is its own name.
    """
    if (blend := _blend(text)) is not None:
        return hashlib.sha256("\n".join(blend).encode()).hexdigest()
    path, function = Path(text), ""
    if not path.exists() and ":" in text:
        path, function = Path(text.rpartition(":")[0]), text.rpartition(":")[2]
    if not path.exists():
        return text
    try:
        return hashlib.sha256("\n".join([function, *_described(path)]).encode()).hexdigest()
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from None


def _blend(text: str) -> list[str] | None:
    """What folders of shards hold, and their weights; None where a text does not name such."""
    try:
        parts = blend_of(text)
    except UserError:
        return None
    indices = [(Path(folder) / INDEX, weight) for folder, weight in parts]
    if not all(index.is_file() for index, _ in indices):
        return None
    return [f"{digest(index)} {weight}" for index, weight in indices]


def _described(path: Path) -> Iterator[str]:
    if path.is_dir():
        has_hashes = has_manifest(path)
        for file in sorted(path.iterdir()):
            if file.is_file() and (
                file.name in (*NOTES, MANIFEST) or (file.suffix in TENSORS and not has_hashes)
            ):
                yield f"{file.name} {_of_file(file)}"
        if (path / "adapter").is_dir():
            yield from _described(path / "adapter")
        tokenizer = find_tokenizer(path)
        if tokenizer is not None and tokenizer.parent != path:
            yield from _described(tokenizer)
        elif tokenizer is not None and tokenizer.name not in NOTES:
            yield f"{tokenizer.name} {digest(tokenizer)}"
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


@dataclass(frozen=True)
class Change:
    """What of `identity` has become another, as the two records have it; in words by `str`."""

    name: str
    before: Any
    now: Any

    @property
    def is_of_content(self) -> bool:
        """Whether it is the same path, which holds something else."""
        old, new = self._shown
        return old == new and new is not None

    @property
    def _shown(self) -> list[Any]:
        return [v.get("path", v) if isinstance(v, dict) else v for v in (self.before, self.now)]

    def __str__(self) -> str:
        old, new = self._shown
        if self.is_of_content:
            return f"--{self.name} {new} holds something else now"
        return f"--{self.name} {old} → {new}"


def differences(before: object, now: dict[str, Any], defaults: dict[str, Any]) -> list[Change]:
    """What of `identity` has become another; [] when nothing.

    defaults: of settings, for those that the earlier record, of an older version, does not know.
    """
    before = before if isinstance(before, dict) else {}
    changes = []
    for name in sorted(before.keys() | now.keys()):
        values = [record.get(name, defaults.get(name)) for record in (before, now)]
        holds = [value.get("holds") if isinstance(value, dict) else None for value in values]
        if values[0] != values[1] and (holds[0] != holds[1] or holds[0] is None):
            changes.append(Change(name, *values))
    return changes
