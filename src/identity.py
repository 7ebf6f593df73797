"""What makes a run the same run when its command is given again: the settings that matter, and what the files they name hold."""

import hashlib
from pathlib import Path
from typing import Collection

from src.checkpoint.folder import NOTES
from src.checkpoint.manifest import MANIFEST, TENSORS, digest, has_manifest


def identity(settings: dict, free: Collection[str]) -> dict:
    """A script's flags but for those in `free`; of those that name files and folders, what is in them: they may lie elsewhere later."""
    return {
        name: {"path": value, "holds": held(Path(value))} if name.endswith(("_dir", "_file")) and value is not None else value
        for name, value in settings.items()
        if name not in free
    }


def held(path: Path) -> str:
    """A digest of a file, or of a checkpoint's folder: of its manifest's hashes, or the names, sizes and times of its tensor files, and

    of what else belongs to it.
    """
    if path.is_file():
        return digest(path)
    total, told = hashlib.sha256(), path.is_dir() and has_manifest(path)
    for file in sorted(path.iterdir()) if path.is_dir() else []:
        if file.suffix in TENSORS and not told:
            status = file.stat()
            total.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        elif file.name in (*NOTES, MANIFEST) and file.is_file():
            total.update(f"{file.name} {digest(file)}\n".encode())
    return total.hexdigest()


def differences(before: object, now: dict) -> list[str]:
    """In words, what `identity` has become another; [] when nothing."""
    before, said = before if isinstance(before, dict) else {}, []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        paths = [value["path"] if isinstance(value, dict) and "path" in value else value for value in (old, new)]
        if old == new or (isinstance(old, dict) and isinstance(new, dict) and old.get("holds") == new.get("holds")):
            continue
        same = paths[0] == paths[1] and paths[0] is not None
        said.append(f"--{name} {paths[0]} holds something else now" if same else f"--{name} {paths[0]} → {paths[1]}")
    return said
