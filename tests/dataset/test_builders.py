"""What dataset/build.py makes of public data sets: samples by hand, in the forms of their cards."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import trl

from dataset.builders.hh import hh
from dataset.builders.html_text import text_of
from dataset.builders.math import competition_math
from dataset.builders.no_robots import no_robots
from dataset.builders.parts import BuildSettings
from dataset.builders.stackexchange import StackExchangeSettings, stackexchange
from dataset.builders.ultrafeedback import UltraFeedbackSettings, ultrafeedback
from src.data.encoding import comparisons, solver_sequences
from src.data.rows import read_prompt_rows, read_solver_rows, read_verifier_rows
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.evaluation.tasks import read_labels
from src.settings.declaration import build as settings_of
from tests.data import test_tokenizer as other

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A tokenizer with ChatML's template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    other.byte_level(500).save(str(folder / "tokenizer.json"))
    template = Path(trl.__file__).parent / "chat_templates/qwen2_5.jinja"
    config = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template.read_text()}
    other.write_json(folder / "tokenizer_config.json", config)
    return Tokenizer.find(folder, use_chat_template=True)


def write_lines(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


@pytest.fixture
def built(tmp_path, capsys):
    """built(builder, rows): (train rows, all that was printed) of a file without a test part."""

    def make(builder, rows, kind=BuildSettings, **settings):
        source = rows if isinstance(rows, str) else write_lines(tmp_path / "in/rows.jsonl", rows)
        settings = {"source": source, "save_dir": str(tmp_path / "out"), **settings}
        if "test_source" not in settings and isinstance(rows, list):
            settings = {"test_share": 0.0} | settings
        builder(settings_of(kind, settings))
        return json.loads((tmp_path / "out/train.json").read_text()), capsys.readouterr().out

    return make


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


# ---- HH-RLHF -------------------------------------------------------------------------------------


def transcript(*turns: str) -> str:
    """In turns by the human and the assistant, but for one that begins with its own speaker."""
    speakers = ("Human", "Assistant") * len(turns)
    named = (t if ":" in t else f"{speaker}: {t}" for t, speaker in zip(turns, speakers))
    return "".join(f"\n\n{turn}" for turn in named)


HH = [
    {"chosen": transcript("What is it?", "An egg.", "Sure?", "Assistant: Yes: x")}
    | {"rejected": transcript("What is it?", "An egg.", "Sure?", "No")},
    # Which differ before the last answer.
    {"chosen": transcript("Hi", "A", "more", "B"), "rejected": transcript("Hi", "C")},
    # Which differ in what the human asks.
    {"chosen": transcript("Hi", "A", "B", "C"), "rejected": transcript("Hi", "A", "D", "E")},
    {"chosen": transcript("Hi", "A"), "rejected": transcript("Hi", "A")},
    {"chosen": transcript("Hi", "A"), "rejected": transcript("Hi", "Assistant:")},
    {"chosen": transcript("Hi", "A", "B"), "rejected": transcript("Hi", "A")},
    {"chosen": transcript("Hi", "A"), "rejected": transcript("Ho", "B")},
    {"chosen": transcript("Hi", "Human: Ho", "Assistant: A"), "rejected": transcript("Hi", "B")},
]


def test_hh_becomes_comparisons_of_messages(built, tmp_path, chat):
    rows, printed = built(hh, HH)
    assert rows == [
        {
            "prompt": [user("What is it?"), answer("An egg."), user("Sure?")],
            "chosen": [answer("Yes: x")],
            "rejected": [answer("No")],
        },
        {
            "prompt": [user("Hi")],
            "chosen": [answer("A"), user("more"), answer("B")],
            "rejected": [answer("C")],
        },
        {
            "prompt": [user("Hi")],
            "chosen": [answer("A"), user("B"), answer("C")],
            "rejected": [answer("A"), user("D"), answer("E")],
        },
    ]
    found, _ = comparisons(str(tmp_path / "out/train.json"), chat, 999)
    asked = chat.conversation_ids(rows[0]["prompt"])
    for sequence, text in zip(found[0].responses, ("Yes: x", "No")):
        assert list(sequence.tokens[: sequence.prompt_length]) == asked
        assert chat.spelled(sequence.response) == f"{text}<|im_end|>"
    assert found[0].pairs == [(0, 1)] and len(found) == 3
    for reason in (
        "1 rows whose sides say the same",
        "1 rows with a turn that is blank or holds a NUL",
        "1 rows that do not end with the assistant's turn",
        "1 rows whose sides share no question",
        "1 rows in which human and assistant do not take turns",
    ):
        assert f"  left out: {reason}\n" in printed
    assert "rows.jsonl: 8 rows\n" in printed and "train.json: 3 rows\n" in printed


def test_hh_refuses_what_is_no_transcript(built, tmp_path):
    with pytest.raises(UserError, match=r'rows.jsonl:2: field "rejected": is .*expected a trans'):
        built(hh, [HH[0], HH[0] | {"rejected": "No."}])
    with pytest.raises(UserError, match=r'rows.jsonl:1: field "chosen" is missing'):
        built(hh, [{"rejected": "No."}])
    with pytest.raises(UserError, match="no row is left of 1: 1 rows whose sides say the same"):
        built(hh, HH[3:4])
    assert not (tmp_path / "out").exists()


# ---- Parts ---------------------------------------------------------------------------------------


def many(n: int) -> list[dict]:
    """Each prompt twice."""
    return [
        {"messages": [user(f"question {i // 2}"), answer(f"answer {i}")], "category": "Chat"}
        for i in range(2 * n)
    ]


def test_a_share_of_the_prompts_is_held_out_by_the_seed_alone(built, tmp_path):
    def parts(**settings) -> tuple[list, list]:
        train, _ = built(no_robots, many(40), **settings)
        return train, json.loads((tmp_path / "out/test.json").read_text())

    train, test = parts(test_share=0.1, seed=1)
    assert len(test) == 8 and len(train) == 72
    sides = [{row["messages"][0]["content"] for row in side} for side in (train, test)]
    assert not sides[0] & sides[1]
    plain = [{"messages": row["messages"]} for row in many(40)]
    assert [row for row in plain if row in train] == train, "in their order"
    assert sorted(map(json.dumps, train + test)) == sorted(map(json.dumps, plain))
    assert parts(test_share=0.1, seed=1) == (train, test) != parts(test_share=0.1, seed=2)
    assert len(parts(test_share=None)[1]) == 4, "a twentieth where nothing is said"
    _, said = built(no_robots, many(9), test_share=0.05)
    assert "held out: none, 0.05 of 9 prompts is less than one (--test_share)" in said


def test_parts_that_a_source_has_stay_apart(built, tmp_path):
    rows = many(3)
    folder = tmp_path / "published"
    write_lines(folder / "train-00000-of-00002.jsonl.gz", rows[:1])
    write_lines(folder / "train-00001-of-00002.jsonl.gz", rows[1:4])
    write_lines(folder / "test-00000-of-00001.jsonl", rows[4:])
    train, printed = built(no_robots, str(folder))
    assert [row["messages"] for row in train] == [row["messages"] for row in rows[:4]]
    test = json.loads((tmp_path / "out/test.json").read_text())
    assert [row["messages"] for row in test] == [row["messages"] for row in rows[4:]]
    remote = fsspec.filesystem("memory")
    for file in folder.iterdir():
        remote.pipe(f"/{tmp_path.name}/{file.name}", file.read_bytes())
    assert built(no_robots, f"memory://{tmp_path.name}")[0] == train
    assert json.loads((tmp_path / "out/test.json").read_text()) == test
    with pytest.raises(UserError, match="--test_share 0.1: has no effect, since .* a test part"):
        built(no_robots, str(folder), test_share=0.1)
    with pytest.raises(UserError, match="--test_share 0.5: has no effect with --test_source"):
        built(no_robots, rows, test_source=str(folder), test_share=0.5)
    files = {name: str(folder / f"{name}*") for name in ("train", "test")}
    assert built(no_robots, files["train"], test_source=files["test"])[0] == train
    write_lines(folder / "train_sft.jsonl", rows)
    with pytest.raises(UserError, match="holds test, train, train_sft; say which"):
        built(no_robots, str(folder))
    write_lines(tmp_path / "out/train.jsonl", rows)
    with pytest.raises(UserError, match="train.jsonl there is read and would be overwritten"):
        built(no_robots, str(tmp_path / "out/train.jsonl"), format="jsonl")


def test_a_folder_of_shards_without_parts_is_one_source(built, tmp_path):
    for i in range(2):
        write_lines(tmp_path / f"published/part-{i}.jsonl", many(2)[2 * i : 2 * i + 2])
    assert len(built(no_robots, str(tmp_path / "published"), test_share=0.0)[0]) == 4


# ---- No Robots -----------------------------------------------------------------------------------


def test_no_robots_becomes_conversations(built, tmp_path, chat):
    system = {"role": "system", "content": "Be brief."}
    whole = [system, user("What is it?"), answer("An egg."), user("Sure?"), answer("Yes.")]
    row = {"prompt": "What is it?", "prompt_id": "a1", "category": "Chat"}
    rows, printed = built(
        no_robots, [row | {"messages": m} for m in (whole, whole[:4], [user(" "), answer("A")])]
    )
    assert rows == [{"messages": whole}]
    assert "left out: 1 rows that do not end with the assistant's turn" in printed
    assert "left out: 1 rows with a turn that is blank or holds a NUL" in printed
    (sequence,), notes = solver_sequences(str(tmp_path / "out/train.json"), chat, 999)
    assert not notes and len(sequence.ranges) == 2
    assert chat.spelled([*sequence.tokens]) == chat.chat.text_of(whole)
    with pytest.raises(UserError, match='rows.jsonl:1: field "messages": expected a list of mess'):
        built(no_robots, [row | {"messages": [{"role": "narrator", "content": "A"}]}])


# ---- UltraFeedback -------------------------------------------------------------------------------


def completion(text: str, *ratings, overall: float | None = None) -> dict:
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    annotations = {
        aspect: {"Rating": rating, "Rationale": "..."} for aspect, rating in zip(aspects, ratings)
    }
    return {
        "model": "m",
        "response": text,
        "annotations": annotations,
        "overall_score": overall,
        "critique": "...",
    }


ULTRA = [
    {
        "source": "flan",
        "instruction": "Name a colour.",
        "models": ["a", "b", "c", "d"],
        "completions": [
            completion("blue", "3", "4", "4", "3", overall=9.0),
            completion("An egg", "1", "2", "1", "2", overall=10.0),
            completion("red", "5", "5", "5", "4", overall=8.5),
            completion("", "5", "5", "5", "5", overall=8.0),
            completion("green", "5", "N/A", "5", "5", overall=7.0),
        ],
        "correct_answers": ["None"],
    },
    {
        "source": "flan",
        "instruction": "Tie.",
        "completions": [completion(x, *"1111", overall=5.0) for x in "ab"],
    },
    {"source": "flan", "instruction": "None.", "completions": []},
]


def test_ultrafeedback_becomes_rankings(built, tmp_path):
    rows, printed = built(ultrafeedback, ULTRA, UltraFeedbackSettings)
    assert rows == [
        {
            "instruction": "Name a colour.",
            "ranked": ["red", "blue", "An egg"],
            "scores": [4.75, 3.5, 1.5],
        }
    ]
    assert read_verifier_rows(tmp_path / "out/train.json") == rows
    assert "left out: 2 rows without two answers of unlike ratings" in printed
    assert "left out: 1 answers that are blank or hold a NUL" in printed
    assert "left out: 1 answers without a rating (aspects)" in printed
    rows, _ = built(ultrafeedback, ULTRA, UltraFeedbackSettings, score="overall")
    assert rows[0]["ranked"] == ["An egg", "blue", "red", "green"]
    with pytest.raises(UserError, match='rows.jsonl:1: field "completions": expected a list of c'):
        built(ultrafeedback, [ULTRA[0] | {"completions": [{"text": "a"}]}], UltraFeedbackSettings)


def test_binarised_ultrafeedback_becomes_comparisons(built, tmp_path):
    asked = user("Name a colour.")
    row = {
        "prompt": "Name a colour.",
        "prompt_id": "a1",
        "messages": [asked, answer("red")],
        "chosen": [asked, answer("red")],
        "rejected": [asked, answer("An egg")],
        "score_chosen": 8.5,
        "score_rejected": 2.0,
    }
    long = {"chosen": [asked, answer("red"), user("And?"), answer("blue")]}
    long["rejected"] = [*long["chosen"][:3], answer("no")]
    table = pyarrow.Table.from_pylist(
        [row, row | {"score_rejected": 8.5}, row | long, row | {"rejected": row["chosen"]}]
    )
    (tmp_path / "in").mkdir()
    source = tmp_path / "in/train_prefs-00000-of-00001.parquet"
    pyarrow.parquet.write_table(table, source)
    rows, printed = built(ultrafeedback, str(source), UltraFeedbackSettings, test_share=0.0)
    assert rows[0] == {"instruction": "Name a colour.", "chosen": "red", "rejected": "An egg"}
    assert rows[1] == {
        "prompt": long["chosen"][:3],
        "chosen": [answer("blue")],
        "rejected": [answer("no")],
    }
    assert len(rows) == 2 == len(read_verifier_rows(tmp_path / "out/train.json"))
    assert "left out: 1 rows whose chosen side is not scored higher" in printed
    assert "left out: 1 rows whose sides say the same" in printed


# ---- StackExchange -------------------------------------------------------------------------------


def voted(text: str, score: int, selected: bool = False, name: str = "pm_score") -> dict:
    return {"answer_id": 1, "author": "A", name: score, "selected": selected, "text": text}


def test_stackexchange_becomes_rankings(built, tmp_path):
    answers = [
        voted("<p>use <code>a &lt; b</code></p>", 2),
        voted("<p>the first of a tie</p>", 3),
        voted("<p>the accepted one of it</p>", 3, True),
        voted("<p>bad</p>", -1),
        voted("<p></p>", 5),
        voted("<p>bad</p>", 1),
    ]
    row = {"qid": 1, "question": "<p>How &amp; why?</p>\n<pre><code>x  = 1\n</code></pre>"}
    rows, printed = built(
        stackexchange,
        [row | {"answers": answers}, row | {"answers": answers[1:3]}],
        StackExchangeSettings,
    )
    question = "How & why?\n\n```\nx  = 1\n```"
    ranked = ["the accepted one of it", "use `a < b`", "bad"]
    assert rows == [{"instruction": question, "ranked": ranked, "scores": [3, 2, -1]}]
    assert read_verifier_rows(tmp_path / "out/train.json") == rows
    for reason in (
        "1 rows with fewer than 2 answers of unlike scores",
        "2 answers that tie with another of the row",
        "1 answers that are no text",
        "1 answers that another of the row repeats",
    ):
        assert f"left out: {reason}" in printed
    few = {"min_answers": 2, "max_answers": 2}
    scored = [voted(f"<p>{i}</p>", i, name="score") for i in range(5)]
    rows, printed = built(stackexchange, [row | {"answers": scored}], StackExchangeSettings, **few)
    assert rows[0]["ranked"] == ["4", "3"] and "3 answers below the best" in printed
    with pytest.raises(UserError, match="--min_answers 3: is above --max_answers 2"):
        built(stackexchange, [row], StackExchangeSettings, min_answers=3, max_answers=2)
    with pytest.raises(UserError, match=r'rows.jsonl:1: field "answers": expected a list of answ'):
        built(stackexchange, [row | {"answers": [{"text": "a"}]}], StackExchangeSettings)


@pytest.mark.parametrize(
    "html, text",
    [
        ("plain", "plain"),
        ("a<br>b<br/>c", "a\nb\nc"),
        ("<p>a</p>\n\n<p>b  c\nd</p>", "a\n\nb c d"),
        ("<h1>T</h1><p>a <b>b</b> <a href='https://example.org'>c</a>.</p>", "T\n\na b c."),
        ("<ul><li>a</li><li><p>b</p></li></ul><p>c</p>", "- a\n- b\n\nc"),
        ("<ol>\n<li>a</li>\n<li>b<ul><li>c</li></ul></li>\n</ol>", "1. a\n2. b\n  - c"),
        ("<pre><code>a &lt;\n\n\n    c</code></pre>after", "```\na <\n\n\n    c\n```\n\nafter"),
        ("x<script>alert(1)</script><style>p {}</style>y", "xy"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", "a b\n\nc"),
        ("a &lt;b&gt; &#39;c&#39; &copy;", "a <b> 'c' ©"),
        ("<p>unclosed <b>", "unclosed"),
        ("</ul></pre></script>a<img src=x>", "a"),
    ],
)
def test_html_as_text(html, text):
    assert text_of(html) == text


# ---- MATH ----------------------------------------------------------------------------------------


def problem(text: str, solution: str) -> dict:
    return {"problem": text, "level": "Level 5", "type": "Algebra", "solution": solution}


def test_math_from_the_official_folder(built, tmp_path):
    folder = tmp_path / "MATH"
    for name, row in {
        "train/algebra/10.json": problem("c", r"So $\boxed{\frac{1}{2}}$."),
        "train/algebra/2.json": problem("b", r"$\boxed 7$"),
        "train/geometry/1.json": problem("d", "It is 7."),
        "test/algebra/1.json": problem("a", r"First \boxed{1}, then \boxed{x^{2}}."),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(row))
    rows, printed = built(competition_math, str(folder))
    assert rows == [
        {"instruction": "b", "output": r"$\boxed 7$", "label": "7"},
        {"instruction": "c", "output": r"So $\boxed{\frac{1}{2}}$.", "label": r"\frac{1}{2}"},
    ]
    assert "left out: 1 rows whose solution boxes no answer" in printed
    test = tmp_path / "out/test.json"
    assert json.loads(test.read_text())[0]["label"] == "x^{2}"
    assert read_labels("MATH", str(test)).golds == ["x^{2}"]
    assert len(read_solver_rows(tmp_path / "out/train.json")) == 2
    assert len(read_prompt_rows(tmp_path / "out/train.json")) == 2
    (folder / "train/algebra/3.json").write_text('{"problem": "e"}')
    with pytest.raises(UserError, match='algebra/3.json: expected an object with "solution"'):
        built(competition_math, str(folder))
    (folder / "train/algebra/3.json").write_text("[")
    with pytest.raises(UserError, match="algebra/3.json: cannot be read as JSON"):
        built(competition_math, str(folder))


def test_math_from_one_file_and_by_the_command(tmp_path):
    source = write_lines(tmp_path / "in/rows.jsonl", [problem(f"p{i}", r"\boxed{1}") for i in "ab"])
    command = [sys.executable, ROOT / "dataset/build.py", "math", "--source", source]
    command += ["--save_dir", tmp_path / "out", "--format", "jsonl", "--test_share", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_solver_rows(tmp_path / "out/train.jsonl")) == 1
    assert f"{tmp_path}/out/test.jsonl: 1 rows" in done.stdout
