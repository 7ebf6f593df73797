"""Data files: what is read, and that every defect is named with file and line."""

import json
import os

import pytest

from src.data.rows import (
    OF_THE_ANSWER,
    OF_THE_PROMPT,
    TEXT,
    read_prompt_rows,
    read_rows,
    read_solver_rows,
    read_verifier_rows,
    write_json,
    write_jsonl,
)
from src.errors import UserError
from src.evaluation.tasks import read_labels

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
        (f'{{"instruction": "x", "output": "y", "label": {10**400}}}', ['"label"', "huge number"]),
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
        (
            '{"instruction": "x", "output": "y", "output": "z"}',
            ['the field "output" comes twice in one object'],
        ),
        (
            '{"instruction": "x", "output": "y", "input": "z", "input": ""}',
            ['the field "input" comes twice in one object'],
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
        ("a.xml", "x", "must end in .json"),
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


def test_a_missing_file_names_the_nearest_and_an_empty_folder_is_refused(file, tmp_path):
    file("train.json", "[]")
    message = refusal(tmp_path / "trains.json")
    assert "did you mean" in message and "train.json?" in message
    (tmp_path / "folder.json").mkdir()
    assert "holds no data file" in refusal(tmp_path / "folder.json")


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


# --- fields that nobody reads ---------------------------------------------------------------------

SIDES = {"chosen": "2", "rejected": "3"}
# How each kind of file is read, and what its rows must have beside an instruction.
READERS = {
    "SFT": (read_solver_rows, {"output": "2"}),
    "verifier": (read_verifier_rows, SIDES),
    "prompts": (read_prompt_rows, {}),
    "scored": (
        lambda path: read_rows(path, {"instruction": TEXT, "output": TEXT}),
        {"output": "2"},
    ),
    "labels": (lambda path: read_labels("GSM8K", str(path)).rows, {"label": "2"}),
}


def written(file, *rows: dict, name="a.jsonl"):
    return file(name, "\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "field, value",
    [
        ("input", "3 and 4"),
        ("Input", "3 and 4"),
        ("system", "Answer in French."),
        ("history", [["a", "b"]]),
        ("messages", [{"role": "user", "content": "hello"}]),
        ("conversations", [{"from": "human", "value": "hello"}]),
        ("context", "Paris is in France."),
        ("tools", '[{"name": "f"}]'),
        ("images", ["a.png"]),
        ("choices", {"text": ["a", "b"]}),
        ("prompt", "another"),
        ("query", "another"),
        ("input", 0),
    ],
)
def test_what_belongs_to_the_prompt_and_is_not_read_is_refused(file, kind, field, value):
    read, more = READERS[kind]
    row = {"instruction": "1+1?"} | more
    path = written(file, row, row | {field: value})
    message = refusal(path, read)
    for word in (
        f'{path}:2: field "{field}"',
        "belongs to the prompt",
        'join it with "instruction"',
    ):
        assert word in message
    assert "1 problem:" in message


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("empty", ["", " \n", None, [], {}, [["", ""]], {"text": []}])
def test_an_empty_field_says_nothing_and_is_not_named(file, kind, empty):
    """Alpaca has "input": "" in many rows."""
    read, more = READERS[kind]
    rows = read(written(file, {"instruction": "1+1?", "input": empty, "other": empty} | more))
    assert len(rows) == 1 and rows.notes == []


def test_an_optional_field_may_say_nothing(file):
    """Data sets that are joined have null in each other's columns."""
    empty = {"label": None, "question": "", "problem": None}
    assert read_solver_rows(written(file, GOOD | empty)) == [GOOD | empty | {"outputs": ["2"]}]
    row = {"instruction": None, "question": "1+1?", "output": None, "label": "2"}
    assert read_prompt_rows(written(file, row)) == [row | {"instruction": "1+1?"}]
    nothing = {"instruction": None, "question": "", "output": "2"}
    assert '"instruction": expected a non-blank string, found null' in refusal(
        written(file, nothing)
    )


def test_a_field_that_says_the_same_is_read(file):
    row = GOOD | {"prompt": GOOD["instruction"], "completion": GOOD["output"]}
    assert len(read_solver_rows(written(file, row))) == 1


def test_a_second_answer_is_refused_where_answers_are_learned(file):
    row = GOOD | {"response": "two"}
    message = refusal(path := written(file, row))
    assert f'{path}:1: field "response": belongs to the answer' in message
    assert 'join it with "output"' in message
    assert read_prompt_rows(path)[0]["response"] == "two"
    assert not OF_THE_PROMPT & OF_THE_ANSWER


def test_a_file_without_prompts_has_no_fields_of_a_prompt(file):
    path = written(file, {"output": "2", "prompt": "1+1?", "messages": ["x"]})
    assert read_rows(path, {"output": TEXT})[0]["prompt"] == "1+1?"


def test_other_fields_are_named_once_with_how_many_rows_have_them(file):
    rows = [GOOD | {"id": i, "label": "2"} for i in range(3)]
    rows[1] |= {"source": "x", "level": 5, "empty": None}
    path = written(file, *rows, GOOD)
    said = f"{path}: 3 fields are not used: id, source, level (in 3 of 4 rows)"
    assert read_solver_rows(path).notes == [said]
    path = written(file, GOOD, GOOD | {"id": 1})
    assert read_solver_rows(path).notes == [f"{path}: 1 field is not used: id (in 1 of 2 rows)"]
    path = written(file, GOOD | {f"f{i}": 1 for i in range(12)} | {"x" * 500: 1})
    note = read_solver_rows(path).notes[0]
    assert "13 fields" in note and "f7, ..." in note and "f8" not in note and len(note) < 300
    # What a prompt should lead to is known; a user's function may read anything.
    prompt = {"instruction": "x", "answer": "1", "solution": "1", "label": 1, "output": "1"}
    path = written(file, prompt | {"id": 1})
    assert [": id (in 1" in note for note in read_prompt_rows(path).notes] == [True]
    assert read_prompt_rows(path, unread=None).notes == []


# --- an instruction by another name ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["question", "problem"])
def test_the_official_files_names_of_an_instruction_are_taken(file, name):
    row = {name: "1+1?", "answer": 2, "label": 2}
    rows = read_prompt_rows(written(file, row, row | {"instruction": "1+1?"}))
    assert rows == [row | {"instruction": "1+1?"}] * 2 and rows.notes == []
    rows = read_solver_rows(written(file, {name: "1+1?", "output": "2", "label": 2.5}))
    assert rows[0]["instruction"] == "1+1?" and rows[0]["label"] == 2.5
    assert read_verifier_rows(written(file, {name: "1+1?"} | SIDES))[0]["instruction"] == "1+1?"
    empty = {"instruction": "1+1?", name: "", "output": "2"}
    assert read_solver_rows(written(file, empty)) == [empty | {"outputs": ["2"]}]


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Answer.", "question": "1+1?"},
        {"question": "1+1?", "problem": "2+2?"},
        {"instruction": "Answer.", "problem": {"text": "1+1?"}},
    ],
)
def test_two_different_instructions_are_refused(file, kind, row):
    if kind == "labels" and isinstance(row.get("problem"), dict):
        pytest.skip("a task's file says which of its fields are texts")
    read, more = READERS[kind]
    other = "question" if "problem" not in row else "problem"
    assert f'field "{other}": is not the text of "instruction"' in refusal(
        written(file, row | more), read
    )


def test_what_is_no_text_is_no_instruction_by_any_name(file):
    message = refusal(written(file, {"question": ["1+1?"], "output": "2"}))
    assert 'field "instruction": expected a non-blank string, found a list' in message
    assert '"instruction" is missing' in refusal(written(file, {"question": "", "output": "2"}))


# --- a file's name --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [json.dumps([GOOD, GOOD]), json.dumps([GOOD] * 2, indent=2), "\n[\n\n", "[{"]
)
def test_a_list_that_is_called_jsonl_gets_one_message(file, text):
    message = refusal(path := file("a.jsonl", text))
    line = 2 if text.startswith("\n") else 1
    assert f"{path}:{line}: the file is one list [...] of objects; name it .json\n" in message
    assert "1 problem:" in message


def test_a_line_that_is_a_list_of_something_else_is_a_row_s_problem(file):
    message = refusal(path := file("a.jsonl", '["x"]\n' + json.dumps(GOOD)))
    assert (
        f"{path}:1: expected an object {{...}}, found a list" in message and "1 problem" in message
    )
