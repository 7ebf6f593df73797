"""--max_minutes: a run saves and ends before its job is ended."""

import os
import time
from pathlib import Path

MARGIN = 1.25  # the next step, and saving, may take so many times as long as the longest so far
SLOW_DISK = 250e6  # bytes/s that a machine is taken to write, as long as no step has been saved
STARTED = 19  # proc(5): the field of a process's start, counted from its state

_imported = time.monotonic()


def process_age() -> float:
    """Seconds since this process was started; since this file was read where no system tells."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[STARTED]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):  # no Linux
        return time.monotonic() - _imported


class TimeLimit:
    """Whether another step, and what saves it, would still end before the limit."""

    def __init__(self, minutes: float | None) -> None:
        self.limit = None if minutes is None else 60 * minutes
        self.longest_step = 0.0  # seconds, with what comes between steps, such as evaluations
        self.longest_save = 0.0
        self.began = time.monotonic()

    def begin(self) -> None:
        """A step begins."""
        self.began = time.monotonic()

    def end(self) -> None:
        """A step has ended."""
        self.longest_step = max(self.longest_step, time.monotonic() - self.began)

    def is_past(self) -> bool:
        """Whether the limit has come already."""
        return self.limit is not None and process_age() >= self.limit

    def is_up(self) -> bool:
        """Whether the run must be saved now."""
        if self.limit is None:
            return False
        needed = MARGIN * (self.longest_step + self.longest_save)
        return process_age() + needed > self.limit
