"""The tasks that a model can be evaluated on or trained for: another task is another entry."""

import difflib
from dataclasses import dataclass

from src.data.rows import LABEL, TEXT, TEXTS, Rows, read_rows
from src.errors import UserError
from src.evaluation import gsm8k, math
from src.evaluation.task import Task

TASKS = {task.name: task for task in (gsm8k.TASK, math.TASK)}


def find_task(name: str) -> Task:
    """The task called `name`; `UserError` with the nearest name otherwise."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(str(name).upper(), TASKS, n=1, cutoff=0.0)
    raise UserError(f"unknown task {name!r}; did you mean {near[0]!r}? Known: {', '.join(TASKS)}")


@dataclass(frozen=True)
class LabelledRows:
    """A task and its rows; `golds` are the right answers."""

    task: Task
    rows: Rows
    instructions: list[str]
    golds: list[str]


def read_labels(task_name: str, label_file: str) -> LabelledRows:
    """A task's label file.

    Rows are `{"instruction", "label"}` as `dataset/build.py` writes them, or the official files'.
    """
    task = find_task(task_name)
    fields = {
        "instruction": TEXT,
        "question": TEXT,
        "label": LABEL,
        "output": TEXTS,
        "answer": TEXT,
    }
    rows = read_rows(label_file, {}, fields)
    instructions = [row.get("instruction") or row.get("question") for row in rows]
    if None in instructions:
        number = instructions.index(None)
        raise UserError(f'{label_file}: row {number} (from 0) has no "instruction" (or "question")')
    golds = [task.gold_of(row) for row in rows]
    for gold in golds:  # one that the rules cannot read is refused here, not after an epoch
        task.grade("", gold)
    return LabelledRows(task, rows, [text for text in instructions if text is not None], golds)
