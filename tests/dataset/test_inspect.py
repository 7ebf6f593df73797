"""dataset/inspect.py: what is shown is what the trainers read, and what is counted is there."""

import html.parser
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import trl

from dataset import start
from dataset.inspect import main
from dataset.report import Report, lines_of, page_of, takes_colour, visible
from src.data.encoding import comparisons, labelled, prompt_sequences, solver_sequences
from src.data.inspection import histogram, inspected, quantile, tokens_of
from src.data.loss_mask import LossMask
from src.data.mapping import RowMap
from src.data.sources import Source
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.settings.declaration import build
from src.settings.scripts import InspectSettings
from tests.data import test_tokenizer as other

ROOT = Path(__file__).parents[2]
ALL = LossMask()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of bytes, with ChatML's template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    other.byte_level(500).save(str(folder / "tokenizer.json"))
    template = Path(trl.__file__).parent / "chat_templates/qwen2_5.jinja"
    config = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template.read_text()}
    other.write_json(folder / "tokenizer_config.json", config)
    return folder


@pytest.fixture(scope="module")
def chat(folder):
    return Tokenizer.find(folder, use_chat_template=True)


@pytest.fixture(scope="module")
def plain(folder):
    return Tokenizer.find(folder)


@pytest.fixture
def file(tmp_path):
    def make(*rows: dict, name="rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    return make


def looked_at(text: str, kind: str, tokenizer, mask: LossMask, row_map: RowMap | None = None):
    return inspected(Source(text, row_map), kind, tokenizer, mask)


def said(role: str, text: str, **more) -> dict:
    return {"role": role, "content": text} | more


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
SCHEMA = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CONVERSATION = {
    "messages": [
        said("system", "Be brief."),
        said("user", "Add 1."),
        said("assistant", "", tool_calls=[CALL]),
        said("tool", "2"),
        said("assistant", "It is 2."),
    ],
    "tools": [*SCHEMA, {"type": "function", "function": {"name": "idle", "parameters": {}}}],
}
SOLVED = {"instruction": "What is it?", "output": ["an egg", "a larger egg"], "label": "egg"}
COMPARED = {"instruction": "What is it?", "chosen": "an egg", "rejected": ["a", "no eggs at all"]}
RANKED = {"instruction": "What is it?", "ranked": ["an egg", "an", "a"], "scores": [3, 2.5, 1]}
LABELLED = [
    {"instruction": "What is it?", "output": text, "label": is_good}
    for text, is_good in (("an egg", True), ("a", False))
]


def ids(sequences) -> list:
    return [([*s.tokens], s.ranges) for s in sequences]


def test_what_is_shown_is_what_the_trainers_read(file, plain, chat):
    path = file(SOLVED, CONVERSATION)
    for mask in (ALL, LossMask("last"), LossMask("everything")):
        found = looked_at(path, "auto", chat, mask)
        assert found.kind == "solver"
        assert ids(found.sequences) == ids(solver_sequences(path, chat, 9999, mask=mask)[0])
    for rows in ([COMPARED] * 2, [RANKED]):
        path = file(*rows)
        found, (theirs, _) = looked_at(path, "auto", plain, ALL), comparisons(path, plain, 9999)
        assert found.kind == "verifier"
        assert ids(found.sequences) == ids(s for c in theirs for s in c.responses)
    path = file(*LABELLED)
    found, (theirs, _) = looked_at(path, "auto", plain, ALL), labelled(path, plain, 9999)
    assert ids(found.sequences) == ids(s for x in theirs for s in x.responses)
    assert [r.name for x in found.examples for r in x.responses] == ["label true", "label false"]
    path = file({"instruction": "What is it?", "label": "egg"})
    found = looked_at(path, "auto", plain, ALL)
    assert found.kind == "prompts" and not sum(found.trained)
    assert ids(found.sequences) == ids(prompt_sequences(path, plain, 9999)[0])


def test_of_several_sources_with_weights_all_rows_are_shown(file, plain):
    texts = [file(SOLVED | {"output": name}, name=f"{name}.jsonl") for name in "ab"]
    found = looked_at(f"{texts[0]}:0.9,{texts[1]}:0.1", "auto", plain, ALL)
    assert [example.place for example in found.examples] == [f"{path}:1" for path in texts]


def test_rows_are_shown_as_a_map_makes_them(file, plain, tmp_path):
    made = "{'instruction': 'Why?', 'output': 'x' * row['n']}"
    (tmp_path / "mine.py").write_text(f"def pair(row):\n    return row['n'] and {made}")
    path = file({"n": None}, {"n": 3})
    found = looked_at(path, "auto", plain, ALL, RowMap(f"{tmp_path / 'mine.py'}:pair"))
    assert [x.place for x in found.examples] == [f"{path}:2"] and found.kind == "solver"
    assert found.examples[0].responses[0].text == "xxx"
    assert f"{path}: --map leaves out 1 rows" in found.notes


def test_messages_and_tools_are_counted_once(file, chat, plain):
    found = looked_at(file(CONVERSATION, SOLVED), "solver", chat, ALL)
    assert found.roles == {"assistant": 4, "user": 2, "system": 1, "tool": 1}
    assert found.tools == {"add": 1, "idle": 0}
    found = looked_at(file(COMPARED), "auto", plain, ALL)
    assert found.roles == {"assistant": 3, "user": 1}


def test_what_a_length_leaves_out_is_what_the_trainers_leave_out(file, plain):
    rows = [{"instruction": "What is it?", "output": "egg " * n} for n in range(1, 30)]
    path = file(*rows)
    found = looked_at(path, "auto", plain, ALL)
    pairs = file(
        *({"instruction": "?", "chosen": r["output"], "rejected": "a"} for r in rows),
        name="pairs.jsonl",
    )
    compared = looked_at(pairs, "auto", plain, ALL)
    prompts = file(*({"instruction": row["output"]} for row in rows), name="prompts.jsonl")
    asked = looked_at(prompts, "auto", plain, ALL)
    for limit in (20, 21, 22, 40):
        for one, read, name in (
            (found, solver_sequences, path),
            (compared, comparisons, pairs),
            (asked, prompt_sequences, prompts),
        ):
            assert one.too_long(limit) == len(rows) - len(read(name, plain, limit)[0])


def test_what_comes_twice_is_named_with_both_places(file, plain):
    again = {"instruction": "What is it?", "output": "an egg"}
    path = file(again, again | {"output": "a"}, {"instruction": "Why?", "output": "an egg"}, again)
    found = looked_at(path, "auto", plain, ALL)
    assert found.again(of_prompts=False) == [(f"{path}:4", f"{path}:1")]
    assert found.again(of_prompts=True) == [(f"{path}:{n}", f"{path}:1") for n in (2, 4)]


def test_quantiles_and_bins_are_numpys():
    lengths = [int(x) for x in numpy.random.default_rng(0).gamma(2, 150, 999)] + [40_000]
    for share in (0, 0.05, 0.5, 0.99, 1):
        theirs = numpy.quantile(lengths, share, method="inverted_cdf")
        assert quantile(lengths, share) == theirs
    bins = histogram(lengths)
    edges = [start for start, _, _ in bins] + [bins[-1][1]]
    assert [count for *_, count in bins] == numpy.histogram(lengths, edges)[0].tolist()
    assert len(bins) <= 20 and bins[-1][1] == 40_001 and bins[-1][0] <= 2 * numpy.max(lengths[:-1])
    assert histogram([7]) == [(i, i + 1, int(i == 7)) for i in range(8)]


TEXTS = ("an egg 🥚🥚, é\n\n  naïve <|im_end|> ☃", "\ufffd and 🥚", "")


@pytest.mark.parametrize("pieces", [False, True])
def test_texts_of_tokens_make_up_the_text(tmp_path, plain, pieces):
    tokenizer = plain
    if pieces:
        other.train_pieces(tmp_path / "tokenizer.model")
        tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    for text in TEXTS:
        sequence = solver_sequences(
            str(written(tmp_path, {"instruction": "What is it? 🥚", "output": text + "e"})),
            tokenizer,
            999,
        )[0][0]
        tokens = tokens_of(tokenizer, sequence)
        assert "".join(token.text for token in tokens) == tokenizer.spelled([*sequence.tokens])
        assert [token.id for token in tokens] == [*sequence.tokens]
        trained = [token.id for token in tokens if token.is_trained]
        assert trained == sequence.response
        assert tokens[-1].is_special and tokens[-1].spelling == tokenizer.text_of(tokenizer.eos_id)


def written(folder: Path, row: dict) -> Path:
    path = folder / "row.jsonl"
    path.write_text(json.dumps(row))
    return path


# ---- What is printed -----------------------------------------------------------------------------

EVIL = "<script>alert(1)</script> &amp; \x1b[31m\u202e <img src=https://example.org/x.png>"


def report_of(path: str, tokenizer, n_examples: int = 2) -> Report:
    return Report(path, looked_at(path, "auto", tokenizer, ALL), 64, n_examples)


def test_a_terminal_shows_the_mask_by_brackets_or_by_colour(file, chat):
    report = report_of(file(CONVERSATION), chat)
    lines = [*lines_of(report, lambda s: tokens_of(chat, s), in_colour=False)]
    text = "\n".join(line.removeprefix("    ") for line in lines)
    sequence = report.examples[0].responses[0].sequence
    trained = [chat.spelled([*sequence.tokens[a:b]]) for a, b in sequence.ranges]
    assert len(trained) == 2 and all(f"[[{part}]]" in text for part in trained)
    coloured = "\n".join(lines_of(report, lambda s: tokens_of(chat, s), in_colour=True))
    # Each line of what is trained on is on green, and nothing else.
    codes = re.compile("\x1b\\[(42;30(?:;1)?)m(.*?)\x1b\\[0m")
    green = "".join(text for _, text in codes.findall(coloured))
    assert green.removeprefix("trained on") == "".join(trained).replace("\n", "")


def test_nothing_of_a_row_reaches_the_terminal_as_a_command(file, plain):
    report = report_of(file({"instruction": EVIL, "output": "a\rb\x07"}), plain)
    text = "\n".join(lines_of(report, lambda s: tokens_of(plain, s), in_colour=False))
    assert text.replace("\n", "").isprintable()
    assert r"\x1b[31m\u202e" in text and r"a\rb\x07" in text
    assert visible("é ☃\n\t") == "é ☃\n\\t"


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: its text, its elements, and where tags do not fit."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.elements, self.open = "", [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_page_is_whole_loads_nothing_and_takes_rows_for_text(file, plain):
    row = {"instruction": EVIL, "output": f"{EVIL} '\">", "</b>": 1}
    report = report_of(file(row, name="<b>&.jsonl"), plain)
    page = Page(page_of(report, lambda s: tokens_of(plain, s)))
    assert not page.open and "<script>alert(1)</script> &amp; \\x1b[31m" in page.text
    assert "\\u202e <img src=https://example.org/x.png>" in page.text
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "b"} and "svg" in tags
    for _, attributes in page.elements:
        assert not attributes.keys() & {"src", "href"}
        assert not any(name.startswith("on") for name in attributes)
    assert "http" not in page.text.replace("https://example.org", "")
    # A token is an element that names its id and its text, marked where it is trained on.
    sequence = report.examples[0].responses[0].sequence
    tokens = [a for tag, a in page.elements if tag == "span" and "title" in a]
    assert [int(a["title"].partition(":")[0]) for a in tokens] == [*sequence.tokens]
    marked = [i for i, a in enumerate(tokens) if "trained" in a["class"]]
    assert marked == [*range(sequence.prompt_length, len(sequence.tokens))]
    bars = [a for tag, a in page.elements if tag == "rect"]
    assert len(bars) == len(report.bars)


# ---- The script ----------------------------------------------------------------------------------


def inspect(**flags) -> None:
    main(build(InspectSettings, flags))


def test_rows_without_a_mask_are_named_and_the_others_shown(file, folder, capsys, tmp_path):
    path = file(CONVERSATION, {"instruction": "Mark: me", "output": "it"}, SOLVED)
    with pytest.raises(UserError, match=f"{path}: 2 of its rows are refused"):
        inspect(
            train_file=path,
            tokenizer_file=str(folder / "tokenizer.json"),
            use_chat_template=True,
            response_template="me<|im_end|>\n<|im_start|>assistant\n",
            out=str(tmp_path / "page.html"),
        )
    printed = capsys.readouterr().out
    assert (
        "rows that a trainer refuses: 2" in printed and f"{path}:1: --response_template" in printed
    )
    assert "[[it<|im_end|>" in printed and (tmp_path / "page.html").is_file()


def test_a_checkpoint_is_read_with_its_tokenizer(file, tmp_path, capsys):
    path = file(*({"instruction": f"What is {i}?", "output": f"an egg {i}"} for i in range(99)))
    start.main(path, str(tmp_path / "model"), vocab_size=420, dim=16, n_heads=2)
    inspect(train_file=path, ckpt_dir=str(tmp_path / "model"), examples=1)
    tokenizer = Tokenizer.find(tmp_path / "model")
    tokens = sum(len(s.tokens) for s in solver_sequences(path, tokenizer, 99)[0])
    printed = capsys.readouterr().out
    assert re.search(rf"(?m)^  tokens +{tokens:,}$", printed) and "[[ an egg 0</s>]]" in printed


def test_settings_that_say_nothing_are_refused(file, folder):
    path, tokenizer = file(COMPARED), str(folder / "tokenizer.json")
    with pytest.raises(UserError, match="--ckpt_dir or --tokenizer_file"):
        inspect(train_file=path)
    with pytest.raises(UserError, match="--loss_on last: has no effect with --kind verifier"):
        inspect(train_file=path, tokenizer_file=tokenizer, kind="verifier", loss_on="last")
    with pytest.raises(UserError, match="holds rows of kind verifier"):
        inspect(train_file=path, tokenizer_file=tokenizer, loss_on="last")
    with pytest.raises(UserError, match="a .html file is written"):
        inspect(train_file=path, tokenizer_file=tokenizer, out="page.txt")
    with pytest.raises(UserError, match='field "output" is missing'):  # as its trainer says
        inspect(train_file=path, tokenizer_file=tokenizer, kind="solver")


def test_colour_is_for_a_terminal_that_has_some(monkeypatch):
    main_end, descriptor = pty.openpty()
    with os.fdopen(descriptor, "w") as terminal, open(os.devnull, "w") as nowhere:
        for no_colour, term, has_colour in (
            ("", "xterm", True),
            ("1", "xterm", False),
            ("", "dumb", False),
        ):
            monkeypatch.setenv("NO_COLOR", no_colour)
            monkeypatch.setenv("TERM", term)
            assert takes_colour(terminal) == has_colour and not takes_colour(nowhere)
    os.close(main_end)


def test_the_script_starts_although_python_has_a_module_of_its_name(file, folder):
    command = [sys.executable, str(ROOT / "dataset/inspect.py"), "--train_file", file(SOLVED)]
    command += ["--tokenizer_file", str(folder / "tokenizer.json"), "--examples", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[[an egg<|endoftext|>]]" in done.stdout and "\x1b" not in done.stdout
