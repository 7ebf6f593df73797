"""Where a row becomes token ids: prompts, responses and pairs, as the trainers take them.

What a user should know of a file's rows comes with them as notes, a sentence each.
"""

import json
from array import array
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from src.data.rows import (
    SAMPLE,
    TEXT,
    read_prompt_rows,
    read_rows,
    read_solver_rows,
    read_verifier_rows,
)
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.models.batch import Sequence

if TYPE_CHECKING:
    from src.evaluation.tasks import Task


@dataclass(frozen=True)
class Comparison:
    """One prompt's responses, each side one or more, prompt included in each sequence."""

    chosen: list[Sequence]
    rejected: list[Sequence]


@dataclass(frozen=True)
class Prompt:
    """A query's ids, the right answer where the data has one, and the data row it came from."""

    tokens: list[int]
    gold: str = ""
    row: dict = field(default_factory=dict)


def encode(tokenizer: Tokenizer, instruction: str, output: str, sampled: bool = False) -> Sequence:
    """Prompt and response as ids: BOS, the instruction, the output, EOS.

    sampled: whether the output may be a model's, which need not be a whole answer.
    """
    prompt = tokenizer.prompt_ids(instruction)
    response = tokenizer.response_ids(output, sampled)
    return Sequence(array("i", prompt + response), len(prompt))  # a list takes nine times as much


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
    path: str, tokenizer: Tokenizer, max_seq_len: int, must_fit: bool = False
) -> tuple[list[Sequence], list[str]]:
    """Training sequences of a solver file, one of each accepted output; and notes."""
    rows = read_solver_rows(path)
    pairs = [(row["instruction"], output) for row in rows for output in row["outputs"]]
    sequences = [encode(tokenizer, *pair) for pair in pairs]
    nothing = tokenizer.response_ids("")
    is_empty = [[*s.tokens[s.prompt_length :]] == nothing for s in sequences]
    lengths = [len(s.tokens) for s in sequences]
    fits, notes = within(lengths, max_seq_len, must_fit, f"rows of {path}")
    notes += _counted(sum(is_empty), len(pairs), path, "have an answer without a token of its own")
    return [s for s, fit in zip(sequences, fits) if fit], rows.notes + notes + _again(pairs, path)


def comparisons(
    path: str, tokenizer: Tokenizer, max_seq_len: int, must_fit: bool = False
) -> tuple[list[Comparison], list[str]]:
    """Training comparisons of a verifier file; and notes."""
    rows, pairs = read_verifier_rows(path), []
    for row in rows:
        chosen, rejected = (
            [encode(tokenizer, row["instruction"], text, sampled=True) for text in row[side]]
            for side in ("chosen", "rejected")
        )
        pairs.append(Comparison(chosen, rejected))
    longest = [max(len(s.tokens) for s in c.chosen + c.rejected) for c in pairs]
    fits, notes = within(longest, max_seq_len, must_fit, f"rows of {path}")
    equal = sum(any(c.tokens == r.tokens for c in p.chosen for r in p.rejected) for p in pairs)
    notes += _counted(
        equal,
        len(rows),
        path,
        "have one text on both sides, chosen and rejected: it teaches nothing",
    )
    keys = [(row["instruction"], *row["chosen"], None, *row["rejected"]) for row in rows]
    return [c for c, fit in zip(pairs, fits) if fit], rows.notes + notes + _again(keys, path)


def scored_sequences(
    path: str, tokenizer: Tokenizer, max_seq_len: int
) -> tuple[list[Sequence], list[str]]:
    """Given outputs to be scored, a sequence for each row; and notes.

    Raises UserError for one too long.
    """
    rows = read_rows(path, {"instruction": TEXT, "output": SAMPLE})
    sequences = [encode(tokenizer, row["instruction"], row["output"], True) for row in rows]
    within([len(s.tokens) for s in sequences], max_seq_len, True, f"rows of {path}")
    return sequences, rows.notes


WRONG = ": they count as wrong"  # what becomes of a question without room for an answer


def prompts_of(
    instructions: list[str], tokenizer: Tokenizer, max_seq_len: int, path: str, fate: str
) -> tuple[list[list[int]], list[str]]:
    """Every instruction's ids, and a note that counts those without room for an answer.

    fate: what becomes of them.
    """
    prompts = [tokenizer.prompt_ids(text) for text in instructions]
    lengths = [len(prompt) + 1 for prompt in prompts]
    what = f"prompts of {path}, with one token more,"
    return prompts, within(lengths, max_seq_len, False, what, fate)[1]


def ppo_prompts(
    path: str,
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
        try:
            gold = rule.gold_of(row) if rule else ""
            if rule:
                rule.check_gold(rule.metric, gold)
        except UserError as error:
            raise UserError(f"{path}: row {number} (from 0): {error}") from None
        prompts.append(Prompt(tokenizer.prompt_ids(row["instruction"]), gold, row))
    lengths = [len(p.tokens) + 1 for p in prompts]
    what = f"prompts of {path}, with one token more,"
    fits, notes = within(lengths, max_seq_len, False, what)
    return [p for p, fit in zip(prompts, fits) if fit], rows.notes + notes + _again(keys, path)


def _again(keys: Collection[Hashable], path: str) -> list[str]:
    """A note of the rows that say what another has said before."""
    return _counted(len(keys) - len(set(keys)), len(keys), path, "say what a row before them says")


def _counted(n: int, rows: int, path: str, what: str) -> list[str]:
    return [f"{n} of {rows} rows of {path} {what}"] if n else []
