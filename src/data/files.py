"""A data file's elements, one after the other, each with its place for messages.

A `.json` is a list of objects, a `.jsonl` has one object per line; a `.csv` or `.tsv` has a header
and one object per row; `.parquet` and `.arrow` are tables. Each may be compressed (`.gz`, `.zst`).
What is wrong with one element comes in its place, so that a reader can name several; what is wrong
with a whole file is raised. But for a `.json`, which is decoded as one text, memory holds one line
or a few rows at a time.
"""

import codecs
import csv
import difflib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn, cast

from src import storage
from src.errors import UserError

LONGEST_LINE = 64 * 2**20  # bytes of a line of text: one longer is hardly meant
LONGEST_CELL = 16 * 2**20  # characters of a cell of a .csv
DECOMPRESSED_AT_ONCE = 2**20  # bytes


@dataclass(frozen=True)
class Broken:
    """What is wrong where an element should be; takes its place among the values."""

    problem: str

    def __str__(self) -> str:
        return self.problem


class Cells(dict[str, str]):
    """A row of a `.csv`, all texts: a reader knows which of them spell other values."""


Element = tuple[str, Any]  # its place, FILE:LINE, and what stands there, perhaps `Broken`


def elements(path: str | Path) -> Iterator[Element]:
    """(place, value) of each element of a data file, `Broken` in the place of what is none.

    Values are JSON's, but for a row of a `.csv`, which is `Cells`. Raises UserError where the file
    cannot be read, is empty, damaged, or of no known format.
    """
    form = format_of(path)
    if form is None:
        raise UserError(
            f"{path}: a data file must end in .json (a list of objects), .jsonl "
            f"(one object per line), {', '.join([*_FORMATS][2:])}, or one of these with "
            f"{' or '.join(_CODECS)} behind it, not {Path(path).suffix or 'nothing'!r}"
        )
    with _read(path, must_seek=form in _TABLES) as file:
        yield from _FORMATS[form](path, file)


def text_blocks(path: str | Path, size: int = 2**18) -> Iterator[str]:
    """A text, `size` bytes of it at a time. Raises UserError where it is none."""
    line, rest = 1, b""  # the beginning of a character whose end is in the next block
    with _read(path, must_seek=False) as file:
        data = file.read(size + len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
        while data:
            after = file.read(size)
            whole = rest + data
            end = len(whole) if not after else _characters_end(whole)
            head = codecs.BOM_UTF8 if line == 1 else b""  # which is taken off a first line, once
            text = _text(path, head + whole[:end], line)
            yield text
            line, rest, data = line + text.count("\n"), whole[end:], after


def _characters_end(data: bytes) -> int:
    """Where the last whole character of UTF-8 ends, before one that goes on after the data."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # a character of several bytes begins
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if length > back else len(data)
        if byte < 0x80:
            break
    return len(data)


def is_text(path: str | Path) -> bool:
    """Whether a file is plain text by its name, and not rows."""
    return PurePosixPath(_uncompressed(path)).suffix == ".txt"


@contextmanager
def _read(path: str | Path, must_seek: bool) -> Iterator[BinaryIO]:
    """As `_opened`; raises UserError for what goes wrong meanwhile."""
    try:
        with _opened(path, must_seek) as file:
            yield file
    except OSError as error:
        if error.strerror is None:  # a decompressor's
            raise UserError(f"{path}: is damaged: {error}") from error
        raise UserError(f"{path}: cannot be read: {error.strerror}{_nearest_file(path)}") from error


def format_of(path: str | Path) -> str | None:
    """The suffix that says how a data file is to be read, without a compression's; None: none."""
    suffix = PurePosixPath(_uncompressed(path)).suffix
    return suffix if suffix in _FORMATS else None


def _uncompressed(path: str | Path) -> str:
    name = storage.name_of(path)
    return next((name.removesuffix(end) for end in _CODECS if name.endswith(end)), name)


@contextmanager
def _opened(path: str | Path, must_seek: bool) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed; must_seek: from any place, which takes a file beside."""
    with storage.opened(path) as file:
        codec = _CODECS.get(PurePosixPath(storage.name_of(path)).suffix)
        if codec is None:
            yield file
            return
        from pyarrow import CompressedInputStream, PythonFile

        stream = CompressedInputStream(PythonFile(file, "r"), codec)
        decompressed = cast(BinaryIO, BufferedReader(stream, DECOMPRESSED_AT_ONCE))
        if not must_seek:
            yield decompressed
            return
        with tempfile.TemporaryFile() as whole:
            shutil.copyfileobj(decompressed, whole, DECOMPRESSED_AT_ONCE)
            whole.seek(0)
            yield cast(BinaryIO, whole)


def _nearest_file(path: str | Path) -> str:
    folder = Path(path).parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, n=1)
    return f"; did you mean {folder / near[0]}?" if near and near[0] != Path(path).name else ""


# ---- text ----------------------------------------------------------------------------------------


def _empty(path: str | Path) -> UserError:
    return UserError(f"{path}: is empty; it needs at least one row")


def _text(path: str | Path, data: bytes, line: int = 1) -> str:
    """The text of a file, or of its part that begins at `line`. Raises UserError where it is none.

    A byte-order mark, which some editors put first, is no part of it.
    """
    if b"\0" in data:
        line += data.count(b"\n", 0, data.index(0))
        raise UserError(
            f"{path}:{line}: holds a NUL byte; "
            "save it as UTF-8 text (UTF-16 and half-written files look like this)"
        )
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        # Counted in the bytes that the decoder saw: without a byte-order mark.
        line += error.object.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; "
            "save the file as UTF-8"
        ) from error


def _lines(path: str | Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of each line; only a line feed ends one."""
    number = 0
    while data := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(data) > LONGEST_LINE:
            raise UserError(
                f"{path}:{number}: the line is longer than {LONGEST_LINE >> 20} MiB; "
                "write one object per line, with a line feed behind each"
            )
        yield number, _text(path, data, number).removesuffix("\n")


# ---- JSON ----------------------------------------------------------------------------------------


class _NotJson(Exception):
    """The text is not JSON at `line`."""

    def __init__(self, line: int, why: str):
        super().__init__(why)
        self.line = line


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # else the last would count, in silence
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        shown = json.dumps(twice[:40])
        raise ValueError(f"the field {shown} comes twice in one object")
    return found


# NaN and infinities are no JSON.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated)
_SPACE = re.compile(r"[ \t\r\n]*")


def _after_space(text: str, position: int = 0) -> int:
    match = _SPACE.match(text, position)
    assert match is not None, "no space at all matches too"
    return match.end()


def _line_elements(path: str | Path, file: BinaryIO) -> Iterator[Element]:
    """Of each line that is not blank."""
    is_first = True
    for number, text in _lines(path, file):
        if not text.strip():
            continue
        if is_first and _begins_a_list(text):
            problem = "the file is one list [...] of objects; name it .json"
            yield f"{path}:{number}", Broken(problem)
            return
        is_first = False
        try:
            value, end = _decode(text, _after_space(text), number)
            if text[end:].strip():
                why = f"column {end + 1}: text after the object; write one object per line"
                raise _NotJson(number, why)
            yield f"{path}:{number}", value
        except _NotJson as error:
            yield f"{path}:{number}", Broken(str(error))
    if is_first:
        raise _empty(path)


def _begins_a_list(line: str) -> bool:
    """Whether a list of objects begins in this line, or one that goes on in the next."""
    line = line.strip()
    return line == "[" or line.startswith("[") and line.startswith("{", _after_space(line, 1))


def _array_elements(path: str | Path, file: BinaryIO) -> Iterator[Element]:
    """Of the list that the file is.

    Decodes one element at a time, because the line on which each starts is wanted.
    """
    text = _text(path, file.read())
    if not text.strip():
        raise _empty(path)

    def skip_space(position: int, line: int) -> tuple[int, int]:
        end = _after_space(text, position)
        return end, line + text.count("\n", position, end)

    try:
        position, line = skip_space(0, 1)
        if not text.startswith("[", position):
            raise _NotJson(
                line,
                "the file must be one list [...] of objects; "
                "with one object per line, name it .jsonl",
            )
        position, line = skip_space(position + 1, line)
        closed = text.startswith("]", position)
        while not closed:
            value, end = _decode(text, position, line)
            yield f"{path}:{line}", value
            position, line = skip_space(end, line + text.count("\n", position, end))
            closed = text.startswith("]", position)
            if not closed:
                if not text.startswith(",", position):
                    raise _NotJson(line, 'not JSON: expected "," or "]" after the element before')
                position, line = skip_space(position + 1, line)
        position, line = skip_space(position + 1, line)
        if position < len(text):
            raise _NotJson(line, "text after the list's closing ]")
    except _NotJson as error:
        yield f"{path}:{error.line}", Broken(str(error))


def _decode(text: str, start: int, line: int) -> tuple[Any, int]:
    """The JSON value at `start`, which is on `line`, and where it ends. Raises `_NotJson`."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        error_line = line + text.count("\n", start, error.pos)
        raise _NotJson(error_line, f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise _NotJson(line, "not usable: nested too deeply") from None
    except ValueError as error:  # NaN, or an integer of thousands of digits
        raise _NotJson(line, f"not usable: {error}") from None


# ---- tables --------------------------------------------------------------------------------------


def _cell_elements(delimiter: str, path: str | Path, file: BinaryIO) -> Iterator[Element]:
    """Of each row below the header, as RFC 4180 has them: quotes around what holds a delimiter."""
    csv.field_size_limit(LONGEST_CELL)
    lines = (f"{text}\n" for _, text in _lines(path, file))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{rows.line_num + 1}"
        try:
            cells = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            yield where, Broken(f"not CSV: {error}")
            continue
        if not cells:
            continue
        if header is None:
            header = cells
            _check_header(where, header)
        elif len(cells) == len(header):
            yield where, Cells(zip(header, cells))
        else:
            yield where, Broken(f"has {len(cells)} cells, and the header {len(header)}")
    if header is None:
        raise _empty(path)


def _check_header(where: str, header: list[str]) -> None:
    for name, count in Counter(header).items():
        if not name.strip() or count > 1:
            what = f"{json.dumps(name[:40])} comes {count} times" if name.strip() else "a blank one"
            raise UserError(
                f"{where}: the first row must have a name for each column, each once; found {what}"
            )


def _table_elements(form: str, path: str | Path, file: BinaryIO) -> Iterator[Element]:
    """Of each row of a Parquet or an Arrow file."""
    from src.data import tables  # pyarrow is only needed for these

    if not file.read(1):
        raise _empty(path)
    file.seek(0)
    rows = tables.parquet_rows if form == ".parquet" else tables.arrow_rows
    for number, row in enumerate(rows(path, file)):
        value = Broken(str(row)) if isinstance(row, tables.Unusable) else row
        yield f"{path}: row {number} (from 0)", value


_TABLES = (".parquet", ".arrow")
_FORMATS: dict[str, Callable[[str | Path, BinaryIO], Iterator[Element]]] = {
    ".json": _array_elements,
    ".jsonl": _line_elements,
    ".csv": partial(_cell_elements, ","),
    ".tsv": partial(_cell_elements, "\t"),
    **{form: partial(_table_elements, form) for form in _TABLES},
}
_CODECS = {".gz": "gzip", ".zst": "zstd"}
