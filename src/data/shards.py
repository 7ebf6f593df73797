"""Token ids on disk: shards that are mapped into memory, with the documents' ends and an index.

    tokens-00000.bin     a shard's ids end to end, uint16 where the vocabulary fits, else uint32
    documents-00000.bin  uint64: where each of its documents ends, in tokens from its start
    index.json           counts, dtype, tokenizer, sources, settings, each file's size and SHA-256

All numbers are little-endian. A document lies in one shard, whole, with the BOS and EOS that the
model's family puts around a text. The index is written last: without it a folder is unfinished.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.checkpoint.json_file import read_json
from src.checkpoint.manifest import digest, problems
from src.data.sources import parts_of
from src.errors import UserError

INDEX, VERSION = "index.json", 1
ENDS = np.dtype("<u8")


def dtype_for(vocab_size: int) -> np.dtype:
    """The narrowest that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def names_of(shard: int) -> tuple[str, str]:
    """The files of a shard: of its tokens and of its documents' ends."""
    return f"tokens-{shard:05}.bin", f"documents-{shard:05}.bin"


class Writer:
    """Appends documents to a folder's shards, and goes on where an earlier one had written to.

    shards: [tokens, documents] of each, the last one open.
    """

    def __init__(
        self, folder: Path, dtype: np.dtype, shard_tokens: int, shards: Sequence[Sequence[int]] = ()
    ) -> None:
        """shard_tokens: a shard is full with the document that reaches so many.

        shards: those that are there; what was written after them is cut off. Raises UserError where
        there is less.
        """
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.shards = [list(shard) for shard in shards] or [[0, 0]]
        self.waiting: tuple[list[NDArray], list[int]] = [], []  # ids, and ends, to be written
        for number, (tokens, documents) in enumerate(self.shards):
            sizes = tokens * dtype.itemsize, documents * ENDS.itemsize
            for name, size in zip(names_of(number), sizes):
                path = folder / name
                path.touch()
                if path.stat().st_size < size:
                    raise UserError(f"{path}: less than was written is left of it; begin anew")
                os.truncate(path, size)
        number = len(self.shards)
        while (later := folder / names_of(number)[0]).exists():
            later.unlink()
            (folder / names_of(number)[1]).unlink(missing_ok=True)
            number += 1

    def append(self, ids: list[int] | NDArray, ends: bool) -> None:
        """Add ids to the document that is open. ends: whether that ends with them."""
        shard = self.shards[-1]
        self.waiting[0].append(np.asarray(ids, dtype=self.dtype))
        shard[0] += len(ids)
        if ends:
            shard[1] += 1
            self.waiting[1].append(shard[0])
            if shard[0] >= self.shard_tokens:
                self.flush()
                self.shards.append([0, 0])

    def flush(self) -> None:
        """Down to the disk with what was appended."""
        ids, ends = self.waiting
        self.waiting = [], []
        parts = ids, [np.asarray(ends, dtype=ENDS)]
        for name, arrays in zip(names_of(len(self.shards) - 1), parts):
            with (self.folder / name).open("ab") as file:
                for array in arrays:
                    file.write(array.data)
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> list[list[int]]:
        """The shards, once all is on the disk. [tokens, documents] of each."""
        self.flush()
        if len(self.shards) > 1 and self.shards[-1] == [0, 0]:  # the last one had just become full
            for name in names_of(len(self.shards) - 1):
                (self.folder / name).unlink()
            self.shards.pop()
        return self.shards


@dataclass(frozen=True)
class Shards:
    """A folder of shards, seen as one array of tokens, one document after the other.

    index: what `index.json` says.
    """

    folder: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path, part: int = 0, parts: int = 1) -> "Shards":
        """The shards of a finished folder, whose files are what was written.

        part, parts: this process's number among those that share the hashing, and how many they
        are. Raises UserError for damage.
        """
        folder = Path(path)
        if not (folder / INDEX).is_file():
            why = "is unfinished: run its dataset/build.py again"
            if not any(folder.glob("tokens-*.bin")):
                why = "is no folder of shards; dataset/build.py pretrain makes one of texts"
            raise UserError(f"{folder}: {why}")
        index = read_json(folder / INDEX)
        _check_index(folder / INDEX, index)
        damage = problems(folder, index, part, parts)
        if damage:
            raise UserError(f"{damage[0]}; build the shards again")
        shards = cls(folder, index)
        shards._check_ends()
        return shards

    @property
    def tokens(self) -> int:
        return self.index["tokens"]

    @property
    def documents(self) -> int:
        return self.index["documents"]

    @cached_property
    def digest(self) -> str:
        """Of the index, and so of all files: equal where two folders hold the same."""
        return digest(self.folder / INDEX)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens from `start` to before `stop`, counted over all shards."""
        found = []
        while start < stop:
            shard = int(np.searchsorted(self._starts, start, side="right")) - 1
            first = int(self._starts[shard])
            last = min(stop, int(self._starts[shard + 1]))
            found.append(self._tokens[shard][start - first : last - first])
            start = last
        return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)

    def ends(self, start: int, stop: int) -> list[int]:
        """Where documents end, after `start` and at most at `stop`, counted over all shards."""
        found: list[int] = []
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for shard in range(max(first, 0), len(self._ends)):
            begin = int(self._starts[shard])
            if begin >= stop:
                break
            ends = self._ends[shard]
            here = np.searchsorted(ends, [max(start - begin, 0), stop - begin], side="right")
            found += (ends[here[0] : here[1]].astype(np.int64) + begin).tolist()
        return found

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Where each shard begins, and the last one's end."""
        return np.cumsum([0, *(shard["tokens"] for shard in self.index["shards"])])

    @cached_property
    def _tokens(self) -> list[NDArray]:
        dtype = np.dtype(self.index["dtype"])
        return [self._mapped(names_of(i)[0], dtype) for i in range(len(self.index["shards"]))]

    @cached_property
    def _ends(self) -> list[NDArray]:
        return [self._mapped(names_of(i)[1], ENDS) for i in range(len(self.index["shards"]))]

    def _mapped(self, name: str, dtype: np.dtype) -> NDArray:
        try:
            return np.memmap(self.folder / name, dtype=dtype, mode="r")
        except OSError as error:
            raise UserError(f"{self.folder / name}: cannot be read: {error.strerror}") from error

    def _check_ends(self) -> None:
        for number, (ends, shard) in enumerate(zip(self._ends, self.index["shards"])):
            is_rising = ends[0] > 0 and bool((ends[1:] > ends[:-1]).all())
            if not is_rising or int(ends[-1]) != shard["tokens"]:
                raise UserError(
                    f"{self.folder / names_of(number)[1]}: its documents do not end one after the "
                    f"other, the last at {shard['tokens']}; build the shards again"
                )


def are_shards(text: str) -> bool:
    """Whether what a text names, as `parts_of` reads it, are folders of shards, and not of rows."""
    folders = [Path(part.location) for part in parts_of(text)]
    return any(any(folder.glob("tokens-*.bin")) for folder in folders if folder.is_dir())


def _check_index(path: Path, index: dict[str, Any]) -> None:
    """Raise UserError where an index is not of the form that is written."""
    if index.get("format") != VERSION:
        raise UserError(f"{path}: format {index.get('format')!r}, this code reads {VERSION}")
    shards: Any = index.get("shards")
    files: Any = index.get("files")
    is_whole = (
        isinstance(shards, list)
        and bool(shards)
        and all(
            isinstance(shard, dict)
            and all(type(shard.get(of)) is int and shard[of] > 0 for of in ("tokens", "documents"))
            for shard in shards
        )
        and index.get("dtype") in ("<u2", "<u4")
        and isinstance(files, dict)
        and all(isinstance(index.get(key), str) for key in ("tokenizer", "vocabulary"))
        and all(
            index.get(key) == sum(shard[key] for shard in shards) for key in ("tokens", "documents")
        )
    )
    if not is_whole:
        raise UserError(f"{path}: is damaged; build the shards again")
    width = np.dtype(index["dtype"]).itemsize
    for number, shard in enumerate(shards):
        sizes = shard["tokens"] * width, shard["documents"] * ENDS.itemsize
        for name, size in zip(names_of(number), sizes):
            entry = files.get(name)
            if not isinstance(entry, dict) or entry.get("size") != size or "sha256" not in entry:
                raise UserError(f"{path}: its entry of {name} is damaged; build the shards again")
