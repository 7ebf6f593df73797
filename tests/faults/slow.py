"""Runs a script whose last rank is slow, and whose time is up after so many steps, on that rank.

Started as: torchrun --nproc_per_node N tests/faults/slow.py STEPS script.py --flag value ...
"""

import os
import runpy
import sys
import time

import src.trainer.time_limit
from src.trainer.solver import SolverObjective
from src.trainer.time_limit import TimeLimit
from tests.launch import ROOT


def main(steps: int, script: str, *arguments: str) -> None:
    loss, end = SolverObjective.loss, TimeLimit.end
    taken = []

    def slow_loss(self, model, rows, denominator):
        time.sleep(0.03)  # a slow processor
        return loss(self, model, rows, denominator)

    def counted(self) -> None:
        taken.append(1)
        end(self)

    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        SolverObjective.loss, TimeLimit.end = slow_loss, counted
        age = src.trainer.time_limit.process_age
        src.trainer.time_limit.process_age = lambda: age() + 3600 * (len(taken) >= steps)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
