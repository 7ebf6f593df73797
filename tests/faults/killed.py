"""Runs a script in which one rank is killed (SIGKILL) at a stage of writing the first step.

Started as: torchrun --nproc_per_node N tests/faults/killed.py STAGE RANK script.py --flag value ...
"""

import os
import runpy
import signal
import sys

from src.checkpoint.steps import Steps
from tests.launch import ROOT


def main(stage: str, rank: int, script: str, *arguments: str) -> None:
    real = Steps.__init__

    def reached(current: str) -> None:
        if current == stage and int(os.environ.get("RANK", 0)) == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    def init(self, folder, keep, parallel, **more) -> None:
        real(self, folder, keep, parallel, reached, **more)

    Steps.__init__ = init
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
