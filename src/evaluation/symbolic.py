"""Comparing two answers by math-verify, in a process of its own that has limits.

One comparison may take `CPU_SECONDS` of the processor's time, `WALL_SECONDS` by the clock where the
machine is crowded, and the process `MEMORY` bytes (the first and the last stand in
`symbolic_worker.py`). One that takes more ends with its process, and the next begins a new one.
"""

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

from src.errors import UserError

WALL_SECONDS = 20.0
START_SECONDS = 120.0  # until the libraries are imported, on a crowded machine
_WORKER = Path(__file__).with_name("symbolic_worker.py")


class SymbolicComparer:
    """Asks the process, which is started when it is first needed and again when it was ended.

    It is no child of torch's state: a fresh interpreter, that shares two pipes with this one.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def same(self, gold: str, text: str) -> bool | None:
        """Whether the answer in `text` is that in `gold`; None when a limit cut the comparison off.

        Both are texts with the answer in a box or a formula, a few kilobytes at most. Raises
        UserError when the process cannot be started.
        """
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([gold, text]).encode() + b"\n")
        except BrokenPipeError:  # it was ended from outside since the last one
            self.close()
            return self.same(gold, text)
        answer = self._line(WALL_SECONDS)
        if answer is None:
            self.close()
            return None
        return json.loads(answer)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        # -P: the worker's own folder, with our math.py, is none to import from. One hash seed: the
        # order in which sympy tries things is then the same every time.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        first = self._line(START_SECONDS)
        if first != b"true":
            self.close()
            why = json.loads(first) if first else "its process ended at once"
            raise UserError(
                f"the symbolic rule needs math-verify: {why}; pip install -r requirements.txt"
            )

    def _line(self, seconds: float) -> bytes | None:
        """The process's next line, without its end; None when it ended, or wrote none in time."""
        assert self._process is not None and self._process.stdout is not None
        output, line, deadline = self._process.stdout.fileno(), b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(output, 4096) if ready else b""
            if not piece:
                return None
            line += piece
        return line[:-1]


def check_installed() -> None:
    """Raise UserError when math-verify is not there."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "MATH's symbolic rule needs math-verify, which is not installed; "
            "pip install -r requirements.txt"
        )


_comparer = SymbolicComparer()
same = _comparer.same
