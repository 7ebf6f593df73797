"""Wrong versions of right GSM8K answers: one calculation slips, and the rest goes on from the slip.

These are the cheap negatives of a verifier; samples of a solver (`build.py pairs`) are better ones.
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

    The result of a random `<<expr=N>>N` becomes a plausible other number, and later text and steps
    that use N are redone with it. Where no slip reaches the final answer that way, only `#### N`
    changes. `answer` must hold one.
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
    assert final is not None, "`extract` took the gold from there"
    slips = list(_slips(_value(final[0].rstrip("."))))
    # what is no number, such as 1.2.3, has no slips
    wrong = rng.choice(slips or [Fraction(1), Fraction(2)])
    return answer[: final.start()] + _written(wrong, like=final[0]) + answer[final.end() :]


def evaluate(expression: str) -> Fraction | None:
    """The exact value of decimals joined by + - * / and parentheses.

    None for anything else, and for anything long.
    """
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
    """`answer` with the result of step `slipped` wrong, and all later ones redone from it.

    None where a later step cannot be redone plausibly.
    """
    changed: dict[Fraction | None, Fraction] = {}  # value in `answer` -> value in its wrong version
    pieces: list[str] = []
    end = 0  # of what the pieces cover
    for index, step in enumerate(_STEP.finditer(answer)):
        expression, result, copy = step[1], step[2], step[3] or ""
        old, redone = _value(result), _renumber(expression, changed)
        new: Fraction | None
        if index == slipped:
            new = wrong
        elif redone == expression:
            new = old
        else:
            new = evaluate(redone)
            if evaluate(expression) != old or not _plausible(new, old):
                return None
        pieces.append(_renumber(answer[end : step.start()], changed))
        if new == old:
            changed.pop(old, None)  # from here on this number means this right result
        else:
            assert new is not None, "neither a slip nor what is plausible is None"
            changed[old] = new
            result = _written(new, like=result)
        pieces.append(f"<<{redone}={result}>>{_renumber(copy, changed)}")
        end = step.end()
    return "".join(pieces) + _renumber(answer[end:], changed)


def _renumber(text: str, changed: dict[Fraction | None, Fraction]) -> str:
    """`text` with every number that has changed written as what it is now."""

    def replacement(number: re.Match) -> str:
        value = _value(number[0])
        return _written(changed[value], like=number[0]) if value in changed else number[0]

    return _NUMBERS.sub(replacement, text) if changed else text


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
            yield sign * (other + abs(value) - whole)  # the digits after the point stay


def _value(number: str) -> Fraction | None:
    """What a number in an answer is worth; None for what is no number, or a very long one."""
    number = number.strip().replace(",", "")
    is_number = re.fullmatch(r"-?(?:\d{1,15}(?:\.\d{1,9})?|\.\d{1,9})", number)
    return Fraction(number) if is_number else None


def _plausible(new: Fraction | None, old: Fraction | None) -> bool:
    """Whether `new` is positive, and whole where the right result is.

    A fraction of a person would betray the slip.
    """
    if new is None or new <= 0:
        return False
    if new.denominator == 1:
        return True
    return old is not None and old.denominator > 1 and 100 % new.denominator == 0


def _written(value: Fraction, like: str) -> str:
    """`value` written the way `like` is, so that the slip is not betrayed by its form.

    That is with its thousands commas and at least its decimals.
    """
    needed = next(places for places in range(10) if 10**places % value.denominator == 0)
    places = max(needed, len(like.partition(".")[2]))
    return f"{float(value):{',' if ',' in like else ''}.{places}f}"
