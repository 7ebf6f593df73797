"""What solver_generate.py reads before any work, and the lines that it writes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.data.encoding import prompts_of
from src.data.rows import read_prompt_rows
from src.generation.engine import Completion
from src.generation.journal import Journal
from src.inputs import OpenedModel, check_writable, open_model
from src.parallel.setup import Parallel
from src.settings.scripts import SolverGenerateSettings


def cut_at(text: str, stops: tuple[str, ...]) -> str:
    """The text up to the first of the stop strings."""
    positions = [text.find(stop) for stop in stops]
    return text[: min((p for p in positions if p >= 0), default=len(text))]


@dataclass(frozen=True)
class GenerationInputs:
    """The model, and a prompt for each sample that is wanted.

    rows: (number, instruction) of each prompt; notes: what a user should know of the rows; journal:
    what an earlier run finished.
    """

    model: OpenedModel
    rows: list[tuple[int, str]]
    prompts: list[list[int]]
    notes: list[str]
    journal: Journal

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
        return cls(
            model,
            [(i, text) for i, text in enumerate(instructions) for _ in range(samples)],
            [prompt for prompt in prompts for _ in range(samples)],
            rows.notes + too_long,
            Journal(Path(files.output_file), settings, parallel),
        )

    def lines(
        self, completions: list[Completion], stop_strings: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        """A row for each completion; texts are cut before the stop strings."""
        decode = self.model.tokenizer.decode
        return [
            {
                "index": index,
                "instruction": instruction,
                "output": cut_at(decode(completion.tokens), stop_strings),
                "tokens": completion.tokens,
                "logprobs": completion.logprobs,
                "stop_reason": completion.stop_reason,
            }
            for (index, instruction), completion in zip(self.rows, completions)
        ]
