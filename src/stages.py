"""The stages of a whole job: real scripts with their real flags, one after the other."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Stages:
    """Runs the commands, and keeps the minutes of each stage."""

    def __init__(self, job: str, ranks: int, gpu: bool = False) -> None:
        """job: what is told to have stopped when a stage fails; ranks: of `torchrun`.

        gpu: where there is one; GPUs are hidden otherwise, so that the job is the same everywhere.
        """
        self.job, self.ranks = job, ranks
        self._environment = os.environ | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @property
    def minutes(self) -> float:
        """Since the first stage was to begin."""
        return (time.perf_counter() - self._began) / 60

    def print_minutes(self) -> None:
        """Of each stage, and of all."""
        print("Minutes")
        for stage, seconds in self.seconds.items():
            print(f"  {stage:24} {seconds / 60:5.1f}")
        print(f"  {'all':24} {self.minutes:5.1f}")

    def run(self, stage: str, script: str, **flags) -> None:
        """A script in this process's Python, alone."""
        self._run(stage, [sys.executable], script.split(), flags)

    def torchrun(self, stage: str, script: str, **flags) -> None:
        """A script on all ranks."""
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(self.ranks),
        ]
        self._run(stage, launcher, [script], flags)

    def _run(self, stage: str, launcher: list[str], script: list[str], flags: dict) -> None:
        arguments = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        shown = ["torchrun", *launcher[3:]] if len(launcher) > 1 else ["python"]
        print(f"\n[{stage}] {shlex.join([*shown, *script, *arguments])}", flush=True)
        began = time.perf_counter()
        command = [*launcher, *script, *arguments]
        code = subprocess.run(command, cwd=ROOT, env=self._environment).returncode
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
        if code:
            sys.exit(
                f"{self.job} stopped: {stage} ended with exit code {code}; the line above shows "
                "the command"
            )


def accuracy_in(path: Path) -> float:
    """The headline of a results.json."""
    return json.loads((ROOT / path).read_text())["accuracy"]
