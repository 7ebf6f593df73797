"""Threads on the CPU: how many, and how they wait for one another.

libgomp, which PyTorch's threads come from, lets a thread that waits spin for some 15 ms before it
sleeps. On free cores nothing is quicker; beside other work the cores go to those who wait instead
of those they wait for. While libgomp has more threads than there are cores it sends them to sleep
after 100 looks (its manual, GOMP_SPINCOUNT): the watch here sees to that as long as others want the
cores. What is computed, and by how many threads, stays the same.
"""

import ctypes
import math
import os
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import torch

INTERVAL_S = 0.5
MOST_THREADS = 4096  # OpenMP would start them; a larger number is a slip
# Of the time, how long one of our threads stood in line for a core: beside nobody under a tenth,
# beside one busy process a third at least.
CROWDED = 0.2
CALM_S = 5.0  # until the machine counts as free again
# Whoever sets one of these has decided how threads wait.
DECIDED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def settle_number() -> None:
    """As many threads as OMP_NUM_THREADS says, or else this rank's share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # the outermost level's
    if given.isdecimal() and 0 < int(given) <= MOST_THREADS and _user_decided():
        torch.set_num_threads(int(given))  # PyTorch by itself takes no more than MKL thinks fit
    else:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, cores() // ranks_here))


def _user_decided() -> bool:
    """Whether OMP_NUM_THREADS is the user's.

    torchrun sets it to 1 for several ranks where it is not set; what it was started with tells.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("OMP_NUM_THREADS") != "1":
        return "OMP_NUM_THREADS" in os.environ
    try:
        given = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:  # not Linux, or not ours to read
        return True
    return any(variable.startswith(b"OMP_NUM_THREADS=") for variable in given)


def cores(root: Path = Path("/")) -> int:
    """Those that this process may use: its affinity, and what its control groups allow.

    root: where /proc and /sys are.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return math.ceil(min(len(os.sched_getaffinity(0)), max(1.0, _quota(root))))


def _quota(root: Path) -> float:
    """Cores' worth of time that control groups allow this process; infinite without a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    allowed = math.inf
    for line in lines:
        _, controllers, group = line.split(":", 2)
        # No controllers: version 2, one tree for all; else version 1.
        if controllers and "cpu" not in controllers.split(","):
            continue
        tree = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        for folder in (Path(group), *Path(group).parents):  # each may set a limit
            with suppress(OSError):  # a group outside the container, or the root, which has none
                place = tree / folder.relative_to("/")
                limit, period = " ".join((place / name).read_text() for name in names).split()
                if limit not in ("max", "-1"):
                    allowed = min(allowed, int(limit) / int(period))
    return allowed


class Watch:
    """Sees, by how long this process's threads stand in line, whether others want the cores.

    crowded: what it saw last.
    """

    def __init__(self) -> None:
        self.crowded = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._surplus: Surplus | None = None

    def start(self) -> None:
        """Watch from now on. Does nothing where the kernel does not tell, or the user decided."""
        decided = any(name in os.environ for name in DECIDED)
        if self._thread is None and not decided and Path("/proc/self/schedstat").exists():
            self._ended.clear()
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the watch and what it holds."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        looks = self.looks()
        next(looks)
        while not self._ended.wait(INTERVAL_S):
            next(looks)
        looks.close()

    def looks(self) -> Generator[None]:
        """Look now and whenever the next is asked for."""
        stood, at, last = _lines_stood(), time.monotonic(), -math.inf
        try:
            while True:
                yield
                before, began = stood, at
                stood, at = _lines_stood(), time.monotonic()
                longest = max(stood[thread] - before.get(thread, 0.0) for thread in stood)
                if longest > CROWDED * (at - began):
                    last = at
                self._settle(at - last < CALM_S)
        finally:
            self._settle(False)

    def _settle(self, crowded: bool) -> None:
        self.crowded = crowded
        if crowded and self._surplus is None:
            self._surplus = Surplus()
        elif not crowded and self._surplus is not None:
            self._surplus.end()
            self._surplus = None


class Surplus:
    """A team of idle libgomp threads, one more than there are cores, asleep until `end`."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="surplus", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # A team lives as long as the thread that it was made for.
        if library := _libgomp():
            size = len(os.sched_getaffinity(0)) + 1
            library.GOMP_parallel(library.omp_get_thread_num, None, size, 0)
        self._ended.wait()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def _lines_stood() -> dict[str, float]:
    """Seconds that each thread of this process has stood in line for a core so far."""
    stood = {}
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # one that has just ended
            running, waiting, _ = Path(f"/proc/self/task/{thread}/schedstat").read_text().split()
            stood[thread] = int(waiting) / 1e9
    return stood


def _libgomp() -> ctypes.CDLL | None:
    """The one that is loaded, whatever its file is called; None where PyTorch has another."""
    maps = Path("/proc/self/maps").read_text().split()
    path = next((word for word in maps if "libgomp" in word.rsplit("/", 1)[-1]), None)
    return None if path is None else ctypes.CDLL(path)


watch = Watch()
