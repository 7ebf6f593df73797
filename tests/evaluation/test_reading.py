"""What of a text is graded, whichever way it came; and what rows and files are taken."""

import json
import time

import pytest
import torch.distributed as dist

from src.errors import UserError
from src.evaluation import solver
from src.evaluation.solver import graded
from src.evaluation.tasks import TASKS, find_task, read_labels
from src.generation.engine import Completion

GSM8K, MATH = TASKS["GSM8K"], TASKS["MATH"]


@pytest.mark.parametrize("text", [
    "Restating the Question: 2 plus 2.\nIt is 4.\n#### 4",
    "Question: 2 plus 2?\nAnswer: 4\n#### 4",
    "Sure!\nQuestion: 2 plus 2?\nAnswer: #### 4",
    "Let me restate.\n\nProblem: 2 plus 2?\n\nThe answer is 4.",
    "Step 1. **Question:** 2 plus 2?\nStep 2.\nQuestion: is it even?\n\\boxed{4}",
    "<think>The answer is 5?\nQuestion: 2 plus 2, so 4.</think>\n#### 4",
    "#### 4\nThat answers the Question: it is 4.",
    "#### 4\nQuestions: none",
    "#### Reading\nProblem: 2 plus 2\n#### 4",
    "To find what the answer is, look at it again.\nQuestion: 2 plus 2\n4",
    "", "\n", "4",
    # spoken of, and not given: an empty box, a heading with a number, a phrase, a question
    "I must put my final answer in \\boxed{}.\n\n**Problem:** 9 eggs at $2.\n\n\\boxed{18}",
    "It goes in \\boxed{...}.\nProblem: 9 eggs\n\\boxed{18}",
    "It goes in \\boxed{ \\ldots }.\nProblem: 9 eggs\n\\boxed{18}",
    "It goes in \\boxed{\\text{your answer}}.\nProblem: 9 eggs\n\\boxed{18}",
    "#### 1. Restate\nQuestion: how many?\n9*2=18\n\\boxed{18}",
    "#### 1) Restate\nQuestion: how many?\n#### 18",
    "#### **2: Restate**\nQuestion: how many?\n#### 18",
    "The answer is found in 2 steps.\n**Problem:** 9 eggs.\nSo \\boxed{18}.",
    "The answer: it depends on 3 eggs.\nProblem: 9 eggs.\nSo 18.",
    "The answer is 18?\n\nQuestion: is it reasonable? No.\n#### 20",
])  # fmt: skip
def test_an_answer_is_read_to_its_end(text):
    assert GSM8K.read(text) == MATH.read(text) == text


@pytest.mark.parametrize("text, answer", [
    ("#### 4\n\nQuestion: 5 plus 5?\n#### 10", "#### 4"),
    ("It is 4.\n#### 4\nQuestion: 5 plus 5?", "It is 4.\n#### 4"),
    (r"\boxed{4}" + "\n\nProblem: 5 plus 5?\n" + r"\boxed{10}", r"\boxed{4}"),
    ("The answer is 4.\n\nQuestion: 5 plus 5?\nThe answer is 10.", "The answer is 4."),
    ("The answer is $4$.\n\nQ: 5 plus 5?", "The answer is $4$."),
    ("Answer: 4\n### Instruction:\nAdd", "Answer: 4"),
    ("#### 4\n**Question 2:** more", "#### 4"), ("#### 4\n### Problem 2: more", "#### 4"),
    ("Question: 2 plus 2?\n#### 4\nQuestion: 3 plus 3?", "Question: 2 plus 2?\n#### 4"),
    ("<think>so 4</think>#### 4\nQuestion: 5", "<think>so 4</think>#### 4"),
    ("The answer is x = 4\nQ: more", "The answer is x = 4"),
    ("The answer is **$4.50**.\nQ: more", "The answer is **$4.50**."),
    ("The answer is $\\frac12$\nQ: more", "The answer is $\\frac12$"),
    ("The answer is −4\nQ: more", "The answer is −4"), ("$\\boxed 4$\nQ: 5", "$\\boxed 4$"),
    ("In \\boxed{}.\nQ: 2 plus 2\n\\boxed{4}\nQ: 5", "In \\boxed{}.\nQ: 2 plus 2\n\\boxed{4}"),
    ("#### 4</s>#### 5", "#### 4"), ("4<|im_end|>\n<|im_start|>user\n5", "4"),
])  # fmt: skip
def test_what_comes_after_an_answer_is_not_read(text, answer):
    assert GSM8K.read(text) == MATH.read(text) == answer
    assert GSM8K.read(answer) == answer


def test_stop_strings_end_an_answer_anywhere():
    assert GSM8K.read("4 eggs\n\nUser: 5 END", ("User:", "END")) == "4 eggs\n\n"


@pytest.mark.parametrize("piece", [
    "answer:", "answer is ", "#### 4", "Question:\n", "\nQ:", "</think>", "</s", "\n", "###### ",
    "answer is 4\nQuestion", r"\boxed", r"\boxed{}", r"\boxed{.", r"\boxed{your ", "#### 1. ",
    "####1", "answer is 1.1", "answer: -$",
])  # fmt: skip
def test_reading_takes_no_time(piece, a_moment):
    def seconds():
        start = time.process_time()
        GSM8K.read(piece * (1_000_000 // len(piece)))
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) < a_moment


# --- one way for all texts ------------------------------------------------------------------------

TEXTS = {
    1: "Restating the Question: 2 plus 2.\n#### 4",
    2: "#### 4\n\nQuestion: 5 plus 5?\n#### 10",
    3: "it is 4",
    4: "#### 4 STOP 5",
}


class Texts:
    """A tokenizer of four tokens that stand for whole texts."""

    stop_ids = {0}

    def prompt_ids(self, text):
        return [1]

    def decode(self, ids):
        return "".join(TEXTS.get(i, "") for i in ids)


class Given:
    """An engine whose completions are there already."""

    parallel = None


def test_generated_and_given_texts_get_the_same_verdicts(monkeypatch):
    seen = []

    def generate_all(engine, prompts, sampling, stop, log, name, journal):
        seen.append(stop.strings)
        reasons = ["stop", "length", "length", "stop"]
        return [Completion([i], [0.0], why) for i, why in zip(TEXTS, reasons)]

    monkeypatch.setattr(solver, "generate_all", generate_all)
    questions, golds = ["q"] * 4, ["4"] * 4
    generated = solver.evaluate_solver(
        Given(), Texts(), GSM8K, questions, golds, None, None, stop_strings=("STOP",)
    )
    given = graded(GSM8K, questions, golds, list(TEXTS.values()), None, 1, ("STOP",))
    assert seen == [("</s>", "<|im_end|>", "STOP")]
    # What went on to the next question had answered; the third had not, as far as is known.
    assert [row.pop("truncated") for row in generated[1]] == [False, False, True, False]
    assert generated[0].pop("truncated") == 1 and given[0].pop("truncated") == 0
    assert generated == given
    assert [row["output"] for row in given[1]] == [
        TEXTS[1], "#### 4", "it is 4", "#### 4 "
    ]  # fmt: skip
    assert [row["official"] for row in given[1]] == [True, True, False, True]
    assert [row["numeric"] for row in given[1]] == [True] * 4


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_share_the_verdicts_and_all_get_them_in_order(size, monkeypatch):
    texts, golds = [f"#### {i}" for i in range(5)], ["3"] * 5
    alone = graded(GSM8K, ["q"] * 5, golds, texts)
    asked, shares = [], {}
    monkeypatch.setattr(solver, "agreed", lambda find: find())

    def gather(whole, own):
        shares[ranks.rank] = own
        whole[:] = [shares.get(rank, []) for rank in range(size)]

    monkeypatch.setattr(dist, "all_gather_object", gather)

    class ranks:
        rank, world_size = 0, size

    def verdicts(i):
        asked.append(i)
        return GSM8K.verdicts(texts[i], golds[i])

    for rank in reversed(range(1, size)):
        ranks.rank = rank
        shares[rank] = [verdicts(i) for i in range(rank, 5, size)]
    ranks.rank = 0
    assert sorted(asked) == [i for i in range(5) if i % size]
    assert graded(GSM8K, ["q"] * 5, golds, texts, parallel=ranks) == alone


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, row, gold", [
    ("GSM8K", {"question": "q", "answer": "so\n#### 4"}, "so\n#### 4"),
    ("GSM8K", {"question": "q", "answer": 4}, "4"),
    ("GSM8K", {"instruction": "q", "label": 4.0}, "4"),
    ("MATH", {"problem": "q", "level": "Level 1", "type": "A", "solution": r"so \boxed{4}"}, "4"),
    ("MATH", {"problem": "q", "solution": r"\boxed{5}", "answer": "4", "subject": "A", "level": 1,
              "unique_id": "test/1.json"}, "4"),
    ("MATH", {"problem": "q", "answer": 4}, "4"), ("MATH", {"question": "q", "answer": 4.0}, "4"),
    ("MATH", {"Problem": "q", "Answer": 204, "Solution": "s", "ID": "2024-I-1"}, "204"),
    ("MATH", {"question": "q", "final_answer": "4"}, "4"),
    ("MATH", {"instruction": "q", "problem": "q", "label": "4", "answer": "5"}, "4"),
    # fields that say nothing, as where data sets are joined
    ("GSM8K", {"instruction": None, "question": "q", "label": None, "answer": "5"}, "5"),
    ("MATH", {"question": "", "problem": "q", "answer": None, "solution": r"\boxed{5}"}, "5"),
    ("MATH", {"instruction": " ", "Problem": "q", "label": [], "Answer": 33}, "33"),
])  # fmt: skip
def test_the_tasks_own_files_are_taken(task, row, gold, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    data = read_labels(task, str(path))
    assert (data.instructions, data.golds) == (["q"], [gold])
    assert data.task is find_task(task) and read_labels(task, str(path), "numeric").task.metric == (
        "numeric"
    )


@pytest.mark.parametrize("task, row, says", [
    ("MATH", {"text": "q", "answer": 4}, r'jsonl:2: .*"instruction", .*"problem".*it has .*text'),
    ("MATH", {"problem": "q", "solution": "4"}, r"rows.jsonl:2: .*without a gold answer.*solution"),
    ("MATH", {"problem": "q", "answer": r"\frac{1"}, "rows.jsonl:2: .*gold answer.*MATH needs one"),
    ("GSM8K", {"problem": "q", "answer": r"\frac12"}, "rows.jsonl:2: .*neither a number nor"),
    ("MATH", {"problem": 4, "answer": 4}, 'field "problem": expected a non-blank string'),
    ("MATH", {"problem": "q", "answer": None}, "rows.jsonl:2: .*without a gold answer"),
    ("MATH", {"problem": "q", "answer": True}, 'field "answer": expected .*number, found true'),
    ("MATH", {"problem": None, "answer": 4}, 'rows.jsonl:2: .*"instruction", .*"problem"'),
])  # fmt: skip
def test_what_is_wrong_with_a_row_is_said(task, row, says, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "q", "answer": 4}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=says):
        read_labels(task, str(path))
