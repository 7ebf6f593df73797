"""Which files a setting such as --train_file names, and in which proportions they are mixed.

    train.jsonl                          a file, of any format that src/data/files.py reads
    data                                 a folder: all data files in it, by name
    data/**/*.parquet                    a pattern: all files that it matches, by name
    saved, saved@train                   a folder that `save_to_disk` of Hugging Face's wrote
    openai/gsm8k/main@train              a data set of its hub: OWNER/NAME, /CONFIG, @SPLIT
    a.jsonl,data/*.csv                   several of these: all their rows
    a.jsonl:0.7,openai/gsm8k@train:0.3   in these proportions

What exists by a name with a comma or a colon in it is that file. Files, folders and patterns may
also be URLs (src/storage.py): s3://bucket/data/*.jsonl.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from src import storage
from src.checkpoint.manifest import digest
from src.data.files import Element, elements, format_of
from src.data.mapping import RowMap
from src.errors import UserError

_WEIGHTED = re.compile(r"(.+):((?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?)")
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@(\w+))?")
_SPLIT = re.compile(r"(.+)@(\w+)")
# What `save_to_disk` writes beside its .arrow files: of one split, and of several.
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class Source:
    """What rows are read from, as a setting names it; map: what they go through, if anything."""

    text: str
    map: RowMap | None = None

    def __str__(self) -> str:
        return self.text


Named = str | Path | Source


@dataclass(frozen=True)
class Part:
    """One of the sources that a text names; weight: its share, None without weights."""

    location: str
    weight: Fraction | None


def parts_of(text: str) -> list[Part]:
    """The sources that a text names, in its order.

    Raises UserError where some have a weight and others none, or a weight is 0.
    """
    parts = [_part(location) for location in _split(text)]
    weights = [part.weight for part in parts]
    if None in weights and any(weight is not None for weight in weights):
        bare = next(part.location for part in parts if part.weight is None)
        raise UserError(f"{text}: {bare} has no weight and others have; give all one, or none")
    if 0 in weights:
        raise UserError(f"{text}: a weight is 0; leave that source out")
    if len(parts) == 1:
        return [Part(parts[0].location, None)]  # a share of one is all of it
    return parts


def _split(text: str) -> Iterator[str]:
    """The names between commas; the longest that exists, where one has commas in it."""
    pieces = text.split(",")
    start = 0
    while start < len(pieces):
        for stop in range(len(pieces), start + 1, -1):
            name = ",".join(pieces[start:stop])
            if os.path.exists(name) or os.path.exists(_part(name).location):
                break
        else:
            stop = start + 1
        name = ",".join(pieces[start:stop]).strip()
        if not name:
            raise UserError(f"{text}: nothing stands before or behind a comma; take it out")
        yield name
        start = stop


def _part(name: str) -> Part:
    match = None if os.path.exists(name) else _WEIGHTED.fullmatch(name)
    return Part(name, None) if match is None else Part(match[1], Fraction(match[2]))


def elements_of(source: Named) -> Iterator[Element]:
    """The elements of all files that are named, one after the other, or what a map makes of them.

    Raises UserError where there are none, or one cannot be read; and for weights, which say nothing
    where all rows are read.
    """
    found = itertools.chain.from_iterable(map(elements, files_of(str(source))))
    yield from source.map.over(found) if isinstance(source, Source) and source.map else found


def bytes_of(source: Named) -> int:
    """How large the files are that a source names; what is not there or unknown counts nothing."""
    named = source if isinstance(source, Source) else Source(str(source))
    return sum(map(storage.size_of, files_of(named.text)))


def held_source(source: Named) -> str:
    """A digest of what decides a source's rows: its text, its files' content, its map.

    Of a map the files in its folder that it may import; what else it reads is not looked at.
    """
    named = source if isinstance(source, Source) else Source(str(source))
    files = files_of(named.text)
    lines = [named.text, *files, *map(held_file, files)]
    if named.map is not None:
        folder = Path(named.map.where.rpartition(":")[0]).resolve().parent
        lines += [named.map.where, *(digest(file) for file in sorted(folder.glob("*.py")))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def held_file(file: str) -> str:
    """A text that is another when a file holds another thing: of a remote one size and version."""
    return storage.version_of(file) if storage.is_url(file) else digest(Path(file))


def files_of(text: str | Path) -> list[str]:
    """All files that a text names. Raises as `elements_of` does."""
    parts = parts_of(str(text))
    if parts[0].weight is not None:
        raise UserError(f"{text}: weights mix rows that are trained on, and are not taken here")
    return list(itertools.chain.from_iterable(files_in(part.location) for part in parts))


def files_in(location: str) -> list[str]:
    """All files of one source, by name or in the order that their folder gives them."""
    if storage.is_folder(location):
        return _of_folder(location)
    if storage.is_file(location):
        return [location]
    if match := _SPLIT.fullmatch(location):
        folder, split = match.groups()
        if storage.is_file(f"{folder}/{_SAVED_SPLITS}"):
            return _of_folder(_of_split(folder, split))
    if storage.has_pattern(location):
        found = storage.matches(location)
        if not found:
            raise UserError(f"{location}: no file is called so")
        return found
    if format_of(location) is None and (match := _HUB_NAME.fullmatch(location)):
        return _of_hub(location, *match.groups())
    return [location]  # which is not there, as its reader will say


def _of_folder(folder: str) -> list[str]:
    """The data files of a folder, which may be one of Hugging Face's."""
    folder = folder.rstrip("/")
    names = storage.names_in(folder)
    if _SAVED_SPLITS in names:
        _of_split(folder, None)  # which refuses it
    if _SAVED in names and any(name.endswith(".arrow") for name in names):
        return _of_saved(folder)
    found = [
        f"{folder}/{name}"
        for name in names
        if not name.endswith("/") and format_of(name) and not name.startswith(".")
    ]
    if not found:
        below = any(name.endswith("/") for name in names)
        hint = f"; of those in its folders: '{folder}/**/*.jsonl'" if below else ""
        raise UserError(f"{folder}: holds no data file (.jsonl, .parquet, ...){hint}")
    return found


def _of_saved(folder: str) -> list[str]:
    """The .arrow files of a data set that `save_to_disk` wrote, in its order."""
    state = _read_saved(f"{folder}/{_SAVED}", "_data_files")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(
            f"{folder}: was saved with a choice of its rows beside them; load it with `datasets` "
            "and save it with flatten_indices()"
        )
    return [f"{folder}/{entry['filename']}" for entry in state["_data_files"]]


def _of_split(folder: str, split: str | None) -> str:
    splits = _read_saved(f"{folder}/{_SAVED_SPLITS}", "splits")["splits"]
    if split is None or split not in splits:
        ways = ", ".join(f"{folder}@{name}" for name in splits)
        raise UserError(f"{folder}: has the splits {', '.join(splits)}; choose one: {ways}")
    return f"{folder}/{split}"


def _read_saved(file: str, key: str) -> dict[str, Any]:
    """A file of `save_to_disk`'s; key: that must be there, a list."""
    try:
        with storage.opened(file) as stream:
            found = json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is not what save_to_disk writes: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get(key), list):
        raise UserError(f"{file}: is not what save_to_disk writes: has no list {key}")
    return found


def _of_hub(location: str, name: str, config: str | None, split: str | None) -> list[str]:
    """The .arrow files that `datasets` keeps of a data set of the hub, fetched if need be."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{location}: there is no such file or folder; for a data set of the Hugging Face hub: "
            "pip install datasets"
        ) from None
    if os.environ.get("RANK", "0") != "0":
        datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config, split=split, keep_in_memory=False)
    except Exception as error:  # of many libraries below it
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{location}: there is no such file or folder, and as a data set of the Hugging Face "
            f"hub, OWNER/NAME, /CONFIG, @SPLIT, it cannot be loaded: {first}"
        ) from error
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            ways = ", ".join(f"{location}@{name}" for name in loaded)
            raise UserError(f"{location}: has the splits {', '.join(loaded)}; choose one: {ways}")
        [loaded] = loaded.values()
    return [entry["filename"] for entry in loaded.cache_files]
