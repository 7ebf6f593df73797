"""Texts to shards of token ids, once, by all cores; what was begun and killed goes on exactly.

Three things overlap: the next texts are read, those before are tokenised (by the library's
threads, outside of Python), and those before these are written. After each batch `progress.json`
says how far the shards are, and which piece of which source comes next; what was written after it
is cut off when the run goes on. So the files of a run that was killed are those of one that was
not, byte for byte.
"""

import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src import storage
from src.checkpoint.json_file import read_json
from src.checkpoint.manifest import described
from src.data.documents import Piece, chunks_of, pieces
from src.data.rows import write_json
from src.data.shards import INDEX, VERSION, Writer, dtype_for, names_of
from src.data.tokenizer import Tokenizer
from src.errors import UserError

# While a folder is unfinished: what it is made of, and how far it is.
UNFINISHED, PROGRESS = "unfinished.json", "progress.json"
PER_CORE = 2**17  # characters of a batch
IN_FLIGHT = 3  # batches that are tokenised or wait for it


@dataclass(frozen=True)
class Texts:
    """What is tokenised and how.

    field: that holds a row's text; separator: what sets a `.txt`'s documents apart; shard_tokens:
    of a full shard.
    """

    sources: list[str]
    field: str
    separator: str | None
    shard_tokens: int


def tokenize(
    texts: Texts,
    tokenizer: Tokenizer,
    save_dir: str,
    told: Callable[[int], object] = lambda n: None,
) -> dict[str, Any]:
    """Write the shards, from where an earlier run of the same stopped; returns their index.

    told: is given the number of characters of each batch that is done. Raises UserError for a
    source that cannot be read, or has become another since the shards were begun, and for a folder
    that holds something else.
    """
    folder = Path(save_dir)
    sources = _described(texts.sources)
    known = {
        "tokenizer": tokenizer.identity,
        "vocabulary": tokenizer.vocabulary,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "settings": {
            "text_field": texts.field,
            "document_separator": texts.separator,
            "special_tokens": "text" if tokenizer.as_text else "control",
            "shard_tokens": texts.shard_tokens,
        },
        "sources": sources,
    }
    with _alone(folder):
        if (folder / INDEX).is_file():  # unless it was killed right after
            index = read_json(folder / INDEX)
            _check_same(folder / INDEX, index, known)
        else:
            index = _written(folder, texts, tokenizer, known, told)
        for name in (PROGRESS, UNFINISHED):
            (folder / name).unlink(missing_ok=True)
    return index


def _written(
    folder: Path,
    texts: Texts,
    tokenizer: Tokenizer,
    known: dict[str, Any],
    told: Callable[[int], object],
) -> dict[str, Any]:
    """The index of the shards, which are written to their end."""
    before: dict[str, Any] = {}
    if (folder / UNFINISHED).is_file():
        _check_same(folder / UNFINISHED, read_json(folder / UNFINISHED), known)
        before = read_json(folder / PROGRESS) if (folder / PROGRESS).is_file() else {}
    else:
        write_json(folder / UNFINISHED, known)
    dtype = dtype_for(tokenizer.vocab_size)
    writer = Writer(folder, dtype, texts.shard_tokens, before.get("shards", ()))
    place, empty = tuple(before.get("place", (0, 0, 0))), before.get("empty", 0)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    for batch, ids in _in_order(_batches(texts, tokenizer, known["sources"], place), tokenizer):
        for (number, piece), of_piece in zip(batch, ids):
            if piece.begins and piece.ends and not piece.text:
                empty += 1
            else:
                # as of a prompt: a text that spells it out has it already
                has_begun = not piece.begins or of_piece[:1] == begin
                end = [tokenizer.eos_id] if piece.ends else []
                writer.append([*([] if has_begun else begin), *of_piece, *end], piece.ends)
            place = number, piece.documents, piece.characters
        writer.flush()
        state = {"shards": writer.shards, "place": place, "empty": empty}
        write_json(folder / PROGRESS, state)
        told(sum(len(piece.text) for _, piece in batch))

    shards = writer.finish()
    if shards == [[0, 0]]:
        raise UserError(f"{texts.sources[0]}: there is no text in the sources")
    names = [name for number in range(len(shards)) for name in names_of(number)]
    with ThreadPoolExecutor() as threads:
        files = dict(zip(names, threads.map(lambda name: described(folder / name), names)))
    index = {
        "format": VERSION,
        "documents": sum(documents for _, documents in shards),
        "tokens": sum(tokens for tokens, _ in shards),
        "empty": empty,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        **known,
        "shards": [{"tokens": tokens, "documents": documents} for tokens, documents in shards],
        "files": files,
    }
    write_json(folder / INDEX, index)
    return index


Batch = list[tuple[int, Piece]]  # pieces with their sources' numbers


def _batches(
    texts: Texts, tokenizer: Tokenizer, sources: list[dict], place: tuple[int, ...]
) -> Iterator[Batch]:
    """All pieces from a place on: (source, documents of it, characters of the next)."""
    limit = PER_CORE * len(os.sched_getaffinity(0))
    batch: Batch = []
    size, (first, *within) = 0, place
    for number, path in enumerate(texts.sources):
        if number < first:
            continue
        began = _moment(path)
        chunks = chunks_of(path, texts.field, texts.separator)
        for piece in pieces(tokenizer, chunks, path, *(within if number == first else (0, 0))):
            batch.append((number, piece))
            size += len(piece.text)
            if size >= limit:
                yield batch
                batch, size = [], 0
        if _moment(path) != began or sources[number].get("size", began[0]) != began[0]:
            raise UserError(f"{path}: was changed while it was read; begin anew, in another folder")
    yield batch


def _in_order(
    batches: Iterator[Batch], tokenizer: Tokenizer
) -> Iterator[tuple[Batch, list[list[int]]]]:
    """Each batch with its ids, while the next ones are read and tokenised."""

    def ids_of(batch: Batch) -> list[list[int]]:
        pieces = [piece for _, piece in batch]
        return tokenizer.text_ids([p.text for p in pieces], [not p.begins for p in pieces])

    waiting: deque[tuple[Batch, Future]] = deque()
    with ThreadPoolExecutor(IN_FLIGHT - 1) as threads:
        for batch in batches:
            waiting.append((batch, threads.submit(ids_of, batch)))
            if len(waiting) == IN_FLIGHT:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def _moment(path: str) -> tuple[int | str, int]:
    """What is another when a source was written to: size and time, or a remote one's version."""
    if storage.is_url(path):
        return storage.version_of(path), 0
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _described(paths: list[str]) -> list[dict[str, Any]]:
    """The path, size and SHA-256 of each source; of a remote one what tells its versions apart."""

    def of(path: str) -> dict[str, Any]:
        if storage.is_url(path):
            return {"path": path, "version": storage.version_of(path)}
        try:
            return {"path": path, **described(Path(path))}
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None

    with ThreadPoolExecutor() as threads:
        return list(threads.map(of, paths))


def _check_same(path: Path, before: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise UserError where what a folder holds was begun with something else."""
    old = {source["path"]: source for source in before.get("sources", [])}
    for source in known["sources"]:
        if source["path"] in old and old[source["path"]] != source:
            now, then = (of.get("size", of.get("version")) for of in (source, old[source["path"]]))
            raise UserError(
                f"{source['path']}: is another than when {path.parent} was begun ({now} bytes now, "
                f"{then} then); give what it was, or begin anew, in another folder"
            )
    for key, value in known.items():
        if before.get(key) != value:
            what = {"sources": "other sources", "settings": "other settings"}.get(
                key, f"another {key.removesuffix('_id')}"
            )
            raise UserError(
                f"{path.parent}: was begun with {what}; give the same, or another --save_dir"
            )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While nobody else writes to a folder of shards. Raises UserError where it holds others."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        notes = (INDEX, PROGRESS, UNFINISHED)
        ours = ("tokens-", "documents-", *notes, *(f".{name}" for name in notes))
        foreign = [file.name for file in folder.iterdir() if not file.name.startswith(ours)]
        if foreign:
            raise UserError(
                f"{folder}: holds {min(foreign)}, which is no part of shards; choose an empty or "
                "new folder"
            )
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in notes:  # what was being written when a run was killed
            for file in folder.glob(f".{name}.*"):
                file.unlink()
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another process writes to it") from None
    finally:
        os.close(descriptor)
