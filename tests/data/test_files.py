"""Data files of every format, held against the libraries that write them, and what is wrong."""

import bz2
import csv
import gzip
import io
import json
import sys
import tracemalloc
import uuid
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from src import cli
from src.data.files import LONGEST_LINE, Broken, elements
from src.data.rows import (
    FLAG,
    NUMBER,
    NUMBERS,
    SAMPLE,
    TEXT,
    TEXTS,
    read_rows,
    read_solver_rows,
    read_verifier_rows,
)
from src.data.sources import files_of
from src.errors import UserError

ROWS = [
    {"instruction": "1+1?", "output": "2"},
    {"instruction": 'a "quoted", line\nand another', "output": "é\u2028\U0001f600"},
    {"instruction": "naïve; tab\there", "output": " blanks at the ends "},
    {"instruction": "[1, 2]", "output": "null"},
]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: list[dict], **options) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), file := io.BytesIO(), **options)
    return file.getvalue()


def arrow(rows: list[dict], new=pa.ipc.new_file) -> bytes:
    table = pa.Table.from_pylist(rows)
    with new(file := io.BytesIO(), table.schema) as writer:
        writer.write_table(table, max_chunksize=max(3, len(rows) // 100))
    return file.getvalue()


def cells(rows: list[dict], delimiter=",", end="\r\n") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


WRITTEN = {
    "a.json": json.dumps(ROWS, indent=2).encode(),
    "a.jsonl": jsonl(ROWS),
    "a.parquet": parquet(ROWS),
    "a.arrow": arrow(ROWS),
    "stream.arrow": arrow(ROWS, pa.ipc.new_stream),
    "a.csv": cells(ROWS),
    "pandas.csv": pd.DataFrame(ROWS).to_csv(index=False).encode(),
    "a.tsv": cells(ROWS, "\t", "\n"),
    "bom.csv": b"\xef\xbb\xbf" + cells(ROWS),
    "pandas.jsonl": pd.DataFrame(ROWS).to_json(orient="records", lines=True).encode(),
}


@pytest.fixture
def file(tmp_path):
    def make(name: str, content: bytes):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return make


def values(path) -> list:
    return [value for _, value in elements(path)]


def refusal(path, read=read_solver_rows) -> str:
    with pytest.raises(UserError) as error:
        read(path)
    return str(error.value)


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_gives_the_rows_that_were_written(file, name, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    assert values(file(name + suffix, pack(WRITTEN[name]))) == ROWS


def test_compressed_files_may_be_several_behind_one_another(file):
    half = len(jsonl(ROWS)) // 2
    parts = jsonl(ROWS)[:half], jsonl(ROWS)[half:]
    assert values(file("a.jsonl.gz", b"".join(map(gzip.compress, parts)))) == ROWS
    assert values(file("a.jsonl.zst", b"".join(map(zstandard.compress, parts)))) == ROWS


def test_places_are_lines_of_texts_and_numbers_of_rows(file):
    path = file("a.csv", b'\na,b\n1,"x\ny"\n\n2,z\n')
    assert [(place, dict(cells)) for place, cells in elements(path)] == [
        (f"{path}:3", {"a": "1", "b": "x\ny"}),
        (f"{path}:6", {"a": "2", "b": "z"}),
    ]
    path = file("a.parquet", parquet(ROWS, row_group_size=2))
    assert [place for place, _ in elements(path)] == [f"{path}: row {i} (from 0)" for i in range(4)]


def test_a_table_s_structs_lose_the_keys_that_other_rows_have(file):
    """A column of structs has all keys in every row; JSON's rows have their own."""
    rows = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "call": {"id": 1}}]},
        {"messages": [{"role": "a", "call": {"name": "f", "more": [{"k": 1}, {"l": None}]}}]},
        {"messages": None, "label": None},
        {"messages": [], "label": "7"},
    ]
    nothing = [{"messages": None, "label": None} | row for row in rows]
    nothing[1]["messages"] = [{"role": "a", "call": {"name": "f", "more": [{"k": 1}, {}]}}]
    assert values(file("a.parquet", parquet(nothing))) == nothing
    assert values(file("a.arrow", arrow(nothing))) == nothing


def test_a_table_s_values_become_json_s(file):
    day, moment = date(2024, 2, 29), datetime(2024, 2, 29, 12, 0, 1)
    table = pa.table(
        {
            "text": pa.array(["a", None]).dictionary_encode(),
            "bytes": pa.array([b"\xc3\xa9", None], pa.binary()),
            "decimal": pa.array([Decimal("1.5"), Decimal("7.0")]),
            "day": pa.array([day, day]),
            "moment": pa.array([moment, None]),
            "map": pa.array([[("k", 1.5)], []], pa.map_(pa.string(), pa.float64())),
            "lists": pa.array([[[1.0], None], [[]]], pa.list_(pa.list_(pa.float16()))),
            "views": pa.array(["x", "y"], pa.string_view()),
            "large": pa.array([[True], [None]], pa.large_list(pa.bool_())),
            "id": pa.array([uuid.UUID(int=5).bytes, None], pa.uuid()),
        }
    )
    with pa.ipc.new_file(stream := io.BytesIO(), table.schema) as writer:
        writer.write_table(table)
    path = file("a.arrow", stream.getvalue())
    first = {"text": "a", "bytes": "é", "decimal": 1.5, "day": "2024-02-29", "views": "x"}
    first |= {"moment": "2024-02-29T12:00:01", "map": {"k": 1.5}, "lists": [[1.0], None]}
    first |= {"id": "00000000-0000-0000-0000-000000000005"}
    second = dict.fromkeys(("text", "bytes", "moment", "id"))
    second |= {"decimal": 7, "day": "2024-02-29", "map": {}, "lists": [[]], "views": "y"}
    assert values(path) == [first | {"large": [True]}, second | {"large": [None]}]
    assert json.dumps(values(path))


def test_what_a_cell_spells_is_read_where_its_field_asks_for_it(file):
    rows = [
        {
            "instruction": "5",
            "output": '["a", "b"]',
            "score": "1.5",
            "grades": "[1, 2]",
            "ok": "True",
        },
        {"instruction": "x", "output": "", "score": "-2", "grades": "[]", "ok": "false"},
    ]
    kinds = {"instruction": TEXT, "output": SAMPLE, "score": NUMBER, "grades": NUMBERS, "ok": FLAG}
    found = read_rows(file("a.csv", cells(rows)), kinds)
    assert found == [
        rows[0] | {"score": 1.5, "grades": [1, 2], "ok": True},
        rows[1] | {"score": -2, "grades": [], "ok": False},
    ]
    pairs = [{"instruction": "x", "chosen": "c", "rejected": "r", "extra": ""}]
    assert read_verifier_rows(file("b.csv", cells(pairs)))[0]["extra"] is None
    ranked = [{"instruction": "x", "ranked": '["a", "b"]', "scores": ""}]
    assert read_verifier_rows(file("c.csv", cells(ranked)))[0]["ranked"] == ["a", "b"]
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    chats = file("e.csv", cells([{"messages": json.dumps(said)}]))
    assert read_solver_rows(chats) == read_solver_rows(file("e.jsonl", jsonl([{"messages": said}])))
    # A text that spells a list stays a text, where a text is what the field holds.
    one = file("d.csv", cells([{"instruction": "x", "output": '["a"]'}]))
    assert read_rows(one, {"instruction": TEXT, "output": TEXTS})[0]["output"] == '["a"]'
    wrong = refusal(one, lambda path: read_rows(path, {"output": NUMBER}))
    assert f'{one}:2: field "output": expected a finite number, found the string' in wrong


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.csv", "a.parquet", "a.arrow"])
def test_memory_holds_some_rows_not_all(file, name):
    rows = [{"instruction": f"{i} " * 100, "output": "x" * 400} for i in range(15_000)]
    write = {"a.csv": cells, "a.parquet": parquet, "a.arrow": arrow}.get(name, jsonl)
    content = zstandard.compress(write(rows)) if name.endswith(".zst") else write(rows)
    path = file(name, content)
    del rows, content
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()
    try:
        most = max(pool.bytes_allocated() - before for _ in elements(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20 and most < 4 * 2**20, (peak, most)  # of some 15 MB


def test_a_line_longer_than_any_is_refused_before_it_is_read_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(jsonl(ROWS[:1]) + b'{"instruction": "')
        for _ in range(200):
            stream.write(b"x" * 2**20)
    tracemalloc.start()
    try:
        message = refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert f"{path}:2: the line is longer than 64 MiB" in message
    assert peak < 2.5 * LONGEST_LINE


# --- what is wrong --------------------------------------------------------------------------------

GOOD = jsonl(ROWS[:1])
LINE = ROWS[0]
HEADER = b"instruction,output\n"


def column(name: str, array: pa.Array, write=pq.write_table) -> bytes:
    table = pa.table({"instruction": ["x"] * len(array), "output": ["y"] * len(array), name: array})
    write(table, stream := io.BytesIO())
    return stream.getvalue()


def as_arrow(table: pa.Table, stream: io.BytesIO) -> None:
    with pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)


def offsets(rows: list[dict]) -> bytes:
    """Where the texts of the rows' first batch end in its first column, as Arrow has them."""
    lengths = [len(row["instruction"].encode()) for row in rows]
    return np.cumsum([0, *lengths]).astype("<i4").tobytes()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


CHECKED_ZSTD = zstandard.ZstdCompressor(write_checksum=True)
MANY = [{"instruction": f"question {i}", "output": f"{i * i}"} for i in range(3000)]
BROKEN: dict[str, tuple[str, bytes, list[str]]] = {
    # texts
    "utf-16": ("a.jsonl", GOOD.decode().encode("utf-16"), [":1: holds a NUL byte", "UTF-16"]),
    "latin-1": ("a.jsonl", GOOD + '{"instruction": "é"}'.encode("latin-1"), [":2: byte 0xe9"]),
    "gb18030": ("a.csv", HEADER + "你,好\n".encode("gb18030"), [":2: byte 0xc4 is not UTF-8"]),
    "latin-1 json": ("a.json", b'[\n{"instruction": "\xe9"}]', [":2: byte 0xe9 is not UTF-8"]),
    "bom then latin-1": ("a.json", b'\xef\xbb\xbf[\n"\xe9"]', [":2: byte 0xe9 is not UTF-8"]),
    "nul": ("a.csv", HEADER + b"x,y\nx,\0\n", [":3: holds a NUL byte"]),
    "cut in a character": ("a.jsonl", GOOD + '"é'.encode()[:-1], [":2: byte 0xc3"]),
    "empty": ("a.csv", b"", ["is empty"]),
    "empty table": ("a.parquet", b"", ["is empty"]),
    "blank": ("a.tsv", b"\n\n", ["is empty"]),
    "cut line": ("a.jsonl", GOOD + b'{"instruction": "x", "out', [":2: not JSON: Unterminated"]),
    "single quotes": ("a.jsonl", GOOD + b"{'instruction': 'x'}", [":2: not JSON"]),
    "comma behind": ("a.jsonl", GOOD + b'{"instruction": "x",}', [":2: not JSON"]),
    "two in a line": ("a.jsonl", GOOD + b"{} {}", [":2: column 3: text after the object"]),
    "infinity": ("a.jsonl", GOOD + b'{"a": -Infinity}', [":2: not usable: -Infinity"]),
    "list as lines": ("a.jsonl", json.dumps([LINE]).encode(), [":1: the file is one list"]),
    "lines as list": ("a.json", GOOD, [":1: the file must be one list", "name it .jsonl"]),
    "object of rows": ("a.json", json.dumps({"data": [LINE]}).encode(), [":1: the file must be"]),
    "list cut": ("a.json", b'[{"instruction": "a", "output": "b"},\n', [":2: not JSON"]),
    "list never ends": ("a.json", b"[" * 100_000, [":1: not usable: nested too deeply"]),
    "numbers": ("a.jsonl", b"1\n2\n", [":1: expected an object {...}, found the number 1", ":2: "]),
    "nested nulls": (
        "a.jsonl",
        b'{"instruction": "x", "output": ["y", null]}',
        [":1: field", "a list whose item 1 is null"],
    ),
    # cells
    "no header": ("a.csv", b"1+1?,2\n2+2?,4\n", [':2: field "instruction" is missing', '"1+1?"']),
    "too many cells": ("a.csv", HEADER + b"x,y\nx,y,z\n", [":3: has 3 cells, and the header 2"]),
    "too few cells": ("a.csv", HEADER + b"x\n", [":2: has 1 cells, and the header 2"]),
    "quote never closed": ("a.csv", HEADER + b'x,y\nx,"y\nz\n', [":3: not CSV: unexpected end"]),
    "text after a quote": ("a.csv", HEADER + b'x,"y"z\nx,y\n', [":2: not CSV", "expected after"]),
    "a name twice": ("a.csv", b"a,b,a\n1,2,3\n", [":1: the first row", '"a" comes 2 times']),
    "a name missing": ("a.csv", b"instruction,,output\nx,y,z\n", [":1: ", "found a blank one"]),
    "semicolons": ("a.csv", b"instruction;output\nx;y\n", [':2: field "instruction" is missing']),
    "tabs in csv": ("a.csv", b"instruction\toutput\nx\ty\n", [':2: field "instruction"']),
    "empty cell": ("a.csv", HEADER + b"x,\n", [':2: field "output"', "found null"]),
    "a cell too long": (
        "a.csv",
        HEADER + b'x,"' + (b"y" * 2**20 + b"\n") * 17 + b'"',
        [":2: not CSV: field larger"],
    ),
    "only a header": ("a.csv", HEADER, ["holds no rows"]),
    # compression
    "gzip cut": ("a.jsonl.gz", gzip.compress(jsonl(MANY))[:-10], ["is damaged: Truncated"]),
    "gzip half": ("a.csv.gz", gzip.compress(cells(MANY))[:5000], ["is damaged: Truncated"]),
    "gzip damaged": ("a.jsonl.gz", flipped(gzip.compress(jsonl(MANY)), 4000), ["is damaged"]),
    "no gzip": ("a.jsonl.gz", GOOD, ["is damaged: zlib inflate failed: incorrect header"]),
    "gzip of bzip2": ("a.json.gz", bz2.compress(GOOD), ["is damaged"]),
    "zstd cut": ("a.jsonl.zst", zstandard.compress(jsonl(MANY))[:-5], ["is damaged: Truncated"]),
    "zstd damaged": (
        "a.jsonl.zst",
        flipped(CHECKED_ZSTD.compress(jsonl(MANY)), 900),
        ["is damaged"],
    ),
    "no zstd": ("a.parquet.zst", parquet(ROWS), ["is damaged: ZSTD decompress failed"]),
    "line in gzip": ("a.jsonl.gz", gzip.compress(GOOD + b"{"), [":2: not JSON"]),
    # tables
    "parquet cut": ("a.parquet", parquet(MANY)[:-20], ["is no Parquet file, or a damaged one"]),
    "parquet's start": ("a.parquet", parquet(MANY)[:4], ["is no Parquet file"]),
    "parquet's page": (
        "a.parquet",
        flipped(parquet(MANY, write_page_checksum=True), 60),
        ["is no Parquet file, or a damaged"],
    ),
    "no parquet": ("a.parquet", GOOD, ["is no Parquet file", "magic bytes"]),
    "parquet as arrow": ("a.arrow", parquet(ROWS), ["is no Arrow file, or a damaged one"]),
    "arrow cut": ("a.arrow", arrow(MANY)[:-20], ["is no Arrow file, or a damaged one"]),
    "stream cut": (
        "a.arrow",
        arrow(MANY, pa.ipc.new_stream)[:-8],
        ["is no Arrow file, or a damaged one", "may have been cut"],
    ),
    "stream's half": ("a.arrow", arrow(MANY, pa.ipc.new_stream)[:20_000], ["may have been cut"]),
    "arrow's offsets": (
        "a.arrow",
        arrow(ROWS).replace(offsets(ROWS[:3]), np.array([0, 4, 2**31 - 1, 9], "<i4").tobytes()),
        ["is no Arrow file, or a damaged one"],
    ),
    "short": ("a.arrow", b"abc", ["is no Arrow file"]),
    "no rows": (
        "a.parquet",
        parquet([LINE])[:0] + column("a", pa.array([], pa.int8())),
        ["no rows"],
    ),
    "numbers for texts": (
        "a.parquet",
        parquet([LINE, LINE]) and parquet([{"instruction": 5, "output": "y"}] * 2),
        [': row 0 (from 0): field "instruction"', "found the number 5", "2 problems"],
    ),
    "null text": (
        "a.parquet",
        parquet([LINE, {"instruction": "x", "output": None}]),
        [': row 1 (from 0): field "output"', "found null"],
    ),
    "nan": (
        "a.parquet",
        column("label", pa.array([1.0, float("nan")])),
        [': row 1 (from 0): not usable: the field "label" holds nan'],
    ),
    "nan in a struct": (
        "a.parquet",
        column("info", pa.array([{"p": [float("inf")]}])),
        [': row 0 (from 0): not usable: the field "info" holds inf'],
    ),
    "bytes": (
        "a.parquet",
        column("image", pa.array([b"\xff\xd8"], pa.binary())),
        [': row 0 (from 0): not usable: the field "image" holds bytes'],
    ),
    "durations": (
        "a.parquet",
        column("took", pa.array([1], pa.duration("s"))),
        ['the column "took" holds duration[s]'],
    ),
    "a date past all": (
        "a.parquet",
        column("day", pa.array([0, 10**7], pa.date32())),
        [": row 1 (from 0): not usable: date value out of range", "1 problem:"],
    ),
    "a field twice in a struct": (
        "a.arrow",
        column("x", pa.StructArray.from_arrays([[1], [2]], names=["a", "a"]), as_arrow),
        [": row 0 (from 0): not usable: ", "duplicate field names"],
    ),
    "other columns": (
        "a.parquet",
        parquet([{"asked": "x", "answered": "y"}]),
        [': row 0 (from 0): field "instruction" is missing', '"asked"'],
    ),
    "a struct for a text": (
        "a.arrow",
        arrow([{"instruction": {"text": "x"}, "output": "y"}]),
        [': row 0 (from 0): field "instruction"', "found an object"],
    ),
    # names
    "unknown": ("a.xlsx", b"PK", ["must end in .json", ".parquet", ".zst behind it, not '.xlsx'"]),
    "only a compression": ("a.gz", gzip.compress(GOOD), ["must end in .json", "not '.gz'"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_is_named_by_its_place_and_ends_with_code_2(file, what, monkeypatch, capsys):
    def main(train_file: Annotated[str, "rows"]) -> None:
        read_solver_rows(train_file)

    name, content, words = BROKEN[what]
    path = file(name, content)
    monkeypatch.setattr(sys, "argv", ["script.py", "--train_file", str(path)])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said) < 2000
    for word in words:
        assert (str(path) + word if word.startswith(":") else word) in said


def test_a_broken_element_does_not_hide_the_next(file):
    path = file("a.csv", HEADER + b'x,"y"z\nx,y\nx\n')
    kinds = [type(value) for _, value in elements(path)]
    assert kinds[0] is kinds[2] is Broken and len(kinds) == 3
    path = file("a.parquet", column("n", pa.array([1.0, float("nan"), 2.0])))
    assert [isinstance(value, Broken) for value in values(path)] == [False, True, False]


# --- sources --------------------------------------------------------------------------------------


def test_a_folder_a_pattern_and_a_list_are_their_files_by_name(file, tmp_path):
    for name in ("d/b.jsonl", "d/a.parquet", "d/c.csv.gz", "d/deep/e.jsonl", "d/.hidden.jsonl"):
        form = {"d/a.parquet": parquet, "d/c.csv.gz": lambda rows: gzip.compress(cells(rows))}
        file(name, form.get(name, jsonl)([{"instruction": name, "output": "x"}]))
    file("d/README.md", b"no data")

    def read(text: str) -> list[str]:
        return [row["instruction"] for row in read_solver_rows(text)]

    assert read(f"{tmp_path}/d") == ["d/a.parquet", "d/b.jsonl", "d/c.csv.gz"]
    assert read(f"{tmp_path}/d/*.jsonl") == ["d/b.jsonl"]
    assert read(f"{tmp_path}/d/**/*.jsonl") == ["d/b.jsonl", "d/deep/e.jsonl"]
    both = f"{tmp_path}/d/c.csv.gz,{tmp_path}/d/*.jsonl"
    assert read(both) == ["d/c.csv.gz", "d/b.jsonl"]
    rows = read_solver_rows(both)
    assert rows.places == [f"{tmp_path}/d/c.csv.gz:2", f"{tmp_path}/d/b.jsonl:1"]
    assert "README.md: a data file must end in" in refusal(f"{tmp_path}/d/*")
    assert "no file is called so" in refusal(f"{tmp_path}/*.csv")
    (tmp_path / "e" / "deep").mkdir(parents=True)
    assert f"'{tmp_path}/e/**/*.jsonl'" in refusal(tmp_path / "e")


def test_problems_of_several_files_are_named_together(file, tmp_path):
    file("d/a.jsonl", GOOD + b"{}\n")
    file("d/b.csv", HEADER + b"x\n")
    message = refusal(tmp_path / "d")
    assert f"{tmp_path}/d/a.jsonl:2: " in message and f"{tmp_path}/d/b.csv:2: " in message


def test_names_with_commas_and_colons_are_files_where_they_exist(file, tmp_path):
    odd = [file(name, GOOD) for name in ("a,b.jsonl", "x:0.5", "a.jsonl:0.7", "c.jsonl")]
    assert files_of(odd[0]) == [str(odd[0])]
    assert files_of(odd[2]) == [str(odd[2])]
    assert files_of(f"{odd[3]},{odd[0]},{odd[2]}") == [str(odd[i]) for i in (3, 0, 2)]
    assert files_of(f"{odd[0]}:1") == [str(odd[0])]


def test_weights_are_refused_where_nothing_is_mixed(file):
    a, b = file("a.jsonl", GOOD), file("b.jsonl", GOOD)
    assert "weights mix rows that are trained on" in refusal(f"{a}:0.5,{b}:0.5")
    assert f"{b} has no weight and others have" in refusal(f"{a}:0.5,{b}")
    assert "a weight is 0" in refusal(f"{a}:1,{b}:0")
    assert "before or behind a comma" in refusal(f"{a},,{b}")


def test_what_datasets_saves_is_read_as_datasets_reads_it(tmp_path):
    many = [{"instruction": f"{i}", "output": "x", "tags": [{"k": i}]} for i in range(50)]
    whole = datasets.Dataset.from_list(many)
    whole.select(range(3, 40)).shuffle(seed=1).save_to_disk(tmp_path / "one", num_shards=3)
    splits = datasets.DatasetDict({"train": whole, "test": whole.select(range(5))})
    splits.save_to_disk(tmp_path / "two")
    assert read_solver_rows(tmp_path / "one") == [
        row | {"outputs": ["x"]} for row in datasets.load_from_disk(tmp_path / "one")
    ]
    assert len(read_solver_rows(f"{tmp_path}/two@train")) == 50
    assert len(read_solver_rows(tmp_path / "two" / "test")) == 5
    assert "has the splits train, test; choose one" in refusal(tmp_path / "two")
    assert "has the splits train, test; choose one" in refusal(f"{tmp_path}/two@valid")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of folders: names are loaded by `datasets` itself, from disk."""
    load = datasets.load_dataset
    monkeypatch.chdir(tmp_path / "..")

    def load_dataset(name, config, **options):
        return load(str(tmp_path / "hub" / name), config, cache_dir=str(tmp_path / "c"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_a_data_set_of_the_hub_is_loaded_by_name(hub, file):
    for split, n in (("train", 7), ("test", 2)):
        file(f"hub/org/sums/{split}.jsonl", GOOD * n)
    assert len(read_solver_rows("org/sums@train")) == 7
    assert len(read_solver_rows("org/sums/default@test")) == 2
    assert "choose one: org/sums@train, org/sums@test" in refusal("org/sums")
    assert "there is no such file or folder, and as a data set" in refusal("org/sums@valid")
    assert "there is no such file or folder, and as a data set" in refusal("org/missing@train")


def test_without_datasets_a_name_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refusal("openai/gsm8k/main@train")
    assert "no such file or folder" in message and "pip install datasets" in message
