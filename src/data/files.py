"""A data file's elements, one after the other, each with its place for messages.

A `.json` is a list of objects, a `.jsonl` has one object per line. What is wrong with one element
comes in its place, so that a reader can name several; what is wrong with a whole file is raised.
A `.jsonl` is read line by line, in as much memory as its longest line takes.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from src.errors import UserError

LONGEST_LINE = 64 * 2**20  # bytes of a .jsonl's line: one longer is hardly meant


@dataclass(frozen=True)
class Broken:
    """What is wrong where an element should be; takes its place among the values."""

    problem: str

    def __str__(self) -> str:
        return self.problem


Element = tuple[str, Any]  # its place, FILE:LINE, and what stands there, perhaps `Broken`


def elements(path: str | Path) -> Iterator[Element]:
    """(place, value) of each element of a data file, `Broken` in the place of what is none.

    Raises UserError where the file cannot be read, is empty or is no text.
    """
    read = _FORMATS.get(Path(path).suffix)
    if read is None:
        raise UserError(
            f"{path}: a data file must end in .json (a list of objects) or .jsonl "
            f"(one object per line), not {Path(path).suffix or 'nothing'!r}"
        )
    try:
        with open(path, "rb") as file:
            yield from read(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}{_nearest_file(path)}") from error


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


_FORMATS: dict[str, Callable[[str | Path, BinaryIO], Iterator[Element]]] = {
    ".json": _array_elements,
    ".jsonl": _line_elements,
}
