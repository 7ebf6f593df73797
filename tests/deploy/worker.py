"""A rank that says where it is, adds something up with the others, and goes on until it is told
to stop: what a trainer does of it, without a model.

    worker.py --folder FOLDER    # each rank leaves files there: `rank-N`, and `saved-N`

With LEAVES_AFTER, a file, it only ends when that is there.
"""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from src.cli import run
from src.errors import Stopped
from src.parallel.setup import start
from src.trainer.saving import StopSignal


def main(folder: str, save_dir: str = "", resume: str = "auto") -> None:
    """Go on until a signal comes. save_dir, resume: as a trainer has them, for deploy/run.sh."""
    parallel, stop_signal = start(), StopSignal()
    total = torch.tensor(float(parallel.rank))
    dist.all_reduce(total)
    node = os.environ["GROUP_RANK"]
    (Path(folder) / f"rank-{parallel.rank}").write_text(f"node {node} sum {total.item():g}")
    while True:
        came = torch.tensor(float(stop_signal.came))
        dist.all_reduce(came, op=dist.ReduceOp.MAX)
        if came:
            (Path(folder) / f"saved-{parallel.rank}").touch()
            while not Path(os.environ.get("LEAVES_AFTER", folder)).exists():
                time.sleep(0.01)
            raise Stopped("stopped by a signal")
        time.sleep(0.01)


if __name__ == "__main__":
    run(main)
