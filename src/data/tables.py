"""The rows of Parquet and Arrow files, as JSON would have them.

Read by batches: memory holds some rows at a time, of a Parquet file also its compressed pages.
"""

import json
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from src.errors import UserError

ROWS_AT_ONCE = 256
READ_AT_ONCE = 2**20  # bytes of a column's pages
# What an Arrow stream ends with (https://arrow.apache.org/docs/format/Columnar.html): without it
# the file may have been cut between two batches.
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
FILE_MAGIC = b"ARROW1"

_DAMAGE = pa.ArrowException, OSError, UnicodeDecodeError  # what pyarrow raises of it

Convert = Callable[[Any], Any]


class Unusable(Exception):
    """A value that JSON cannot hold; says which."""


def parquet_rows(path: str | Path, file: BinaryIO) -> Iterator[dict[str, Any] | Unusable]:
    """Each row of a Parquet file, `Unusable` where it holds what JSON does not.

    Raises UserError for a file that is none or is damaged, and for columns without such a form.
    """
    try:
        table = pq.ParquetFile(
            file, buffer_size=READ_AT_ONCE, pre_buffer=False, page_checksum_verification=True
        )
        yield from _rows(path, table.schema_arrow, table.iter_batches(ROWS_AT_ONCE))
    except _DAMAGE as error:
        raise _damaged(path, "Parquet", error) from error


def arrow_rows(path: str | Path, file: BinaryIO) -> Iterator[dict[str, Any] | Unusable]:
    """Each row of an Arrow file, in its format of files or of streams; else like `parquet_rows`."""
    is_file = file.read(len(FILE_MAGIC)) == FILE_MAGIC
    if not is_file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(END_OF_STREAM)))
        if file.read() != END_OF_STREAM:
            why = "it does not end as an Arrow stream does, and may have been cut"
            raise _damaged(path, "Arrow", why)
    file.seek(0)
    try:
        reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file)
        if is_file:
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(reader)
        slices = (
            batch.slice(start, ROWS_AT_ONCE)
            for batch in batches
            for start in range(0, batch.num_rows, ROWS_AT_ONCE)
        )
        yield from _rows(path, reader.schema, slices)
    except _DAMAGE as error:
        raise _damaged(path, "Arrow", error) from error


def _damaged(path: str | Path, form: str, why: object) -> UserError:
    first = (str(why).strip() or type(why).__name__).splitlines()[0]
    return UserError(f"{path}: is no {form} file, or a damaged one: {first[:200]}")


def _rows(
    path: str | Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> Iterator[dict[str, Any] | Unusable]:
    names = schema.names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: the column {_quoted(twice)} comes twice; rename one")
    converts: dict[str, Convert] = {}
    for field in schema:
        try:
            convert = _convert(field.type)
        except TypeError as error:
            raise UserError(
                f"{path}: the column {_quoted(field.name)} holds {error}, which rows of text have "
                "no form for; take the column out"
            ) from None
        if convert is not None:
            converts[field.name] = convert
    for batch in batches:
        batch.validate(full=True)  # offsets that lead out of a damaged file end the process
        for row in _as_python(batch):
            try:
                if isinstance(row, Unusable):
                    raise row
                for name, convert in converts.items():
                    if row[name] is not None:
                        row[name] = _converted(convert, row[name], name)
                yield row
            except Unusable as unusable:
                yield unusable


def _as_python(batch: pa.RecordBatch) -> list[Any]:
    """Rows as dicts, `Unusable` in the place of one that Python has no form for."""
    try:
        return batch.to_pylist()
    except _DAMAGE:
        raise
    # A date past the year 9999, a struct with a name twice.
    except (OverflowError, ValueError) as error:
        if batch.num_rows > 1:
            return [row for i in range(batch.num_rows) for row in _as_python(batch.slice(i, 1))]
        return [Unusable(f"not usable: {error}")]


def _converted(convert: Convert, value: Any, name: str) -> Any:
    try:
        return convert(value)
    except ValueError as error:
        raise Unusable(f"not usable: the field {_quoted(name)} holds {error}") from None


def _quoted(name: str) -> str:
    return json.dumps(name[:40])


# ---- Arrow's values to JSON's --------------------------------------------------------------------


def _convert(kind: pa.DataType) -> Convert | None:
    """How a value of a type, not null, becomes one of JSON; None: it is one.

    Raises TypeError, which names the type, where there is no such form.
    """
    types = pa.types
    if getattr(kind, "extension_name", None) == "arrow.uuid":
        return str
    if isinstance(kind, pa.BaseExtensionType):
        return _convert(kind.storage_type)
    if types.is_dictionary(kind):
        return _convert(kind.value_type)
    if types.is_floating(kind):
        return _finite
    if types.is_decimal(kind):
        return _number
    if types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return _struct({name: _convert(inner) for name, inner in fields.items()})
    if types.is_map(kind):
        return _map(_convert(kind.item_type))
    if any(is_kind(kind) for is_kind in _LISTS):
        inner = _convert(kind.value_type)
        return None if inner is None else _list(inner)
    if any(is_kind(kind) for is_kind in _BYTES):
        return _text
    if types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind):
        return _iso
    if any(is_kind(kind) for is_kind in _OF_JSON):
        return None
    raise TypeError(str(kind))


_OF_JSON = (
    *(pa.types.is_null, pa.types.is_boolean, pa.types.is_integer),
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
)
_LISTS = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)
_BYTES = (
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary),
    pa.types.is_binary_view,
)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value}, which is not JSON")
    return value


def _number(value: Decimal) -> int | float:
    return int(value) if value == value.to_integral_value() else float(value)


def _text(value: bytes) -> str:
    """Some writers keep texts as bytes."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ValueError("bytes that are no UTF-8 text; take the column out") from None


def _iso(value: Any) -> str:
    return value.isoformat()


def _struct(converts: dict[str, Convert | None]) -> Convert:
    """Without what is null: a column's structs all have the keys that any of them has."""

    def convert(struct: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value if (inner := converts[name]) is None else inner(value)
            for name, value in struct.items()
            if value is not None
        }

    return convert


def _map(inner: Convert | None) -> Convert:
    def convert(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        found = {
            str(key): value if inner is None or value is None else inner(value)
            for key, value in pairs
        }
        if len(found) < len(pairs):
            raise ValueError("a map with a key that comes twice")
        return found

    return convert


def _list(inner: Convert) -> Convert:
    def convert(items: list[Any]) -> list[Any]:
        return [None if item is None else inner(item) for item in items]

    return convert
