r"""Grading answers to MATH (arXiv 2103.03874): the boxed answer, and three comparisons beside it.

boxed     the last `\boxed` or `\fbox`, equal as a string in normal form: what the paper counts, in
          its spirit and not its code
numeric   the same answer where it and the gold are both a number or a fraction: equal in value;
          false of all others, so that its share cannot pass that of the golds that are numbers
          (81 % of the paper's test set)
loose     the boxed answer, or without one what follows the last "answer is", "Final Answer:" or
          `#### ` in its line; several answers, and sets, in any order; a number's base or none
symbolic  what is right by `loose` or equal by math-verify, both ways round: the same value written
          otherwise. It takes time, and has a process of its own (`symbolic.py`)

What stands in round or square brackets keeps its order by every rule. Responses are written by
models, so nothing here executes, nests or converts more than a bounded piece of them.
"""

import re
from fractions import Fraction
from typing import Any

from src.errors import UserError
from src.evaluation import symbolic
from src.evaluation.scoring import field_text, first_gold
from src.evaluation.task import Task

_LONGEST = 1024  # characters of an answer; a longer one is no answer
_SCANNED = 65_536  # characters at the end of a text in which the loose rule looks
# Greedy from the start, so that it finds the last one in linear time: for `match` only, never for
# `search`.
_LAST_BOX = re.compile(r"(?s).*(\\(?:boxed|fbox))(?![A-Za-z])")
_BRACE = re.compile(r"(?s)\\.|[{}]")
_END_OF_BARE_BOX = re.compile(r"\$|\n|\\[)\]]")
_SAYS = re.compile(r"(?i:answer is|final answer:)|#### ")
# What stands between the answers where there are several: in one box, and between boxes.
_AND = re.compile(
    r"\\(?:text|textrm|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}"
    r"|(?<![^\s,$}])(?:and|or)(?![^\s$\\-])|;|\\q?quad(?![A-Za-z])"
)
_BETWEEN_BOXES = re.compile(
    r"(?:[\s,;.$]|\\[()\[\],;: ]|\\q?quad(?![A-Za-z])|\\text\s*\{[^{}]*\}|and|or)*"
)
_MOST_BOXES = 32
_NEAR = 1024  # characters between two boxes of one answer, and their own
_OPENING = frozenset(["(", "[", "{", r"\{", r"\begin"])
_CLOSING = frozenset([")", "]", "}", r"\}", r"\end"])
_GREEK = re.compile(
    r"\\(?:ell|hbar)(?![A-Za-z])|\\(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|pi|rho"
    r"|sigma|tau|upsilon|phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi"
    r"|Omega)(?![A-Za-z])"
)
_WITH_BASE = re.compile(r"(?<![\\A-Za-z0-9.])([0-9][0-9A-Z]*)_\{([0-9]+)\}")

# What does not show between two digits still keeps them apart, but for groups of three: 1 000. In
# \frac12 and x^2 3 they are apart as it is.
_GAP = (
    r"(?:\s|[~°]|\\?[$%]|\\[,;:!>() \[\]]|\\text\s?\{\s?\}"
    r"|\\(?:q?quad|degree|displaystyle|left|right|limits)(?![A-Za-z]))+"
)
_SPACE = re.compile(r"\s|~|\\(?:[,;: ]|q?quad(?![A-Za-z]))")
_GROUPS = re.compile(
    r"(?<![0-9.,])(?<!frac)[1-9][0-9]{0,2}(?:(?:[ ~]|\\[,;:! ])[0-9]{3})+(?![0-9])"
)
_MIXED = re.compile(rf"(?<![0-9.])(?<!frac)([0-9]+){_GAP}([0-9]+)\s?/\s?([0-9]+)(?![0-9])")
_APART = re.compile(
    rf"(?<=[0-9])(?<!frac[0-9])(?<!frac [0-9])(?<!binom[0-9])(?<!binom [0-9])(?<!sqrt[0-9])"
    rf"(?<![\^_][0-9]){_GAP}(?=[0-9])"
)

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
UNITS = frozenset([
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
_TEXT_BOX = re.compile(r"\\(?:text(?:rm|up|normal|bf|it)?|[mh]box|mathrm)\s?\{([^{}]*)\}")
_LETTER = "[A-Za-z](?<![mgslhdLNJWVCF])(?<! [KA])"  # that is no unit's
_TEXT_BEHIND = re.compile(r"(?<=[0-9})!])\s?(?:\\[,;:! ])?" + _TEXT_BOX.pattern)
_NUMBERS = "(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|sixteen|[0-9])"
_CHANGING = re.compile(
    rf"(?!\s*,?\s*(?:and|or)\s*\Z)(?:\s*(?:{_LETTER}|(?i:squared|cubed|factorial))\s*\Z"
    rf"|(?i:.*(?<![a-z])(?:or|(?:over|base|root|root of) {_NUMBERS}|plus|minus|divided|power|modulo"
    r"|mod|not|wrong|to the|pi|at (?:most|least)|gross|lakhs?|crores?|halves|half(?=\s*\Z)"
    r"|and (?:an? )?(?:half|third|quarter)"
    r"|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|[a-z]*teenth"
    r"|[a-z]*ieth|hundredth|thousandth)s)(?![a-z])))"
)

# On the joined tokens; {,} is a comma outside brackets, or one that is written as a thousands
# separator.
_THOUSANDS = re.compile(r"(?<![0-9.])(?<!\{,\})[1-9][0-9]{0,2}(?:\{,\}[0-9]{3})+(?![0-9]|\{,\})")
_LIST_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
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


def _repeating(number: re.Match[str]) -> str:
    """A decimal whose last digits repeat, as a fraction."""
    whole, once = number["whole"].replace(",", ""), number["once"]
    again = number["again"] or number["digit"]
    above = int(whole + once + again) - int(whole + once or "0")
    return rf"\frac{{{above}}}{{{'9' * len(again) + '0' * len(once)}}}"


# A bar over the digits that repeat, or a dot over the first of them and the last.
_DOT = r"\\dot\s?(?:\{([0-9])\}|([0-9]))"
REPEATING: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(rf"(?<=[0-9.]){_DOT}(?:([0-9]{{0,20}}){_DOT})?"), r"\\bar{\1\2\3\4\5}"),
    (re.compile(
        r"(?<![0-9.])(?P<whole>[0-9]{1,3}(?:,[0-9]{3}){1,6}|[0-9]{0,30})\.(?P<once>[0-9]{0,30})"
        r"\\(?:overline|bar)\s?(?:\{\s?(?P<again>[0-9]{1,30})\s?\}|(?P<digit>[0-9]))"
     ), _repeating),
]  # fmt: skip


# For `symbolic` alone: formulas and numbers in a text, …
_FORMULA = re.compile(r"\$[^$]{1,200}\$|-?[0-9][0-9.,/]*")
_STATED = re.compile(r"(?:^|\bis )(\$[^$]{1,200}\$|-?[0-9][0-9.,/]*(?=[^0-9A-Za-z]*$))(?!.*[$0-9])")
_INSIDE = re.compile(r"\$([^$]{1,1024})\$|\\[(\[](.{1,1024}?)\\[)\]]")
# … what the library drops or takes for something else, …
_PRIME = re.compile(r"['′’]|\\prime(?![A-Za-z])")
_MEANT_WORD = re.compile(
    r"(?<![a-z\\])(?:hundred|thousand|million|billion|trillion)(?:th)?s?(?![a-z])"
    r"|(?<![a-z\\])(?:dozens?|[ap]m)(?![a-z])|\\text\s?\{[^{}]*[a-z][^{}]*[0-9][^{}]*\}"
)
_LONG_RATIO = re.compile(r"[^:=,]:[^:=,]{1,64}:[^:=,]")
_RELATION = re.compile(
    r"\\(?:ne|le|ge|lt|gt|not|leqslant|geqslant|ll|gg|equiv|cong|propto)(?![A-Za-z])|!=|[<>≠≤≥]"
)
_RANGE = re.compile(r"[()\[\]|]|\\(?:in|cup|cap|infty|setminus|mathbb)(?![A-Za-z])")
_PASSED_OVER = re.compile(r"\\(?:[lcvd]?dots|sim|neg|lnot|nmid|phantom|gap)(?![A-Za-z])|…")
_OPERATION = re.compile(r"\\(?:times|cdot|div|ast|in)(?![A-Za-z])|[*/^×÷]")  # that begins one
_TIME = re.compile(r"(?<![0-9:.])[0-9]{1,2}:[0-5][0-9](?![0-9:])")
# … and what it does not know.
_HELD = r"\s?\{([^{}]{0,200})\}"
_PLAIN_SPELLINGS: list[tuple[re.Pattern[str], Any]] = [
    *REPEATING,
    (re.compile(r"\\(?:underline|boldsymbol|bm|(?:textcolor|color)\s?\{[a-z]{1,20}\})" + _HELD),
     r"{\1}"),
    (re.compile(r"\{\\(?:rm|bf|it)(?![A-Za-z])\s?"), "{"),
    (re.compile(r"\\(?:math(?:rm|bf|it|sf)|text(?:rm|bf|it)?|mbox)\s?\{\s?([ie])\s?\}"), r"\1"),
    (re.compile(rf"\\math(?:rm|bf|it|sf)\s?\{{\s?({_LETTER})\s?\}}"), r"\1"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile("√([0-9]+)"), r"\\sqrt{\1}"), (re.compile("√(?=[({])"), r"\\sqrt"),
    (re.compile("½"), r"\\frac{1}{2}"), (re.compile("¼"), r"\\frac{1}{4}"),
    (re.compile("¾"), r"\\frac{3}{4}"), (re.compile("[–－]"), "-"),
    (re.compile(r"(?<![\w.])([0-9]\.[0-9]{1,20})e\+?([0-9]{1,3})(?![\w.])"), r"\1\\times10^{\2}"),
]  # fmt: skip


def boxed_answer(text: str) -> str | None:
    """The answer in the last box of `text`, in normal form; None if there is none."""
    answer = boxed(text)
    return None if answer is None else _normal(answer)


def loose_answer(text: str) -> str | None:
    """The boxed answer, or without one what is said to be the answer, in normal form; or None."""
    return boxed_answer(text) or _said_answer(text)


def grade(response: str, gold: str) -> dict[str, bool]:
    r"""Whether `response` is right by each rule.

    `gold` is an answer, or a text with a `\boxed` one. Raises `UserError` if it is neither.
    """
    reference = _reference(gold)
    answer = boxed_answer(response)
    value = value_of(answer)
    # Where one side writes 100, 200 with a space, the other's comma is no thousands' either.
    is_list = any(", " in (side or "") for side in (answer, reference))
    sides = (boxed(response), boxed(gold) or gold) if is_list else ()
    is_same_list = is_list and len({_normal(_spaced(side or "")) for side in sides}) == 1
    return {
        "boxed": answer == reference or is_same_list,
        "numeric": value is not None and value == value_of(reference),
        "loose": (answer or _said_answer(response)) == reference
        or _is_same_list(_boxes(response) or _said(response), _boxes(gold) or gold),
    }


def is_right_symbolically(response: str, gold: str) -> bool | None:
    """Whether `response` is right by `symbolic`; None where a limit cut the comparison off.

    Raises `UserError` as `grade` does, and where math-verify cannot be had.
    """
    response, gold = (_with_plain_spellings(text) for text in (response, gold))
    if grade(response, gold)["loose"]:
        return True
    answer, reference = _boxes(response), _boxes(gold) or gold
    if answer is None:
        answer = _said_formula(response)
    # Without any of it, what the library finds at the end: the last formula or number.
    seen = _last_formula(response) or "" if answer is None else answer
    if not response.strip() or _is_another(seen, reference):
        return False
    is_formula = _boxes(gold) is None and re.search(r"(?<!\\)\$|\\[(\[]", gold) is not None
    return symbolic.same(
        gold if is_formula else rf"\boxed{{{reference}}}",
        response[-_LONGEST:] if answer is None else rf"\boxed{{{answer}}}",
    )


def _with_plain_spellings(text: str) -> str:
    """A text with what the library does not know written as it does: 0.\\overline{3} is 3/9."""
    start, end = text[:-_SCANNED], text[-_SCANNED:]
    for pattern, written in _PLAIN_SPELLINGS:
        end = pattern.sub(written, end)
    return start + end


def _said_formula(response: str) -> str | None:
    """What is said to be the answer, or the formula or number that a sentence about it ends in."""
    said = (_said(response) or "")[:_LONGEST]
    stated = _STATED.search(said)
    is_denied = re.search(r"\b(?:not|no)\b|n't\b", said, re.IGNORECASE)
    return (said if stated is None or is_denied else stated[1].strip("$")) or None


def _is_another(answer: str, gold: str) -> bool:
    """Whether two answers differ in what the library does not see, so that its verdict is void."""
    sides = []
    for text in (answer, gold):
        inside = _INSIDE.findall(text[: 4 * _LONGEST])
        sides.append(", ".join(map("".join, inside)) or text)
    forms = [_normal(side) or "" for side in sides]
    if forms[0] == forms[1]:
        return False
    lists = [_values(side) for side in sides]
    return (
        _has_other_bases(sides)
        or _has_other_letters(forms)
        or _has_other_marks(sides, forms)
        or _has_another_length(sides, lists)
        or _has_another_order(sides, lists)
    )


def _has_other_bases(sides: list[str]) -> bool:
    """12_3 and 12_4, which are one to the library."""
    bases = [_bases(side) for side in sides]
    return all(bases) and bases[0] != bases[1]


def _has_other_letters(forms: list[str]) -> bool:
    r"""Other words, points or cases of letters: to the library, words are products.

    It takes ABC for CBA, \angle ABC for \angle ACB, r^2 for R^2 and aA for a^2.
    """
    words = [form for form in forms if form.isalpha() and len(form) > 1]
    if len(words) == 2 or any(not word.islower() for word in words):
        # Even is even, but AB is not ab, nor Ab ab
        are_english = len(words) == 2 and all(word[1:].islower() for word in words)
        are_long = are_english and (len(words[0]) > 2 or words[0].lower() == "no")
        return not are_long or words[0].lower() != words[1].lower()
    texts = [re.sub(r"\\[A-Za-z]+", " ", form) for form in forms]
    points = [sorted(re.findall("[A-Z]{2,}", text)) for text in texts]
    if all(points) and points[0] != points[1]:
        return True
    one, other = (
        {letter for letter in text if letter.isalpha()} | {*_GREEK.findall(form)}
        for text, form in zip(texts, forms)
    )
    cases = [{letter: letter.lower() for letter in letters} for letters in (one, other)]
    both = {*cases[0].values()} & {*cases[1].values()}
    return {x for x in one if cases[0][x] in both} != {x for x in other if cases[1][x] in both}


def _has_other_marks(sides: list[str], forms: list[str]) -> bool:
    r"""Other primes, \text, signs or colons, which the library drops or divides by.

    It takes f' for f, 5 million for 5, 8 p.m. for 8 a.m., > 3 and \ldots 3 for 3, 1:2:3 for 1/2/3
    and 3:30 for 1/10.
    """
    is_relation = [_RELATION.search(form) is not None for form in forms]
    if is_relation[0] != is_relation[1] and not _RANGE.search(forms[is_relation.index(False)]):
        return True
    if bool(_OPERATION.match(forms[0])) != bool(_OPERATION.match(forms[1])):
        return True
    passed_over = [sorted(_PASSED_OVER.findall(form)) for form in forms]
    changing = [sorted(filter(_CHANGING.match, _TEXT_BEHIND.findall(side))) for side in sides]
    if passed_over[0] != passed_over[1] or changing[0] != changing[1]:
        return True
    # those of a name on one side only, f'(x) = 2x for 2x, do not count
    values = sides if ("=" in sides[0]) == ("=" in sides[1]) else [s.split("=")[-1] for s in sides]
    primes = [len(_PRIME.findall(value)) for value in values]
    words = [sorted(_MEANT_WORD.findall(side.lower().replace(".", ""))) for side in sides]
    times = [_TIME.findall(form) for form in forms]
    are_long = any(_LONG_RATIO.search(form) for form in forms)
    return are_long or any(found[0] != found[1] for found in (primes, words, times))


def _has_another_length(sides: list[str], lists: list[list[str]]) -> bool:
    """More or fewer answers, some of them alike, since the library makes a set of a list."""
    if not all(lists) or lists[0][0].startswith("(") != lists[1][0].startswith("("):
        return False
    if any(len({*items}) < len(items) for items in lists):
        return lists[0] != lists[1]
    are_open = any(mark in side for side in sides for mark in ("=", r"\pm", r"\mp", "±"))
    return not are_open and min(map(len, lists)) > 1 and len(lists[0]) != len(lists[1])


def _has_another_order(sides: list[str], lists: list[list[str]]) -> bool:
    """The same values with several names and without, as x=5, y=3 and 3, 5, in another order."""
    names = [{item.partition("=")[0][:1] for item in _items(side) if "=" in item} for side in sides]
    if all(names) or max(map(len, names)) < 2:
        return False
    values = [[item.split("=")[-1] for item in _items(side)] for side in sides]
    return values[0] != values[1] and sorted(values[0]) == sorted(values[1])


def taken(rule: str, response: str) -> str | Fraction | tuple[str, ...] | None:
    """The answer that a rule takes from a response, equal where the rule takes two for the same.

    Of several answers the order does not count by `loose` and `symbolic`. What `symbolic` alone
    takes for the same stays two answers, since it cannot be asked about every two.
    """
    if rule in ("boxed", "numeric"):
        answer = boxed_answer(response)
        return answer if rule == "boxed" else value_of(answer)
    text = _boxes(response) or _said(response)
    if rule == "loose":
        return tuple(sorted(map(_item, _items(text or "")))) or None
    return tuple(_values(text or _last_formula(response) or "")) or None


def gold_of(row: dict) -> str:
    r"""The gold of a row: its `label` or `answer`, else what `solution` or first `output` boxes."""
    gold = first_gold(row)
    if gold is not None:
        return gold
    for field in ("solution", "Solution", "output"):
        gold = boxed(field_text(row.get(field)) or "")
        if gold is not None:
            return gold
    raise UserError(
        'a row without a gold answer: it needs "label", "answer", or a "solution" or "output" '
        f"with a \\boxed one, and has {sorted(row)}"
    )


def boxed(text: str) -> str | None:
    r"""What the last box holds, if it is whole; of `\boxed 5` what follows in its formula."""
    box = _last_box(text)
    return None if box is None else box[0]


def _last_box(text: str, start: int = 0, end: int | None = None) -> tuple[str, int, int] | None:
    """(what it holds, where it begins, where it ends) of the last box in text[start:end]."""
    end = len(text) if end is None else end
    box = _LAST_BOX.match(text, start, end)
    if box is None:
        return None
    held = held_by_box(text, box.end(), end)
    return None if held is None else (held[0], box.start(1), held[1])


def held_by_box(text: str, start: int, end: int | None = None) -> tuple[str, int] | None:
    r"""(what it holds, where it ends) of the box whose `\boxed` ends at `start`; None if broken."""
    rest = text[start : min(start + _LONGEST + 2, len(text) if end is None else end)]
    spaces = len(rest) - len(rest := rest.lstrip())
    if not rest.startswith("{"):
        content = _END_OF_BARE_BOX.split(rest, maxsplit=1)[0]
        return content, start + spaces + len(content)
    # to the brace that closes it; an escaped one, \{, is a sign like others
    depth = 0
    for brace in _BRACE.finditer(rest):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return rest[1 : brace.start()], start + spaces + brace.end()
    return None


def _boxes(text: str) -> str | None:
    """What the last box holds, after what boxes just before it do, with commas between them."""
    box = _last_box(text)
    if box is None:
        return None
    contents, begin = [box[0]], box[1]
    while len(contents) < _MOST_BOXES:
        earlier = _last_box(text, max(0, begin - 2 * _NEAR), begin)
        if earlier is None or not _BETWEEN_BOXES.fullmatch(text, earlier[2], begin):
            break
        contents.append(earlier[0])
        begin = earlier[1]
    return ", ".join(reversed(contents))


def _said_answer(text: str) -> str | None:
    """What is said to be the answer, in normal form; or None."""
    said = _said(text)
    return None if said is None else _normal(said)


def _said(text: str) -> str | None:
    """What follows the last marker, to the end of its sentence or line; or None."""
    text = text[-_SCANNED:]
    markers = list(_SAYS.finditer(text))
    if not markers:
        return None
    answer = text[markers[-1].end() :].partition("\n")[0].partition(". ")[0]
    return answer.lstrip(" \t:*").rstrip(" \t\r.*")


def _values(text: str) -> list[str]:
    """The answers in a text, sorted, the numbers among them by their value: 0.5 and 1/2 alike."""
    values = [(value_of(item), item) for item in map(_item, _items(text))]
    return sorted(item if value is None else str(value) for value, item in values)


def _last_formula(text: str) -> str | None:
    """What the last formula between dollar signs holds, else the last number; or None."""
    found = _FORMULA.findall(text[-_LONGEST:])
    return found[-1].strip("$").rstrip(".,/") if found else None


def _is_same_list(answer: str | None, gold: str) -> bool:
    """Whether both hold the same answers, in any order; one of them may write a number's base."""
    answers, golds = _items(answer or ""), _items(gold)
    # a comma of thousands may separate two of three digits
    if len(answers) == 1 < len(golds):
        answers = _items(_spaced(answer or ""))
    elif len(golds) == 1 < len(answers):
        golds = _items(_spaced(gold))
    if not answers or len(answers) != len(golds):
        return False
    left = [_item(gold) for gold in golds]
    for item in map(_item, answers):
        found = next((other for other in left if _is_same_item(item, other)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _spaced(text: str) -> str:
    """A text whose commas separate answers, whatever stands between them."""
    return re.sub(r"(?<!\{),(?!\}|\\!)", ", ", text)


def _items(text: str) -> list[str]:
    r"""The answers in a text: between commas and words outside brackets, and inside `\{...\}`."""
    if len(text) > _LONGEST:
        return []
    normal = _normal(_AND.sub(",", _with_words(text))) or ""
    items = _between_commas(normal)
    if len(items) == 1 and normal.startswith(r"\{") and normal.endswith(r"\}"):
        items = _between_commas(normal[2:-2])
    return [item for item in items if item]  # 1, 2, and 3 has nothing between , and "and"


def _between_commas(normal: str) -> list[str]:
    """A normal form, cut at its commas outside brackets."""
    items, depth = [""], 0
    for token in re.findall(r"(?s)\\[A-Za-z]+ ?|\\.|.", normal):
        depth += (token in _OPENING) - (token in _CLOSING)
        if token == "," and depth == 0:
            items.append("")
        else:
            items[-1] += token
    return items


def _item(text: str) -> str:
    """One of several answers in normal form, with its name if it has one: x=1 is not y=1."""
    return text if "=" in text else _normal(text) or text


def _is_same_item(one: str, other: str) -> bool:
    if one == other:
        return True
    bases = [_WITH_BASE.fullmatch(item) for item in (one, other)]
    return any(base and _normal(base[1]) == item for base, item in zip(bases, (other, one)))


def _bases(text: str | None) -> list[str]:
    """The bases of the numbers in an answer that have one."""
    return sorted(base for _, base in _WITH_BASE.findall(_normal(text or "") or ""))


def check_gold(rule: str, gold: str) -> None:
    """Raise UserError for a gold that is no answer; one without a value `numeric` finds wrong."""
    _reference(gold)


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
    tokens = _tokens(_with_what_counts(answer)) if len(answer) <= _LONGEST else []
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
    text = _LIST_COMMA.sub(", ", text.replace("{,}", ","))  # as it is no thousands separator
    text = _POINT.sub("0.", text)
    text = _SLASH.sub(r"\\frac{\1}{\2}", text)
    text = re.sub(r"^0+(?=[0-9]+$)", "", text)  # 033, as AIME writes 33
    return re.sub(r"^(-?)0\.5$", r"\1\\frac{1}{2}", text) or None


def _with_what_counts(text: str) -> str:
    r"""A text with commands for what tokens would lose: `\gap` between digits, and `\words`."""
    text = _DEGREES.sub(" ", _with_words(text).replace("{,}", r",\!"))
    text = _GROUPS.sub(lambda number: re.sub(r"[^0-9]", "", number[0]), text)
    return _APART.sub(r"\\gap ", _MIXED.sub(r"\1\\frac{\2}{\3}", text))


def _with_words(text: str) -> str:
    r"""A text with `\words` for each `\text` that says more than a unit."""
    return _TEXT_BOX.sub(
        lambda box: rf"\words{{{box[1]}}}" if _CHANGING.match(box[1]) else box[0], text
    )


def _tokens(text: str) -> list[str]:
    """Commands and characters, without what does not show or matter.

    Commas outside brackets without a space come as `{,}`, as those that separate thousands are
    written.
    """
    tokens: list[str] = []
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token == r"\!" and tokens and tokens[-1] == ",":
            tokens[-1] = "{,}"
        elif token not in _INVISIBLE:
            token = _SAME.get(token, token)
            depth = max(0, depth + (token in ("(", "[", r"\{")) - (token in (")", "]", r"\}")))
            is_tight = not (_SPACE.match(text, match.end()) or text[match.start() - 1].isspace())
            tokens.append("{,}" if token == "," and depth == 0 and is_tight else token)
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
        if word.removeprefix("square").removeprefix("cubic").removeprefix("sq") in UNITS
        else None
    )


def _without_text_boxes(tokens: list[str]) -> list[str]:
    r"""Without `\text` and its braces; what it holds stays."""
    partners, hidden = _partners(tokens) or {}, set()
    for index, token in enumerate(tokens):
        if token in (r"\text", r"\words"):
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
    greek = len(name) == 1 and _GREEK.fullmatch(name[0])
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


def value_of(answer: str | None) -> Fraction | None:
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
    answer_of=boxed_answer,
    gold_of=gold_of,
    metric="boxed",
    taken=taken,
    check_gold=check_gold,
    symbolic=is_right_symbolically,
)
