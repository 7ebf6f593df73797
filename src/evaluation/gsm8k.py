r"""Grading GSM8K responses by the three public rules, and a numeric comparison beside them.

official          OpenAI grade-school-math, `dataset.py`: first `#### N`, commas removed, equal
                  as strings
strict_match      lm-evaluation-harness `gsm8k` version 3: first `#### N`, both sides normalised
flexible_extract  the same task: last number anywhere, both sides normalised
numeric           ours, beside the rules and never instead of them: the number after `####`, else
                  that in the last `\boxed`, else that after "the answer is", else the last number,
                  equal in value however people write it: `$18.00`, `\(18\)`, `1{,}800`,
                  `\frac{36}{2}`, `2 1/2`, `18\%`, `−5`, `1.8 thousand`, `1.8\times10^3`. Units and
                  words may stand beside it, no operation: `18!`, `2 \cdot 18`, `18x`, `17, 18` have
                  no value, and no second unit: `18 ft 6 in`

All take the same text. Responses are written by models, so nothing here executes, nests or converts
more than a bounded piece of them.
"""

import re
import unicodedata
from fractions import Fraction
from functools import partial
from typing import Any

from src.errors import UserError
from src.evaluation.math import REPEATING, UNITS, held_by_box
from src.evaluation.scoring import GOLD_FIELDS, first_gold
from src.evaluation.task import EMPTY_BOX, HEADING, SAID, Task

RULES = ("official", "strict_match", "flexible_extract")

# Of a longer text only so many characters are scanned: the first for `####`, the last for the last
# number.
_SCANNED = 65_536
_MARKED = re.compile(r"#### (\-?[0-9\.\,]+)")
_LOOSE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_BARE = re.compile(r"-?[0-9.,]*[0-9][0-9.,]*")

# --- how people write a number, for `numeric` alone -----------------------------------------------
_WRITTEN_IN = 8192  # characters of an answer, and those at the end in which a last number is seen
_MOST_DIGITS = 1000
# `####` that is no heading: neither "1. Understand" nor a word follows, nor nothing
_MARK = re.compile(
    rf"####(?!{HEADING})(?!#{{0,2}}[ :*_]{{0,9}}(?:[A-Za-z](?:[A-Za-z]|[.)])|\n|$))[^\n#]{{0,4000}}"
)
_BOX = re.compile(rf"\\(?:boxed|fbox)(?![A-Za-z])(?!{EMPTY_BOX})")
_SAID = re.compile(SAID)
# A number in words: with it in a box, the same one in digits may stand behind.
_WORD = (
    "(?i:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|[a-z]{2,6}teen"
    "|[a-z]{2,6}ty)"
)
_IN_WORDS = re.compile(rf"\b{_WORD}\b")
_PARTS = (  # of a whole, in words
    "(?i:half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?"
    "|hundredths?|thousandths?)"
)
# What a compound measure may begin with: 7 feet 6 inches, 1 hr 30 min
_MEASURE = (
    r"(?:(?i:years?|yrs?|months?|weeks?|wks?|days?|hours?|hrs?|minutes?|mins?|degrees?|feet|foot|ft"
    r"|yards?|yds?|miles?|meters?|metres?|kilometers?|kilometres?|km|cm|pounds?|lbs?|stones?"
    r"|kilograms?|kilos?|kgs?|grams?|tons?|tonnes?|gallons?|gals?|quarts?|qts?|pints?|pts?|cups?"
    r"|lit(?:er|re)s?|dollars?|bucks?|euros?|dozens?)|[hdmgL])"
)
_CODE = "(?i:USD|CAD|AUD|NZD|EUR|GBP|INR|PKR|JPY|CNY|RMB|CHF|SGD|HKD|PHP|MXN|BRL|NGN|KES|TL)"

_CHARACTERS = str.maketrans(
    "–－０１２３４５６７８９．，％＝≈\u00a0\u2009\u202f\u3000’₱₦₩₪₫₽₴₺＄",
    "--0123456789.,%==    '$$$$$$$$$",
    "\u200b\u2060\ufeff",
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")


def _scientific(number: re.Match[str]) -> str:
    """1.8e3 for 1.8 × 10^3."""
    return f"{number[1]}e{(number[2] or number[3] or number[4]).translate(_SUPERSCRIPTS)}"


_SPELLINGS: list[tuple[str | re.Pattern[str], Any]] = [
    # a sign where it is not between two numbers: no bullet, as "- 5" may be
    (r"(?<![\w)\]}%.])(?<![\w)\]}%.] )− ?", "-"), ("−", "-"),
    # 1{,}800, 1\,800, 1,\!800, 1~800 and 1'800 are 1,800
    (r"(?<=[0-9])(?:\{,\}|,?\\[,!;: ]|\\thinspace ?|~|')(?=[0-9]{3}(?![0-9]))", ","),
    (r"<<[^<>\n]{0,100}>>", ""), (r"<([-+$0-9.,]{1,30})>", r"\1"),  # GSM8K's own calculations
    (r"\\([$%&#_{}])", r"\1"), (r"\\lbrace(?![A-Za-z])", "{"), (r"\\rbrace(?![A-Za-z])", "}"),
    *REPEATING,
    # one digit before the point: other products are operations
    (r"(?<![0-9.,^_/])([1-9](?:\.[0-9]{1,30})?)"
     r" ?(?:\\times(?![A-Za-z])|\\cdot(?![A-Za-z])|[×·⋅*xX])"
     r" ?(?:10|\{10\})(?: ?(?:\^|\*\*) ?(?:\{ ?([+-]?[0-9]{1,2}) ?\}|([+-]?[0-9]{1,2}))"
     r"|([⁻⁺]?[⁰¹²³⁴-⁹]{1,2}))"
     r"(?![0-9⁰¹²³⁴-⁹])", _scientific),
    # C$18, USD 18 and 18USD
    (r"(?<![A-Za-z])[A-Z][A-Za-z]{0,2}\$(?= ?-?[0-9.])", "$"),
    (rf"(?<![A-Za-z]){_CODE} ?(?=[$€£]?-?[0-9.])", "$"),
    (rf"(?<=[0-9]) ?{_CODE}(?![A-Za-z])", " dollars "),
    (r"\\(?:[()\[\],;:!\\ ]|(?:left|right|displaystyle|q?quad|large|boxed|fbox)(?![A-Za-z]))", " "),
    (r"\\(?:begin|end)\{[a-z]{1,12}\*?\}|</?[a-z]{2,12}>|<\|[a-z_]{1,30}\|>", " "),
    (r"\\(?:text(?:bf|it|rm|normal|superscript)?|math(?:bf|rm)|mbox|boldsymbol|underline)\s?"
     r"\{([^{}]{0,200})\}", r" \1 "),
    (r"\^\s?(?:\{\s?\\circ\s?\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])|°", " degrees "),
    (r"\\(?:approx|(?:long)?(?:right|Right)arrow|implies|to)(?![A-Za-z])", "="),
    (r"\\(?:times|cdot|div|ast)(?![A-Za-z])", "×"),
    # mixed numbers, which need a space, and fractions, \frac12 too
    (r"(?<=[0-9])(?=[½¼¾⅐-⅞]|\\[dtc]?frac)", " "),
    *((part, unicodedata.normalize("NFKC", part).replace("\u2044", "/"))
      for part in "½¼¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"),
    (r"\\[dtc]?frac\s?\{\s?(-?[0-9.,]{1,30})\s?\}\s?\{\s?([0-9.,]{1,30})\s?\}", r"\1/\2 "),
    (r"\\[dtc]?frac\s?([0-9])\s?([0-9])", r"\1/\2 "),
    (r"(?<=[0-9]) ?\^ ?\{? ?(st|nd|rd|th)(?![A-Za-z]) ?\}?", r"\1"),  # 18^{th}
    (r"(?i:%| per cent| pct\.?) ?of(?![A-Za-z])", " percent of"),
    # the 2 of x_2 and of cm^2
    (r"(?<=[A-Za-z])_(?:\{[^{}]{0,20}\}|[0-9]+)", ""),
]  # fmt: skip
_WAYS = [(re.compile(pattern), written) for pattern, written in _SPELLINGS]
_POWER_OF_UNIT = re.compile(r"(?<=[A-Za-z]) ?(?:\^(?:\{-?[0-9]+\}|-?[0-9]+)|[²³])")

_DIGITS = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+)(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"|\.[0-9]+"
)
_NUMBER = re.compile(
    rf"(?:(?P<whole>[0-9]{{1,9}}) {{1,2}}(?=[0-9]+/[0-9]))?(?P<above>{_DIGITS})"
    rf"(?:[eE](?P<power>[+-]?[0-9]{{1,2}})(?![0-9A-Za-z]))?(?: ?/ ?(?P<below>{_DIGITS}))?"
    r"(?:[ -]{0,4}(?P<times>(?i:hundred|thousand|million|billion|trillion))s?(?![A-Za-z]))?"
)
_TIMES = {
    "": 1,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}

# What may stand before the number that an answer is, beside a name or a sum with its =
_LEAD = re.compile(
    r"^(?:[\s*_`$€£¥₹~({\[\"'+:]|(?i:the|final|answer|total|result|sum|is|of|an?|about|approximately"
    r"|approx|around|roughly|exactly|only|just|rs|usd?)(?![A-Za-z])\.?)*"
)
_MINUS = re.compile(r"-[ $€£({]{0,3}(?=[0-9.])")
_MINUS_IN_TEXT = re.compile(r"(?<![\w)\]}%.])-[$€£]?$|[$€£]-$")
_NAME = re.compile(r"[A-Za-z\s$({*]*|(?:[0-9]e[+-]?[0-9]|[0-9\s.,+\-*/×÷·()$%^])*")
# What stands after a number: the signs that close it, …
_CLOSING = re.compile(r"^(?:[%$€£)}\]>\"'`]|[*_]{1,3}(?!\.?[\w($\\]))*")
# … and what makes another value of it: an operation, a second number, a variable
_CHANGED = re.compile(
    r"\s*[\^²³¹⁰⁴-ⁿ₀-₉½¼¾⅐-⅞⁄×÷·⋅∙±<>≤≥≠=&{\\√π∞!+]|[*_(\u0304\u0305\u0307]|\s*\*{1,2}[\s0-9(]"
    # digits that repeat in a way that is not known: 33.(3)
    r"|\.(?:\{?\\(?:overline|bar|dot|mathring|wide\w+|overset|stackrel)(?![a-z])|\([0-9])"
    r"|\s\((?i:repeating|recurring)|[\s,]*(?i:plus|minus)"
    r"|[\s,(]*(?i:(?:plus|minus)(?! [0-9])|(?:remainder|rem)\.?(?: of| is|:)? [0-9])"
    r"|\s*[-/:|%]\s*(?:[0-9.$({\\√+-]|[A-Za-z](?![A-Za-z]))"
    r"|(?:\s*[,;]\s*|\s*)[$€£]?-?\.?[0-9]"
    r"|\s+(?![mghslLaIp]\b)[A-Za-z](?![A-Za-z'])"
    r"|[\s-]*(?i:or(?! so)|squared|cubed|factorial|hal(?:f|ves)|thirds?|fourths?|fifths?|tenths?"
    r"|sixths|sevenths|eighths|ninths|hundredths?|thousandths?"
    r"|hundreds?|thousands?|millions?|billions?|trillions?|dozens?"
    r"|lakhs?|crores?|mil|mn|bn|tn|point|(?:gross|repeating|recurring)(?! +[A-Za-z]))(?![A-Za-z])"
    # 18 and two thirds, 18 hours and a half, 18 feet six inches, $18 and six cents, 18 ft. 6 in.
    r"|[\s-]*(?:[A-Za-z]{1,12} )?"
    rf"(?:and (?:half|third|quarter|an? {_PARTS})|(?:and )?{_WORD}[ -]{_PARTS})"
    r"(?![A-Za-z]| (?:of|as|that|those|the|are|is|was|were|have|had) )"
    rf"|[\s-]*(?:{_MEASURE}\.?,? (?:and )?|and )(?:{_WORD}[ -]){{1,2}}"
    rf"(?:{_MEASURE}|(?i:in|inch(?:es)?|secs?|seconds?|oz|ounces?|cents?))(?![A-Za-z])"
    r"|[\s-]*(?:ft|yds?|lbs?|hrs?|mins?|h|m)\. (?:& |and )?[0-9]|[A-Za-z]+[0-9]+[A-Za-z]"
    r"|\s+to the [0-9]"
)
_CHANGED_LATER = re.compile(
    r"[×÷·⋅±+=<>≤≥≠^]|\*{1,2}\s?[0-9(]|\s\*\s|\s-\s*[$]?[0-9]|[,;&]\s*[$€£]?[0-9]"
    r"|\b(?i:and|or|to|than|over|by|times|mod|less|percent of|remainder|remainder (?:of|is)|rem)\s+"
    r"[$€£]?-?\.?[0-9]|\b(?i:plus|minus|to the (?:[a-z0-9]+ )?power)\b"
    rf"|\b(?i:times|multiplied by|divided by) (?:{_WORD}(?=\W*\Z)|[b-z](?![A-Za-z]))"
    rf"|\b{_MEASURE}\s+[0-9]"
)
_ASIDE = re.compile(r"[(;]|, (?![$€£]?[0-9])|[.?!]\s|\b(?:because|since|so|as)\b")
_GLUED = {*UNITS, "st", "nd", "rd", "th", "am", "pm", "rs", "g", "m", "mg"}
# What may not stand before the last number of a text: it is only a part of something
_PART = re.compile(
    r"(?:[\^×÷·⋅∙±≠≤≥√/]|[\w)}]_|\\[A-Za-z]+(?:\[[^\[\]]{0,20}\])?|[0-9A-Za-z)\]}]\s*\+"
    r"|[^\s*]\s*\*[ \t]+|[0-9A-Za-z)]\*{1,2}|[^\s-][ \t]+[<>]=?|!=)\s*[{($]*\s*\Z"
    r"|[0-9][.,:'][$]?\Z|(?<![Rr]s)(?<=[A-Za-z])\Z|[0-9)}]\{?\Z"
    r"|[0-9)] {1,2}(?:[xX] {1,2})?\Z|[0-9]\s+:\s*\Z"
    r"|[A-Za-z]\(\Z|\bbetween\s+\S{1,20}\s+and\s+\Z"
    r"|(?i:\bnot(?: [a-z]+){0,2}|n't(?: [a-z]+){0,2}|minus|negative|plus|times|by|than"
    rf"|sqrt|log|twice|double|triple|(?:{_PARTS}|percent) of(?: the)?|[0-9] remainder"
    r"|(?:sum|product|difference|average|mean) (?:of|between) \S{1,20} and)[ \t]+[$€£({*]*\Z"
)
# … and what with a unit behind it is one measure with it: 2 hours and 30 minutes
_MEASURED = re.compile(
    rf"(?:[0-9] ?|\b{_WORD}[ -]|(?<![s0-9] )\ban? ){_MEASURE}(?: and)? {{1,2}}\Z"
    r"|[$€£][0-9.,]{1,20} and {1,2}\Z"
)
_OF_MEASURE = re.compile(
    r" ?(?i:months?|weeks?|wks?|days?|hours?|hrs?|minutes?|mins?|seconds?|secs?|feet|foot|ft"
    r"|inch(?:es)?|in|meters?|metres?|cm|mm|pounds?|lbs?|ounces?|oz|grams?|g|quarts?|pints?|cups?"
    r"|cents?|m|s)(?![A-Za-z])"
)
_LEFT_OF_THREE = re.compile(r"(?<![0-9])[0-9]{1,3}, +\Z")  # 18, 000


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
    right["numeric"] = value is not None and value == numeric_answer(gold)
    return right


def taken(rule: str, response: str) -> str | Fraction | None:
    """The answer that a rule takes from a response; equal values are equal."""
    return numeric_answer(response) if rule == "numeric" else extract(rule, response)


def check_gold(rule: str, gold: str) -> None:
    """Raise UserError for a gold that `rule` cannot compare with."""
    text = _gold_text(gold)
    if rule == "numeric" and numeric_answer(text) is None:
        raise UserError(f"gold answer {gold[-60:]!r} has no value; --rule numeric needs one")


def numeric_answer(response: str) -> Fraction | None:
    """The number that `numeric` takes from a response, or from a gold that has its `#### `.

    It is the one that the text's answer is, if this is a number; where nothing says what the answer
    is, the last one. What comes before a last `</think>` is not looked at.
    """
    response = response[response.rfind("</think>") + 1 :]
    answer = _answer_text(response)
    return _last_number(response[-_WRITTEN_IN:]) if answer is None else _value_of_text(answer)


def _answer_text(response: str) -> str | None:
    """What follows the first `####` that is no heading, else the last box, else "the answer is"."""
    for mark in _MARK.finditer(response[:_SCANNED]):
        if re.search("[0-9０-９]", mark[0]):
            return mark[0].lstrip("#")
    end = response[-_SCANNED:]
    *_, box = [None, *_BOX.finditer(end)]
    if box is not None:
        held, behind = held_by_box(end, box.end()) or (_line(end, box.end()), len(end))
        is_in_words = _IN_WORDS.search(held) and not re.search("[0-9]", held)
        return _line(end, behind).lstrip(" ,.;:($") if is_in_words else held
    *_, said = [None, *_SAID.finditer(end)]
    if said is not None:
        line = _line(end, said.end())
        is_final = said[0].endswith("s") or end[: said.start()].lower().endswith("final ")
        # "Answer:" may also stand before a whole computation.
        if is_final or len(re.findall("[0-9.,]+", line)) == 1:
            return line
    return None


def _line(text: str, start: int) -> str:
    return text[start : start + _WRITTEN_IN].partition("\n")[0]


def _value_of_text(answer: str) -> Fraction | None:
    """The value of a text that is one number, beside a name, a unit or words; else None."""
    text = _tidy(answer[:_WRITTEN_IN])
    # `x = 18` and `9 * 2 = 18` are 18; `2x = 18` is not.
    *left, right = text.split("=")
    if left and all(_NAME.fullmatch(part) for part in left):
        text = right
    text = _LEAD.sub("", text, count=1)
    minus = _MINUS.match(text)
    number = _NUMBER.match(text, minus.end() if minus else 0)
    if number is None or _is_changed(text[number.end() :]):
        return None
    return _value(number, minus is not None)


def _last_number(text: str) -> Fraction | None:
    """The last number of a text; None where it is a part of an operation, a list or a word."""
    text = _POWER_OF_UNIT.sub("", _tidy(text))
    *_, number = [None, *_NUMBER.finditer(text)]
    if number is None:
        return None
    before, rest = text[max(0, number.start() - 80) : number.start()], text[number.end() :]
    minus = _MINUS_IN_TEXT.search(before)
    before = before[: minus.start()] if minus else before
    if re.search(r"[A-Za-z]{2} [$€£*]*$", before):
        rest = rest.lstrip("!")  # a word, the number, and joy
    is_cut = len(number[0]) == 3 and _LEFT_OF_THREE.search(before)
    is_rest = _MEASURED.search(before) and _OF_MEASURE.match(rest)
    if is_cut or is_rest or _PART.search(before) or _is_changed(rest):
        return None
    return _value(number, minus is not None)


def _is_changed(rest: str) -> bool:
    """Whether what stands after a number makes another value of it."""
    rest = _CLOSING.sub("", _POWER_OF_UNIT.sub("", rest[:500]), count=1)
    glued = re.match("[A-Za-z]+", rest)
    # 5m is metres, 5M millions
    unit = glued and (glued[0] if len(glued[0]) == 1 else glued[0].lower())
    if _CHANGED.match(rest) or unit and unit not in _GLUED:
        return True
    return _CHANGED_LATER.search(_ASIDE.split(rest, maxsplit=1)[0]) is not None


def _tidy(text: str) -> str:
    """A text with each number written in one of the ways that `_NUMBER` knows."""
    text = text.translate(_CHARACTERS)
    for pattern, written in _WAYS:
        text = pattern.sub(written, text)
    return text


def _value(number: re.Match[str], is_negative: bool) -> Fraction | None:
    """The value of a match of `_NUMBER`; None where it has too many digits, or divides by 0."""
    above, below = (re.sub("[ ,]", "", number[part] or "1") for part in ("above", "below"))
    if max(len(above), len(below)) > _MOST_DIGITS or Fraction(below) == 0:
        return None
    value = Fraction(above) / Fraction(below)
    if number["whole"]:
        if not 0 < value < 1:
            return None
        value += int(number["whole"])
    value *= Fraction(10) ** int(number["power"] or 0) * _TIMES[(number["times"] or "").lower()]
    return -value if is_negative else value


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
    marked = _MARKED.search(text)
    is_number = marked is not None and re.search("[0-9]", marked[1])
    if not is_number or ("####" not in gold and not _BARE.fullmatch(text[5:])):
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


TASK = Task(
    name="GSM8K",
    grade=grade,
    answer_of=partial(extract, "official"),
    gold_of=gold_of,
    metric="official",
    taken=taken,
    check_gold=check_gold,
)
