"""Rows of the user's data files, and writing our own.

Rows stay plain dicts and keep their extra keys. Everything wrong with a file is one `UserError`
that names file:line, the field, what it holds, what it must hold and how a row looks; no row is
dropped or repaired in silence, and a field that nobody reads is named: refused where it would
change what is asked.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.data.files import Broken, Cells
from src.data.mapping import LeftOut
from src.data.messages import UNUSABLE, Messages, Question, put_in_form
from src.data.sources import Named, elements_of
from src.errors import UserError

_SHOWN_PROBLEMS, _SHOWN_FIELDS = 5, 8
INSTRUCTION = "instruction"
OTHER_NAMES = ("question", "problem", "Problem")  # of the instruction: GSM8K's, MATH's, AIME's
# Where such files have the right answer, which a prompt may well come with.
ANSWERS = ("answer", "final_answer", "Answer", "solution", "Solution")
# Of well-known formats: what a row asks is another thing without them.
OF_THE_PROMPT = {
    *("input", "inputs", "prompt", "query", "system", "system_prompt"),
    *("history", "messages", "conversation", "conversations"),
    *("context", "contexts", "passage", "document", "documents", "choices", "options"),
    *("tools", "functions", "image", "images", "video", "videos", "audio", "audios"),
}
OF_THE_ANSWER = {"completion", "response"}


@dataclass(frozen=True)
class Kind:
    """What a field may hold: in words, as an example, and as a test."""

    words: str
    example: str
    accepts: Callable[[Any], bool]


def _is_string(value: Any) -> bool:
    return isinstance(value, str) and not UNUSABLE.search(value)


def _is_text(value: Any) -> bool:
    return _is_string(value) and bool(value.strip())


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # whole ones may be larger; NaN is not


# What a model wrote: bytes are tokens, too, and NUL is one of them.
SAMPLE = Kind("a string", '"..."', lambda v: isinstance(v, str) and _is_string(v.replace("\0", "")))
TEXT = Kind("a non-blank string", '"..."', _is_text)
# What is asked, and what is answered: texts, or messages of a conversation.
PROMPT = Kind(TEXT.words, TEXT.example, lambda v: _is_text(v) or isinstance(v, Messages))
ANSWER = Kind(SAMPLE.words, SAMPLE.example, lambda v: isinstance(v, Messages) or SAMPLE.accepts(v))
TEXTS = Kind(
    "a non-blank string or a list of them",
    '"..." or ["...", "..."]',
    lambda v: PROMPT.accepts(v) or isinstance(v, list) and bool(v) and all(map(PROMPT.accepts, v)),
)
LABEL = Kind(
    "a non-blank string or a finite number", '"..." or 1', lambda v: _is_text(v) or _is_number(v)
)
INDEX = Kind("a whole number from 0", "0", lambda v: type(v) is int and v >= 0)
FLAG = Kind("true or false", "true", lambda v: isinstance(v, bool))
NUMBER = Kind("a finite number", "1.5", _is_number)
FLAGS = Kind(
    "a list of true and false",
    "[true, false]",
    lambda v: isinstance(v, list) and all(isinstance(x, bool) for x in v),
)
RANKED = Kind(
    "a list of two or more non-blank strings",
    '["best", "...", "worst"]',
    lambda v: isinstance(v, list) and len(v) > 1 and all(map(PROMPT.accepts, v)),
)
NUMBERS = Kind(
    "a list of finite numbers", "[2, 1]", lambda v: isinstance(v, list) and all(map(_is_number, v))
)
IDS = Kind(
    "a list of token ids",
    "[1, 2]",
    lambda v: isinstance(v, list) and all(type(i) is int and i >= 0 for i in v),
)
LISTS = Kind(
    "a list of lists of numbers",
    "[[1, 2], [3, 4]]",
    lambda v: isinstance(v, list) and all(NUMBERS.accepts(x) for x in v),
)

Form = tuple[dict[str, Kind], dict[str, Kind]]  # the fields that are required, and others
# What solver_score.py --top_k_logprobs writes.
TOP_K: Form = (
    {
        "prompt_tokens": IDS,
        "tokens": IDS,
        "top_tokens": LISTS,
        "top_logprobs": LISTS,
        "vocabulary": TEXT,
        "temperature": NUMBER,
    },
    {"logprobs": NUMBERS, "sum": NUMBER},
)
# The forms that comparisons may have; the first row says which its file has.
TWO_SIDES: Form = {INSTRUCTION: PROMPT, "chosen": TEXTS, "rejected": TEXTS}, {}
RANKING: Form = {INSTRUCTION: PROMPT, "ranked": RANKED}, {"scores": NUMBERS}
LABELLED: Form = {INSTRUCTION: PROMPT, "output": ANSWER, "label": FLAG}, {}


class Rows(list[dict]):
    """The rows of a file, or of several.

    notes: what their user should know of them, a sentence each; places: where each stands,
    FILE:LINE.
    """

    def __init__(self, rows: list[dict], notes: list[str], places: list[str]) -> None:
        super().__init__(rows)
        self.notes, self.places = notes, places


def solver_rows(path: Named) -> "RowStream":
    """Rows `{"instruction", "output", "label"?}`, or conversations, one by one.

    Of a conversation all from its first answer on is an output.
    """
    return RowStream(path, {INSTRUCTION: PROMPT, "output": TEXTS}, {"label": LABEL}, whole=True)


def read_solver_rows(path: Named) -> Rows:
    """`solver_rows`, all of them; adds `outputs`, the accepted ones as a list."""
    stream = solver_rows(path)
    found = [(place, row | {"outputs": as_list(row["output"])}) for place, row in stream]
    return Rows([row for _, row in found], stream.notes, [place for place, _ in found])


def read_prompt_rows(path: Named, unread: Collection[str] | None = ANSWERS) -> Rows:
    """Rows `{"instruction", "output"?, "label"?}`: a prompt, and perhaps what it should lead to.

    unread: as `read_rows` has it.
    """
    return read_rows(path, {INSTRUCTION: PROMPT}, {"output": TEXTS, "label": LABEL}, unread)


def read_verifier_rows(path: Named) -> Rows:
    """Rows `{"instruction", "chosen", "rejected"}`, or `{"instruction", "ranked", "scores"?}`.

    A file has one form. Both sides come back as non-empty lists; scores go with the ranked outputs
    and do not rise.
    """
    rows = read_form(path, {"ranked": RANKING, "chosen": TWO_SIDES})
    for number, row in enumerate(rows):
        if "ranked" not in row:
            row["chosen"], row["rejected"] = as_list(row["chosen"]), as_list(row["rejected"])
        elif (scores := row.get("scores")) is not None:
            n = len(row["ranked"])
            if len(scores) != n or scores != sorted(scores, reverse=True):
                raise UserError(
                    f"{rows.places[number]}: scores are {str(scores)[:60]} for {n} ranked "
                    "outputs; give one for each, none higher than the one before it"
                )
    return rows


def read_form(path: Named, forms: dict[str, Form]) -> Rows:
    """Rows of one of several forms, told by a field of the first row; else the last form.

    forms: from such a field to the form.
    """
    return read_rows(path, *forms[form_of(path, tuple(forms))])


def form_of(path: Named, fields: tuple[str, ...]) -> str:
    """The first of the fields that the file's first row has, or the last of them."""
    values = (value for _, value in elements_of(path))
    first = next((value for value in values if not isinstance(value, LeftOut)), None)
    names = first if isinstance(first, dict) else {}
    return next((field for field in fields if field in names), fields[-1])


def is_truncated(sample: dict) -> bool | None:
    """Whether a sample's row says that the token limit cut it; None where it says nothing.

    `truncated`, or `stop_reason`, as solver_evaluate.py and solver_generate.py write them, or
    `finish_reason`, as servers do.
    """
    if isinstance(sample.get("truncated"), bool):
        return sample["truncated"]
    reason = sample.get("stop_reason") or sample.get("finish_reason")
    return None if reason is None else reason == "length"


def as_list(value: Question | list[Question]) -> list[Question]:
    """A text or a conversation as a list of one; a list of such as it is."""
    return [value] if isinstance(value, (str, Messages)) else value


def read_rows(
    path: Named,
    required: dict[str, Kind],
    optional: dict[str, Kind] | None = None,
    unread: Collection[str] | None = (),
    whole: bool = False,
) -> Rows:
    """All rows of `path`, as `RowStream` reads them."""
    stream = RowStream(path, required, optional, unread, whole)
    found = list(stream)
    return Rows([row for _, row in found], stream.notes, [place for place, _ in found])


class RowStream:
    """The rows of a source, one by one: each with every required field, each field of its kind.

    To iterate gives (place, row). Once all are read `notes` says what their user should know.
    """

    def __init__(
        self,
        path: Named,
        required: dict[str, Kind],
        optional: dict[str, Kind] | None = None,
        unread: Collection[str] | None = (),
        whole: bool = False,
    ) -> None:
        """path: whatever src/data/sources.py takes.

        An `optional` field may be missing, or say nothing as null does. unread: others that a row
        may well have; None: all may be read by somebody. A row's instruction may also be called as
        in `OTHER_NAMES`, and gets our name; a conversation gets our form (src/data/messages.py;
        whole: all of its answers are an output).
        """
        self.path, self.required, self.fields = path, required, {**required, **(optional or {})}
        self.optional, self.whole = optional or {}, whole
        self.known = None if unread is None else {*self.fields, *unread}
        if self.known is not None and INSTRUCTION in self.known:
            self.known |= {*OTHER_NAMES}
        self.notes = list[str]()

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        """Raises `UserError` behind the last row, with the first few problems and their count.

        Rows behind the first problem are read, and not given.
        """
        problems, unused = Problems(), Counter[str]()
        rows = with_unused = left_out = 0
        for where, value in elements_of(self.path):
            if isinstance(value, LeftOut):
                left_out += 1
                continue
            if isinstance(value, Cells):
                value = _spelled(value, self.fields)
            rows += 1
            found, made_of = _in_form(value, self.required, self.fields, self.whole)
            if not found:  # else what it would have been made into is missing, too
                found += _row_problems(value, self.required, self.optional, made_of)
            problems.add(where, found)
            if problems.count:
                continue
            if self.known is not None:
                others = value.keys() - self.known - made_of
                others = [n for n in value if n in others and not _is_empty(value[n])]
                unused.update(others)
                with_unused += bool(others)
            yield where, value
        if problems.count or not rows:
            raise self._wrong(problems, left_out)
        self.notes = _unused(self.path, unused, with_unused, rows)
        self.notes += [f"{self.path}: --map leaves out {left_out} rows"] * bool(left_out)

    def _wrong(self, problems: "Problems", left_out: int) -> UserError:
        example = _example(self.required, self.optional)
        if not problems.count:
            which = "no rows that --map keeps" if left_out else "no rows"
            return UserError(f"{self.path}: holds {which}; it needs at least one like {example}")
        return UserError(f"{self.path}: {problems}\nA row looks like {example}")


@dataclass
class Problems:
    """What is wrong with rows: how much it is, and in words what is shown of it."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, problems: Collection[str]) -> None:
        """where: the row's place."""
        self.count += len(problems)
        room = _SHOWN_PROBLEMS - len(self.first)
        self.first += [f"{where}: {problem}" for problem in problems][:room]

    def __str__(self) -> str:
        lines = "\n".join(f"  {problem}" for problem in self.first)
        hidden = self.count - len(self.first)
        more = f"\n  ... and {hidden} more" if hidden > 0 else ""
        return f"{self.count} problem{'s' * (self.count > 1)}:\n{lines}{more}"


def _unused(path: Named, unused: Counter[str], with_unused: int, rows: int) -> list[str]:
    """A sentence that names fields that nobody reads, [] when there are none."""
    if not unused:
        return []
    names = [_shown(name) for name, _ in unused.most_common(_SHOWN_FIELDS)]
    names += ["..."] * (len(unused) > len(names))
    number = f"{len(unused)} fields are" if len(unused) > 1 else "1 field is"
    return [f"{path}: {number} not used: {', '.join(names)} (in {with_unused} of {rows} rows)"]


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, a list with one element per line.

    Atomic; `ValueError` at NaN and infinity.
    """
    if isinstance(value, list):
        write_text(path, "[\n" + ",\n".join(map(_dumps, value)) + "\n]\n")
    else:
        write_text(path, _dumps(value, indent=2) + "\n")


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Write one row per line. Atomic; `ValueError` at NaN and infinity."""
    write_text(path, "".join(_dumps(row) + "\n" for row in rows))


# ---- text out ------------------------------------------------------------------------------------


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8. Atomic."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            # An unpaired surrogate has no UTF-8 form; its backslash form is the JSON escape for it.
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        if unfinished.exists():
            unfinished.unlink()


# ---- elements to rows ----------------------------------------------------------------------------


def _spelled(cells: Cells, fields: dict[str, Kind]) -> dict[str, Any]:
    """A row of texts as one of JSON.

    An empty cell is null. A cell that spells messages in JSON is these messages; another that its
    field does not take as it stands, and takes as what it spells, is that. What --map has made of a
    row may be no text: it stands as it is.
    """

    def value(text: Any, kind: Kind | None) -> Any:
        if not isinstance(text, str):
            return text
        is_taken = kind is None or kind.accepts(text)
        if text == "":
            return text if kind is not None and is_taken else None
        if is_taken and not text.startswith("["):
            return text
        try:
            meant = json.loads(_OF_PYTHON.get(text, text))
        except (ValueError, RecursionError):
            return text
        asked_for = kind is not None and not is_taken and kind.accepts(meant)
        return meant if asked_for or _are_messages(meant) else text

    return {name: value(text, fields.get(name)) for name, text in cells.items()}


_OF_PYTHON = {"True": "true", "False": "false"}  # how pandas writes them


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, dict) and x.keys() & {"role", "from"} for x in value)
    )


def _in_form(
    value: Any, required: Collection[str], fields: Collection[str], whole: bool
) -> tuple[list[str], set[str]]:
    """What is wrong with a row's conversation, and the fields that it was read from."""
    if not isinstance(value, dict) or INSTRUCTION not in fields:
        return [], set()
    return put_in_form(value, required, fields, whole)


def _row_problems(
    value: Any, required: dict[str, Kind], optional: dict[str, Kind], used: Collection[str]
) -> Iterator[str]:
    """What is wrong with a row. used: fields from which others were made."""
    if isinstance(value, Broken):
        yield str(value)
    elif not isinstance(value, dict):
        yield f"expected an object {{...}}, found {_describe(value)}"
    else:
        fields = {**required, **optional}
        if INSTRUCTION in fields:
            yield from _other_name_problems(value)
            yield from _left_out(value, required, {*fields, *used})
        for field, kind in fields.items():
            if field in optional and _is_empty(value.get(field)):
                continue
            if field in value:
                if not kind.accepts(value[field]):
                    yield f'field "{field}": expected {kind.words}, found {_describe(value[field])}'
            elif field in required:
                names = ", ".join(json.dumps(name[:40]) for name in list(value)[:8]) or "no fields"
                yield f'field "{field}" is missing: expected {kind.words}; the row has {names}'


def _other_name_problems(row: dict) -> Iterator[str]:
    """Give a row its instruction under our name; and what is wrong with another name beside it."""
    for name in OTHER_NAMES:
        value = row.get(name)
        if _is_empty(value):
            continue
        if _is_empty(row.get(INSTRUCTION)):
            row[INSTRUCTION] = value
        ours = row[INSTRUCTION]
        if ours is not value and not (isinstance(value, str) and value == ours):
            yield (
                f'field "{name}": is not the text of "{INSTRUCTION}" (or of another name of it), '
                "and only one is read; join them in one, or leave one out"
            )


def _left_out(row: dict, required: dict[str, Kind], fields: Collection[str]) -> Iterator[str]:
    """What belongs to the prompt, or to an answer that is learned, and is not read."""
    for name, value in row.items():
        if name.lower() in OF_THE_PROMPT:
            part, ours = "the prompt", INSTRUCTION
        elif name.lower() in OF_THE_ANSWER and "output" in required:
            part, ours = "the answer", "output"
        else:
            continue
        says_the_same = isinstance(value, str) and value == row.get(ours)
        if name not in fields and not _is_empty(value) and not says_the_same:
            yield (
                f'field "{_shown(name)}": belongs to {part} and is not read here, where it holds '
                f'{_describe(value)}; join it with "{ours}" (or, if it is something else, give it '
                "another name)"
            )


def _is_empty(value: Any, depth: int = 5) -> bool:
    """Whether a field says nothing: null, blank, or made up of such, not too deep."""
    match value:
        case None:
            return True
        case str():
            return not value.strip()
        case list() | dict():
            items = value.values() if isinstance(value, dict) else value
            return depth > 0 and all(_is_empty(item, depth - 1) for item in items)
    return False


def _shown(name: str) -> str:
    """A field's name, with no more of it than a line holds."""
    return json.dumps(name[:40])[1:-1]


def _describe(value: Any) -> str:
    """A value of JSON in words, with no more of it than a line holds."""
    match value:
        case None:
            return "null"
        case bool():
            return json.dumps(value)
        case int() | float():
            return f"the number {value}" if abs(value) < 1e15 else "a huge number"
        case str() if UNUSABLE.search(value):
            return "a string with a NUL or an unpaired surrogate"
        case str():
            return f"the string {json.dumps(value[:40])}" if value.strip() else "a blank string"
        case []:
            return "an empty list"
        case list():
            index = next((i for i, item in enumerate(value) if not _is_text(item)), None)
            if index is None:
                return "a list"
            return f"a list whose item {index} is {_describe(value[index])}"
        case _:
            return "an object"


def _example(required: dict[str, Kind], optional: dict[str, Kind]) -> str:
    fields = [f'"{field}": {kind.example}' for field, kind in required.items()]
    fields += [f'"{field}": {kind.example} (optional)' for field, kind in optional.items()]
    return "{" + ", ".join(fields) + "}"
