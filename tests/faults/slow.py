"""Runs a script whose last rank is slow, by its clock, and whose time is up after so many steps.

Started as: torchrun --nproc_per_node N tests/faults/slow.py STEPS script.py --flag value ...
"""

import os
import runpy
import sys

import src.trainer.time_limit
from src.trainer.monitor import Monitor
from src.trainer.time_limit import TimeLimit
from tests.launch import ROOT


def main(steps: int, script: str, *arguments: str) -> None:
    took, end = Monitor.took, TimeLimit.end
    taken = []

    def slowly(self, step, phases, numbers) -> None:  # more than a busy machine can add to others
        took(self, step, {**phases, "forward": 1000 * phases["forward"]}, numbers)

    def counted(self) -> None:
        taken.append(1)
        end(self)

    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        Monitor.took, TimeLimit.end = slowly, counted
        age = src.trainer.time_limit.process_age
        src.trainer.time_limit.process_age = lambda: age() + 3600 * (len(taken) >= steps)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
