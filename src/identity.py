"""What makes a run the same run when its command is given again.

That is the settings that matter, and what the files that they name hold.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src import storage
from src.checkpoint.folder import NOTES, TOKENIZERS, find_tokenizer
from src.checkpoint.manifest import MANIFEST, TENSORS, digest, has_manifest
from src.data.sources import files_in, held_file, parts_of
from src.errors import UserError
from src.settings.declaration import CONTENT, MAY_CHANGE, ROWS, Settings, declared, flat

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
            holds = held_rows(value) if ROWS in setting.marks else held(value)
            record[name] = {"path": value, "holds": holds}
        else:
            record[name] = value
    return record


def held(text: str) -> str:
    """A digest of what a path leads to: a file's content, or what of a folder is the checkpoint.

    Weights are known by their manifest's hashes, or by names, sizes and times. With a tokenizer's
    file counts what describes it beside it; of FILE.py:FUNCTION the file and the name; what is not
    there is its own name.
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


def held_rows(text: str) -> str:
    """A digest of the rows that a text names: of each file's content, and of the weights.

    What is not there is its own name. Raises UserError as src/data/sources.py does.
    """
    lines = [""]
    for part in parts_of(text):
        files = files_in(part.location)
        if not all(storage.is_url(file) or Path(file).is_file() for file in files):
            return text
        lines += [] if part.weight is None else [f"weight {part.weight}"]
        try:
            lines += map(held_file, files)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


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
