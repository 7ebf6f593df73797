"""Splits or loads a checkpoint and prints the most anonymous memory, in bytes, that this added.

    memory_worker.py split CKPT SAVE N STAGES
    memory_worker.py load CKPT DTYPE STAGES     under torchrun: each rank's peak, and what it holds

Linux: reads /proc. Mapped file pages are the system's to take back, and not counted.
"""

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from src.checkpoint.load import load_model
from src.checkpoint.source import Checkpoint
from src.checkpoint.write import split
from src.parallel.setup import start, stop


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line for line in lines if line.startswith("RssAnon")).split()[1]
    return int(kilobytes) * 1024


def peak_of(run: Callable[[], object]) -> tuple[int, object]:
    """The largest anonymous memory added while `run` ran, and what it gave back."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = run()
    done.set()
    watcher.join()
    return max(peak, anonymous_bytes()) - before, result


def main(action: str, ckpt: str, *more: str) -> None:
    if action == "split":
        save, n, stages = more
        checkpoint = Checkpoint.open(ckpt)
        print(peak_of(lambda: split(checkpoint, Path(save), int(n), stages=int(stages)))[0])
        return
    parallel = start(timeout=120, pipeline_parallel_size=int(more[1]))
    dtype = getattr(torch, more[0])
    peak, model = peak_of(lambda: load_model(Checkpoint.open(ckpt), parallel, dtype))
    shard = sum(parameter.nbytes for parameter in model.parameters())
    sys.stdout.write(f"{peak} {shard}\n")  # in one piece: the ranks share the pipe
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
