"""Texts to pre-train on, document by document, in pieces that are tokenised one by one.

A row of a data file is a document; a `.txt` is one, or several, set apart by a separator. A
document of any length passes through in as much memory as a few pieces take: it is cut where the
ids of the pieces are, one after the other, the ids of the whole (`Tokenizer.may_cut`).
"""

import codecs
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from io import BufferedIOBase
from pathlib import Path

from src.data.files import Broken, elements, format_of
from src.data.rows import SAMPLE
from src.data.tokenizer import Tokenizer
from src.errors import UserError

PIECE = 2**15  # characters, about
LONGEST_PIECE = 2**26
BLOCK = 2**18  # bytes of a text that are read at a time
# Where cuts are tried, the likeliest first: before a space between words, before other space after
# a word, before punctuation after a word, before any space.
_PLACES = [
    re.compile(pattern)
    for pattern in (
        r"(?<=[A-Za-z])(?= [A-Za-z])",
        r"(?<=\w)(?=\s)",
        r"(?<=\w)(?=[^\w\s'’])",
        r"(?<=\S)(?=\s)",
    )
]
_NEAR, _TRIED = 512, 16  # characters that are looked through first; places that are tried of a kind

Chunk = tuple[str, bool]  # a stretch of text, and whether a document ends with it


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one.

    begins, ends: whether a document does; documents, characters: how many of the source are over
    after it: whole documents, and of the one that goes on so much.
    """

    text: str
    begins: bool
    ends: bool
    documents: int
    characters: int


def pieces(
    tokenizer: Tokenizer, chunks: Iterable[Chunk], where: str, documents: int = 0, taken: int = 0
) -> Iterator[Piece]:
    """A source's documents in pieces, from a place on that an earlier piece ended at.

    where: the source's name, for messages. Raises UserError where a text cannot be cut.
    """
    text, size = "", PIECE
    for chunk, ends in _from(chunks, documents, taken):
        text += chunk
        start = 0
        while len(text) - start >= 2 * size:
            place = _cut(tokenizer, text, start + size // 2, start + size)
            if place is None:
                if size >= LONGEST_PIECE:
                    raise UserError(
                        f"{where}: document {documents + 1} goes on for {size:,} characters "
                        "without a place where it could be cut into words; cut it, or leave it out"
                    )
                size *= 2
                continue
            begins, taken = taken == 0, taken + place - start
            yield Piece(text[start:place], begins, False, documents, taken)
            start, size = place, PIECE
        text = text[start:]
        if ends:
            documents += 1
            yield Piece(text, taken == 0, True, documents, 0)
            text, size, taken = "", PIECE, 0


def _from(chunks: Iterable[Chunk], documents: int, taken: int) -> Iterator[Chunk]:
    """The chunks after so many documents and so many characters of the next."""
    for text, ends in chunks:
        if documents:
            documents -= ends
        elif len(text) > taken or ends:
            yield text[taken:], ends
            taken = 0
        else:
            taken -= len(text)


def _cut(tokenizer: Tokenizer, text: str, first: int, last: int) -> int | None:
    """A place from `first` to `last` where the text may be cut; None where none was found."""
    for start in (max(first, last - _NEAR), first):
        for kind in _PLACES:
            places = [match.start() for match in kind.finditer(text, start, last)]
            for place in reversed(places[-_TRIED:]):
                if tokenizer.may_cut(text, place):
                    return place
    return None


# --- A source's text ------------------------------------------------------------------------------


def sources_of(names: Iterable[str]) -> list[Path]:
    """The files that are meant by names of files, folders and patterns, each once, in order.

    Of a folder and of a pattern by name. Raises UserError where there are none.
    """
    files: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = [file for file in path.rglob("*") if is_source(file)]
        elif path.is_file():
            found = [path]
        else:
            found = [Path(file) for file in glob(name, recursive=True) if Path(file).is_file()]
        if not found:
            raise UserError(
                f"--source {name}: no such file, nor a folder or pattern with files that can be "
                "read (.txt, .jsonl, .parquet, ...)"
            )
        files |= dict.fromkeys(sorted(found))
    return list(files)


def is_source(path: Path) -> bool:
    """Whether a folder's file is one of texts, by its name."""
    return path.is_file() and (is_text(path) or format_of(path) is not None)


def chunks_of(path: Path, field: str, separator: str | None) -> Iterator[Chunk]:
    """A source's text in its order.

    field: that holds a row's text; separator: what sets the documents of a `.txt` apart. Raises
    UserError, with the place, for what is no text.
    """
    if is_text(path):
        return separated(_blocks(path), separator)
    return ((text, True) for text in _texts(path, field))


def is_text(path: Path) -> bool:
    """Whether a file is plain text, and not rows."""
    return path.name.endswith((".txt", ".txt.gz"))


def separated(blocks: Iterable[str], separator: str | None) -> Iterator[Chunk]:
    """Blocks of a text with a document's end at each separator, which is left out."""
    rest, kept = "", len(separator or "") - 1  # what may be the beginning of one waits
    for block in blocks:
        if separator is None:
            yield block, False
            continue
        *documents, rest = (rest + block).split(separator)
        yield from ((text, True) for text in documents)
        if len(rest) > kept:
            yield rest[: len(rest) - kept], False
            rest = rest[len(rest) - kept :]
    yield rest, True


def _texts(path: Path, field: str) -> Iterator[str]:
    for where, row in elements(path):
        if isinstance(row, Broken):
            raise UserError(f"{where}: {row}")
        if not isinstance(row, dict) or field not in row:
            names = ", ".join(list(row)[:8]) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f'{where}: has no field "{field}" (it has {names}); name it by --text_field'
            )
        if not SAMPLE.accepts(row[field]):
            held = repr(row[field])[:40]
            raise UserError(f'{where}: the field "{field}" holds {held}; a text is needed')
        yield row[field]


def _blocks(path: Path) -> Iterator[str]:
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    try:
        with _opened(path) as file:
            is_first = True
            while True:
                data = file.read(BLOCK)
                if is_first:  # some editors put a byte-order mark first
                    data, is_first = data.removeprefix(codecs.BOM_UTF8), False
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    line += error.object.count(b"\n", 0, error.start)
                    byte = error.object[error.start]
                    raise UserError(
                        f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
                    ) from error
                if "\0" in text:
                    line += text.count("\n", 0, text.index("\0"))
                    raise UserError(
                        f"{path}:{line}: holds a NUL byte; save it as UTF-8 text (UTF-16 and "
                        "half-written files look like this)"
                    )
                yield text
                line += text.count("\n")
                if not data:
                    return
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except EOFError as error:
        raise UserError(f"{path}: is cut short: {error}") from error
    except zlib.error as error:
        raise UserError(f"{path}: is damaged: {error}") from error


def _opened(path: Path) -> BufferedIOBase:
    return gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb")
