"""A rank that hangs while the others reduce over gloo.

Started as: torchrun --nproc_per_node N tests/faults/lost.py [--watched]

watched: gloo itself waits for long, as if it were NCCL, and the roll call names the rank.
"""

import os
import signal

import torch
import torch.distributed as dist

from src.cli import run
from src.parallel.setup import start, watch_collectives


def main(timeout: float = 2.0, watched: bool = False):
    parallel = start(1, 60.0 if watched else timeout)
    if watched:
        watch_collectives(parallel, timeout)
    if parallel.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.zeros(1))


if __name__ == "__main__":
    run(main)
