"""What dataset/build.py makes.

Right sums, wrong corruptions, no overlap, and pairs from graded samples.
"""

import ast
import collections
import json
import operator
import random
import re
import subprocess
import sys
import types
from fractions import Fraction
from pathlib import Path

import pytest

from dataset import build
from dataset.arithmetic import ITEMS, NAMES, TEMPLATES, Template, generate
from dataset.corrupt import corrupt, evaluate
from src.data.rows import read_prompt_rows, read_solver_rows, read_verifier_rows
from src.errors import UserError
from src.evaluation.gsm8k import extract, grade

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "gsm8k"
real_data = pytest.mark.skipif(
    not REAL.is_dir(), reason="the GSM8K files are not beside this checkout"
)
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value(expression: str) -> Fraction:
    """An evaluator that shares nothing with the code under test.

    It is Python's own parser and four operators.
    """

    def visit(node):
        if isinstance(node, ast.Constant):
            return Fraction(str(node.value))
        return OPERATORS[type(node.op)](visit(node.left), visit(node.right))

    return visit(ast.parse(expression, mode="eval").body)


def notes(answer: str) -> list[tuple[str, str, str]]:
    return re.findall(r"<<([^=<>]+)=([^=<>]+)>>(\d+(?:\.\d+)?)", answer)


@pytest.fixture(scope="module")
def problems():
    return {
        "train": generate(6000, seed=0),
        "test": generate(600, seed=0, part="test", terse_share=0.0),
    }


def test_every_equation_of_every_answer_is_true(problems):
    for row in problems["train"] + problems["test"]:
        steps = notes(row["output"])
        assert steps and len(steps) == row["output"].count("<<") == row["output"].count("\n")
        for expression, result, copy in steps:
            assert value(expression) == int(result) == int(copy)
        assert steps[-1][1] == row["label"] and all(grade(row["output"], row["label"]).values())


def test_every_answer_uses_the_numbers_of_its_question(problems):
    for row in problems["train"]:
        asked = collections.Counter(re.findall(r"\d+", row["instruction"]))
        expressions = " ".join(expression for expression, _, _ in notes(row["output"]))
        used = collections.Counter(re.findall(r"\d+", expressions))
        assert not asked - used, row


def test_texts_are_short_small_and_of_few_words(problems):
    rows = problems["train"] + problems["test"]
    assert all(60 <= len(row["instruction"]) <= 140 for row in rows)
    assert all(30 <= len(row["output"]) <= 110 for row in rows)
    assert all(2 <= int(row["label"]) < 200 for row in rows)
    questions = "\n".join(row["instruction"] for row in rows)
    assert all(int(number) < 100 for number in re.findall(r"\d+", questions))
    texts = "\n".join(row["instruction"] + row["output"] for row in rows)
    words = set(re.findall("[A-Za-z]+", texts))
    assert 150 <= len(words) <= 250


def skeleton(question: str) -> str:
    """A question without its names and things: its template and its numbers."""
    return re.sub("|".join(rf"\b{word}\b" for word in NAMES + ITEMS), "_", question)


def test_train_and_test_share_no_problem_and_no_question_comes_twice(problems):
    questions = [row["instruction"] for part in problems.values() for row in part]
    assert len(questions) == len(set(questions)) == 6600
    train = {skeleton(row["instruction"]) for row in problems["train"]}
    test = {skeleton(row["instruction"]) for row in problems["test"]}
    assert len(test) > 400 and not train & test
    elsewhere = {skeleton(row["instruction"]) for row in generate(2000, seed=7, part="test")}
    assert not train & elsewhere  # other seeds do not mix the parts either


def test_all_templates_occur_with_one_to_three_steps(problems):
    assert len(TEMPLATES) >= 24
    shapes = {re.sub(r"\d+", "0", skeleton(row["instruction"])) for row in problems["train"]}
    assert len(shapes) == len(TEMPLATES)
    assert {row["output"].count("<<") for row in problems["test"]} == {1, 2, 3}


def test_styles_follow_their_share():
    def terse(row):
        return len(re.findall("[-+*/]", notes(row["output"])[0][0])) > 1

    steps_above_one = sum(len(template.steps) > 1 for template in TEMPLATES) / len(TEMPLATES)
    for share in (0.0, 0.5, 1.0):
        rows = generate(2000, seed=1, terse_share=share)
        assert sum(map(terse, rows)) / len(rows) == pytest.approx(share * steps_above_one, abs=0.05)
        assert share < 1.0 or all(row["output"].count("\n") == 1 for row in rows)


@pytest.mark.parametrize(
    "steps",
    [
        (("y+z", "{}"), ("x-p", "{}")),
        (("y-z", "{}"), ("x-p", "{}")),
        (("y+z", "{}"), ("p*x", "{}")),
        (("y-z", "{}"), ("x*p", "{}")),
        (("x*y", "{}"), ("p*z", "{}"), ("q/p", "{}")),
        (("x+y", "{}"), ("p/z", "{}")),
        (("x+y", "{}"), ("p-z", "{}"), ("q-p", "{}")),
        (("x/y", "{}"), ("z/p", "{}")),
        (("x+y", "{}"), ("z+p", "{}")),
    ],
)
def test_a_terse_expression_has_the_value_of_its_steps(steps, monkeypatch):
    monkeypatch.setattr("dataset.arithmetic.RANGES", dict.fromkeys("xyz", (1, 12)))
    monkeypatch.setattr("dataset.arithmetic.SMALLEST", -200)
    monkeypatch.setattr("dataset.arithmetic.LARGEST", 2000)
    monkeypatch.setattr("dataset.arithmetic.TEMPLATES", [Template("{x} {y} {z}", steps)])
    for row in generate(30, seed=0, terse_share=1.0):
        expression, result = re.search("<<(.*)=(.*)>>", row["output"]).groups()
        assert value(expression) == int(result) == int(row["label"])


def test_generation_depends_on_the_seed_alone():
    assert generate(50, seed=3) == generate(50, seed=3) != generate(50, seed=4)


def test_problems_may_be_limited_in_their_steps():
    for most in (1, 2, 3):
        rows = generate(300, seed=0, terse_share=0.0, max_steps=most)
        assert {row["output"].count("\n") for row in rows} == set(range(1, most + 1))


def test_generation_refuses_what_it_cannot_do(monkeypatch):
    with pytest.raises(UserError, match="terse_share"):
        generate(5, seed=0, terse_share=1.5)
    with pytest.raises(UserError, match="at least 1"):
        generate(0, seed=0)
    monkeypatch.setattr("dataset.arithmetic.TEMPLATES", TEMPLATES[4:5])
    monkeypatch.setattr("dataset.arithmetic.NAMES", NAMES[:2])
    with pytest.raises(UserError, match="different questions for test; ask for fewer than 5000"):
        generate(5000, seed=0, part="test")


# ---- corruption ----------------------------------------------------------------------------------

GOLD = "Sold 48/2 = <<48/2=24>>24 in May.\nSold 48+24 = <<48+24=72>>72 in all.\n#### 72"


def test_a_slip_is_carried_on_to_the_final_answer():
    seen = {corrupt(GOLD, random.Random(seed)) for seed in range(60)}
    first = "Sold 48/2 = <<48/2=25>>25 in May.\nSold 48+25 = <<48+25=73>>73 in all.\n#### 73"
    swapped = "Sold 48/2 = <<48/2=24>>24 in May.\nSold 48+24 = <<48+24=27>>27 in all.\n#### 27"
    assert first in seen  # a slip in the first step
    assert swapped in seen  # digits swapped
    for text in seen:
        false = [note for note in notes(text) if value(note[0]) != Fraction(note[1])]
        assert len(false) == 1 and text.endswith(f"#### {notes(text)[-1][1]}")


@pytest.mark.parametrize(
    "gold",
    [
        "No steps at all.\n#### 18",
        "#### 0",
        "#### 1",
        "#### -5",
        "#### .5",
        "#### 11",
        "#### 1,234,567",
        "#### 1.2.3",
        "#### 99999999999999999999",
        "<<3-3=0>>0\n#### 0",
        "<<5*0=0>>0 then <<0*7=0>>0\n#### 7",
        "a <<20*50%=10>>10, b <<10+1=11>>11\n#### 11",
        "$<<1.25*2=2.50>>2.50\n#### 2.50",
        "<<1000*2=2000>>2,000\n#### 2,000",
        "<<x=y>>\n#### 3",
        "<<5-9=-4>>-4\n#### -4",
    ],
)
def test_a_corrupted_answer_always_differs(gold):
    for seed in range(40):
        wrong = corrupt(gold, random.Random(seed))
        assert not grade(wrong, gold)["official"] and extract("official", wrong) is not None
        assert not grade(wrong, gold)["numeric"]
        assert extract("official", wrong) != "0"  # not what a slip in a word problem gives


def test_a_slip_keeps_the_way_numbers_are_written():
    for gold, wrong in (
        ("<<1000*2=2000>>2,000\n#### 2,000", "<<1000*2=2001>>2,001\n#### 2,001"),
        ("<<1.25*2=2.50>>2.50\n#### 2.50", "<<1.25*2=3.50>>3.50\n#### 3.50"),
    ):
        assert wrong in {corrupt(gold, random.Random(seed)) for seed in range(20)}


def test_a_slip_makes_no_fractions_of_whole_things():
    gold = "<<7*5=35>>35 people fill <<35/5=7>>7 cars.\n#### 7"
    assert all("." not in notes(corrupt(gold, random.Random(seed)))[1][1] for seed in range(60))


def test_a_number_that_a_later_step_gives_anew_is_not_taken_for_the_slip():
    gold = "A <<2+3=5>>5, B <<1+4=5>>5, all of B twice <<5*2=10>>10\n#### 10"
    for seed in range(60):
        wrong = notes(corrupt(gold, random.Random(seed)))
        assert wrong[0][1] == "5" and (wrong[1][1] == "5" or wrong[2][0] != "5*2")


def test_corrupting_depends_on_the_generator_alone_and_needs_an_answer():
    assert corrupt(GOLD, random.Random(5)) == corrupt(GOLD, random.Random(5))
    with pytest.raises(ValueError, match="####"):
        corrupt("nothing", random.Random(0))


@pytest.mark.parametrize(
    "expression, result",
    [
        ("3*14+25", 67),
        ("2*(3+4)", 14),
        ("100-2*(3-1)/4", 99),
        ("1,000/8", 125),
        (".5*10", 5),
        ("7-3-2", 2),
        ("8/4/2", 1),
        ("-3+5", 2),
        ("1/0", None),
        ("2**3", None),
        ("(1", None),
        ("1)", None),
        ("", None),
        ("x+1", None),
        ("5%", None),
        ("1e9", None),
        ("(" * 90 + "1" + ")" * 90, None),
        ("__import__('os')", None),
    ],
)
def test_evaluate(expression, result):
    assert evaluate(expression) == result


# ---- the commands --------------------------------------------------------------------------------


@pytest.fixture
def tiny_gsm8k(tmp_path):
    folder = tmp_path / "official"
    folder.mkdir()
    for part in ("train", "test"):
        rows = []
        for i in (1, 1999):
            answer = f"{i}+1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1:,}"
            rows.append({"question": f"{part} {i}?", "answer": answer})
        write_lines(folder / f"{part}.jsonl", rows)
    return folder


def check_folder(folder: Path, n_train: int, n_test: int):
    for part, n in (("train", n_train), ("test", n_test)):
        rows = read_solver_rows(folder / f"{part}.json")
        pairs = read_verifier_rows(folder / f"verifier_{part}.json")
        assert len(rows) == len(read_prompt_rows(folder / f"{part}.json")) == len(pairs) == n
        for row, pair in zip(rows, pairs):
            assert set(row) == {"instruction", "output", "label", "outputs"}
            assert pair["instruction"] == row["instruction"] and pair["chosen"] == row["outputs"]
            assert grade(row["output"], row["label"])["official"]
            assert not grade(pair["rejected"][0], row["label"])["official"]


def test_gsm8k_from_a_folder(tiny_gsm8k, tmp_path):
    build.gsm8k(str(tiny_gsm8k), str(tmp_path / "out"))
    check_folder(tmp_path / "out", 2, 2)
    assert json.loads((tmp_path / "out" / "train.json").read_text())[1] == {
        "instruction": "train 1999?",
        "output": "1999+1 = <<1999+1=2000>>2000\n#### 2,000",
        "label": "2000",
    }


@real_data
def test_real_gsm8k(tmp_path):
    build.gsm8k(str(REAL), str(tmp_path))
    check_folder(tmp_path, 7473, 1319)
    first = json.loads((REAL / "test.jsonl").read_text().splitlines()[0])
    written = json.loads((tmp_path / "test.json").read_text())[0]
    assert written == {"instruction": first["question"], "output": first["answer"], "label": "18"}
    pairs = read_verifier_rows(tmp_path / "verifier_train.json")
    kept = [
        pair["chosen"][0].rpartition("####")[0] == pair["rejected"][0].rpartition("####")[0]
        for pair in pairs
    ]
    assert sum(kept) < 0.1 * len(pairs)  # the fallback, which keeps the steps, is rare


def test_gsm8k_from_the_hub(tiny_gsm8k, tmp_path, monkeypatch):
    def load_dataset(name, config, split):
        if name != "openai/gsm8k":
            raise FileNotFoundError(f"Dataset {name} does not exist")
        lines = (tiny_gsm8k / f"{split}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    build.gsm8k("openai/gsm8k", str(tmp_path / "out"))
    check_folder(tmp_path / "out", 2, 2)
    with pytest.raises(UserError, match="openai/gsm9k.*does not exist"):
        build.gsm8k("openai/gsm9k", str(tmp_path / "out"))
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if not installed
    with pytest.raises(UserError, match="pip install datasets"):
        build.gsm8k("openai/gsm8k", str(tmp_path / "out"))


def test_gsm8k_refuses_bad_settings_and_files(tiny_gsm8k, tmp_path):
    out = str(tmp_path / "out")
    for settings in ({"negatives": "solver"}, {"predictions": "p.jsonl"}):
        with pytest.raises(UserError, match="need a predictions file"):
            build.gsm8k(str(tiny_gsm8k), out, **settings)
    (tiny_gsm8k / "train.jsonl").write_text('{"question": "q", "answer": "no number"}')
    with pytest.raises(UserError, match="train row 0"):
        build.gsm8k(str(tiny_gsm8k), out)
    (tiny_gsm8k / "train.jsonl").unlink()
    with pytest.raises(UserError, match="train.jsonl: cannot be read"):
        build.gsm8k(str(tiny_gsm8k), out)
    assert not Path(out).exists()


def write_lines(path: Path, rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def samples(tmp_path):
    train = [
        {"instruction": f"q{i}", "output": f"gold\n#### {i}", "label": str(i)} for i in range(4)
    ]
    outputs = {
        0: ["#### 0", "a #### 0", "b #### 0", "#### 9", "#### 9", "it is 0", "#### 8"],
        1: ["#### 1", " "],  # no wrong one that could be read
        2: ["#### 7", "\0#### 2"],  # no right one that could
    }
    predictions = [{"index": i, "output": text} for i, texts in outputs.items() for text in texts]
    return (
        write_lines(tmp_path / "train.jsonl", train),
        write_lines(tmp_path / "predictions.jsonl", predictions),
    )


def test_pairs_put_right_samples_against_wrong_ones(samples, tmp_path, capsys):
    build.pairs(*samples, str(tmp_path / "pairs.json"))
    assert read_verifier_rows(tmp_path / "pairs.json") == [
        {"instruction": "q0", "chosen": ["#### 0", "a #### 0"], "rejected": ["#### 9", "it is 0"]},
        {"instruction": "q2", "chosen": ["gold\n#### 2"], "rejected": ["#### 7"]},
    ]
    assert capsys.readouterr().out.endswith(
        "2 rows; 9 samples of 3 prompts, 1 prompts without a wrong one (skipped), "
        "1 without a right one (gold chosen), 2 samples blank or with a NUL (left out)\n"
    )
    build.pairs(*samples, str(tmp_path / "pairs.json"), max_per_side=1, gold_when_none_right=False)
    assert read_verifier_rows(tmp_path / "pairs.json") == [
        {"instruction": "q0", "chosen": ["#### 0"], "rejected": ["#### 9"]}
    ]


def test_pairs_tell_of_unread_fields_and_of_samples_that_were_cut(tmp_path, capsys):
    train = [{"instruction": "q", "output": "#### 1", "hint": "none"}]
    texts = {"#### 1": {}, "#### 2": {"stop_reason": "length"}, "3": {"truncated": True}}
    build.pairs(
        write_lines(tmp_path / "train.jsonl", train),
        write_lines(
            tmp_path / "p.jsonl", [{"index": 0, "output": t} | x for t, x in texts.items()]
        ),
        str(tmp_path / "pairs.json"),
    )
    out = capsys.readouterr().out
    assert "1 field is not used: hint (in 1 of 1 rows)" in out
    assert "2 samples cut at their token limit (taken as they are)" in out


@pytest.mark.parametrize("field, fate", [("hint", "told"), ("context", "refused")])
def test_gsm8k_s_files_lose_no_field_in_silence(tmp_path, capsys, field, fate):
    row = {"question": "q", "answer": "a\n#### 1", field: "more of it"}
    for part in ("train", "test"):
        write_lines(tmp_path / f"{part}.jsonl", [row])
    if fate == "refused":
        with pytest.raises(UserError, match='field "context": belongs to the prompt'):
            build.gsm8k(str(tmp_path), str(tmp_path / "out"))
    else:
        build.gsm8k(str(tmp_path), str(tmp_path / "out"))
        assert "1 field is not used: hint" in capsys.readouterr().out


def test_pairs_go_by_the_task_s_rule_or_another(tmp_path):
    train = [{"instruction": "q", "output": r"\boxed{\frac12}", "label": r"\frac12"}]
    texts = [r"\boxed{1/2}", r"\boxed{0.50}", r"\boxed{3}" + "\n\nProblem: \\boxed{1/2}"]
    files = (
        write_lines(tmp_path / "train.jsonl", train),
        write_lines(tmp_path / "p.jsonl", [{"index": 0, "output": text} for text in texts]),
        str(tmp_path / "pairs.json"),
    )
    for rule, n_right in ((None, 1), ("numeric", 2), ("symbolic", 2)):
        build.pairs(*files, task="MATH", rule=rule, max_per_side=3)
        assert read_verifier_rows(files[2]) == [
            {"instruction": "q", "chosen": texts[:n_right], "rejected": texts[n_right:]}
        ]
    with pytest.raises(UserError, match="row 0 .*gold answer.*GSM8K needs one"):
        build.pairs(*files)
    with pytest.raises(UserError, match="--rule official: MATH has boxed, "):
        build.pairs(*files, task="MATH", rule="official")


def test_pairs_refuse_what_fits_nothing(samples, tmp_path):
    train, _ = samples
    out = str(tmp_path / "pairs.json")
    for rows, words in (
        ([{"index": 4, "output": "x"}], "index 4 in a train file of 4 rows"),
        ([{"index": -1, "output": "x"}], "whole number from 0"),
        ([{"index": True, "output": "x"}], "whole number from 0"),
        ([{"index": 1, "output": "#### 1"}], "no prompt gives a pair"),
    ):
        with pytest.raises(UserError, match=words):
            build.pairs(train, write_lines(tmp_path / "p.jsonl", rows), out)
    assert not Path(out).exists()


def test_gsm8k_takes_the_solver_route(tiny_gsm8k, tmp_path, capsys):
    rows = [{"index": 1, "output": text} for text in ("#### 3", "#### 2000")]
    predictions = write_lines(tmp_path / "p.jsonl", rows)
    build.gsm8k(str(tiny_gsm8k), str(tmp_path / "out"), negatives="solver", predictions=predictions)
    assert read_verifier_rows(tmp_path / "out" / "verifier_train.json") == [
        {"instruction": "train 1999?", "chosen": ["#### 2000"], "rejected": ["#### 3"]}
    ]
    assert len(read_verifier_rows(tmp_path / "out" / "verifier_test.json")) == 2
    assert "2 samples" in capsys.readouterr().out


def test_the_script_runs_from_the_command_line(tmp_path):
    def script(*flags):
        command = [sys.executable, "dataset/build.py", "arithmetic"]
        command += ["--save_dir", str(tmp_path / "out"), *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    done = script("--n_train", "50", "--n_test", "20", "--seed", "0")
    assert done.returncode == 0 and "train.json: 50 rows" in done.stdout, done.stderr
    check_folder(tmp_path / "out", 50, 20)
    refused = script("--n_trian", "50")
    assert refused.returncode == 2 and "n_train" in refused.stderr + refused.stdout
    refused = script("--n_train", "0")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
