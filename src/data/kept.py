"""Training sequences of large files: made once, by all cores, kept on disk and mapped from there.

    ids.bin        int32: the sequences' tokens end to end
    ends.bin       int64: where each of them ends, in tokens
    ranges.bin     int32: [start, stop) of what each is trained on, in tokens from its start
    range_ends.bin int64: how many ranges there are up to and with each sequence
    index.json     how many, what their user should know, how large the files are

A folder is called by what decides its content: the rows' files, the tokenizer, the mask. It appears
whole; of the processes of a node that want it one makes it, and the others wait.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from src.checkpoint.json_file import read_json
from src.checkpoint.manifest import sync
from src.errors import UserError
from src.models.batch import Sequence as Tokens
from src.storage import CACHE_VARIABLE, cache_dir

INDEX, VERSION = "index.json", 2  # of the files, and of what rows become
ROWS_AT_ONCE = 64
Facts = dict[str, tuple[int, str]]
FILES: dict[str, Any] = {
    "ids.bin": np.dtype("<i4"),
    "ends.bin": np.dtype("<i8"),
    "ranges.bin": np.dtype("<i4"),
    "range_ends.bin": np.dtype("<i8"),
}


@dataclass
class Made:
    """What a chunk of rows has become.

    ids, lengths: of its sequences, end to end; ranges, range_counts: what each is trained on; keys:
    a number for each that is the same where rows say the same; facts: what their user should know,
    by its name how many there are, and the first.
    """

    ids: array = field(default_factory=lambda: array("i"))
    lengths: array = field(default_factory=lambda: array("q"))
    ranges: array = field(default_factory=lambda: array("i"))
    range_counts: array = field(default_factory=lambda: array("q"))
    keys: array = field(default_factory=lambda: array("q"))
    facts: Facts = field(default_factory=dict)

    def add(self, sequence: Tokens, key: str) -> None:
        """One more sequence. key: what its row says."""
        self.ids.extend(sequence.tokens)
        self.lengths.append(len(sequence.tokens))
        self.ranges.extend(i for span in sequence.ranges for i in span)
        self.range_counts.append(len(sequence.ranges))
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self.keys.append(int.from_bytes(digest, "little", signed=True))


class KeptSequences(Sequence[Tokens]):
    """Sequences in a folder, each read when it is asked for.

    rows: which of those there, all when not given.
    """

    def __init__(self, folder: Path, rows: NDArray[np.int64] | None = None) -> None:
        self.folder, self.about = folder, read_json(folder / INDEX)
        self._rows = np.arange(self.about["sequences"]) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> Tokens: ...
    @overload
    def __getitem__(self, i: slice) -> "KeptSequences": ...
    def __getitem__(self, i: int | slice) -> "Tokens | KeptSequences":
        if isinstance(i, slice):
            return KeptSequences(self.folder, self._rows[i])
        row = self._rows[i]
        start, first = (int(ends[row - 1]) if row else 0 for ends in (self._ends, self._range_ends))
        tokens = array("i", self._ids[start : self._ends[row]].tobytes())
        ranges = self._ranges[2 * first : 2 * int(self._range_ends[row])].tolist()
        return Tokens.of_spans(tokens, zip(ranges[::2], ranges[1::2]))

    def only(self, keep: Sequence[bool]) -> "KeptSequences":
        """Those for which `keep` is true."""
        return KeptSequences(self.folder, self._rows[np.asarray(keep, dtype=bool)])

    @property
    def again(self) -> int:
        """How many of the folder's sequences say what one before them says."""
        return self.about["again"]

    @property
    def notes(self) -> list[str]:
        """What a user should know of the rows that they were made of."""
        return self.about["notes"]

    @property
    def facts(self) -> Facts:
        """What is to be known of those that were made."""
        return {name: (count, first) for name, (count, first) in self.about["facts"].items()}

    @cached_property
    def lengths(self) -> list[int]:
        """How many tokens each sequence has."""
        return np.diff(self._ends, prepend=0)[self._rows].tolist()

    @cached_property
    def response_lengths(self) -> list[int]:
        """How many tokens of each sequence are trained on."""
        sizes = self._ranges[1::2] - self._ranges[::2]
        upto = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))[self._range_ends]
        return np.diff(upto, prepend=np.int64(0))[self._rows].tolist()

    def _mapped(self, name: str) -> NDArray:
        path = self.folder / name
        if not path.stat().st_size:
            return np.empty(0, FILES[name])
        return np.memmap(path, dtype=FILES[name], mode="r")

    @cached_property
    def _ids(self) -> NDArray:
        return self._mapped("ids.bin")

    @cached_property
    def _ends(self) -> NDArray:
        return self._mapped("ends.bin")

    @cached_property
    def _ranges(self) -> NDArray:
        return self._mapped("ranges.bin")

    @cached_property
    def _range_ends(self) -> NDArray:
        return self._mapped("range_ends.bin")


Sequences = Sequence[Tokens]


def chosen(sequences: Sequences, keep: list[bool]) -> Sequences:
    """Those for which `keep` is true."""
    if all(keep):
        return sequences
    if isinstance(sequences, KeptSequences):
        return sequences.only(keep)
    return [s for s, is_kept in zip(sequences, keep) if is_kept]


def lengths_of(sequences: Sequences) -> tuple[list[int], list[int]]:
    """Each sequence's tokens, and how many of them are trained on."""
    if isinstance(sequences, Joined):
        every = [lengths_of(part) for part in sequences.parts]
        return [n for part, _ in every for n in part], [n for _, part in every for n in part]
    if isinstance(sequences, KeptSequences):
        return sequences.lengths, sequences.response_lengths
    return [len(s.tokens) for s in sequences], [s.response_length for s in sequences]


class Joined(Sequence[Tokens]):
    """Several lists of sequences, one after the other."""

    def __init__(self, parts: list[Sequences]) -> None:
        self.parts, self._ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        part = int(np.searchsorted(self._ends, i, side="right"))
        return self.parts[part][i - len(self) + sum(map(len, self.parts[part:]))]


def kept(
    folder: Path,
    rows: Callable[[], Iterable[Any]],
    make: Callable[[list[Any]], Made],
    start: Callable[[], None],
    workers: int,
    notes: Callable[[], list[str]] = list,
) -> KeptSequences:
    """The sequences in a folder, made there if they are not.

    rows: gives what `make` takes, chunk by chunk, in processes of its own if there are several
    workers, each of which calls `start` first; notes: what is to be known once all were read.
    Raises UserError as they do, on each process that waited for this one.
    """
    since = time.time()
    with _alone(folder.with_suffix(".lock")):
        failed = folder.with_suffix(".failed")
        if _is_whole(folder):
            return KeptSequences(folder)
        if failed.is_file() and failed.stat().st_mtime >= since:  # while this process waited
            raise UserError(failed.read_text("utf-8"))
        failed.unlink(missing_ok=True)
        try:
            _write(folder, _in_order(iter(rows()), make, start, workers), notes)
        except UserError as error:
            failed.write_text(str(error), "utf-8")
            raise
    return KeptSequences(folder)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of a node at a time. Raises UserError where nothing can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot be written: {error.strerror}; name another folder for what is "
            f"kept: ${CACHE_VARIABLE}"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_whole(folder: Path) -> bool:
    if not (folder / INDEX).is_file():
        return False
    index = read_json(folder / INDEX)
    return index.get("version") == VERSION and all(
        (folder / name).is_file() and (folder / name).stat().st_size == index["bytes"].get(name)
        for name in FILES
    )


def _write(folder: Path, chunks: Iterator[Made], notes: Callable[[], list[str]]) -> None:
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        index = _written(temporary, chunks)
        for name in FILES:
            sync(temporary / name)
        index["bytes"] = {name: (temporary / name).stat().st_size for name in FILES}
        (temporary / INDEX).write_text(json.dumps(index | {"notes": notes()}), "utf-8")
        sync(temporary / INDEX)
        shutil.rmtree(folder, ignore_errors=True)  # one that is not whole
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
    except BrokenExecutor as error:
        raise UserError(
            f"{folder}: a process that makes it was ended from without, perhaps for lack of memory"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _written(folder: Path, chunks: Iterator[Made]) -> dict[str, Any]:
    """Write what rows have become; what the index says of it, but for the files' sizes."""
    tokens = ranges = sequences = 0
    keys: list[NDArray] = []
    facts: Facts = {}
    with ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("wb")) for name in FILES]
        for made in chunks:
            ends = np.cumsum(np.asarray(made.lengths, "<i8")) + tokens
            range_ends = np.cumsum(np.asarray(made.range_counts, "<i8")) + ranges
            parts = np.asarray(made.ids, "<i4"), ends, np.asarray(made.ranges, "<i4"), range_ends
            for file, part in zip(files, parts):
                file.write(part.tobytes())
            tokens, ranges = tokens + len(made.ids), ranges + sum(made.range_counts)
            sequences += len(made.lengths)
            keys.append(np.asarray(made.keys, "<i8"))
            for name, (count, first) in made.facts.items():
                before, earliest = facts.get(name, (0, first))
                facts[name] = before + count, earliest
    unique = len(np.unique(np.concatenate(keys))) if keys else 0
    return {"version": VERSION, "sequences": sequences, "again": sequences - unique, "facts": facts}


def _in_order(
    rows: Iterator[Any], make: Callable[[list[Any]], Made], start: Callable[[], None], workers: int
) -> Iterator[Made]:
    """What chunks of rows become, in their order, so many ahead as keep the workers busy."""
    if workers == 1:
        start()
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            yield make(chunk)
        return
    # Not a fork: this process may have threads, and a device.
    pool: Executor
    with ProcessPoolExecutor(workers, get_context("spawn"), start) as pool:
        asked: list[Future[Made]] = []
        while True:
            while len(asked) < 4 * workers and (chunk := list(islice(rows, ROWS_AT_ONCE))):
                asked.append(pool.submit(make, chunk))
            if not asked:
                return
            yield asked.pop(0).result()


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def kept_folder(*decides: str) -> Path:
    """Where sequences are kept whose content is decided by some texts."""
    name = hashlib.sha256("\n".join(decides).encode()).hexdigest()[:32]
    return cache_dir() / "tokens" / name
