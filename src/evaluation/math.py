r"""Grading answers to MATH (arXiv 2103.03874): the boxed answer, and two comparisons beside it.

boxed    the last `\boxed` or `\fbox`, equal as a string in normal form: what the paper counts, in
         its spirit and not its code
numeric  the same answer where it and the gold are both a number or a fraction: equal in value;
         false of all others, so that its share cannot pass that of the golds that are numbers
         (81 % of the paper's test set)
loose    the boxed answer, or without one what follows the last "answer is", "Final Answer:" or
         `#### ` in its line

Responses are written by models, so nothing here executes, nests or converts more than a bounded
piece of them.
"""

import re
from fractions import Fraction

from src.errors import UserError
from src.evaluation.scoring import field_text, tally
from src.evaluation.task import Task

_LONGEST = 1024  # characters of an answer; a longer one is no answer
_SCANNED = 65_536  # characters at the end of a text in which the loose rule looks
# Greedy from the start, so that it finds the last one in linear time: for `match` only, never for
# `search`.
_LAST_BOX = re.compile(r"(?s).*\\(?:boxed|fbox)(?![A-Za-z])")
_BRACE = re.compile(r"(?s)\\.|[{}]")
_END_OF_BARE_BOX = re.compile(r"\$|\n|\\[)\]]")
_SAYS = re.compile(r"(?i:answer is|final answer:)|#### ")

_TOKEN = re.compile(r"(?s)\\[A-Za-z]+|\\.|\S")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![A-Za-z]))")
# What does not show or matter: space, sizes, a formula's delimiters, signs of money and degrees.
_INVISIBLE = frozenset([
    r"\!", r"\,", r"\;", r"\:", r"\>", r"~", "\\ ", "\\\n",
    r"$", r"\$", r"%", r"\%", r"\(", r"\)", r"\[", r"\]", r"°", r"\degree",
    r"\quad", r"\qquad", r"\displaystyle", r"\left", r"\right", r"\limits",
])  # fmt: skip
# Other spellings of what is taken for the same.
_SAME = {
    **dict.fromkeys((r"\dfrac", r"\tfrac", r"\cfrac"), r"\frac"),
    **dict.fromkeys((r"\dbinom", r"\tbinom"), r"\binom"),
    **dict.fromkeys((r"\mbox", r"\hbox", r"\mathrm", r"\textrm", r"\textup"), r"\text"),
    **dict.fromkeys((r"\textnormal", r"\textbf", r"\textit"), r"\text"),
    r"\leq": r"\le", r"\geq": r"\ge", r"\neq": r"\ne", r"\lbrace": r"\{", r"\rbrace": r"\}",
    "−": "-", "π": r"\pi", "∞": r"\infty",
}  # fmt: skip
# How many arguments follow.
_ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1, "^": 1, "_": 1}
_UNITS = frozenset([
    "unit", "units", "in", "inch", "inches", "ft", "foot", "feet", "yd", "yard", "yards", "mile",
    "miles", "mm", "cm", "dm", "km", "millimeter", "millimeters", "centimeter", "centimeters",
    "meter", "meters", "metre", "metres", "kilometer", "kilometers", "mph", "degree", "degrees",
    "radian", "radians", "percent", "dollar", "dollars", "cent", "cents", "second", "seconds",
    "sec", "minute", "minutes", "min", "hour", "hours", "day", "days", "week", "weeks", "month",
    "months", "year", "years", "gram", "grams", "kg", "kilogram", "kilograms", "lb", "lbs", "pound",
    "pounds", "ounce", "ounces", "ml", "liter", "liters", "gallon", "gallons",
])  # fmt: skip
# What a \text after a number may hold that is no unit: a part of the number or of the time.
_MEANT = re.compile(r"[ie]|[ap]m|.*(?:[0-9]|hundred|thousand|million|billion|trillion|dozen).*")

# On the joined tokens; {,} is a comma outside brackets, or one that is written as a thousands
# separator.
_THOUSANDS = re.compile(r"(?<![0-9.])(?<!\{,\})[1-9][0-9]{0,2}(?:\{,\}[0-9]{3})+(?![0-9]|\{,\})")
_POINT = re.compile(r"(?<![0-9.])\.(?=[0-9])")
# A fraction on its own, or between signs or in a cell of a matrix: not the one in 2^1/2 or 1/2x.
_SLASH = re.compile(
    r"(?:(?<![^(\[{,+\-=&<>|])|(?<=\\\\)|(?<=matrix\}))"
    r"([0-9]+)/([0-9]+)"
    r"(?=$|[)\]},+\-=&<>|]|\\\}|\\\\|\\end\b)"
)
_PLAIN = r"[0-9]{1,64}(?:\.[0-9]{0,64})?"  # no exponent: 1e3000000 must stay text
_NUMBER = re.compile(rf"([+-]?)({_PLAIN})")
_FRACTION = re.compile(rf"([+-]?)([0-9]{{0,64}})\\frac\{{([+-]?{_PLAIN})\}}\{{([+-]?{_PLAIN})\}}")


def boxed_answer(text: str) -> str | None:
    """The answer in the last box of `text`, in normal form; None if there is none."""
    boxed = _boxed(text)
    return None if boxed is None else _normal(boxed)


def loose_answer(text: str) -> str | None:
    """The boxed answer, or without one what is said to be the answer, in normal form; or None."""
    return boxed_answer(text) or _said_answer(text)


def grade(response: str, gold: str) -> dict[str, bool]:
    r"""Whether `response` is right by each rule.

    `gold` is an answer, or a text with a `\boxed` one. Raises `UserError` if it is neither.
    """
    reference = _reference(gold)
    answer = boxed_answer(response)
    value = _value(answer)
    return {
        "boxed": answer == reference,
        "numeric": value is not None and value == _value(reference),
        "loose": (answer or _said_answer(response)) == reference,
    }


def score(
    responses: list[str], golds: list[str], truncated: list[bool] | None = None
) -> tuple[dict, list[dict]]:
    """(summary, per_row): `n`, the accuracy in [0, 1] by each rule, and counts.

    `unparsed` counts responses without a boxed answer, `truncated` those cut by the token limit:
    both stay in the denominator. A row holds what `grade` returns and `answer`, the boxed one in
    normal form or None.
    """
    return tally(grade, boxed_answer, responses, golds, truncated)


def gold_of(row: dict) -> str:
    r"""The gold of a row: its `label` or `answer`, else what `solution` or first `output` boxes."""
    for field in ("label", "answer"):
        gold = field_text(row.get(field))
        if gold is not None:
            return gold
    for field in ("solution", "output"):
        gold = _boxed(field_text(row.get(field)) or "")
        if gold is not None:
            return gold
    raise UserError(
        'a row without a gold answer: it needs "label", "answer", or a "solution" or "output" '
        f"with a \\boxed one, and has {sorted(row)}"
    )


def _boxed(text: str) -> str | None:
    r"""What the last box holds, if it is whole; of `\boxed 5` what follows in its formula."""
    box = _LAST_BOX.match(text)
    if box is None:
        return None
    rest = text[box.end() : box.end() + _LONGEST + 2].lstrip()
    if not rest.startswith("{"):
        return _END_OF_BARE_BOX.split(rest, maxsplit=1)[0]
    # to the brace that closes it; an escaped one, \{, is a sign like others
    depth = 0
    for brace in _BRACE.finditer(rest):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return rest[1 : brace.start()]
    return None


def _said_answer(text: str) -> str | None:
    """What follows the last marker, to the end of its sentence or line, in normal form; or None."""
    text = text[-_SCANNED:]
    markers = list(_SAYS.finditer(text))
    if not markers:
        return None
    answer = text[markers[-1].end() :].partition("\n")[0].partition(". ")[0]
    return _normal(answer.lstrip(" \t:*").rstrip(" \t\r.*"))


def _reference(gold: str) -> str:
    """A gold in the form that answers are compared in. Raises UserError when it has none."""
    if _LAST_BOX.match(gold):
        reference = boxed_answer(gold)
    else:
        reference = None if "####" in gold else _normal(gold)
    if reference is None:
        raise UserError(
            f"gold answer {gold[-60:]!r} is neither an answer nor a text with a \\boxed one; "
            "MATH needs one"
        )
    return reference


def _normal(answer: str) -> str | None:
    """The form in which answers are compared, itself LaTeX.

    None for an answer that is empty, overlong or unbalanced.
    """
    tokens = _tokens(answer) if len(answer) <= _LONGEST else []
    if _partners(tokens) is None:
        return None
    for step in (
        _without_dots,
        _without_units,
        _without_text_boxes,
        _without_dots,
        _without_name,
        _with_braces,
    ):
        tokens = step(tokens)
    text = _joined(tokens)
    text = _THOUSANDS.sub(lambda number: number[0].replace("{,}", ""), text)
    text = _POINT.sub("0.", text.replace("{,}", ","))
    text = _SLASH.sub(r"\\frac{\1}{\2}", text)
    return re.sub(r"^(-?)0\.5$", r"\1\\frac{1}{2}", text) or None


def _tokens(text: str) -> list[str]:
    """Commands and characters, without what does not show or matter.

    Commas outside brackets come as `{,}`, as those that separate thousands are written.
    """
    tokens: list[str] = []
    depth = 0
    for token in _TOKEN.findall(_DEGREES.sub("", text.replace("{,}", r",\!"))):
        if token == r"\!" and tokens and tokens[-1] == ",":
            tokens[-1] = "{,}"
        elif token not in _INVISIBLE:
            token = _SAME.get(token, token)
            depth = max(0, depth + (token in ("(", "[", r"\{")) - (token in (")", "]", r"\}")))
            tokens.append("{,}" if token == "," and depth == 0 else token)
    return tokens


def _partners(tokens: list[str]) -> dict[int, int] | None:
    """Index of each brace → index of the one that closes or opens it; None if unbalanced."""
    partners: dict[int, int] = {}
    opened: list[int] = []
    for index, token in enumerate(tokens):
        if token == "{":
            opened.append(index)
        elif token == "}":
            if not opened:
                return None
            partners[index] = opened.pop()
            partners[partners[index]] = index
    return None if opened else partners


def _without_dots(tokens: list[str]) -> list[str]:
    end = len(tokens)
    while end and tokens[end - 1] == ".":
        end -= 1
    return tokens[:end]


def _without_units(tokens: list[str]) -> list[str]:
    r"""Without `\text{...}`, words like cm and their powers that end the answer after a number."""
    partners, end = _partners(tokens) or {}, len(tokens)
    while end:
        # the unit, before its power if it has one: `^2` or `^{2}`
        unit_end = end
        if unit_end > 2 and tokens[unit_end - 2] == "^" and tokens[unit_end - 1] != "}":
            unit_end -= 2
        elif (
            unit_end > 2
            and tokens[unit_end - 1] == "}"
            and tokens[partners[unit_end - 1] - 1] == "^"
        ):
            unit_end = partners[unit_end - 1] - 1
        start = _unit_start(tokens, partners, unit_end) if unit_end else None
        if start is None:
            break
        end = start - (start > 0 and tokens[start - 1] == "^")  # 5^\text{th}
    is_number = end and (tokens[end - 1] in (*"0123456789)!", r"\pi") or tokens[end - 1] == "}")
    return tokens[:end] if is_number else tokens


def _unit_start(tokens: list[str], partners: dict[int, int], end: int) -> int | None:
    """Where the unit that ends before `end` starts; None if there is none."""
    if tokens[end - 1] == "}":
        opening = partners[end - 1]
        is_unit = opening and tokens[opening - 1] == r"\text"
        content = "".join(tokens[opening + 1 : end - 1]).replace(".", "").lower()
        return opening - 1 if is_unit and not _MEANT.fullmatch(content) else None
    start = end
    while (
        start
        and len(tokens[start - 1]) == 1
        and tokens[start - 1].isascii()
        and tokens[start - 1].isalpha()
    ):
        start -= 1
    word = "".join(tokens[start:end]).lower()
    return (
        start
        if word.removeprefix("square").removeprefix("cubic").removeprefix("sq") in _UNITS
        else None
    )


def _without_text_boxes(tokens: list[str]) -> list[str]:
    r"""Without `\text` and its braces; what it holds stays."""
    partners, hidden = _partners(tokens) or {}, set()
    for index, token in enumerate(tokens):
        if token == r"\text":
            hidden.add(index)
            if index + 1 in partners and tokens[index + 1] == "{":
                hidden |= {index + 1, partners[index + 1]}
    return [token for index, token in enumerate(tokens) if index not in hidden]


def _without_name(tokens: list[str]) -> list[str]:
    """Without the `x=` in front, where that is the only equation.

    The paper takes names of up to two characters.
    """
    if tokens.count("=") != 1 or tokens[-1] == "=":
        return tokens
    name = tokens[: tokens.index("=")]
    letters = len(name) in (1, 2) and all(part.isascii() and part.isalpha() for part in name)
    greek = len(name) == 1 and name[0].startswith("\\")
    return tokens[len(name) + 1 :] if letters or greek else tokens


def _with_braces(tokens: list[str]) -> list[str]:
    r"""With braces round each argument of one token: `x^2` as `x^{2}`, `\frac12` as two of them."""
    partners, bare = _partners(tokens) or {}, set()
    for index, token in enumerate(tokens):
        argument = index + 1
        for _ in range(_ARGUMENTS.get(token, 0)):
            if argument in partners and tokens[argument] == "{":
                argument = partners[argument] + 1
            elif (
                argument < len(tokens)
                and tokens[argument][-1].isalnum()
                and tokens[argument] not in _ARGUMENTS
            ):
                bare.add(argument)
                argument += 1
            else:
                break
    return [f"{{{token}}}" if index in bare else token for index, token in enumerate(tokens)]


def _joined(tokens: list[str]) -> str:
    r"""The tokens as one text; a space only where a command would run into a letter: `\pi r`."""
    parts: list[str] = []
    for token in tokens:
        if parts and token[0].isalpha() and parts[-1][0] == "\\" and parts[-1][-1].isalpha():
            parts.append(" ")
        parts.append(token)
    return "".join(parts)


def _value(answer: str | None) -> Fraction | None:
    """The value of a number, a fraction or a mixed number, in normal form; None of all else."""
    answer = answer or ""
    if number := _NUMBER.fullmatch(answer):
        return Fraction(number[1] + number[2])
    parts = _FRACTION.fullmatch(answer)
    if parts is None:
        return None
    sign = -1 if parts[1] == "-" else 1
    whole = parts[2]
    above, below = Fraction(parts[3]), Fraction(parts[4])
    if below == 0 or whole and not 0 < above < below:
        return None
    return sign * (int(whole or 0) + above / below)


TASK = Task(
    name="MATH",
    grade=grade,
    score=score,
    gold_of=gold_of,
    stop=("Problem:", "Question:", "</s>", "<|im_end|>"),
    metric="boxed",
)
