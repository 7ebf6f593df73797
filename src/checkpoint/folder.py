"""Whole folders or nothing: a checkpoint is written beside its place and renamed into it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.checkpoint.json_file import read_json
from src.checkpoint.manifest import MANIFEST, described_all, sync, write_manifest
from src.errors import UserError

# In the order in which they are looked for; what they are, their content tells.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "qwen.tiktoken", "vocab.json")
TOKENIZER_PATTERNS = ("*.tiktoken", "*tokenizer*.model", "*tokenizer*.model.v*", "tekken*.json")
TOKENIZER_FILES = (
    *TOKENIZERS,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Templates besides chat_template.jinja, a file each, by their names.
MORE_TEMPLATES = "additional_chat_templates"

# What a verifier's scores are centred and scaled by, where they are.
SCORES_FILE = "score_normalization.json"

# The small files: what beside the tensors tells one checkpoint from another.
NOTES = (
    "params.json",
    "config.json",
    "adapter_config.json",
    "ppo_state.json",
    SCORES_FILE,
    *TOKENIZER_FILES,
)

# What a checkpoint's folder may hold, and is replaced with it.
_OURS = (
    "consolidated*",
    "model*.safetensors*",
    "adapter",
    MORE_TEMPLATES,
    *TOKENIZER_PATTERNS,
    MANIFEST,
    *(name for name in NOTES if name != "adapter_config.json"),
)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def check_replaceable(path: str) -> Path:
    """The folder to save to, resolved.

    Saving writes a folder beside it and renames that into its place. Raises UserError when it holds
    anything but a checkpoint, or cannot be replaced.
    """
    folder = Path(path).resolve()
    if folder.is_file():
        raise UserError(f"{folder}: is a file, a folder is needed to save to")
    if folder.is_mount():
        raise UserError(
            f"{folder}: is a mount point, which cannot be replaced as a whole: "
            "name a folder inside it"
        )
    parent = next(parent for parent in folder.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{folder}: {parent} is not a folder that can be written to")
    if folder.is_dir():
        ours = {file for pattern in _OURS for file in folder.glob(pattern)}
        foreign = sorted(file.name for file in set(folder.iterdir()) - ours)
        adapter = folder / "adapter"
        if adapter.is_dir():
            foreign += sorted(
                f"adapter/{f.name}" for f in adapter.iterdir() if f.name not in _ADAPTER
            )
        more = folder / MORE_TEMPLATES
        if more.is_dir():
            foreign += sorted(
                f"{more.name}/{f.name}" for f in more.iterdir() if f.suffix != ".jinja"
            )
        if foreign:
            raise UserError(
                f"{folder}: holds {', '.join(foreign[:3])}, which is no part of a checkpoint; "
                "saving would remove it: choose an empty or new folder"
            )
    return folder


def check_apart(saved: dict[str, str], others: dict[str, str | None]) -> None:
    """Raise UserError when a folder to save to is, holds or lies in one that the run also uses.

    saved: flag → path of the folders to save to; what lies in one is lost when it is replaced.
    others: the same of what is read or logged, which may hold a saved folder, but not lie in one.
    """
    paths = {
        flag: Path(path).resolve() for flag, path in (saved | others).items() if path is not None
    }
    for flag in saved:
        for other, path in paths.items():
            lies_in_saved = paths[flag] in (path, *path.parents)
            holds_saved = other in saved and path in paths[flag].parents
            if other != flag and (lies_in_saved or holds_saved):
                raise UserError(
                    f"--{flag} {saved[flag]} and --{other} {(saved | others)[other]} overlap: "
                    "saving would remove what the other holds; choose another folder"
                )


def beside(save_dir: str, what: str) -> str:
    """The folder OUT-what that belongs to a folder OUT, however that is spelled."""
    path = os.path.normpath(save_dir)
    return f"{path if Path(path).name not in ('', '..') else os.path.abspath(path)}-{what}"


def check_space(folder: Path, needed: int, what: str = "") -> None:
    """Raise UserError when the disk has less than `needed` bytes free.

    The new folder is whole before the old one goes, whose bytes are therefore not counted as free.
    what: for whom they are needed, for the message.
    """
    folder = folder.resolve()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / 1e9:.3f} GB are needed{what and ' ' + what} "
            f"and {free / 1e9:.3f} GB are free: make room or save elsewhere"
        )


def find_tokenizer(folder: Path, adapter: Path | None = None) -> Path | None:
    """The tokenizer's file in a checkpoint's folder, or beside that, as in Meta's downloads.

    adapter: the folder of an adapter on it, whose own counts before that: it may hold tokens, an
    end and a template that the adapter was trained with.
    """
    own = () if adapter is None else (adapter,)
    for place in (*own, folder, folder.resolve().parent):
        others = [path for pattern in TOKENIZER_PATTERNS for path in sorted(place.glob(pattern))]
        for path in (*(place / name for name in TOKENIZERS), *others):
            if path.is_file():
                return path
    return None


def temporary_of(folder: Path) -> Path:
    """Where a folder is written before it is whole."""
    return folder.parent / f".tmp-{folder.name}"


def publish(folder: Path, known: dict[str, dict] | None = None, **facts) -> None:
    """Put the finished temporary folder in its place, and remove the older one.

    known: manifest entries of files that were hashed already; facts: what else goes into it.
    """
    temporary, old = temporary_of(folder), folder.parent / f".old-{folder.name}"
    for file in (f for f in temporary.rglob("*") if f.is_file()):
        sync(file)
    write_manifest(temporary, described_all(temporary, known), **facts)
    # A folder cannot be renamed over one that holds files: the older one steps aside, to go last.
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def fresh_temporary(folder: Path) -> Path:
    """An empty temporary folder for `folder`."""
    temporary = temporary_of(folder)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


@contextmanager
def whole_folder(folder: Path, **facts) -> Iterator[Path]:
    """Write into the yielded folder, which takes `folder`'s place unless anything fails.

    facts: what the manifest is to say beside the files' hashes.
    """
    temporary = fresh_temporary(folder)
    try:
        yield temporary
        publish(folder, **facts)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_side_files(source: Path, target: Path, adapter: Path | None = None) -> None:
    """Copy the tokenizer's, generation's and scores' files that lie with the weights, as they are.

    The tokenizer's own file and what describes it go together, wherever they lie; so does the
    source's chat template where there is none beside that. adapter: see `find_tokenizer`.
    """
    tokenizer = find_tokenizer(source, adapter)
    place = source if tokenizer is None else tokenizer.parent
    for name in TOKENIZER_FILES:
        if (place / name).is_file():
            shutil.copyfile(place / name, target / name)
    copy_more_templates(place, target)
    for name in ("generation_config.json", SCORES_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, target / tokenizer.name)
    if _template_in(place) is None and (template := _template_in(source)) is not None:
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def keep_special_ids(source: Path, target: Path, adapter: Path | None = None) -> None:
    """Put into a folder of shards what the source's files say of special ids.

    Shards have no config.json: its ids go into generation_config.json, which `copy_side_files` has
    copied. The ids that end a text are those of all the files in which they are looked for.
    """
    tokenizer = find_tokenizer(source, adapter)
    places = dict.fromkeys((source if tokenizer is None else tokenizer.parent, source))
    names = ("generation_config.json", "config.json")
    files = [place / name for place in places for name in names if (place / name).is_file()]
    path = target / "generation_config.json"
    if [file.name for file in files] in ([], [path.name]):
        return  # it says all, and is copied as it is
    copied = read_json(path) if path.is_file() else {}
    written, ends = dict(copied), []
    for file in files:
        said = read_json(file)
        ends += [i for i in end_ids(said, file) if i not in ends]
        for key in ("bos_token_id", "pad_token_id"):
            if written.get(key) is None and said.get(key) is not None:
                written[key] = said[key]
    if ends != end_ids(copied, path):
        written["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if written != copied:
        path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def end_ids(said: dict[str, Any], path: Path) -> list[int]:
    """The `eos_token_id` of a config, a number or several. path: what it was read from."""
    value = said.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise UserError(f"{path}: eos_token_id is {value!r}, an id or a list of ids is expected")
    return ids


def _template_in(folder: Path) -> str | None:
    """The chat template of a folder's files: of several the default one."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if not config.is_file() or '"chat_template"' not in config.read_text(encoding="utf-8"):
        return None
    template = read_json(config).get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def copy_more_templates(source: Path, target: Path) -> None:
    """Copy the templates besides chat_template.jinja, where there are some."""
    for path in sorted((source / MORE_TEMPLATES).glob("*.jinja")):
        (target / MORE_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, target / MORE_TEMPLATES / path.name)
