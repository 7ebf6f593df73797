"""The data set that needs no download: word problems from templates, in GSM8K's own format.

Each problem has one to three steps of small whole-number arithmetic, so that a model of a million
parameters learns them on a laptop. Demonstrations come in two styles, both right: "worked", one
operation per line, and "terse", the same calculation as one compound expression. The terse ones are
harder to get right, which is what a verifier and reinforcement learning have to find out.
"""

import operator
import random
import re
import zlib
from dataclasses import dataclass

from src.errors import UserError

NAMES = [
    "Ada", "Amy", "Ben", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jack", "Kim", "Lena", "Leo",
    "Maya", "Mia", "Nina", "Noah", "Omar", "Rosa", "Sam", "Tara", "Tom", "Vera", "Zoe",
]  # fmt: skip
ITEMS = [
    "apples", "balls", "beads", "books", "cards", "coins", "cookies", "cups", "eggs", "flowers",
    "keys", "kites", "lemons", "marbles", "nuts", "pears", "pencils", "pens", "plums", "shells",
    "stamps", "stickers", "stones", "toys",
]  # fmt: skip

RANGES = {**dict.fromkeys("jkmn", (2, 9)), **dict.fromkeys("xyz", (2, 20))}  # by a number's letter
SMALLEST, LARGEST = 2, 99  # of every result
TEST_SHARE = 10  # one problem in so many

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@dataclass(frozen=True)
class Template:
    """A question, and its steps as (operation, sentence): the steps' results are called p, q, r."""

    question: str
    steps: tuple[tuple[str, str], ...]


def _template(question: str, *steps: str) -> Template:
    """steps: each as "operation: sentence", with {} in the sentence where its result goes."""
    parts = [step.partition(": ") for step in steps]
    return Template(question, tuple((operation, sentence) for operation, _, sentence in parts))


TEMPLATES = (
    # one step
    _template(
        "{A} has {x} {items}. {B} gives {A} {y} more {items}. How many {items} does {A} have now?",
        "x+y: {A} has {} {items}.",
    ),
    _template(
        "A shop has {x} {items}. It sells {y} of the {items} on Monday. How many {items} are left?",
        "x-y: The shop has {} {items} left.",
    ),
    _template(
        "One box holds {n} {items}. {A} fills {k} boxes with {items}. "
        "How many {items} does {A} need?",
        "k*n: {A} needs {} {items}.",
    ),
    _template(
        "{A} shares {x} {items} equally with {k} friends. How many {items} does each friend get?",
        "x/k: Each friend gets {} {items}.",
    ),
    _template(
        "{A} is {x} years old. {B} is {k} years older than {A}. How old is {B} now?",
        "x+k: {B} is {} years old.",
    ),
    _template(
        "{A} needs {x} {items} and has only {y} {items}. How many more {items} does {A} need?",
        "x-y: {A} needs {} more {items}.",
    ),
    # two steps
    _template(
        "{A} has {x} {items} and buys {k} boxes with {m} {items} each. "
        "How many {items} does {A} have now?",
        "k*m: The boxes hold {} {items}.",
        "x+p: {A} has {} {items}.",
    ),
    _template(
        "{A} buys {k} bags with {m} {items} each and gives {y} {items} to {B}. "
        "How many {items} are left?",
        "k*m: The bags hold {} {items}.",
        "p-y: {A} has {} {items} left.",
    ),
    _template(
        "{A} has {x} {items}. {A} finds {y} more and then loses {z}. "
        "How many {items} does {A} have now?",
        "x+y: That makes {} {items}.",
        "p-z: {A} has {} {items} left.",
    ),
    _template(
        "{A} has {x} {items} and {B} has {y}. They put them all in {k} equal bags. "
        "How many {items} are in each bag?",
        "x+y: They have {} {items}.",
        "p/k: Each bag holds {} {items}.",
    ),
    _template(
        "{A} has {x} {items}, gives {y} to {B} and puts the rest in bags of {k}. "
        "How many bags does {A} fill?",
        "x-y: {A} keeps {} {items}.",
        "p/k: {A} fills {} bags.",
    ),
    _template(
        "A cake costs {k} dollars and a pie costs {m} dollars. {A} buys {n} of each. "
        "How many dollars does {A} pay?",
        "k+m: One of each costs {} dollars.",
        "p*n: {A} pays {} dollars.",
    ),
    _template(
        "{A} earns {k} dollars an hour and works {n} hours. {A} spends {y} dollars. "
        "How many dollars are left?",
        "k*n: {A} earns {} dollars.",
        "p-y: {A} has {} dollars left.",
    ),
    _template(
        "{A} reads {k} pages a day for {m} days. The book has {x} pages. How many pages are left?",
        "k*m: {A} reads {} pages.",
        "x-p: There are {} pages left.",
    ),
    _template(
        "{A} has {k} times as many {items} as {B}. {B} has {n} {items}. "
        "How many {items} do they have together?",
        "k*n: {A} has {} {items}.",
        "p+n: They have {} {items}.",
    ),
    _template(
        "{A} has {x} {items}. {B} has {y} fewer {items} than {A}. "
        "How many {items} do they have together?",
        "x-y: {B} has {} {items}.",
        "x+p: They have {} {items}.",
    ),
    _template(
        "{A} has {x} {items}. {B} has {y} more {items} than {A}. "
        "How many {items} do they have together?",
        "x+y: {B} has {} {items}.",
        "x+p: They have {} {items}.",
    ),
    _template(
        "{x} girls and {y} boys ride to school in {k} equal groups. "
        "How many children are in each group?",
        "x+y: There are {} children.",
        "p/k: Each group has {} children.",
    ),
    _template(
        "{A} runs {k} miles a day and {B} runs {m} miles a day. "
        "How many miles do they run in {n} days?",
        "k+m: They run {} miles a day.",
        "p*n: They run {} miles.",
    ),
    _template(
        "A rope of {x} feet is cut in {k} equal parts. {A} needs {m} such parts. "
        "How many feet does {A} need?",
        "x/k: Each part is {} feet.",
        "p*m: {A} needs {} feet.",
    ),
    _template(
        "{A} has {x} dollars and buys {k} {items} for {m} dollars each. How many dollars are left?",
        "k*m: The {items} cost {} dollars.",
        "x-p: {A} has {} dollars left.",
    ),
    _template(
        "A train has {k} cars with {n} seats each. People take {y} of the seats. "
        "How many seats are free?",
        "k*n: The train has {} seats.",
        "p-y: There are {} free seats.",
    ),
    # three steps
    _template(
        "{A} buys {k} bags with {m} {items} each. {B} buys {x} {items}. They use {y}. "
        "How many {items} are left?",
        "k*m: {A} buys {} {items}.",
        "p+x: They buy {}.",
        "q-y: They have {} left.",
    ),
    _template(
        "{A} sells {k} pies for {m} dollars each and {n} cakes for {j} dollars each. "
        "How many dollars does {A} earn?",
        "k*m: The pies make {}.",
        "n*j: The cakes make {}.",
        "p+q: {A} earns {} dollars.",
    ),
    _template(
        "{A} has {x} {items}. {B} has {y} fewer. They put all the {items} in {k} equal boxes. "
        "How many are in each box?",
        "x-y: {B} has {} {items}.",
        "x+p: They have {}.",
        "q/k: Each box holds {} {items}.",
    ),
    _template(
        "{A} earns {k} dollars an hour. {A} works {m} hours on Monday and {j} on Friday, "
        "then spends {y} dollars. How many dollars are left?",
        "m+j: {A} works {} hours.",
        "k*p: {A} earns {}.",
        "q-y: {A} has {} dollars left.",
    ),
    _template(
        "A shop gets {k} boxes with {n} {items} each. {y} break and the rest go in {m} equal bags. "
        "How many are in each bag?",
        "k*n: The boxes hold {}.",
        "p-y: It keeps {} {items}.",
        "q/m: Each bag holds {}.",
    ),
    _template(
        "A farm has {k} cows and {n} hens. A cow has 4 legs and a hen has 2 legs. "
        "How many legs are there in all?",
        "k*4: The cows have {} legs.",
        "n*2: The hens have {}.",
        "p+q: There are {} legs.",
    ),
    _template(
        "A garden has {k} rows of {n} trees. {A} cuts {x} trees and plants {y} new ones. "
        "How many trees are there now?",
        "k*n: There are {} trees.",
        "p-x: {A} leaves {}.",
        "q+y: There are {} now.",
    ),
    _template(
        "{A} has {x} {items}. {B} has {k} times as many and gives {y} away. "
        "How many {items} do they have in all?",
        "x*k: {B} has {} {items}.",
        "p-y: {B} keeps {}.",
        "x+q: They have {} in all.",
    ),
)


def generate(
    n: int, seed: int, part: str = "train", terse_share: float = 0.5, max_steps: int = 3
) -> list[dict]:
    """`n` rows `{"instruction", "output", "label"}`, no question twice.

    They are the same for the same arguments. Which `part` ("train" or "test") a problem belongs to
    is a property of its template and numbers alone, so the two never share one, whatever the seeds
    and the names in it. `terse_share` of the outputs are terse, the rest worked; no problem has
    more than `max_steps` steps. Raises `UserError` when the templates cannot make `n` different
    questions.
    """
    if part not in ("train", "test") or not 0 <= terse_share <= 1 or n < 1:
        raise UserError(
            f"need part train or test, terse_share in [0, 1] and n of at least 1; "
            f"got {part!r}, {terse_share} and {n}"
        )
    templates = [template for template in TEMPLATES if len(template.steps) <= max_steps]
    rng = random.Random(f"{part} {seed}")
    rows: dict[str, dict] = {}
    repeats = 0  # questions in a row that were there already
    while len(rows) < n:
        if repeats > 2000:
            raise UserError(
                f"the templates make little more than {len(rows)} different questions for {part}; "
                f"ask for fewer than {n}"
            )
        template = rng.choice(templates)
        numbers, results = _numbers(template, part, rng)
        first, second = rng.sample(NAMES, 2)
        words = {"A": first, "B": second, "items": rng.choice(ITEMS)}
        style = _terse if rng.random() < terse_share else _worked
        question = template.question.format(**words, **numbers)
        repeats = repeats + 1 if question in rows else 0
        rows.setdefault(
            question,
            {
                "instruction": question,
                "output": style(template, numbers, results, words),
                "label": str(results[-1]),
            },
        )
    return list(rows.values())


def _numbers(template: Template, part: str, rng: random.Random) -> tuple[dict[str, int], list[int]]:
    """Numbers for the question's letters, drawn until all results are small and of this part."""
    letters = re.findall(r"{([a-z])}", template.question)
    while True:
        numbers = {letter: rng.randint(*RANGES[letter]) for letter in letters}
        problem = f"{TEMPLATES.index(template)} {numbers}"
        results = _results(template, numbers)
        if results and (zlib.crc32(problem.encode()) % TEST_SHARE == 0) == (part == "test"):
            return numbers, results


def _results(template: Template, numbers: dict[str, int]) -> list[int] | None:
    """Every step's result; None if one is not whole or not small."""
    known, results = dict(numbers), []
    for name, (operation, _) in zip("pqr", template.steps):
        left, sign, right = _parsed(operation)
        result = _OPERATORS[sign](int(known.get(left, left)), int(known.get(right, right)))
        if result != int(result) or not SMALLEST <= result <= LARGEST:
            return None
        known[name] = int(result)
        results.append(int(result))
    return results


def _worked(
    template: Template, numbers: dict[str, int], results: list[int], words: dict[str, str]
) -> str:
    """A line for each step, with its own calculation."""
    known = numbers | dict(zip("pqr", results))
    lines = []
    for (operation, sentence), result in zip(template.steps, results):
        left, sign, right = _parsed(operation)
        note = f"<<{known.get(left, left)}{sign}{known.get(right, right)}={result}>>{result}"
        lines.append(sentence.format(note, **words))
    return "\n".join([*lines, f"#### {results[-1]}"])


def _terse(
    template: Template, numbers: dict[str, int], results: list[int], words: dict[str, str]
) -> str:
    """The last sentence with all the steps composed into one expression."""
    # name -> (expression, its outer sign), which tells where parentheses are needed
    texts = {letter: (str(number), "") for letter, number in numbers.items()}
    for name, (operation, _) in zip("pqr", template.steps):
        left_name, sign, right_name = _parsed(operation)
        left, left_sign = texts.get(left_name, (left_name, ""))
        right, right_sign = texts.get(right_name, (right_name, ""))
        if sign in "*/" and left_sign in ("+", "-"):
            left = f"({left})"
        if right_sign in ("+", "-") and sign != "+" or right_sign in ("*", "/") and sign == "/":
            right = f"({right})"
        texts[name] = left + sign + right, sign
    expression, result = texts["pqr"[len(results) - 1]][0], results[-1]
    return (
        template.steps[-1][1].format(f"<<{expression}={result}>>{result}", **words)
        + f"\n#### {result}"
    )


def _parsed(operation: str) -> tuple[str, str, str]:
    """A template's operation, such as "k*4", as (left, sign, right)."""
    match = re.fullmatch(r"(\w+)([-+*/])(\w+)", operation)
    assert match is not None, operation
    return match[1], match[2], match[3]
