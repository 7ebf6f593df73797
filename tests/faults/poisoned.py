"""Runs a script whose SFT loss is NaN on the last rank: in one step, and from another one on.

Started as: torchrun --nproc_per_node N tests/faults/poisoned.py STEP FROM_STEP script.py --flag …
"""

import os
import runpy
import sys

import torch

from src.trainer.solver import SolverObjective
from tests.launch import ROOT


def main(step: int, from_step: int, script: str, *arguments: str) -> None:
    calls, real = [], SolverObjective.loss

    def loss(self, model, rows, denominator):
        value, stats = real(self, model, rows, denominator)
        calls.append(rows)
        last_rank = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        poisoned = last_rank and (len(calls) == step or len(calls) >= from_step)
        return value * (torch.nan if poisoned else 1.0), stats

    SolverObjective.loss = loss
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
