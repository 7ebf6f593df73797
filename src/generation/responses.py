"""What solver_generate.py reads before any work, and the lines that it writes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.data.encoding import Prompt, prompts_of
from src.data.messages import Messages, Question
from src.data.rows import read_prompt_rows
from src.generation.engine import Completion
from src.generation.journal import Journal
from src.inputs import OpenedModel, check_writable, open_model
from src.parallel.setup import Parallel
from src.ppo.judge import OpenedJudge
from src.settings.declaration import flat
from src.settings.rewards import BestOfSettings
from src.settings.scripts import SolverGenerateSettings


def cut_at(text: str, stops: tuple[str, ...]) -> str:
    """The text up to the first of the stop strings."""
    positions = [text.find(stop) for stop in stops]
    return text[: min((p for p in positions if p >= 0), default=len(text))]


@dataclass(frozen=True)
class GenerationInputs:
    """The model, and a prompt for each sample that is wanted.

    rows: (number, instruction) of each prompt; notes: what a user should know of the rows; journal:
    what an earlier run finished; judge: what scores the samples (--best_of), with `asked`, each
    prompt as it needs it.
    """

    model: OpenedModel
    rows: list[tuple[int, Question]]
    prompts: list[list[int]]
    notes: list[str]
    journal: Journal
    judge: OpenedJudge | None
    asked: list[Prompt]

    @classmethod
    def read(cls, settings: SolverGenerateSettings, parallel: Parallel) -> "GenerationInputs":
        """Read everything. Raises UserError, before any work, for whatever is wrong."""
        files, samples = settings.rows, settings.generation.num_samples
        check_writable(files.output_file, ".jsonl", files.input_file)
        model = open_model(settings.model, parallel, "lm")
        rows = read_prompt_rows(files.input_file)
        instructions = [row["instruction"] for row in rows[: files.max_rows]]
        asked = instructions, model.tokenizer, settings.batches.max_seq_len, files.input_file
        prompts, too_long = prompts_of(*asked, fate=": their outputs are empty")
        judge, judged = None, list[Prompt]()
        if settings.best_of.best_of is not None:
            judge = OpenedJudge.read(settings, settings.best_of, model.tokenizer, parallel)
            judged = judge.asked(rows[: files.max_rows], prompts, files.input_file)
        return cls(
            model,
            [(i, text) for i, text in enumerate(instructions) for _ in range(samples)],
            [prompt for prompt in prompts for _ in range(samples)],
            rows.notes + too_long,
            Journal(Path(files.output_file), settings, parallel, of_judging(settings)),
            judge,
            [prompt for prompt in judged for _ in range(samples)],
        )

    def cut(self, completions: list[Completion], stops: tuple[str, ...]) -> list[Completion]:
        """With the ids of what is written where a stop string cut a text: that is judged."""
        tokenizer, out = self.model.tokenizer, []
        for completion in completions:
            whole = tokenizer.decode(completion.tokens)
            if (text := cut_at(whole, stops)) != whole:
                ids = tokenizer.response_ids(text, sampled=True)
                completion = replace(completion, tokens=ids, logprobs=[0.0] * len(ids))
            out.append(completion)
        return out

    def lines(
        self,
        completions: list[Completion],
        stop_strings: tuple[str, ...],
        scores: list[float | None] | None = None,
    ) -> list[dict[str, Any]]:
        """A row for each completion; texts are cut before the stop strings.

        scores: of each, to be written with it.
        """
        decode = self.model.tokenizer.decode
        rows = [
            {
                "index": index,
                "instruction": instruction,
                **tools_of(instruction),
                "output": cut_at(decode(completion.tokens), stop_strings),
                "tokens": completion.tokens,
                "logprobs": completion.logprobs,
                "stop_reason": completion.stop_reason,
            }
            for (index, instruction), completion in zip(self.rows, completions)
        ]
        if scores is not None:
            rows = [{**row, "score": score} for row, score in zip(rows, scores)]
        return rows


def tools_of(question: Question) -> dict[str, Any]:
    """What a row says of a conversation's tools beside its messages, if it has any."""
    tools = question.tools if isinstance(question, Messages) else None
    return {"tools": tools} if tools else {}


def of_judging(settings: SolverGenerateSettings) -> list[str]:
    """The settings that say what becomes of completions, and not what these are."""
    return [*flat(settings.best_of), *flat(settings.judge)]


def kept(rows: list[dict[str, Any]], settings: BestOfSettings) -> list[dict[str, Any]]:
    """Of each index's rows with a score the best, or all right ones, each text once, in order.

    What the token limit cut is never kept, nor what has no score, nor by rule what is wrong.
    """
    by_index: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        is_right = settings.best_of != "rule" or row["score"]
        if row["stop_reason"] != "length" and row["score"] is not None and is_right:
            by_index.setdefault(row["index"], []).append(row)
    out = []
    for of_index in by_index.values():
        if settings.keep == "best":
            out.append(max(of_index, key=lambda row: row["score"]))
        else:
            first: dict[str, dict[str, Any]] = {}
            for row in of_index:
                first.setdefault(row["output"], row)
            out += first.values()
    return sorted(out, key=lambda row: row["index"])
