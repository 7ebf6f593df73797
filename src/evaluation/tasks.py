"""The tasks that a model can be evaluated on or trained for, as data: another task is another entry."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from src.errors import UserError
from src.evaluation import gsm8k, math


@dataclass(frozen=True)
class Task:
    """What evaluation needs to know of a task; the functions' contracts are those of `src/evaluation/gsm8k.py`."""

    name: str
    grade: Callable[[str, str], dict[str, bool]]  # (response, gold) -> right or wrong by rule
    score: Callable[
        ..., tuple[dict, list[dict]]
    ]  # (responses, golds, truncated) -> (summary, per_row)
    gold_of: Callable[[dict], str]  # a data row -> its gold
    stop: tuple[str, ...]  # generation ends at the first of these strings
    metric: str  # the key of grade and score that is the headline


TASKS = {
    "GSM8K": Task(
        name="GSM8K",
        grade=gsm8k.grade,
        score=gsm8k.score,
        gold_of=gsm8k.gold_of,
        stop=("Question:", "</s>", "<|im_end|>"),
        metric="official",
    ),
    "MATH": Task(
        name="MATH",
        grade=math.grade,
        score=math.score,
        gold_of=math.gold_of,
        stop=("Problem:", "Question:", "</s>", "<|im_end|>"),
        metric="boxed",
    ),
}


def find_task(name: str) -> Task:
    """The task called `name`; `UserError` with the nearest name otherwise."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(str(name).upper(), TASKS, n=1, cutoff=0.0)
    raise UserError(f"unknown task {name!r}; did you mean {near[0]!r}? Known: {', '.join(TASKS)}")
