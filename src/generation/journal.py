"""Completions on disk as they finish, so that a run that was cut off goes on where it was.

No row is generated twice.
"""

import glob
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import TextIO

from src.errors import UserError
from src.generation.engine import Completion, Engine, Stop, generate_sharded
from src.generation.sampling import Sampling
from src.identity import differences, identity
from src.logs import RunLog
from src.models.transformer import evaluating
from src.parallel.setup import Parallel
from src.progress import AnswerLengths
from src.settings.declaration import Settings, defaults


class Journal:
    """One file per data-parallel rank beside the output, `OUTPUT.partial-RANK`.

    They are gone when the output is there.
    """

    def __init__(
        self, output: Path, settings: Settings, parallel: Parallel, beside: Collection[str] = ()
    ) -> None:
        """Raises UserError when what is there was begun with other settings.

        beside: names of settings that no completion depends on.
        """
        self.output, self.parallel = output, parallel
        self._file: TextIO | None = None
        known = identity(settings)
        self.header = {name: value for name, value in known.items() if name not in beside}
        self.defaults = defaults(type(settings))
        self.known = self._read()  # what earlier runs finished

    def _read(self) -> dict[int, Completion]:
        known: dict[int, Completion] = {}
        for path in self._files():
            try:
                first, *lines = path.read_text(encoding="utf-8").split("\n")
                if not lines:
                    continue  # not even its first line was written whole
                self._check(json.loads(first), path)
                # After the last newline comes nothing, or a line that was cut short.
                for line in lines[:-1]:
                    row = json.loads(line)
                    known[row["request"]] = Completion(
                        row["tokens"], row["logprobs"], row["stop_reason"]
                    )
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}: cannot be read ({error}); remove it to begin again"
                ) from None
        return known

    def _check(self, begun: dict, path: Path) -> None:
        changes = differences(begun, self.header, self.defaults)
        if changes:
            told = ", ".join(map(str, changes))
            raise UserError(
                f"{path}: was begun with other settings ({told}); give the same to go on, or "
                "remove it to begin again"
            )

    def open(self) -> None:
        """Begin or go on writing, on the ranks that speak for their model."""
        if self.parallel.mp_rank == 0:
            path = self.output.with_name(f"{self.output.name}.partial-{self.parallel.dp_rank}")
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                whole = path.read_bytes()
                os.truncate(path, whole.rfind(b"\n") + 1)  # a line that was cut short
            self._file = path.open("a", encoding="utf-8")
            if self._file.tell() == 0:
                self._write(self.header)

    def add(self, request: int, completion: Completion) -> None:
        if self._file is not None:
            row = {"tokens": completion.tokens, "logprobs": completion.logprobs}
            self._write({"request": request, **row, "stop_reason": completion.stop_reason})

    def _write(self, row: dict) -> None:
        assert self._file is not None
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """After the output is written: on one rank."""
        for path in self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        return sorted(self.output.parent.glob(f"{glob.escape(self.output.name)}.partial-*"))


def generate_all(
    engine: Engine,
    prompts: list[list[int]],
    sampling: Sampling,
    stop: Stop,
    log: RunLog,
    what: str,
    journal: Journal | None = None,
) -> list[Completion]:
    """A completion for each prompt, with a progress bar; the journal's are not generated again."""
    known = dict(journal.known) if journal else {}
    if known:
        log.info(f"{len(known)} of {len(prompts)} are there already, from a run that was cut off")
    missing = [i for i in range(len(prompts)) if i not in known]
    if journal:
        journal.open()
    try:
        ranks = engine.parallel.dp_size
        lengths = AnswerLengths(len(missing), sampling.max_new_tokens, ranks)
        bar = log.progress(
            len(prompts),
            what,
            unit="answer",
            initial=len(known),
            work=lengths.work_left,
            is_bound=lambda: lengths.are_unknown,
        )
        with evaluating(engine.model), bar:

            def show(ended: list[int], running: list[int]) -> None:
                tokens, taken_in, work = lengths.step(ended, running)
                if taken_in:
                    bar.add_aside(taken_in, left=lengths.waiting)
                bar.update(len(ended), tokens=tokens, work=work, running=len(running))

            done = generate_sharded(
                engine,
                [prompts[i] for i in missing],
                sampling,
                stop,
                samples=missing,
                on_tokens=show,
                on_completion=lambda place, completion: (
                    journal.add(missing[place], completion) if journal else None
                ),
            )
    finally:
        if journal:
            journal.close()
    known |= dict(zip(missing, done))
    return [known[i] for i in range(len(prompts))]
