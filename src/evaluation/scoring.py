"""What every task's `score` and `gold_of` share: the counting, and reading a gold from a field."""

from collections.abc import Callable
from typing import Any

from src.errors import UserError


def tally(
    grade: Callable[[str, str], dict[str, bool]],
    answer_of: Callable[[str], str | None],
    responses: list[str],
    golds: list[str],
    truncated: list[bool] | None = None,
) -> tuple[dict, list[dict]]:
    """(summary, per_row): the accuracy in [0, 1] by each of `grade`'s rules, and counts.

    The counts are `n`, `unparsed` and `truncated`. A row holds what `grade` returns, and as
    `answer` what `answer_of` finds: without one it counts as unparsed.
    """
    if len(responses) != len(golds) or truncated is not None and len(truncated) != len(responses):
        raise ValueError(
            f"{len(responses)} responses, {len(golds)} golds, "
            f"{'no' if truncated is None else len(truncated)} truncation flags"
        )
    if not responses:
        raise UserError("there is nothing to score: 0 responses")
    graded = [grade(response, gold) for response, gold in zip(responses, golds)]
    rows = [{**right, "answer": answer_of(response)} for right, response in zip(graded, responses)]
    n = len(rows)
    summary = {"n": n} | {rule: sum(right[rule] for right in graded) / n for rule in graded[0]}
    summary["unparsed"] = sum(row["answer"] is None for row in rows)
    summary["truncated"] = sum(truncated or [])
    return summary, rows


def field_text(value: Any) -> str | None:
    """A field's text or number, or the first of a list of them, as text; None if it is neither."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a label 18.0 means 18, which no rule would see in its digits
    return (
        str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
    )
