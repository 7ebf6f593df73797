"""Grading GSM8K responses by the three public rules, and a numeric comparison beside them.

official          OpenAI grade-school-math, `dataset.py`: first `#### N`, commas removed, equal
                  as strings
strict_match      lm-evaluation-harness `gsm8k` version 3: first `#### N`, both sides normalised
flexible_extract  the same task: last number anywhere, both sides normalised
numeric           ours, beside the rules and never instead of them: `#### N`, else the last number,
                  equal in value

All take the same text. Responses are written by models, so nothing here executes, nests or converts
more than a bounded piece of them.
"""

import re
from decimal import Decimal
from functools import partial

from src.errors import UserError
from src.evaluation.scoring import field_text, tally
from src.evaluation.task import Task

RULES = ("official", "strict_match", "flexible_extract")

# Of a longer text only so many characters are scanned: the first for `####`, the last for the last
# number.
_SCANNED = 65_536
_MARKED = re.compile(r"#### (\-?[0-9\.\,]+)")
_LOOSE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_BARE = re.compile(r"-?[0-9.,]*[0-9][0-9.,]*")
# No exponent: 1e3000000 must stay text.
_NUMBER = re.compile(r"-?(?:[0-9]{1,18}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})")


def extract(rule: str, text: str) -> str | None:
    """The answer that `rule` takes from `text`, in the form it is compared in; None for none."""
    if rule == "flexible_extract":
        numbers = _LOOSE.findall(text[-_SCANNED:])
        return _harness_form(numbers[-1][0] or numbers[-1][1]) if numbers else None
    marked = _MARKED.search(text[:_SCANNED])
    if marked is None:
        return None
    return {"official": _official_form, "strict_match": _harness_form}[rule](marked[1])


def grade(response: str, gold: str) -> dict[str, bool]:
    """Whether `response` is right by each of `RULES`, and by value as `numeric`.

    `gold` is an answer text with `#### N`, or the bare N. Raises `UserError` if it is neither.
    """
    gold = _gold_text(gold)
    right = {rule: extract(rule, response) == _reference(rule, gold) for rule in RULES}
    answer = extract("official", response) or extract("flexible_extract", response)
    value = _number(answer)
    right["numeric"] = value is not None and value == _number(_reference("official", gold))
    return right


def score(
    responses: list[str], golds: list[str], truncated: list[bool] | None = None
) -> tuple[dict, list[dict]]:
    """(summary, per_row): `n`, the accuracy in [0, 1] by each rule and `numeric`, and counts.

    `unparsed` counts responses without an official `#### N`, `truncated` those cut by the token
    limit: both stay in the denominator. A row holds what `grade` returns and `answer`, the official
    one or None.
    """
    return tally(grade, partial(extract, "official"), responses, golds, truncated)


def gold_of(row: dict) -> str:
    """The gold of a row: its `label`, else its `answer` (official files), else its first output."""
    for field in ("label", "answer", "output"):
        gold = field_text(row.get(field))
        if gold is not None:
            return gold
    raise UserError(
        'a row without a gold answer: it needs "label", "answer" or "output", '
        f"and has {sorted(row)}"
    )


def _gold_text(gold: str) -> str:
    """A gold with its `#### N`, which a bare number gets here. Raises UserError for neither."""
    text = gold.strip() if "####" in gold else "#### " + gold.strip().replace("$", "")
    if _MARKED.search(text) is None or ("####" not in gold and not _BARE.fullmatch(text[5:])):
        raise UserError(
            f"gold answer {gold[-60:]!r} is neither a number nor a text with '#### N'; "
            "GSM8K needs one"
        )
    return text


def _reference(rule: str, gold: str) -> str:
    """What `extract` by this rule is compared with; `gold` is from `_gold_text`."""
    # The harness normalises the whole gold text; OpenAI extracts from it as from a response.
    if rule != "official":
        return _harness_form(gold)
    marked = _MARKED.search(gold)
    assert marked is not None, "`_gold_text` lets no gold without '#### N' through"
    return _official_form(marked[1])


def _official_form(answer: str) -> str:
    return answer.strip().replace(",", "")


def _harness_form(answer: str) -> str:
    """The harness' `regexes_to_ignore` in order: `,`, `$`, all to the last `#### `, a last `.`."""
    answer = answer.strip().replace(",", "").replace("$", "")
    # rpartition is what re.sub("(?s).*#### ", "") does, without its quadratic time.
    return answer.rpartition("#### ")[2].removesuffix(".").lower()


def _number(text: str | None) -> Decimal | None:
    return Decimal(text) if text and _NUMBER.fullmatch(text) else None


TASK = Task(
    name="GSM8K",
    grade=grade,
    score=score,
    gold_of=gold_of,
    stop=("Question:", "</s>", "<|im_end|>"),
    metric="official",
)
