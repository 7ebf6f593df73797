"""Where a step's time goes: its phases, and communication.

Communication is taken out of the phase that it falls in.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

COMMUNICATION = "communication"
Mark = float | torch.cuda.Event


class Clock:
    """Phases of this process, one inside another.

    On a GPU the marks are events in its stream: nothing waits for them.
    """

    def __init__(self) -> None:
        self.inside: list[str] = []
        # name, the phase around it, beginning, end
        self.spans: list[tuple[str, str | None, Mark, Mark]] = []
        # Is told of each phase that begins, exchanges left out: they are too many.
        self.listener: Callable[[str], None] | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside as `name`."""
        if name != COMMUNICATION:
            self.announce(name)
        began = self._now()
        self.inside.append(name)
        try:
            yield
        finally:
            self.inside.pop()
            self.spans.append((name, self.inside[-1] if self.inside else None, began, self._now()))

    def announce(self, name: str) -> None:
        """Tell the listener of a phase that somebody else times, or nobody."""
        if self.listener is not None:
            self.listener(name)

    @contextmanager
    def communication(self) -> Iterator[None]:
        """Time an exchange between ranks, where some phase is timed at all."""
        if self.inside:
            with self.phase(COMMUNICATION):
                yield
        else:
            yield

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call.

        What ran inside another phase is taken out of that.
        """
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds: dict[str, float] = {COMMUNICATION: 0.0}
        for name, outer, began, ended in self.spans:
            took = _seconds(began, ended)
            seconds[name] = seconds.get(name, 0.0) + took
            if outer is not None:
                seconds[outer] = seconds.get(outer, 0.0) - took
        self.spans = []
        return seconds

    @staticmethod
    def _now() -> Mark:
        if not torch.cuda.is_initialized():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(began: Mark, ended: Mark) -> float:
    if isinstance(began, float) and isinstance(ended, float):
        return ended - began
    assert isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event)
    return began.elapsed_time(ended) / 1e3


clock = Clock()
