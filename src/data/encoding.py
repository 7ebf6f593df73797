"""Where a row becomes token ids: prompts, responses and pairs, as the trainers take them."""

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from src.data.rows import TEXT, read_prompt_rows, read_rows, read_solver_rows, read_verifier_rows
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


def encode(tokenizer: Tokenizer, instruction: str, output: str) -> Sequence:
    """Prompt and response as ids: BOS, the instruction, the output, EOS."""
    prompt = tokenizer.prompt_ids(instruction)
    tokens = array("i", prompt + tokenizer.response_ids(output))  # a list takes nine times as much
    return Sequence(tokens, len(prompt))


def within(
    lengths: list[int], max_seq_len: int, must_fit: bool, what: str
) -> tuple[list[bool], str | None]:
    """Which lengths fit into max_seq_len, and a warning that counts the others.

    Raises UserError when all `must_fit` and one does not, or when none fits.
    """
    fits = [length <= max_seq_len for length in lengths]
    if all(fits):
        return fits, None
    message = (
        f"{fits.count(False)} of {len(fits)} {what} are longer than --max_seq_len {max_seq_len} "
        f"(up to {max(lengths)})"
    )
    if must_fit or not any(fits):
        raise UserError(f"{message}; raise it to {max(lengths)} or shorten them")
    return fits, message


def solver_sequences(
    path: str, tokenizer: Tokenizer, max_seq_len: int, must_fit: bool = False
) -> tuple[list[Sequence], str | None]:
    """Training sequences of a solver file, one of each accepted output; and a warning, or None."""
    sequences = [
        encode(tokenizer, row["instruction"], output)
        for row in read_solver_rows(path)
        for output in row["outputs"]
    ]
    lengths = [len(s.tokens) for s in sequences]
    fits, warning = within(lengths, max_seq_len, must_fit, f"rows of {path}")
    return [s for s, fit in zip(sequences, fits) if fit], warning


def comparisons(
    path: str, tokenizer: Tokenizer, max_seq_len: int, must_fit: bool = False
) -> tuple[list[Comparison], str | None]:
    """Training comparisons of a verifier file; and a warning, or None."""
    pairs = []
    for row in read_verifier_rows(path):
        chosen, rejected = (
            [encode(tokenizer, row["instruction"], text) for text in row[side]]
            for side in ("chosen", "rejected")
        )
        pairs.append(Comparison(chosen, rejected))
    longest = [max(len(s.tokens) for s in c.chosen + c.rejected) for c in pairs]
    fits, warning = within(longest, max_seq_len, must_fit, f"rows of {path}")
    return [c for c, fit in zip(pairs, fits) if fit], warning


def scored_sequences(path: str, tokenizer: Tokenizer, max_seq_len: int) -> list[Sequence]:
    """Given outputs to be scored, a sequence for each row. Raises UserError for one too long."""
    rows = read_rows(path, {"instruction": TEXT, "output": TEXT})
    sequences = [encode(tokenizer, row["instruction"], row["output"]) for row in rows]
    within([len(s.tokens) for s in sequences], max_seq_len, True, f"rows of {path}")
    return sequences


def prompts_of(
    instructions: list[str], tokenizer: Tokenizer, max_seq_len: int, path: str
) -> tuple[list[list[int]], str | None]:
    """Every instruction's ids, and a warning that counts those without room for an answer."""
    prompts = [tokenizer.prompt_ids(text) for text in instructions]
    lengths = [len(prompt) + 1 for prompt in prompts]
    what = f"prompts of {path}, with one token more,"
    return prompts, within(lengths, max_seq_len, False, what)[1]


def ppo_prompts(
    path: str, tokenizer: Tokenizer, rule: "Task | None", max_seq_len: int
) -> tuple[list[Prompt], str | None]:
    """PPO's prompts; for a rule, with their right answers, which must be there and readable.

    And a warning, or None.
    """
    prompts = []
    for number, row in enumerate(read_prompt_rows(path)):
        try:
            gold = rule.gold_of(row) if rule else ""
            if rule:
                rule.grade("", gold)
        except UserError as error:
            raise UserError(f"{path}: row {number} (from 0): {error}") from None
        prompts.append(Prompt(tokenizer.prompt_ids(row["instruction"]), gold, row))
    lengths = [len(p.tokens) + 1 for p in prompts]
    what = f"prompts of {path}, with one token more,"
    fits, warning = within(lengths, max_seq_len, False, what)
    return [p for p, fit in zip(prompts, fits) if fit], warning
