"""Prints, from rank 0, how many threads each rank has after `start`, with what the user set."""

import os

import torch
import torch.distributed as dist

from src.parallel.setup import start, stop


def main() -> None:
    parallel = start()
    threads: list = [None] * parallel.world_size
    dist.all_gather_object(threads, torch.get_num_threads())
    if parallel.is_main:
        print(*threads, os.environ.get("OMP_NUM_THREADS"))
    stop()


if __name__ == "__main__":
    main()
