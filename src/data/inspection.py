"""A data file as its trainer reads it, and what there is to know of it before anything is trained.

Rows go through the trainers' own readers and encoding, so that what is shown is what is trained on.
"""

import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from src.data.encoding import PairRules, encode, trained
from src.data.loss_mask import LossMask
from src.data.messages import WHOLE, Message, Messages, Question
from src.data.rows import (
    LABELLED,
    Rows,
    form_of,
    read_prompt_rows,
    read_rows,
    read_solver_rows,
    read_verifier_rows,
)
from src.data.sources import Named, Source, elements_of, parts_of
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.models.batch import Sequence

MOST_BINS = 20
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
COMPARED, SOLVED = ("ranked", "chosen"), ("output", "completion", *WHOLE)


@dataclass(frozen=True)
class Response:
    """One of a row's responses, with the prompt's tokens before its own.

    text: None: the prompt is alone; name: what it is.
    """

    name: str
    text: Question | None
    sequence: Sequence


@dataclass(frozen=True)
class Example:
    """A row with what its trainer makes of it: its responses, or its prompt alone."""

    place: str
    row: dict
    responses: list[Response]

    @property
    def messages(self) -> list[Message]:
        """All messages of the row: those of its prompt, and of each response."""
        asked = [("user", self.row["instruction"])]
        answers = [("assistant", response.text) for response in self.responses]
        return [
            message
            for role, text in asked + answers
            if text is not None
            for message in (text if isinstance(text, Messages) else [{"role": role}])
        ]


@dataclass(frozen=True)
class Inspection:
    """The rows of a file.

    kind: whose they are, "solver", "verifier" or "prompts"; broken: what is wrong with rows that
    have no tokens or no loss mask, each with its place; notes: what a user should know of others.
    """

    kind: str
    examples: list[Example]
    broken: list[str]
    notes: list[str]

    @cached_property
    def sequences(self) -> list[Sequence]:
        """Of each response, prompt included; without responses of each prompt."""
        return [response.sequence for x in self.examples for response in x.responses]

    @cached_property
    def lengths(self) -> list[int]:
        """The tokens of each sequence."""
        return [len(sequence.tokens) for sequence in self.sequences]

    @cached_property
    def trained(self) -> list[int]:
        """The tokens of each sequence that are trained on."""
        return [sequence.response_length for sequence in self.sequences]

    @cached_property
    def sizes(self) -> list[int]:
        """What --max_seq_len is held against, of each thing that it leaves out.

        That is a response; of compared ones the longest, since they go together; and a prompt with
        a token of its answer.
        """
        if self.kind == "solver":
            return self.lengths
        more = self.kind == "prompts"
        return [max(len(r.sequence.tokens) for r in x.responses) + more for x in self.examples]

    @cached_property
    def roles(self) -> Counter[str]:
        """How many messages there are of each role."""
        return Counter(message["role"] for x in self.examples for message in x.messages)

    @cached_property
    def tools(self) -> Counter[str]:
        """How many calls there are of each tool; of one that is offered and never called 0."""
        calls: Counter[str] = Counter()
        for example in self.examples:
            asked = example.row["instruction"]
            for tool in (asked.tools or []) if isinstance(asked, Messages) else []:
                calls[str(tool.get("function", tool).get("name"))] += 0
            for message in example.messages:
                for call in message.get("tool_calls") or []:
                    calls[call.get("function", call)["name"]] += 1
        return calls

    def too_long(self, max_seq_len: int) -> int:
        """How many of `sizes` a limit leaves out."""
        return sum(size > max_seq_len for size in self.sizes)

    def again(self, of_prompts: bool) -> list[tuple[str, str]]:
        """(place, place of the first) of each row that says what one before it says.

        of_prompts: of each whose prompt does.
        """
        first: dict[str, str] = {}
        found = []
        for example in self.examples:
            asked = example.row["instruction"]
            tools = asked.tools if isinstance(asked, Messages) else None
            key = json.dumps([asked, tools] if of_prompts else example.row, sort_keys=True)
            if first.setdefault(key, example.place) != example.place:
                found.append((example.place, first[key]))
        return found

    def spread(self, n: int) -> list[Example]:
        """`n` rows from all over the file, the first among them."""
        n = min(n, len(self.examples))
        return [self.examples[i * len(self.examples) // n] for i in range(n)]


def inspected(source: Source, kind: str, tokenizer: Tokenizer, mask: LossMask) -> Inspection:
    """The rows of a source, all of them: weights do not count.

    kind: "auto": as the first row looks. Raises UserError where the trainer's reader does; a row
    that cannot be encoded, or has nothing that the mask lets be trained on, is one of `broken`.
    """
    parts = parts_of(source.text)
    sources = [replace(source, text=part.location) for part in parts]
    if parts[0].weight is None:  # then they are read as one
        sources = [source]
    kind = kind_of(sources[0]) if kind == "auto" else kind
    if kind != "solver" and mask != LossMask():
        raise UserError(
            f"{source}: holds rows of kind {kind}, and --loss_on, --response_template and "
            "--instruction_template are for a solver's; leave them out, or give --kind solver"
        )
    examples, broken, notes = list[Example](), list[str](), list[str]()
    for part in sources:
        rows, encoded = _READERS[kind](part, tokenizer, mask)
        notes += rows.notes
        for place, row in zip(rows.places, rows):
            try:
                examples.append(Example(place, row, encoded(row)))
            except UserError as error:
                broken.append(f"{place}: {error}")
    return Inspection(kind, examples, broken, notes + tokenizer.notes())


def kind_of(source: Source) -> str:
    """Whose rows a source has, by its first."""
    row = next((value for _, value in elements_of(source) if isinstance(value, dict)), {})
    if row.keys() & {*COMPARED} or isinstance(row.get("label"), bool):
        return "verifier"
    return "solver" if any(row.get(field) for field in SOLVED) else "prompts"


Read = tuple[Rows, Callable[[dict], list[Response]]]  # the rows, and what is made of each


def _solver(path: Named, tokenizer: Tokenizer, mask: LossMask) -> Read:
    def encoded(row: dict) -> list[Response]:
        return [
            Response("output", text, trained(tokenizer, row["instruction"], text, mask))
            for text in row["outputs"]
        ]

    return read_solver_rows(path), encoded


def _verifier(path: Named, tokenizer: Tokenizer, _: LossMask) -> Read:
    is_labelled = form_of(path, (*COMPARED, "label", "chosen")) == "label"

    def encoded(row: dict) -> list[Response]:
        if is_labelled:
            texts, names = [row["output"]], [f"label {json.dumps(row['label'])}"]
        else:
            texts, names = PairRules().pairs(row)[0], _names(row)
        return [
            Response(name, text, encode(tokenizer, row["instruction"], text, True))
            for name, text in zip(names, texts)
        ]

    return read_rows(path, *LABELLED) if is_labelled else read_verifier_rows(path), encoded


def _names(row: dict) -> list[str]:
    if "ranked" not in row:
        return [side for side in ("chosen", "rejected") for _ in row[side]]
    places = [f"ranked {place}" for place in range(1, len(row["ranked"]) + 1)]
    scores = row.get("scores") or []
    return [f"{place}, score {score:g}" for place, score in zip(places, scores)] or places


def _prompts(path: Named, tokenizer: Tokenizer, _: LossMask) -> Read:
    def encoded(row: dict) -> list[Response]:
        ids = tokenizer.prompt_ids(row["instruction"])
        return [Response("prompt", None, Sequence(array("i", ids), len(ids)))]

    return read_prompt_rows(path), encoded


_READERS = {"solver": _solver, "verifier": _verifier, "prompts": _prompts}


# ---- Numbers -------------------------------------------------------------------------------------


def quantile(values: list[int], share: float) -> int:
    """The smallest value that at least this share of the values does not pass."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def histogram(lengths: list[int]) -> list[tuple[int, int, int]]:
    """(from, up to, how many) of lengths in bins of one round width, at most `MOST_BINS`.

    A few that are far longer than 99 % are in a last bin, which is as wide as need be.
    """
    longest, most = max(lengths), quantile(lengths, 0.99)
    widths = (m * 10**k for k in range(10) for m in (1, 2, 5))
    width = next(w for w in widths if most // w < MOST_BINS - 1)
    n = most // width + 1
    counts = Counter(min(length // width, n) for length in lengths)
    bins = [(i * width, (i + 1) * width, counts[i]) for i in range(n)]
    return bins + [(n * width, longest + 1, counts[n])] * (counts[n] > 0)


# ---- Tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """A token of a row, to be looked at.

    text: its part of the row's text, of a character of several tokens the last one's; spelling: as
    the tokenizer's file writes it.
    """

    id: int
    text: str
    spelling: str
    is_special: bool
    is_trained: bool


def tokens_of(tokenizer: Tokenizer, sequence: Sequence) -> list[Token]:
    """A sequence's tokens, whose texts make up what the tokenizer spells it as."""
    ids, special = list(sequence.tokens), set(tokenizer.control.values())
    is_trained = bytearray(len(ids))
    for start, stop in sequence.ranges:
        is_trained[start:stop] = b"\1" * (stop - start)
    return [
        Token(i, text, tokenizer.text_of(i), i in special, bool(mark))
        for i, text, mark in zip(ids, _texts(tokenizer, ids, special), is_trained)
    ]


def _texts(tokenizer: Tokenizer, ids: list[int], special: set[int]) -> Iterator[str]:
    """Each token's part of a text.

    That is what decoding it beside those just before it adds. Bytes that are no whole character yet
    wait for the token that completes it.
    """
    before, done = 0, 0  # decoding begins at `before`; up to `done` texts are told
    for i, token in enumerate(ids):
        if token in special:
            before = done = i + 1
            yield tokenizer.text_of(token)
            continue
        told = tokenizer.decode(ids[before:done])
        text = tokenizer.decode(ids[before : i + 1])
        is_last = i + 1 == len(ids) or ids[i + 1] in special
        if text.endswith("\ufffd") and not is_last:
            yield ""
            continue
        before, done = done, i + 1
        yield text[len(told) :]
