r"""Grading GSM8K responses by the three public rules, and a numeric comparison beside them.

official          OpenAI grade-school-math, `dataset.py`: first `#### N`, commas removed, equal
                  as strings
strict_match      lm-evaluation-harness `gsm8k` version 3: first `#### N`, both sides normalised
flexible_extract  the same task: last number anywhere, both sides normalised
numeric           ours, beside the rules and never instead of them: the number after `####`, else
                  that in the last `\boxed`, else the last number, equal in value however people
                  write it: `$18.00`, `\(18\)`, `1{,}800`, `\frac{36}{2}`, `18\%`, `−5`

All take the same text. Responses are written by models, so nothing here executes, nests or converts
more than a bounded piece of them.
"""

import re
from fractions import Fraction
from functools import partial

from src.errors import UserError
from src.evaluation.math import boxed, boxed_answer, value_of
from src.evaluation.scoring import GOLD_FIELDS, first_gold
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

# How people write a number, for `numeric` alone: in the last so many characters of a text
_WRITTEN_IN = 8192
_TIDY = str.maketrans("−–－\u00a0\u2009\u202f’", "---   ,")  # minus, spaces, Swiss thousands
# 1{,}800, 1\,800, 1,\!800 and 1~800 are 1,800
_SEPARATOR = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!; ]|~)(?=[0-9]{3}(?![0-9]))")
_FRACTION = re.compile(r"\\[dtc]?frac\s?\{(-?[0-9.,]{1,30})\}\s?\{([0-9.,]{1,30})\}")
# The 2 of cm^2 and of x_2 is no answer.
_SCRIPT = re.compile(r"(?<=[0-9A-Za-z}\])])[\^_](?:\{[^{}]{0,20}\}|-?[0-9]+)")
_DIGITS = (
    r"(?:(?<![0-9.,])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])"
    r"|[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
)
_WRITTEN = re.compile(
    r"(?P<minus>(?<![\w)\]}%.])-(?=[$]?[0-9.]))?[$]?(?P<minus_after>(?<=[$])-(?=[0-9.]))?"
    rf"(?:(?P<whole>[0-9]{{1,6}}) (?=[0-9]+/[0-9]))?(?P<number>{_DIGITS})"
    r"(?: ?/ ?(?P<below>[0-9]{1,18})(?![0-9,./]))?"
)
# `####` and what may stand before its number: signs of money, of formulas and of bold type.
_MARKER = re.compile(r"####[ :]{0,4}(?:[*$=~ ]|\\[(\[$]|\\(?:boxed|fbox|text|mathbf)\{){0,8}")


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
    value = numeric_answer(response)
    right["numeric"] = value is not None and value == _number(_reference("official", gold))
    return right


def numeric_answer(response: str) -> Fraction | None:
    """The number that `numeric` takes from a response: the marked, the boxed, or the last one."""
    marked = _number(extract("official", response))
    if marked is not None:
        return marked
    marker = _MARKER.search(response[:_SCANNED])
    if marker is not None:
        line = _tidy(response[marker.end() : marker.end() + _WRITTEN_IN].partition("\n")[0])
        number = _WRITTEN.match(line)
        if number is not None:
            return _written(number)
    end = response[-_SCANNED:]
    value = value_of(boxed_answer(end))
    if value is not None:
        return value
    for text in (boxed(end), end[-_WRITTEN_IN:]):
        numbers = list(_WRITTEN.finditer(_tidy(text or "")))
        if numbers:
            return _written(numbers[-1])
    return None


def gold_of(row: dict) -> str:
    """The gold of a row: its `label`, else its `answer` (official files), else its first output."""
    gold = first_gold(row, (*GOLD_FIELDS, "output"))
    if gold is None:
        raise UserError(
            'a row without a gold answer: it needs "label", "answer" or "output", '
            f"and has {sorted(row)}"
        )
    return gold


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


def _number(text: str | None) -> Fraction | None:
    return Fraction(text) if text and _NUMBER.fullmatch(text) else None


def _tidy(text: str) -> str:
    """A text with each number written in one of the ways that `_WRITTEN` knows."""
    text = _SEPARATOR.sub(",", text.translate(_TIDY).replace(r"\$", "$"))
    return _SCRIPT.sub(" ", _FRACTION.sub(r"\1/\2", text))


def _written(number: re.Match[str]) -> Fraction | None:
    """The value of a match of `_WRITTEN`; None for one that is too long, or divided by 0."""
    digits = re.sub("[ ,]", "", number["number"])
    below = int(number["below"] or 1)
    if len(digits) > 30 or below == 0:
        return None
    value = int(number["whole"] or 0) + Fraction(digits) / below
    return -value if number["minus"] or number["minus_after"] else value


TASK = Task(
    name="GSM8K",
    grade=grade,
    answer_of=partial(extract, "official"),
    gold_of=gold_of,
    metric="official",
)
