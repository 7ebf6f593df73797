"""Where a row becomes token ids: prompts, responses and pairs, as the trainers take them.

What a user should know of a file's rows comes with them as notes, a sentence each.
"""

import json
import random
from array import array
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from src.data.kept import (
    Made,
    Sequences,
    chosen,
    kept,
    kept_folder,
    lengths_of,
    usable_cores,
)
from src.data.loss_mask import ANSWERS, LossMask
from src.data.messages import Conversation, Messages, Question
from src.data.rows import (
    ANSWER,
    FLAG,
    FLAGS,
    LABELLED,
    NUMBER,
    NUMBERS,
    PROMPT,
    TOP_K,
    RowStream,
    as_list,
    form_of,
    read_prompt_rows,
    read_rows,
    read_verifier_rows,
    solver_rows,
)
from src.data.sources import Named, bytes_of, held_source
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.models.batch import Sequence

if TYPE_CHECKING:
    from src.evaluation.tasks import Task


T = TypeVar("T")
AGAIN = "say what a row before them says"
KEPT_FROM = 8 * 2**20  # bytes of a source from which on a solver's sequences are kept on disk


@dataclass(frozen=True)
class Comparison:
    """One prompt's responses, prompt included in each sequence, and which are better than which.

    pairs: (better, worse), by their places among the responses.
    """

    responses: list[Sequence]
    pairs: list[tuple[int, int]]

    @classmethod
    def of_sides(cls, chosen: list[Sequence], rejected: list[Sequence]) -> "Comparison":
        """Each of the chosen is better than each of the rejected."""
        n = len(chosen)
        return cls(chosen + rejected, [(i, n + j) for i in range(n) for j in range(len(rejected))])

    @property
    def chosen(self) -> list[int]:
        """The places of those that are better than some."""
        return sorted({better for better, _ in self.pairs})

    @property
    def rejected(self) -> list[int]:
        """The places of those that are worse than some."""
        return sorted({worse for _, worse in self.pairs})

    def limited(self, most: int | None, rng: random.Random) -> "Comparison":
        """With `most` of the pairs, drawn at random, and the responses that they are of."""
        pairs = self.pairs
        if most is not None and len(pairs) > most:
            pairs = sorted(rng.sample(pairs, most))
        kept = sorted({place for pair in pairs for place in pair})
        new = {place: i for i, place in enumerate(kept)}
        responses = [self.responses[place] for place in kept]
        return Comparison(responses, [(new[a], new[b]) for a, b in pairs])


@dataclass(frozen=True)
class Prompt:
    """A query's ids, the right answer where the data has one, and the data row it came from."""

    tokens: list[int]
    gold: str = ""
    row: dict = field(default_factory=dict)


def encode(
    tokenizer: Tokenizer, instruction: Question, output: Question, sampled: bool = False
) -> Sequence:
    """Prompt and response as ids: BOS, the instruction, the output, EOS.

    An output that is messages ends where the last of its assistant's turns does; between these are
    others' tokens, which are no part of the response. sampled: whether the output may be a model's,
    which need not be a whole answer.
    """
    if isinstance(output, str):
        prompt = tokenizer.prompt_ids(instruction)
        response = tokenizer.response_ids(output, sampled)
        return Sequence(
            array("i", prompt + response), len(prompt)
        )  # a list takes nine times as much
    ids, turns = tokenizer.whole_conversation(_conversation(instruction, output))
    spans = [span for turn in turns for span in turn]
    return Sequence.of_spans(array("i", ids[: spans[-1][1]]), spans)


def _conversation(instruction: Question, output: Question) -> Conversation:
    """What is asked and answered, as one conversation."""
    messages, answer = (
        Messages([{"role": role, "content": text}]) if isinstance(text, str) else text
        for role, text in (("user", instruction), ("assistant", output))
    )
    return Conversation(messages + answer, len(messages))


def within(
    lengths: list[int], max_seq_len: int, must_fit: bool, what: str, fate: str = " and are left out"
) -> tuple[list[bool], list[str]]:
    """Which lengths fit into max_seq_len, and a note that counts the others, if there are any.

    fate: what becomes of them. Raises UserError when all `must_fit` and one does not, or when none
    fits.
    """
    fits = [length <= max_seq_len for length in lengths]
    if all(fits):
        return fits, []
    message = (
        f"{fits.count(False)} of {len(fits)} {what} are longer than --max_seq_len {max_seq_len} "
        f"(up to {max(lengths)})"
    )
    if must_fit or not any(fits):
        raise UserError(f"{message}; raise it to {max(lengths)} or shorten them")
    return fits, [message + fate]


def solver_sequences(
    path: Named,
    tokenizer: Tokenizer,
    max_seq_len: int,
    must_fit: bool = False,
    mask: LossMask = ANSWERS,
) -> tuple[Sequences, list[str]]:
    """Training sequences of a solver's rows, one of each accepted output; and notes.

    mask: which of their tokens are trained on. Those of a large source lie on disk.
    """
    sequences, notes, n_empty, n_again = (
        _in_memory(path, tokenizer, mask)
        if bytes_of(path) < KEPT_FROM
        else _kept(path, tokenizer, mask)
    )
    fits, too_long = within(lengths_of(sequences)[0], max_seq_len, must_fit, f"rows of {path}")
    n = len(sequences)
    more = _counted(n_empty, n, path, "have an answer without a token of its own")
    more += _counted(n_again, n, path, AGAIN)
    return chosen(sequences, fits), notes + too_long + more


Found = tuple[Sequences, list[str], int, int]  # and notes; how many are empty, how many come again


def _in_memory(path: Named, tokenizer: Tokenizer, mask: LossMask) -> Found:
    source, said, sequences = solver_rows(path), list[str](), list[Sequence]()
    for place, asked, output in _pairs(source):
        sequences.append(at(place, trained, tokenizer, asked, output, mask))
        said.append(_said(asked, output))
    empty = tokenizer.response_ids("")
    n_empty = sum(s.response == empty for s in sequences)
    return sequences, source.notes, n_empty, len(said) - len(set(said))


def _kept(path: Named, tokenizer: Tokenizer, mask: LossMask) -> Found:
    """The sequences of a large source, from disk; made there by all cores if need be."""
    source, before = solver_rows(path), tokenizer.facts
    found = kept(
        kept_folder(held_source(path), tokenizer.reading, repr(mask)),
        lambda: _pairs(source),
        _made,
        partial(_begin, tokenizer, mask, tokenizer.response_ids("")),
        usable_cores(),
        lambda: source.notes,
    )
    tokenizer.forget_facts()  # of this process alone
    tokenizer.add_facts(before)
    tokenizer.add_facts(found.facts)
    return found, found.notes, found.facts.get("empty", (0, ""))[0], found.again


def _pairs(source: RowStream) -> Iterator[tuple[str, Question, Question]]:
    """(place, what is asked, one accepted output) of each of a solver's rows."""
    for place, row in source:
        for output in as_list(row["output"]):
            yield place, row["instruction"], output


def _said(*parts: Question) -> str:
    """What a row says, to be compared."""
    return json.dumps(parts, sort_keys=True)


_making: tuple[Tokenizer, LossMask, list[int]] | None = None  # of a process that makes sequences


def _begin(tokenizer: Tokenizer, mask: LossMask, empty: list[int]) -> None:
    """Make this process one that makes sequences with these. empty: an answer without a token."""
    global _making
    _making = tokenizer, mask, empty
    tokenizer.forget_facts()


def _made(rows: list[tuple[str, Question, Question]]) -> Made:
    """The sequences of some of `_pairs`."""
    assert _making is not None
    tokenizer, mask, empty = _making
    made, n_empty = Made(), 0
    for place, asked, output in rows:
        sequence = at(place, trained, tokenizer, asked, output, mask)
        made.add(sequence, _said(asked, output))
        n_empty += sequence.response == empty
    made.facts = tokenizer.facts | ({"empty": (n_empty, "")} if n_empty else {})
    tokenizer.forget_facts()
    return made


def trained(
    tokenizer: Tokenizer, instruction: Question, output: Question, mask: LossMask
) -> Sequence:
    """What a solver is trained on: a conversation whole, as its template writes it.

    Of an instruction and an output that are texts `encode`'s ids.
    """
    if isinstance(instruction, str) and isinstance(output, str):
        sequence = encode(tokenizer, instruction, output)
        ids = list(sequence.tokens)
        turns = [[(sequence.prompt_length, len(ids))]]
    else:
        ids, turns = tokenizer.whole_conversation(_conversation(instruction, output))
    return Sequence.of_spans(array("i", ids), mask.spans(tokenizer, ids, turns))


def at(place: str, work: Callable[..., T], *values: Any) -> T:
    """What the work gives of some values; a UserError names the place of the row they are from."""
    try:
        return work(*values)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


@dataclass(frozen=True)
class PairRules:
    """Which pairs of a prompt's outputs are compared.

    ranked: "all" pairs of a ranking, or the "best" against each; most: of a prompt, None: all;
    seed: of which; must_differ: refuse a row that has one text on both sides of a pair.
    """

    ranked: str = "all"
    most: int | None = None
    seed: int = 0
    must_differ: bool = False

    def pairs(self, row: dict) -> tuple[list[str], list[tuple[int, int]]]:
        """A row's outputs, and the pairs of them; of a tie by score there is none."""
        if "ranked" not in row:
            outputs, n = row["chosen"] + row["rejected"], len(row["chosen"])
            return outputs, [(i, j) for i in range(n) for j in range(n, len(outputs))]
        outputs = row["ranked"]
        scores = row.get("scores") or range(len(outputs), 0, -1)
        better = range(1 if self.ranked == "best" else len(outputs))
        pairs = [(i, j) for i in better for j in range(i + 1, len(outputs))]
        return outputs, [(i, j) for i, j in pairs if scores[i] > scores[j]]


def comparisons(
    path: Named,
    tokenizer: Tokenizer,
    max_seq_len: int,
    must_fit: bool = False,
    rules: PairRules = PairRules(),
) -> tuple[list[Comparison], list[str]]:
    """Comparisons of a file's rows, those without a pair left out; and notes."""
    rows, found, keys, equal = read_verifier_rows(path), [], [], 0
    for number, row in enumerate(rows):
        outputs, pairs = rules.pairs(row)
        place, asked = rows.places[number], row["instruction"]
        sequences = [at(place, encode, tokenizer, asked, text, True) for text in outputs]
        whole = Comparison(sequences, pairs)
        is_equal = any(sequences[a].tokens == sequences[b].tokens for a, b in pairs)
        if is_equal and rules.must_differ:
            raise UserError(
                f"{rows.places[number]}: one text is better and worse than itself: such a "
                "pair teaches nothing; take it out"
            )
        equal += is_equal
        keys.append(json.dumps([asked, outputs, pairs], sort_keys=True))
        found.append(whole.limited(rules.most, random.Random(f"{rules.seed}/pairs/{number}")))
    notes = _counted(sum(not c.pairs for c in found), len(rows), path, "have no pair but ties")
    found = [c for c in found if c.pairs]
    if not found:
        raise UserError(f"{path}: has no pair of outputs of which one is better; all are ties")
    longest = [max(len(s.tokens) for s in c.responses) for c in found]
    fits, too_long = within(longest, max_seq_len, must_fit, f"rows of {path}")
    notes += too_long + _counted(
        equal,
        len(rows),
        path,
        "have one text on both sides, chosen and rejected: it teaches nothing",
    )
    return [c for c, fit in zip(found, fits) if fit], rows.notes + notes + _again(keys, path)


@dataclass(frozen=True)
class Labelled:
    """Responses, prompt included in each sequence, and whether each is a good one."""

    responses: list[Sequence]
    labels: list[bool]


def check_sides(compared: list[Comparison], path: Named) -> None:
    """Raise UserError where a response is both better and worse than another: neither good nor bad.

    path: the file that the comparisons are of.
    """
    between = sum(bool(set(c.chosen) & set(c.rejected)) for c in compared)
    if between:
        raise UserError(
            f"{path}: {between} of {len(compared)} rows rank more than two outputs: one between is "
            "neither good nor bad; give chosen and rejected, a label, or --ranked_pairs best"
        )


def labelled(
    path: Named,
    tokenizer: Tokenizer,
    max_seq_len: int,
    must_fit: bool = False,
    rules: PairRules = PairRules(),
) -> tuple[list[Labelled], list[str]]:
    """Rows with a `label`, true or false, or comparisons, whose sides are labels; and notes.

    Raises UserError where there is but one label in the file, or a ranking, which has none.
    """
    if form_of(path, ("ranked", "chosen", "label")) != "label":
        compared, notes = comparisons(path, tokenizer, max_seq_len, must_fit, rules)
        check_sides(compared, path)
        return [
            Labelled(c.responses, [i in c.chosen for i in range(len(c.responses))])
            for c in compared
        ], notes
    rows = read_rows(path, *LABELLED)
    found = [
        Labelled(
            [at(place, encode, tokenizer, row["instruction"], row["output"], True)], [row["label"]]
        )
        for place, row in zip(rows.places, rows)
    ]
    fits, notes = within(
        [len(x.responses[0].tokens) for x in found], max_seq_len, must_fit, f"rows of {path}"
    )
    found = [x for x, fit in zip(found, fits) if fit]
    if len({x.labels[0] for x in found}) == 1:
        raise UserError(
            f"{path}: every row's label is {str(found[0].labels[0]).lower()}; good and bad outputs "
            "are needed, true and false"
        )
    keys = [json.dumps(row, sort_keys=True) for row in rows]
    return found, rows.notes + notes + _again(keys, path)


def scored_sequences(
    path: Named, tokenizer: Tokenizer, max_seq_len: int, one_turn: bool = False
) -> tuple[list[Sequence], list[str]]:
    """Given outputs to be scored, a sequence for each row; and notes.

    one_turn: whether an output must be one. Raises UserError for several, and for one too long.
    """
    rows = read_rows(path, {"instruction": PROMPT, "output": ANSWER})
    sequences = [
        at(place, encode, tokenizer, row["instruction"], row["output"], True)
        for place, row in zip(rows.places, rows)
    ]
    for place, sequence in zip(rows.places, sequences):
        if one_turn and sequence.spans is not None:
            raise UserError(
                f"{place}: its completion has several turns of the assistant, and the last one is "
                "scored: put those before into the prompt"
            )
    within([len(s.tokens) for s in sequences], max_seq_len, True, f"rows of {path}")
    return sequences, rows.notes


@dataclass(frozen=True)
class Graded:
    """A response, prompt included, and what a verifier should say of it, or of each of its steps.

    places: the tokens at which it says so, by their places in the sequence; grades: what.
    """

    sequence: Sequence
    places: list[int]
    grades: list[float]


def step_places(tokenizer: Tokenizer, sequence: Sequence, separator: str) -> list[int]:
    """The tokens that end a response's steps, the last of them the response's own last token.

    A step ends with the token that completes its separator; behind the last one none is needed.
    Nothing but blanks is no step: separators in a row are one.
    """
    ids = list(sequence.tokens[sequence.prompt_length :])
    text = tokenizer.decode(ids)
    places, end = list[int](), 0
    *parts, rest = text.split(separator)
    while parts and not rest.strip():  # the last step ends the response
        rest = parts.pop()
    for part in parts:
        end += len(part) + len(separator)
        if not part.strip():
            continue
        # The first token with which the text is as long: a text only grows.
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if len(tokenizer.decode(ids[:middle])) >= end:
                high = middle
            else:
                low = middle + 1
        places.append(sequence.prompt_length + low - 1)
    return [*places, len(sequence.tokens) - 1]


def graded_rows(
    path: Named,
    tokenizer: Tokenizer,
    max_seq_len: int,
    must_fit: bool,
    objective: str,
    separator: str | None,
) -> tuple[list[Graded], list[str]]:
    """Rows with a `score` ("pointwise") or a `label` ("classification"); and notes.

    separator: of steps, of which each has one: then they are the lists `scores` and `labels`.
    Raises UserError for another number of them than of steps, and for one label in a whole file.
    """
    kinds = {
        ("pointwise", False): ("score", NUMBER),
        ("pointwise", True): ("scores", NUMBERS),
        ("classification", False): ("label", FLAG),
        ("classification", True): ("labels", FLAGS),
    }
    field, kind = kinds[objective, separator is not None]
    rows = read_rows(path, {"instruction": PROMPT, "output": ANSWER, field: kind})
    found = []
    for number, row in enumerate(rows):
        asked, output = row["instruction"], row["output"]
        sequence = at(rows.places[number], encode, tokenizer, asked, output, True)
        places, grades = [len(sequence.tokens) - 1], [row[field]]
        if separator is not None:
            places, grades = step_places(tokenizer, sequence, separator), row[field]
            if len(grades) != len(places):
                raise UserError(
                    f"{rows.places[number]}: has {len(grades)} {field} for {len(places)} "
                    f"steps, which --step_separator {separator!r} ends; give one for each"
                )
        found.append(Graded(sequence, places, [float(grade) for grade in grades]))
    lengths = [len(x.sequence.tokens) for x in found]
    fits, notes = within(lengths, max_seq_len, must_fit, f"rows of {path}")
    found = [x for x, fit in zip(found, fits) if fit]
    if len({grade for x in found for grade in x.grades}) == 1:
        raise UserError(
            f"{path}: every {field.removesuffix('s')} is {found[0].grades[0]:g}: there is nothing "
            "to tell apart"
        )
    keys = [json.dumps(row, sort_keys=True) for row in rows]
    return found, rows.notes + notes + _again(keys, path)


@dataclass(frozen=True)
class TopK:
    """A teacher's likeliest tokens at each response token of each row.

    ids: int32, logprobs: fp32, [response tokens, k] of each row; temperature: that the logits were
    divided by.
    """

    sequences: list[Sequence]
    ids: list[torch.Tensor]
    logprobs: list[torch.Tensor]
    temperature: float


def top_k_rows(
    path: Named, tokenizer: Tokenizer, max_seq_len: int, must_fit: bool = False
) -> tuple[TopK, list[str]]:
    """What solver_score.py --top_k_logprobs wrote, where it fits; and notes.

    Raises UserError for another vocabulary, and for lists that do not go with the tokens.
    """
    rows = read_rows(path, *TOP_K)
    for number, row in enumerate(rows):
        where, n = rows.places[number], len(row["tokens"])
        if row["vocabulary"] != tokenizer.vocabulary:
            raise UserError(
                f"{where}: was written with another vocabulary than {tokenizer.path}'s: ids would "
                "mean other texts; teacher and student must share it"
            )
        k = len(rows[0]["top_tokens"][0]) if rows[0]["top_tokens"] else 0
        sizes = [len(x) for key in ("top_tokens", "top_logprobs") for x in row[key]]
        if not n or not row["prompt_tokens"] or not k or sizes != [k] * (2 * n):
            raise UserError(
                f"{where}: has {n} tokens and not as many lists of {k} top_tokens and top_logprobs"
            )
        ids = [i for x in (row["prompt_tokens"], row["tokens"], *row["top_tokens"]) for i in x]
        if max(ids) >= tokenizer.vocab_size or any(type(i) is not int for i in ids):
            raise UserError(f"{where}: holds ids that are no token of {tokenizer.path}")
    temperatures = {float(row["temperature"]) for row in rows}
    if len(temperatures) > 1:
        raise UserError(f"{path}: its rows have several temperatures ({sorted(temperatures)[:3]})")
    sequences = [
        Sequence(array("i", row["prompt_tokens"] + row["tokens"]), len(row["prompt_tokens"]))
        for row in rows
    ]
    lengths = [len(s.tokens) for s in sequences]
    fits, notes = within(lengths, max_seq_len, must_fit, f"rows of {path}")
    kept = [(s, row) for s, row, fit in zip(sequences, rows, fits) if fit]
    found = TopK(
        [s for s, _ in kept],
        [torch.tensor(row["top_tokens"], dtype=torch.int32) for _, row in kept],
        [torch.tensor(row["top_logprobs"]) for _, row in kept],
        temperatures.pop(),
    )
    return found, rows.notes + notes


def prompt_sequences(
    path: Named, tokenizer: Tokenizer, max_seq_len: int
) -> tuple[list[Sequence], list[str]]:
    """Prompts without a response, where there is room for one; and notes."""
    rows = read_prompt_rows(path)
    prompts = [
        at(place, tokenizer.prompt_ids, row["instruction"]) for place, row in zip(rows.places, rows)
    ]
    what = f"prompts of {path}, with one token more,"
    fits, notes = within([len(p) + 1 for p in prompts], max_seq_len, False, what)
    found = [Sequence(array("i", p), len(p)) for p, fit in zip(prompts, fits) if fit]
    return found, rows.notes + notes


WRONG = ": they count as wrong"  # what becomes of a question without room for an answer


def prompts_of(
    instructions: Collection[Question],
    tokenizer: Tokenizer,
    max_seq_len: int,
    path: Named,
    fate: str,
) -> tuple[list[list[int]], list[str]]:
    """Every instruction's ids, and a note that counts those without room for an answer.

    fate: what becomes of them.
    """
    prompts = [tokenizer.prompt_ids(text) for text in instructions]
    lengths = [len(prompt) + 1 for prompt in prompts]
    what = f"prompts of {path}, with one token more,"
    return prompts, within(lengths, max_seq_len, False, what, fate)[1]


def gold_of(rule: "Task | None", row: dict, where: str) -> str:
    """A row's right answer as the rule reads it; "" without a rule.

    Raises UserError where it is missing or unreadable. where: the row's place, for the message.
    """
    if rule is None:
        return ""
    try:
        gold = rule.gold_of(row)
        rule.check_gold(rule.metric, gold)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return gold


def ppo_prompts(
    path: Named,
    tokenizer: Tokenizer,
    rule: "Task | None",
    max_seq_len: int,
    rows_are_read: bool = False,
) -> tuple[list[Prompt], list[str]]:
    """PPO's prompts; for a rule, with their right answers, which must be there and readable.

    And notes. rows_are_read: by a user's reward function, whatever fields they have.
    """
    rows = read_prompt_rows(path, unread=None) if rows_are_read else read_prompt_rows(path)
    keys = [json.dumps(row, sort_keys=True) for row in rows]
    prompts = []
    for number, row in enumerate(rows):
        gold = gold_of(rule, row, rows.places[number])
        tokens = at(rows.places[number], tokenizer.prompt_ids, row["instruction"])
        prompts.append(Prompt(tokens, gold, row))
    lengths = [len(p.tokens) + 1 for p in prompts]
    what = f"prompts of {path}, with one token more,"
    fits, notes = within(lengths, max_seq_len, False, what)
    return [p for p, fit in zip(prompts, fits) if fit], rows.notes + notes + _again(keys, path)


def _again(keys: Collection[Hashable], path: Named) -> list[str]:
    """A note of the rows that say what another has said before."""
    return _counted(len(keys) - len(set(keys)), len(keys), path, AGAIN)


def _counted(n: int, rows: int, path: Named, what: str) -> list[str]:
    return [f"{n} of {rows} rows of {path} {what}"] if n else []
