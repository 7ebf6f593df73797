"""Rows through a user's function: the same at any number of processes, and what goes wrong."""

import json
import random

import pytest

from src.data.mapping import RowMap
from src.data.mixture import read_mixture
from src.data.rows import read_prompt_rows, read_solver_rows, write_jsonl
from src.data.sources import Source
from src.errors import UserError

CODE = """
import random, sys, helper
import numpy as np

print("what a function prints is none of its rows")

def renamed(row):
    return {"instruction": row["question"], "output": row["answer"]}

def uneven(row):
    number = int(row["question"])
    if number % 3 == 0:
        return None
    return [{"instruction": f"{number}/{i}", "output": helper.SAID} for i in range(number % 3)]

def drawn(row):
    return {"instruction": row["question"], "output": f"{random.random()} {np.random.rand()}"}

def by_hash(row):
    return {"instruction": " ".join({"alpha", "beta", "gamma", "delta"}), "output": "x"}

def fails(row):
    return {"instruction": row["questin"]}

def raises(row):
    if row["question"] == "70":
        raise ValueError("no such number")
    return row | {"instruction": "x", "output": "y"}

def a_text(row):
    return row["question"]

def an_object(row):
    return {"instruction": "x", "output": {1, 2}}

def nan(row):
    return {"instruction": "x", "output": "y", "label": float("nan")}

def ends(row):
    import os
    os._exit(7)

def nothing(row):
    return None

def cells(row):
    return row | {"instruction": row["a"] + "?", "output": row["b"] or "empty"}
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "helper.py").write_text('SAID = "from a neighbour"')
    (tmp_path / "my_rows.py").write_text(CODE)
    return tmp_path / "my_rows.py"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"question": str(i), "answer": str(i * i)} for i in range(150)])
    return path


def mapped(code, name: str, data, workers: int = 1) -> Source:
    return Source(str(data), RowMap(f"{code}:{name}", workers))


def refusal(source: Source, read=read_solver_rows) -> str:
    with pytest.raises(UserError) as error:
        read(source)
    return str(error.value)


@pytest.mark.parametrize("name", ["renamed", "uneven", "drawn", "by_hash"])
def test_rows_and_places_are_the_same_at_any_number_of_processes(code, data, name, capfd):
    one, three = (read_solver_rows(mapped(code, name, data, n)) for n in (1, 3))
    assert one == three and one.places == three.places and one.notes == three.notes
    out, err = capfd.readouterr()
    assert out == "" and "what a function prints" in err and "--map" in err


def test_rows_are_what_the_function_says_in_their_order(code, data):
    rows = read_solver_rows(mapped(code, "uneven", data, 2))
    expected = [(i, j) for i in range(150) for j in range(i % 3)]
    assert [row["instruction"] for row in rows] == [f"{i}/{j}" for i, j in expected]
    assert rows.places == [f"{data}:{i + 1}" for i, _ in expected]
    assert rows[0]["output"] == "from a neighbour"
    assert rows.notes == [f"{data}: --map leaves out 50 rows"]
    random.seed(70)
    draws = read_solver_rows(mapped(code, "drawn", data))
    assert draws[70]["output"].split()[0] == str(random.random())


@pytest.mark.parametrize(
    "name, words",
    [
        ("fails", [":1: KeyError: 'questin' (", "my_rows.py:23); the row has question, answer"]),
        ("raises", [":71: ValueError: no such number (", "my_rows.py:27)"]),
        ("a_text", [":1: returned str '0'; a row is a dict"]),
        ("an_object", [":1: returned a row that JSON cannot hold: Object of type set"]),
        ("nan", [":1: returned a row that JSON cannot hold: Out of range float"]),
        ("ends", [":1 or one of the rows below it (exit code 7)"]),
        ("missing", ["has no function missing"]),
    ],
)
def test_what_a_function_does_wrong_names_it_and_the_row(code, data, name, words):
    message = refusal(mapped(code, name, data, 2))
    assert message.startswith(f"--map {code}:{name}: ")
    for word in words:
        assert (f"{data}{word}" if word.startswith(":") else word) in message


def test_a_file_that_is_none_is_refused(tmp_path, data):
    (tmp_path / "broken.py").write_text("def f(row)\n")
    assert "broken.py cannot be run: SyntaxError" in refusal(
        mapped(tmp_path / "broken.py", "f", data)
    )
    assert "gone.py is not there" in refusal(mapped(tmp_path / "gone.py", "f", data))
    for where in ("rows.py", "rows.txt:f", "rows.py:f()"):
        assert "write FILE.py:FUNCTION" in refusal(Source(str(data), RowMap(where)))


def test_problems_of_the_data_keep_their_places(code, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "1", "answer": "2"}\n{\n[]\n{"question": "1", "answer": 5}\n')
    message = refusal(mapped(code, "renamed", path))
    assert "3 problems" in message
    for word in (":2: not JSON", ":3: expected an object", ':4: field "output"'):
        assert f"{path}{word}" in message
    nothing = refusal(mapped(code, "nothing", path.with_name("rows.jsonl")))
    assert "cannot be read" in nothing
    path.write_text('{"question": "1"}\n')
    assert "holds no rows that --map keeps" in refusal(mapped(code, "nothing", path))


def test_cells_are_texts_for_the_function_and_spell_values_behind_it(code, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b,label\n1,,2\n")
    [row] = read_solver_rows(mapped(code, "cells", path))
    assert (row["instruction"], row["output"], row["label"]) == ("1?", "empty", "2")


def test_each_source_of_a_mixture_goes_through_the_function(code, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": name, "answer": "x"}))
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source = mapped(code, "renamed", f"{a}:1,{b}:1")

    def read(source: Source) -> tuple[list[dict], list[str]]:
        return (rows := read_prompt_rows(source)), rows.notes

    rows, _, mixture = read_mixture(source, read)
    assert [row["instruction"] for row in rows] == ["a", "b"] and mixture.n_rows == 2
