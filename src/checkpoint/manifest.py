"""What a folder must hold, so that damage is seen.

`manifest.json` has the size and the SHA-256 of every file of tensors.
"""

import hashlib
import json
import os
from pathlib import Path

from src.checkpoint.json_file import read_json
from src.errors import UserError

MANIFEST = "manifest.json"
TENSORS = (".safetensors", ".pth", ".pt", ".bin")
VERSION = 1


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(path: Path) -> dict:
    """A file's entry in a manifest."""
    return {"size": path.stat().st_size, "sha256": digest(path)}


def described_all(folder: Path, known: dict[str, dict] | None = None) -> dict[str, dict]:
    """The entries of all files of tensors in a folder and below it.

    known: entries that were made already; their files are not read again.
    """
    known = known or {}
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix in TENSORS)
    names = [file.relative_to(folder).as_posix() for file in files]
    return {name: known[name] if name in known else described(folder / name) for name in names}


def sync(path: Path) -> None:
    """A file, or a folder's list of names, down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, files: dict[str, dict], **facts) -> None:
    """Write it, down to the disk. files: name → `described`; facts: what else is to be kept."""
    path = folder / MANIFEST
    path.write_text(json.dumps({"format": VERSION, **facts, "files": files}, indent=1) + "\n")
    sync(path)
    sync(folder)


def read_manifest(folder: Path) -> dict:
    """The manifest, once its form is checked. Raises UserError."""
    path = folder / MANIFEST
    manifest = read_json(path)
    files, nodes = manifest.get("files"), manifest.get("nodes", [])
    if type(manifest.get("format")) is not int or manifest["format"] != VERSION:
        raise UserError(f"{path}: format {manifest.get('format')!r}, this code reads {VERSION}")
    # Readers join the names to the folder: they may not lead out of it.
    if not isinstance(files, dict) or not all(
        not Path(name).is_absolute()
        and ".." not in Path(name).parts
        and 0 < len(name) < 256
        and isinstance(entry, dict)
        and type(entry.get("size")) is int
        and "sha256" in entry
        for name, entry in files.items()
    ):
        raise UserError(f"{path}: its list of files is damaged")
    # Of what several nodes hold: who they are, which one's folder this is, and who has a file.
    if nodes or "node" in manifest:
        numbers = [manifest.get("node")]
        for entry in files.values():
            of_file = entry.get("nodes")
            numbers += of_file if isinstance(of_file, list) and of_file else [None]
        known = isinstance(nodes, list) and all(isinstance(name, str) for name in nodes)
        if not known or not all(type(n) is int and 0 <= n < len(nodes) for n in numbers):
            raise UserError(f"{path}: its list of nodes is damaged")
    return manifest


def has_manifest(folder: Path) -> bool:
    """Whether there is one of ours: other software has files of that name too."""
    path = folder / MANIFEST
    return path.is_file() and {"format", "files"} <= read_json(path).keys()


def of_folder(manifest: dict) -> list[str]:
    """The files that belong into the manifest's own folder, by name: of several nodes' its own."""
    if "node" not in manifest:
        return sorted(manifest["files"])
    node, files = manifest["node"], manifest["files"].items()
    return sorted(name for name, entry in files if node in entry.get("nodes", ()))


def identity_of(manifest: dict) -> str:
    """What the manifests of one step have alike on all nodes, and no other step's have."""
    alike = {key: value for key, value in manifest.items() if key != "node"}
    return hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()


def problem(folder: Path, manifest: dict, name: str) -> str | None:
    """What is wrong with a file that the manifest names; None when nothing."""
    path, entry = folder / name, manifest["files"][name]
    try:
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != entry["size"]:
            return f"{path}: {path.stat().st_size} bytes, {entry['size']} were written: cut short"
        if (actual := digest(path)) != entry["sha256"]:
            others = [name for name, of in manifest["files"].items() if of["sha256"] == actual]
            why = f"that is {others[0]}'s, are they swapped?" if others else "damaged"
            return f"{path}: its SHA-256 is not that of what was written: {why}"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return None


def problems(folder: Path, manifest: dict, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files that the manifest names: one line each, the file named.

    part, parts: look at every `parts`-th file only, from number `part` on.
    """
    lines = (problem(folder, manifest, name) for name in of_folder(manifest)[part::parts])
    return [line for line in lines if line is not None]


def check_whole(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Raise UserError when a folder has a manifest and its files are not what that says.

    part, parts: this process's number among those that share the hashing, and how many they are.
    """
    if has_manifest(folder):
        damage = problems(folder, read_manifest(folder), part, parts)
        if damage:
            raise UserError(
                f"{damage[0]}. If the file was changed on purpose, remove {folder / MANIFEST}"
            )
