"""Splits a checkpoint and prints the largest anonymous memory, in bytes, that the process added while doing so.

    memory_worker.py CKPT SAVE N          Linux: reads /proc. Mapped file pages are the system's to take back, and not counted.
"""
import sys
import threading
from pathlib import Path

from src.checkpoint.source import Checkpoint
from src.checkpoint.write import split


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main(ckpt: str, save: str, n: str) -> None:
    start, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    split(Checkpoint.open(ckpt), Path(save), int(n))
    done.set()
    watcher.join()
    print(peak - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
