"""Data files: what is read, and that every defect is named with file and line."""

import json
import os

import pytest

from src.data.rows import (
    read_prompt_rows,
    read_solver_rows,
    read_verifier_rows,
    write_json,
    write_jsonl,
)
from src.errors import UserError

GOOD = {"instruction": "1+1?", "output": "2"}


@pytest.fixture
def file(tmp_path):
    def make(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def refusal(path, read=read_solver_rows) -> str:
    with pytest.raises(UserError) as error:
        read(path)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_rows_come_back_with_their_extra_keys_and_lists(tmp_path, name):
    rows = [
        GOOD | {"note": {"kept": [1]}},
        {"instruction": "x", "output": ["a", "b"], "label": 3.5},
    ]
    (write_json if name == "a.json" else write_jsonl)(tmp_path / name, rows)
    assert read_solver_rows(tmp_path / name) == [
        rows[0] | {"outputs": ["2"]},
        rows[1] | {"outputs": ["a", "b"]},
    ]


def test_prompts_need_no_output_and_pairs_become_lists(file):
    prompts = read_prompt_rows(file("p.jsonl", '{"instruction": "x", "label": "7"}'))
    assert prompts == [{"instruction": "x", "label": "7"}]
    text = '[{"instruction": "x", "chosen": "c", "rejected": ["r", "s"]}]'
    pairs = read_verifier_rows(file("v.json", text))
    assert pairs == [{"instruction": "x", "chosen": ["c"], "rejected": ["r", "s"]}]


def test_text_survives_byte_order_mark_blank_lines_crlf_and_line_separators(file):
    text = '\ufeff{"instruction": "a\u2028b", "output": "é"}\r\n\r\n'
    text += '{"instruction": "c", "output": "d"}\r\n'
    rows = read_solver_rows(file("a.jsonl", text))
    assert [row["instruction"] for row in rows] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"output": "2"}', ['"instruction" is missing', 'the row has "output"']),
        ('{"instruction": "x"}', ['"output" is missing', "a list of them"]),
        (
            '{"instruction": 5, "output": "2"}',
            ['"instruction"', "expected a non-blank string", "found the number 5"],
        ),
        ('{"instruction": null, "output": "2"}', ["found null"]),
        ('{"instruction": " ", "output": "2"}', ["found a blank string"]),
        ('{"instruction": "x", "output": []}', ["found an empty list"]),
        ('{"instruction": "x", "output": ["a", 7]}', ["a list whose item 1 is the number 7"]),
        ('{"instruction": "x", "output": {"a": 1}}', ["found an object"]),
        ('{"instruction": "x", "output": "y", "label": true}', ['"label"', "found true"]),
        ('{"instruction": "x", "output": "y", "label": 1e999}', ['"label"', "huge number"]),
        ('{"instruction": "x", "output": "y", "label": NaN}', ["NaN is not JSON"]),
        ('{"instruction": "x\\u0000", "output": "y"}', ["NUL"]),
        ('{"instruction": "x\\ud800", "output": "y"}', ["surrogate"]),
        (
            '{"instruction": "x", "output": "y", "label": ' + "9" * 5000 + "}",
            ["not usable", "5000 digits"],
        ),
        (
            '{"instruction": "x", "output": "y", "deep": ' + "[" * 200_000 + "}",
            ["nested too deeply"],
        ),
        ('"just a string"', ["expected an object {...}", '"just a string"']),
        ('["x"]', ["expected an object {...}, found a list"]),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_each_bad_row_is_named_by_file_and_line(file, row, words, suffix):
    rows = [json.dumps(GOOD), json.dumps(GOOD), row]
    text = "[" + ",\n".join(rows) + "]" if suffix == "json" else "\n".join(rows)
    path = file(f"bad.{suffix}", text)
    message = refusal(path)
    for word in [f"{path}:3: ", 'A row looks like {"instruction": "..."', *words]:
        assert word in message
    assert len(message) < 2000


def test_the_line_of_a_pretty_printed_element_is_where_it_starts(file):
    rows = [GOOD, {"instruction": "x\ny", "output": 1}, GOOD, {"instruction": 2, "output": "b"}]
    message = refusal(path := file("a.json", "\n" + json.dumps(rows, indent=2)))
    assert f"{path}:7: " in message and f"{path}:15: " in message and "2 problems" in message


@pytest.mark.parametrize(
    "text, line, words",
    [
        ('[{"instruction": "a",\n "output": }]', 2, "Expecting value"),
        (
            '[{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": "b"}]',
            2,
            'expected "," or "]"',
        ),
        ('[{"instruction": "a", "output": "b"},\n]', 2, "Expecting value"),
        ('[{"instruction": "a", "output": "b"}\n', 2, 'expected "," or "]"'),
        ('[{"instruction": "a", "output": "b"}]\n\n[]', 3, "after the list"),
        ('{"instruction": "a", "output": "b"}\n', 1, "name it .jsonl"),
    ],
)
def test_a_broken_list_is_named_by_line(file, text, line, words):
    message = refusal(path := file("a.json", text))
    assert f"{path}:{line}: " in message and words in message


def test_a_broken_line_does_not_hide_the_next_and_five_problems_are_shown(file):
    lines = ["{", '{"instruction": 1}{}', *["[]"] * 6]
    message = refusal(path := file("a.jsonl", "\n".join(lines)))
    assert "8 problems" in message and "and 3 more" in message
    assert [f"{path}:{line}: " in message for line in (1, 2, 3, 4, 5, 6)] == [True] * 5 + [False]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.json", "", "is empty"),
        ("a.jsonl", "  \n", "is empty"),
        ("a.json", "[]", "holds no rows"),
        ("a.csv", "x", "must end in .json"),
        (
            "a.jsonl",
            b'{"instruction": "x", "output": "y"}\n{"instruction": "\xff"}',
            ":2: byte 0xff is not UTF-8",
        ),
        ("a.jsonl", b'{"instruction": "x", "output": "y"}\n\0\0\0', ":2: holds a NUL byte"),
    ],
)
def test_an_unusable_file_is_refused(file, name, content, words):
    message = refusal(path := file(name, content))
    assert str(path) in message and words in message


def test_a_missing_file_names_the_nearest_and_a_folder_is_refused(file, tmp_path):
    file("train.json", "[]")
    message = refusal(tmp_path / "trains.json")
    assert "did you mean" in message and "train.json?" in message
    (tmp_path / "folder.json").mkdir()
    assert "cannot be read" in refusal(tmp_path / "folder.json")


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    write_json(path := tmp_path / "new" / "a.json", {"a": "é\ud800"})
    assert json.loads(path.read_text()) == {"a": "é\ud800"}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_jsonl(path, [{"a": 2}])
    assert json.loads(path.read_text())["a"].startswith("é")
    assert os.listdir(path.parent) == ["a.json"]


def test_a_number_that_is_not_json_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []
