"""Reasoning in chat templates: what is trained is the conversation of transformers."""

import json

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer

from src.data.encoding import comparisons, scored_sequences, solver_sequences
from src.data.export import write_tokenizer
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from tests.data import test_tokenizer as other

CHATML, CHATML_SPECIAL, rust = other.CHATML, other.CHATML_SPECIAL, other.rust


def reasoning_template(opening, closing, thought, none, prompt, is_raw=False):
    """ChatML whose answers have reasoning, as `thought` or, where there is none, `none` says.

    thought: how a template writes the reasoning %; prompt: what it ends a prompt with; is_raw:
    whether an answer that spells out marks stays as it is.
    """
    written = thought.replace("%", "' + r + '")
    parsed = (
        f"{{% set r = m.content.split('{closing}')[0].split('{opening}')[-1].strip() %}}"
        f"{{{{ '{written}' + m.content.split('{closing}')[-1].lstrip() }}}}"
    )
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}{{ m.content }}"
        f"{{% elif '{closing}' in m.content %}}{'{{ m.content }}' if is_raw else parsed}"
        f"{{% else %}}{{{{ '{none}' + m.content }}}}{{% endif %}}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{{{{ '{prompt}' }}}}{{% endif %}}"
    )


EMPTY, TAGS = r"<think>\n\n</think>\n\n", ("<think>", "</think>")
THOUGHT = r"<think>\n%\n</think>\n\n"
TEMPLATES = {
    "qwen3": (*TAGS, THOUGHT, EMPTY, ""),
    "qwen3.5": (*TAGS, THOUGHT, EMPTY, r"<think>\n"),
    "qwen3.5 without thinking": (*TAGS, THOUGHT, EMPTY, EMPTY),
    "nemotron 3": (*TAGS, "%", "<think></think>", r"<think>\n", True),
    "glm 4.7": (*TAGS, "<think>%</think>", "</think>", "<think>"),
    "deepseek 3.1": (*TAGS, "</think>", "</think>", "</think>"),
    "one line": (*TAGS, "<think>%</think>", "<think></think>", "<think>"),
    "mistral's marks": ("[THINK]", "[/THINK]", "[THINK]%[/THINK]", "", "[THINK]"),
    "kimi's marks": ("◁think▷", "◁/think▷", r"◁think▷\n%\n◁/think▷", "◁think▷◁/think▷", "◁think▷"),
    "cohere's marks": (
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        "<|START_THINKING|>%<|END_THINKING|>",
        "<|START_THINKING|><|END_THINKING|>",
        "<|START_THINKING|>",
    ),
}
ANSWERS = [
    "It is 4",
    "",
    "<think>\ntwo and two\n</think>\n\nIt is 4",
    "<think>two and two</think>It is 4",
    " <think>\n\ntwo and two\n\n</think>\nIt is 4",
    "two and two\n</think>\n\nIt is 4",
    "<think>\n\n</think>\n\nIt is 4",
    "<think>two</think>and</think>It is 4",
]


@pytest.fixture
def open_chat(tmp_path, rust):
    """open_chat(name): (the tokenizer in use, transformers' on the same folder, its marks)."""

    def open_one(name):
        rust.save(str(tmp_path / "tokenizer.json"))
        config = other.NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config["chat_template"] = reasoning_template(*TEMPLATES[name])
        other.write_json(tmp_path / "tokenizer_config.json", config)
        ours = Tokenizer.find(tmp_path, use_chat_template=True)
        return ours, AutoTokenizer.from_pretrained(tmp_path), TEMPLATES[name][:2]

    return open_one


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_is_the_conversation_that_begins_with_the_prompt(open_chat, name, answer):
    tokenizer, theirs, (opening, closing) = open_chat(name)
    answer = answer.replace("<think>", opening).replace("</think>", closing)
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answer}]
    text = theirs.apply_chat_template(turns, tokenize=False).rstrip("\n")
    start = theirs.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.prompt_ids("2 + 2?")
    assert tokenizer.spelled(prompt) == start
    holds_all = answer.count(closing) < 2 and (name != "deepseek 3.1" or "two" not in answer)
    try:
        trained = prompt + tokenizer.response_ids(answer)
    except UserError as error:  # it goes on from another prompt, or leaves the reasoning out
        assert not text.startswith(start) or not holds_all
        assert "its prompt ends with" in str(error) and repr(answer[:80]) in str(error)
        return
    if text.startswith(start) and holds_all:
        assert tokenizer.spelled(trained) == text and not tokenizer.notes()
        if answer.startswith(opening + "\n") and "two" in answer:  # no line's ends become one token
            whole = theirs.apply_chat_template(turns, return_dict=False)
            assert trained == whole[: len(trained)] and len(whole) <= len(trained) + 1
        return
    # Elsewhere it is the answer as it stands after the prompt, and the log says so.
    spelled = tokenizer.spelled(trained)
    assert spelled.startswith(start)
    assert opening + closing + opening not in "".join(spelled.split())
    rest = answer.lstrip().removeprefix(opening).strip()
    assert rest in spelled
    assert not answer or [note for note in tokenizer.notes() if repr(answer) in note]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "mistral's marks"])
def test_rows_with_reasoning_are_trained_unless_the_prompt_is_past_it(open_chat, tmp_path, name):
    tokenizer, _, (opening, closing) = open_chat(name)
    output = f"{opening}\ntwo and two\n{closing}\n\nIt is 4"
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "2 + 2?", "output": output}]))
    if name in ("qwen3.5 without thinking", "deepseek 3.1"):
        with pytest.raises(UserError, match="after which no reasoning comes, and the answer"):
            solver_sequences(str(path), tokenizer, 999)
        return
    ((row,), notes) = solver_sequences(str(path), tokenizer, 999)
    spelled = tokenizer.spelled(list(row.tokens))
    assert spelled.count(opening) == spelled.count(closing) == 1 and not notes


def test_an_empty_thought_before_reasoning_is_told(open_chat):
    """A template takes reasoning that is not closed for an answer, in transformers as here."""
    tokenizer, theirs, _ = open_chat("qwen3.5")
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\ntwo"},
    ]
    text = theirs.apply_chat_template(turns, tokenize=False)
    trained = tokenizer.prompt_ids("2 + 2?") + tokenizer.response_ids("<think>\ntwo")
    assert tokenizer.spelled(trained) + "\n" == text
    (note,) = tokenizer.notes()
    assert "an empty thought before the reasoning of 1 answers, such as '<think>\\ntwo'" in note


CUT = ["two and", "It is 4", "<think>\ntwo and", ""]


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("text", CUT)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_was_sampled_is_taken_as_it_went_on(open_chat, name, text, ended):
    """Whether or not a thought was closed; where it was cut, nothing of it is, and no end put."""
    tokenizer, theirs, (opening, _) = open_chat(name)
    text = text.replace("<think>", opening)
    turn = [{"role": "user", "content": "2 + 2?"}]
    start = theirs.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    response = tokenizer.spelled(tokenizer.response_ids(text, sampled=True, ended=ended))
    assert response.endswith("<|im_end|>") is ended
    if start.rstrip().endswith(opening) and not ended:  # a thought goes on from there
        assert response == text.removeprefix(opening).removeprefix("\n" * start.endswith("\n"))
    else:
        assert response.removesuffix("<|im_end|>").endswith(text.removeprefix(opening).strip())


def test_samples_cut_in_a_thought_are_scored_and_compared(tmp_path, rust):
    """By a template that writes no answer without a thought, they were refused."""
    rust.save(str(tmp_path / "tokenizer.json"))
    template = reasoning_template(*TAGS, THOUGHT, "", r"<think>\n")
    other.write_json(tmp_path / "tokenizer_config.json", other.NAMES | {"chat_template": template})
    tokenizer = Tokenizer.find(tmp_path, use_chat_template=True)
    path, cut = tmp_path / "rows.json", "two and two"
    path.write_text(json.dumps([{"instruction": "2 + 2?", "output": cut}]))
    ((row,), _) = scored_sequences(str(path), tokenizer, 999)
    end = tokenizer.spelled(list(row.tokens)).partition("assistant\n")[2]
    assert end == "<think>\ntwo and two<|im_end|>"
    sides = {"chosen": ["so </think>4"], "rejected": [cut]}
    path.write_text(json.dumps([{"instruction": "2 + 2?", **sides}]))
    ((pair,), _) = comparisons(str(path), tokenizer, 999)
    assert list(pair.responses[pair.rejected[0]].tokens) == list(row.tokens)
    assert any("otherwise than its prompt for generation ends" in x for x in tokenizer.notes())
    with pytest.raises(UserError, match="neither begins so nor holds </think>"):
        tokenizer.response_ids(cut)


BY_QUESTION = CHATML.replace(
    "m['content']", "m['content'].replace('/no_think', '').strip()"
).replace(
    "assistant\n'",
    "assistant\n' + ('<think></think>' if '/no_think' in messages[-1].content else '<think>\n')",
)


@pytest.mark.parametrize("question, said", [
    ("2 + 2?", []),
    (" 2 + 2?\n", []),
    ("2 + 2? /no_think", [
        "leaves out or changes parts of 1 questions, such as '2 + 2? /no_think'",
        "ends 1 prompts, such as that of '2 + 2? /no_think', with another thought",
    ]),
])  # fmt: skip
def test_what_a_template_makes_of_questions_is_told(tmp_path, rust, question, said):
    rust.save(str(tmp_path / "tokenizer.json"))
    config = other.NAMES | {"chat_template": BY_QUESTION}
    other.write_json(tmp_path / "tokenizer_config.json", config)
    tokenizer = Tokenizer.find(tmp_path, use_chat_template=True)
    tokenizer.prompt_ids(question)
    notes = tokenizer.notes()
    assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes))


@pytest.mark.parametrize("content", [
    "m['content'].split() | join(' ')", r"m['content'] | replace('\n\n', '\n')",
    "m['content'] | replace('    ', ' ')", "m['content'] | upper",
])  # fmt: skip
def test_white_space_within_an_answer_is_the_answer_s(tmp_path, rust, content):
    """A template may only take it from the ends."""
    rust.save(str(tmp_path / "tokenizer.json"))
    template = CHATML.replace(
        "m['content']", f"({content} if m.role == 'assistant' else m.content)"
    )
    config = other.NAMES | {"chat_template": template.replace("upper", "trim")}
    other.write_json(tmp_path / "tokenizer_config.json", config)
    tokenizer = Tokenizer.find(tmp_path, use_chat_template=True)
    answer = "def f():\n\n    return 1"
    assert tokenizer.decode(tokenizer.response_ids(answer)) == answer
    assert len(tokenizer.notes()) == ("upper" not in content)
    assert tokenizer.decode(tokenizer.response_ids("4")) == "4"


MARKS = ["<think>", "</think>", "<tool>", "[THINK]"]
PROSE = "Reason between <think> and </think>, with a <tool>. Not [THINK]<tool></think>"
SYSTEM = f"<|im_start|>system\n{PROSE}<|im_end|>\n"
SYSTEMS = {  # where a template writes a system's text of its own
    "unless there is one": f"{{% if messages[0].role == 'user' %}}{SYSTEM}{{% endif %}}{CHATML}",
    "always": SYSTEM + CHATML,
    "with a header of its own": f"<|eot_id|>system<|start_header_id|>{PROSE}\n{CHATML}",
    "in the first question": CHATML.replace(
        "+ m['content']", f"+ ('{PROSE}\n\n' if loop.first else '') + m['content']"
    ),
    "in the last question": CHATML.replace(
        "+ m['content']",
        f"+ ('{PROSE}\n\n' if m.role == 'user' and 'user' not in messages[loop.index:]"
        " | map(attribute='role') else '') + m['content']",
    ),
}


@pytest.mark.parametrize("where", SYSTEMS)
def test_tokens_that_a_system_text_mentions_stay_as_they_are(tmp_path, rust, where):
    rust = RustTokenizer.from_str(rust.to_str())
    whole = json.loads(rust.to_str())
    for token in whole["added_tokens"]:  # which the template's own tokens are, whatever is said
        token["special"] = False
    rust = RustTokenizer.from_str(json.dumps(whole))
    rust.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    config = other.NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config["chat_template"] = SYSTEMS[where]
    (tmp_path / "export").mkdir()
    tokenizer = Tokenizer.find(other.folder_of(tmp_path, rust, tokenizer_config=config), None, True)
    assert tokenizer.control.keys() & {*MARKS, *CHATML_SPECIAL} == {*CHATML_SPECIAL}
    write_tokenizer(tokenizer, tmp_path / "export", tmp_path, 999, scores=False)
    for folder in (tmp_path, tmp_path / "export"):
        theirs = AutoTokenizer.from_pretrained(folder)
        for answer in ("<think>two and two</think>It is 4", "<tool>x</tool> [THINK]"):
            ids = tokenizer.response_ids(answer)[:-1]
            assert tokenizer.decode(ids) == answer
            assert theirs.decode(ids, skip_special_tokens=True) == answer
