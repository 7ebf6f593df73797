"""A rank that hangs while the others reduce over gloo.

Started as: torchrun --nproc_per_node N tests/faults/lost.py
"""

import os
import signal

import torch
import torch.distributed as dist

from src.cli import run
from src.parallel.setup import start


def main(timeout: float = 2.0):
    parallel = start(1, timeout)
    if parallel.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.zeros(1))


if __name__ == "__main__":
    run(main)
