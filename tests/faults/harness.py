"""Training runs that are disturbed: killed, stopped, starved; also what they left.

`make faults` starts them as a user would, `make test` as forks (tests/forked.py).
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from src.checkpoint.steps import list_steps
from tests.launch import (
    FORKS,
    ROOT,
    Forked,
    children_of,
    command_of,
    environment,
    started,
)

PATIENCE_S = 120
FORKED = FORKS  # tests/faults/conftest.py may have it otherwise


class Run:
    """A command in a session of its own, its output in a file."""

    def __init__(
        self,
        arguments: list[str],
        ranks: int,
        log: Path,
        launcher: list[str] | None = None,
        forked: bool | None = None,
        cwd: Path = ROOT,
        **node: int,
    ) -> None:
        """launcher: a program that starts the command. forked: False where the end of Python is
        looked at, which forks leave out. cwd: the folder that it works in; node: see `command_of`.
        """
        self.ranks, self.log, self.seen = ranks, log, set()
        self.output = log.open("ab")
        command = command_of(ranks, *arguments, **node)
        env = environment() | {"CUDA_VISIBLE_DEVICES": ""}
        files = self.output, self.output
        self.process: subprocess.Popen | Forked
        if (FORKED if forked is None else forked) and not launcher:
            self.process = Forked(command, env, *files, cwd=cwd)
        else:
            self.process = started(command, env, *files, launcher, cwd)

    def workers(self) -> list[int]:
        """The ranks' process ids, in order; [] while they are not there yet."""
        pids = [self.process.pid] if self.ranks == 1 else sorted(children_of(self.process.pid))
        self.seen.update(pids)
        return pids if len(pids) == self.ranks else []

    def until(self, condition, what: str) -> None:
        """Until the condition holds or the run has ended."""
        began = time.monotonic()
        while not condition() and self.process.poll() is None:
            waited = time.monotonic() - began
            assert waited < PATIENCE_S, f"{what} did not come\n{self.said()[-3000:]}"
            time.sleep(0.005)

    def wait(self) -> int:
        """The exit code, once everything of the run is gone."""
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.end()

    def end(self) -> None:
        # a launcher's workers have sessions of their own, and one that is stopped stays
        for kill, pid in [(os.killpg, self.process.pid), *((os.kill, pid) for pid in self.seen)]:
            with suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        self.process.wait()
        self.output.close()

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def steps_in(state: Path) -> list[int]:
    return [int(step.name.removeprefix("step-")) for step in list_steps(state)]


def curve(logs: Path) -> dict[int, float]:
    """What each step's loss (PPO: value loss and reward) was, by the last run that took it."""
    losses: dict[int, object] = {}
    for file in logs.glob("*train.jsonl"):
        for line in file.read_text().split("\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut short by a kill
            if record.get("event") == "scalars":
                names = ("train/loss", "ppo/reward", "ppo/value_loss", "ppo/policy_grad_norm")
                values = tuple(record[name] for name in names if name in record)
                if values:
                    losses[record["step"]] = values
    return losses


def hashes(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.glob("consolidated.*"))
    }


def recorded(logs: Path) -> int:
    """Steps that were logged so far, by all runs."""
    if not logs.is_dir():
        return 0
    texts = (file.read_text() for file in logs.glob("*train.jsonl"))
    return sum(text.count('"event": "scalars"') for text in texts)


def kill_at_random(run: Run, logs: Path, rng: random.Random, within: int) -> bool:
    """SIGKILL to a random rank after up to `within` more steps; False when the run ended before."""
    goal = recorded(logs) + rng.randrange(within + 1)
    run.until(lambda: run.workers() and recorded(logs) >= goal, "a step")
    time.sleep(rng.random() * 0.05)
    workers = run.workers()
    if run.process.poll() is not None or not workers:
        return False
    os.kill(rng.choice(workers), signal.SIGKILL)
    return True
