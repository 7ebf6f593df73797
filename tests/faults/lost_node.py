"""Runs a script on several nodes, of which one is lost (SIGKILL) at a stage of writing a step.

Its launcher and all its ranks are. Started on each node as:

    torchrun --nnodes N --node_rank I … tests/faults/lost_node.py NODE STAGE SAVE script.py --flag …

SAVE: which one of the steps, from 1.
"""

import os
import runpy
import signal
import sys

from src.checkpoint.steps import Steps
from tests.launch import ROOT, children_of


def main(node: int, stage: str, save: int, script: str, *arguments: str) -> None:
    real, seen = Steps.__init__, []

    def reached(current: str) -> None:
        seen.append(current)
        if current == stage and seen.count(stage) == save:
            launcher = os.getppid()
            ranks = [pid for pid in children_of(launcher) if pid != os.getpid()]
            for pid in (launcher, *ranks, os.getpid()):
                os.kill(pid, signal.SIGKILL)

    def init(self, folder, keep, parallel, **more) -> None:
        if int(os.environ["GROUP_RANK"]) == node and int(os.environ["LOCAL_RANK"]) == 0:
            more["reached"] = reached
        real(self, folder, keep, parallel, **more)

    Steps.__init__ = init
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
