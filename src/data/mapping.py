"""Rows that go through a user's own function (--map FILE.py:FUNCTION) before they are read.

The function runs in processes of its own, a chunk of rows at a time: what it loads, sets or draws
touches no training. Chunks go round the processes and come back in their order, and each row finds
`random` and `numpy.random` seeded by its number: rows are the same at any number of processes.
"""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from src.data.files import Cells, Element
from src.errors import UserError
from src.logs import RunLog

ROWS_AT_ONCE = 64
_WORKER = Path(__file__).with_name("map_worker.py")


class LeftOut:
    """Stands in the place of a row that the function left out."""


@dataclass(frozen=True)
class RowMap:
    """A user's function from a row to a row, a list of rows, or None, which leaves the row out.

    where: FILE.py:FUNCTION; workers: processes.
    """

    where: str
    workers: int = 1

    def over(self, elements: Iterator[Element]) -> Iterator[Element]:
        """What the elements become, in their order, each at the place of the row it was made of.

        What is no row passes as it is. Raises UserError, which names the row, where the function
        fails or returns something else.
        """
        with ExitStack() as stack:
            waiting = deque([stack.enter_context(_Worker(self.where)) for _ in range(self.workers)])
            log = RunLog(None, "map", {}, int(os.environ.get("RANK", 0)))
            bar = stack.enter_context(log.progress(None, f"--map {self.where}", unit=" rows"))
            asked: deque[_Worker] = deque()
            first = 0
            while chunk := list(islice(elements, ROWS_AT_ONCE)):
                if not waiting:
                    waiting.append(asked.popleft())
                    yield from self._answered(waiting[0], bar)
                waiting[0].ask(first, chunk)
                asked.append(waiting.popleft())
                first += len(chunk)
            while asked:
                yield from self._answered(asked.popleft(), bar)

    def _answered(self, worker: "_Worker", bar: Any) -> Iterator[Element]:
        chunk = worker.chunk
        found = iter(worker.answer())
        for where, value in chunk:
            if not isinstance(value, dict):
                yield where, value
                continue
            rows = next(found)
            for row in rows:
                yield where, Cells(row) if isinstance(value, Cells) else row
            if not rows:
                yield where, LeftOut()
        bar.update(len(chunk))


class _Worker:
    """One of the processes; a context manager that starts and ends it."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.chunk: list[Element] = []

    def __enter__(self) -> "_Worker":
        path, colon, name = self.where.rpartition(":")
        if not colon or not path.endswith(".py") or not name.isidentifier():
            raise self._error("write FILE.py:FUNCTION, such as my_rows.py:to_row")
        if not Path(path).is_file():
            raise self._error(f"{path} is not there")
        # -P: our own folder is none to import from. One hash seed: sets have one order.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), path, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        ready = self._read()
        if ready is not True:
            self.__exit__()
            raise self._error(ready)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def _error(self, why: object) -> UserError:
        return UserError(f"--map {self.where}: {why}")

    @property
    def _rows(self) -> list[Element]:
        return [(where, value) for where, value in self.chunk if isinstance(value, dict)]

    def ask(self, first: int, chunk: list[Element]) -> None:
        """Send some elements' rows. first: the number of the first element."""
        self.chunk = chunk
        assert self.process.stdin is not None
        line = json.dumps([first, [row for _, row in self._rows]])
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # which the answer will tell
            return

    def answer(self) -> list[list[dict]]:
        """What each row of the last `ask` has become."""
        found = self._read()
        if isinstance(found, dict):
            where, _ = self._rows[found["row"]]
            raise self._error(f"{where}: {found['why']}")
        return found

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            at = f" on {self.chunk[0][0]} or one of the rows below it" if self.chunk else ""
            raise self._error(f"its process ended while it worked{at} (exit code {code})")
        return json.loads(line)
