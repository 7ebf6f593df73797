"""Several samples of each question: pass@k and maj@n by hand and by counting subsets."""

import itertools

import pytest

from src.evaluation.solver import graded, of_samples
from src.evaluation.tasks import find_task


@pytest.mark.parametrize("right", range(6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right):
    n = 5
    marks = [i < right for i in range(n)]
    got = of_samples([(str(i), mark) for i, mark in enumerate(marks)], n)
    assert set(got) == {"pass@1", "pass@2", "pass@4", "pass@5", "maj@5"}
    for k in (1, 2, 4, 5):
        subsets = list(itertools.combinations(marks, k))
        assert got[f"pass@{k}"] == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    "answers, right",
    [
        ("7 7 8 9", True),
        ("8 7 8 7", False),
        ("7 8 7 8", True),
        ("8 8 8 7", False),
        ("None None None 7", True),
        ("None None None None", False),
    ],
)
def test_the_majority_decides_the_first_of_equals(answers, right):
    pairs = [(None if a == "None" else a, a == "7") for a in answers.split()]
    assert of_samples(pairs, 4)["maj@4"] == right


def test_questions_are_averaged_and_every_sample_is_a_row():
    texts = ["#### 7", "#### 8", "#### 8", "no", "#### 1", "#### 2"]
    summary, rows = graded(find_task("GSM8K"), ["a", "b"], ["7", "1"], texts, None, 3)
    assert summary["accuracy"] == pytest.approx(2 / 6) and summary["n"] == 6
    assert summary["pass@1"] == pytest.approx(1 / 3) and summary["pass@3"] == 1.0
    assert summary["maj@3"] == 0.5  # 8 beats 7; of 1 and 2 the first
    assert [row["index"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row["gold"] for row in rows] == ["7"] * 3 + ["1"] * 3


@pytest.mark.parametrize("task, rule, gold, texts, won", [
    # the vote is on what the rule takes, whichever rule counts
    ("GSM8K", "official", "18", ["#### 18", "#### 18", "#### 7", "18"], True),
    ("GSM8K", "official", "18", [r"\boxed{18}"] * 3 + ["#### 7"], False),
    ("GSM8K", "strict_match", "18", ["#### 18.", "#### 18", "#### 7", "7"], True),
    ("GSM8K", "flexible_extract", "18", ["The answer is 18"] * 4, True),
    ("GSM8K", "flexible_extract", "18", ["It is $18", "so 7", "so 7", "18."], True),
    ("GSM8K", "numeric", "18", [r"so \boxed{18}"] * 4, True),
    ("GSM8K", "numeric", "18", [r"\boxed{18}"] * 3 + ["#### 7"], True),
    ("GSM8K", "numeric", "18", ["#### 7", "it is 18", r"\boxed{36/2}", "#### 7.5"], True),
    ("GSM8K", "numeric", "18", ["#### 7", "18", "#### 18", "so 7.0"], False),  # a tie
    ("GSM8K", "numeric", "18", ["#### 7", "2 x 18", "18!", "18"], False),
    ("GSM8K", "numeric", "18", ["#### 18 ft 6 in"] * 2 + ["#### 18", "#### 7"], True),
    ("GSM8K", "numeric", "1800", ["#### 1.8e3", r"\boxed{1.8\times10^3}", "7", "7"], True),
    ("MATH", "boxed", "033", [r"\boxed{7}", r"\boxed{33}", r"\boxed{033}", r"\boxed{8}"], True),
    ("MATH", "loose", "033", [r"\boxed{7}", "answer is 33", r"\boxed{033}", "7"], True),
    ("MATH", "boxed", "5", [r"\boxed{5}", r"\boxed{5.0}", r"\boxed{x=5}", r"\boxed{7}"], True),
    ("MATH", "boxed", "5", ["The answer is 5"] * 4, False),
    ("MATH", "numeric", r"\frac12", [r"\boxed{7}", r"\boxed{2/4}", r"\boxed{0.50}", "7"], True),
    ("MATH", "loose", "5", ["The answer is 5"] * 4, True),
    ("MATH", "loose", "1,2", [r"\boxed{7}", r"\boxed{2,1}", "answer is 1 and 2", "7"], True),
    ("MATH", "symbolic", "5", [r"\boxed{7}", r"\boxed{5.0}", r"\boxed{5}", "no"], True),
    ("MATH", "symbolic", "5", ["so it is $x=5$"] * 4, True),
    ("MATH", "symbolic", "0", [r"\boxed{0.0}", r"\boxed{7}", r"\boxed{0}", r"\boxed{7.1}"], True),
])  # fmt: skip
def test_the_vote_is_on_the_answers_that_the_rule_takes(task, rule, gold, texts, won):
    summary, _ = graded(find_task(task, rule), ["q"], [gold], texts, None, 4)
    assert summary["maj@4"] == won


@pytest.mark.parametrize("task", ["GSM8K", "MATH"])
def test_where_all_samples_are_right_and_alike_the_vote_is(task):
    task = find_task(task)
    for rule in task.rules:
        for text in ("#### 5", r"\boxed{5}", "The answer is 5", "so $5$", "5"):
            summary, _ = graded(find_task(task.name, rule), ["q"], ["5"], [text] * 4, None, 4)
            assert summary["maj@4"] == summary["accuracy"], (rule, text)
