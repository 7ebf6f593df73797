"""What every task shares: the counting, and reading a gold from a row's fields."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from src.errors import UserError

GOLD_FIELDS = ("label", "answer", "final_answer", "Answer")  # of data sets, in this order


def summarize(
    verdicts: Sequence[dict[str, bool | None]],
    answers: list[str | None],
    truncated: list[bool] | None = None,
) -> tuple[dict, list[dict]]:
    """(summary, per_row): the accuracy in [0, 1] by each rule, and counts.

    verdicts: by each rule, of each response; None where a limit cut the comparison off, which
    counts as not right. answers: what was found in the response, or None. truncated: whether the
    token limit cut it. The counts are `n`, `unparsed`, `truncated`, and with a symbolic rule
    `cut_off`; nothing leaves the denominator. A row holds what each rule says, and `answer`.
    """
    if len(answers) != len(verdicts) or truncated is not None and len(truncated) != len(verdicts):
        raise ValueError(
            f"{len(verdicts)} verdicts, {len(answers)} answers, "
            f"{'no' if truncated is None else len(truncated)} truncation flags"
        )
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
    """A field's text or number, or the first of a list of them, as text; None if it has neither.

    A number in digits alone: 18.0 is 18, and 1e-7 is 0.0000001. A blank text is none.
    """
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, float):
        # the decimal that was written, not the fraction of 2 that is held; -0.0 is 0
        return format(Decimal(repr(value + 0.0)).normalize(), "f")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return str(value) if str(value).strip() else None
