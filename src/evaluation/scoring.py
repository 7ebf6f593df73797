"""What every task shares: the counting, and reading a gold from a row's fields."""

from collections.abc import Callable, Sequence
from typing import Any

from src.errors import UserError

GOLD_FIELDS = ("label", "answer", "final_answer", "Answer")  # of data sets, in this order


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
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses, {len(golds)} golds")
    verdicts = [grade(response, gold) for response, gold in zip(responses, golds)]
    return summarize(verdicts, list(map(answer_of, responses)), truncated)


def summarize(
    verdicts: Sequence[dict[str, bool] | dict[str, bool | None]],
    answers: list[str | None],
    truncated: list[bool] | None = None,
) -> tuple[dict, list[dict]]:
    """`tally` of verdicts that are there already, in the answers' order.

    With a symbolic rule its comparisons that were cut off are counted too, as `cut_off`: they are
    not right.
    """
    if truncated is not None and len(truncated) != len(verdicts):
        raise ValueError(f"{len(verdicts)} responses, {len(truncated)} truncation flags")
    if not verdicts:
        raise UserError("there is nothing to score: 0 responses")
    n, rules = len(verdicts), list(verdicts[0])
    rows: list[dict[str, Any]] = [
        {**{rule: bool(right[rule]) for rule in rules}, "answer": answer}
        for right, answer in zip(verdicts, answers)
    ]
    summary: dict[str, Any] = {"n": n}
    summary |= {rule: sum(row[rule] for row in rows) / n for rule in rules}
    summary["unparsed"] = sum(answer is None for answer in answers)
    summary["truncated"] = sum(truncated or [])
    if "symbolic" in rules:
        summary["cut_off"] = sum(right["symbolic"] is None for right in verdicts)
    return summary, rows


def first_gold(row: dict, fields: tuple[str, ...] = GOLD_FIELDS) -> str | None:
    """The text or number of the first of the fields that has one, as text; None if none has."""
    return next((gold for field in fields if (gold := field_text(row.get(field)))), None)


def field_text(value: Any) -> str | None:
    """A field's text or number, or the first of a list of them, as text; None if it is neither."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a label 18.0 means 18, which no rule would see in its digits
    return (
        str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
    )
