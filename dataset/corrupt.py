"""Wrong versions of right GSM8K answers: one calculation slips, and what follows goes on from the slip.

These are the cheap negatives of a verifier; samples of a solver (`build.py pairs`) are the better ones.
"""

import random
import re
from collections.abc import Iterator
from fractions import Fraction

from src.evaluation.gsm8k import extract

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBERS = re.compile(_NUMBER)
_STEP = re.compile(rf"<<([^<>=]*)=([^<>=]*)>>({_NUMBER})?")
_FINAL = re.compile(r"(?<=#### )-?[0-9.,]+")


def corrupt(answer: str, rng: random.Random) -> str:
    """`answer` with one slip; its official final answer always differs from that of `answer`.

    The result of a random `<<expr=N>>N` becomes a plausible other number, and later text and steps that use N are
    redone with it. Where no slip reaches the final answer that way, only `#### N` changes. `answer` must hold one.
    """
    gold = extract("official", answer)
    if gold is None:
        raise ValueError(f"no '#### N' in {answer[-60:]!r}")
    steps = list(_STEP.finditer(answer))
    for index in rng.sample(range(len(steps)), len(steps)):
        slips = list(_slips(_value(steps[index][2])))
        for wrong in rng.sample(slips, min(3, len(slips))):
            text = _redo(answer, index, wrong)
            if text is not None and extract("official", text) not in (None, gold):
                return text
    final = _FINAL.search(answer)
    wrong = rng.choice(
        list(_slips(_value(final[0].rstrip(".")))) or [Fraction(1), Fraction(2)]
    )  # 1.2.3
    return answer[: final.start()] + _written(wrong, like=final[0]) + answer[final.end() :]


def evaluate(expression: str) -> Fraction | None:
    """The exact value of decimals joined by + - * / and parentheses; None for anything else or anything long."""
    if len(expression) > 100:
        return None
    tokens = re.findall(r"\d+\.?\d*|\.\d+|\S", expression.replace(",", "")) + ["end"]

    def atom() -> Fraction:
        token = tokens.pop(0)
        if token == "-":
            return -atom()
        if token == "(":
            value = sum_()
            if tokens.pop(0) != ")":
                raise ValueError(expression)
            return value
        return Fraction(token)

    def product() -> Fraction:
        value = atom()
        while tokens[0] in "*/":
            value = value * atom() if tokens.pop(0) == "*" else value / atom()
        return value

    def sum_() -> Fraction:
        value = product()
        while tokens[0] in "+-":
            value = value + product() if tokens.pop(0) == "+" else value - product()
        return value

    try:
        value = sum_()
    except (ValueError, ZeroDivisionError):
        return None
    return value if tokens == ["end"] else None


def _redo(answer: str, slipped: int, wrong: Fraction) -> str | None:
    """`answer` with the result of step `slipped` wrong; None where a later step cannot be redone plausibly."""
    changed: dict[Fraction, Fraction] = {}  # value in `answer` -> value here
    pieces, at = [], 0
    for index, step in enumerate(_STEP.finditer(answer)):
        expression, result, copy = step[1], step[2], step[3] or ""
        old, here = _value(result), _renumber(expression, changed)
        if index == slipped:
            new = wrong
        elif here == expression:
            new = old
        else:
            new = evaluate(here)
            if evaluate(expression) != old or not _plausible(new, old):
                return None
        pieces.append(_renumber(answer[at : step.start()], changed))
        if new == old:
            changed.pop(old, None)  # from here on this number means this right result
        else:
            changed[old] = new
            result = _written(new, like=result)
        pieces.append(f"<<{here}={result}>>{_renumber(copy, changed)}")
        at = step.end()
    return "".join(pieces) + _renumber(answer[at:], changed)


def _renumber(text: str, changed: dict[Fraction, Fraction]) -> str:
    def new(number: re.Match) -> str:
        value = _value(number[0])
        return _written(changed[value], like=number[0]) if value in changed else number[0]

    return _NUMBERS.sub(new, text) if changed else text


def _slips(value: Fraction | None) -> Iterator[Fraction]:
    """Plausible small slips: off by one, off by ten, two neighbouring digits swapped."""
    if value is None:
        return
    whole, sign = abs(int(value)), -1 if value < 0 else 1
    digits = str(whole)
    swaps = [
        int(digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :])
        for i in range(len(digits) - 1)
    ]
    near = [whole + 1, whole - 1] + ([whole + 10, whole - 10] if whole > 9 else []) + swaps
    for other in dict.fromkeys(near):
        if other > 0 and other != whole:
            yield sign * (other + abs(value) - whole)


def _value(number: str) -> Fraction | None:
    number = number.strip().replace(",", "")
    return (
        Fraction(number)
        if re.fullmatch(r"-?(?:\d{1,15}(?:\.\d{1,9})?|\.\d{1,9})", number)
        else None
    )


def _plausible(new: Fraction | None, old: Fraction) -> bool:
    """Positive, and whole where the right result is whole: a fraction of a person would betray the slip."""
    return (
        new is not None
        and new > 0
        and (new.denominator == 1 or old.denominator > 1 and 100 % new.denominator == 0)
    )


def _written(value: Fraction, like: str) -> str:
    """`value` written the way `like` is: with its thousands commas and at least its decimals, so that the slip is
    not betrayed by its form."""
    needed = next(places for places in range(10) if 10**places % value.denominator == 0)
    places = max(needed, len(like.partition(".")[2]))
    return f"{float(value):{',' if ',' in like else ''}.{places}f}"
