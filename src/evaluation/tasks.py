"""The tasks that a model can be evaluated on or trained for: another task is another entry."""

import difflib
from dataclasses import dataclass, replace

from src.data.messages import Question
from src.data.rows import INSTRUCTION, LABEL, OTHER_NAMES, PROMPT, TEXTS, Rows, read_rows
from src.errors import UserError
from src.evaluation import gsm8k, math, symbolic
from src.evaluation.scoring import GOLD_FIELDS
from src.evaluation.task import Task

TASKS = {task.name: task for task in (gsm8k.TASK, math.TASK)}
QUESTION_FIELDS = (INSTRUCTION, *OTHER_NAMES)


def find_task(name: str, rule: str | None = None) -> Task:
    """The task called `name`, by its own metric or by `rule`.

    Raises `UserError` where there is no such task, with the nearest name, or no such rule.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(str(name).upper(), TASKS, n=1, cutoff=0.0)
        raise UserError(
            f"unknown task {name!r}; did you mean {near[0]!r}? Known: {', '.join(TASKS)}"
        )
    task = TASKS[name]
    if task.symbolic is not None:
        symbolic.check_installed()
    if rule is None:
        return task
    if rule not in task.rules:
        raise UserError(f"--rule {rule}: {name} has {', '.join(task.rules)}")
    return replace(task, metric=rule)


@dataclass(frozen=True)
class LabelledRows:
    """A task and its rows; `golds` are the right answers."""

    task: Task
    rows: Rows
    instructions: list[Question]
    golds: list[str]


def read_labels(task_name: str, label_file: str, rule: str | None = None) -> LabelledRows:
    """A task's label file; rule: what counts as its accuracy, the task's own metric if not given.

    Rows are `{"instruction", "label"}` as `dataset/build.py` writes them, or the official files':
    GSM8K's `question` and `answer`, MATH's `problem` and `solution`, MATH-500's with `answer`.
    """
    task = find_task(task_name, rule)
    fields = {
        **dict.fromkeys(QUESTION_FIELDS, PROMPT),
        **dict.fromkeys(GOLD_FIELDS, LABEL),
        **dict.fromkeys(("output", "solution", "Solution"), TEXTS),
    }
    rows = read_rows(label_file, {}, fields)
    instructions, golds = [], []
    for number, row in enumerate(rows):
        texts = filter(PROMPT.accepts, map(row.get, QUESTION_FIELDS))
        question = next(texts, None)
        try:
            if question is None:
                names = ", ".join(f'"{field}"' for field in QUESTION_FIELDS)
                raise UserError(f"has none of {names}; it has {sorted(row)}")
            gold = task.gold_of(row)
            task.check_gold(task.metric, gold)
        except UserError as error:
            raise UserError(f"{rows.places[number]}: {error}") from None
        instructions.append(question)
        golds.append(gold)
    return LabelledRows(task, rows, instructions, golds)
