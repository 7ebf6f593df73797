"""How a run that lasts days is watched: a heartbeat beside its log, and who holds the others up."""

import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from src.logs import RunLog
from src.parallel.clock import COMMUNICATION, clock
from src.parallel.setup import Parallel

HEARTBEAT = "heartbeat.json"
PERIOD_S = 1.0  # between two heartbeats, at least
SLOWER = 1.25  # times as long as the other ranks take: what a straggler's phase takes, or more
SHARE = 0.05  # of its step, at least, is what a straggler loses


class Heartbeat:
    """`heartbeat.json`: where the run is, and when that was written; an old one tells of a hang.

    It is written by the training loop, at each of its phases, once a second at most: a thread would
    go on beating beside a loop that hangs.
    """

    def __init__(self, log: RunLog) -> None:
        """log: where that writes no files, or no more, there is no heartbeat."""
        self.log, self.written = log, 0.0
        self.facts: dict[str, Any] = {"pid": os.getpid(), "host": platform.node()}

    def beat(self, at_once: bool = False, **facts: Any) -> None:
        """Note what has become of the run, and write it when it is time; at_once: in any case."""
        if not self.log.is_written or self.log.log_dir is None:
            return
        self.facts |= facts
        now = time.monotonic()
        if not at_once and now - self.written < PERIOD_S:
            return
        self.written = now
        stamp = datetime.now().astimezone().isoformat(timespec="milliseconds")
        path = Path(self.log.log_dir) / HEARTBEAT
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"time": stamp, **self.facts}, indent=1) + "\n")
        temporary.replace(path)  # a reader never sees half of it

    def phase(self, name: str) -> None:
        """A phase of the step begins."""
        self.beat(phase=name)


@dataclass(frozen=True)
class Straggler:
    """The rank that takes longest for a phase, its seconds a step, and the others' median."""

    rank: int
    phase: str
    seconds: float
    others: float


def straggler(ranks: list[dict[str, float]]) -> Straggler | None:
    """Of all phases and ranks the worst: who loses most beside the median of the others.

    ranks: each rank's seconds by phase, of a typical step. None where nobody takes `SLOWER` times
    as long and loses `SHARE` of its step. Waiting for others is no phase of its own doing.
    """
    worst = None
    for phase in sorted({name for times in ranks for name in times} - {COMMUNICATION}):
        times = {rank: of_rank[phase] for rank, of_rank in enumerate(ranks) if phase in of_rank}
        rank = max(times, key=lambda rank: times[rank])
        seconds = times.pop(rank)
        if not times:
            continue  # it has this phase alone: a pipeline's stage, or a role's
        others = statistics.median(times.values())
        matters = seconds - others > SHARE * sum(ranks[rank].values())
        if matters and seconds > SLOWER * others:
            candidate = Straggler(rank, phase, seconds, others)
            if worst is None or seconds - others > worst.seconds - worst.others:
                worst = candidate
    return worst


class Monitor:
    """What is noted of each step: the heartbeat on rank 0, and all ranks' phases."""

    def __init__(self, log: RunLog, parallel: Parallel, window: int | None) -> None:
        """window: steps that a straggler is looked for in; None: nobody looks."""
        self.log, self.parallel, self.window = log, parallel, window
        self.heartbeat = Heartbeat(log)
        self.steps: list[dict[str, float]] = []  # of the window: seconds by phase

    def begin(self, step: int, total: int) -> None:
        """The first step is to come. step: the last that was taken; total: the run's."""
        self.heartbeat.beat(at_once=True, step=step, steps=total, saved_step=step, phase="start")
        clock.take()
        clock.listener = self.heartbeat.phase

    def took(self, step: int, phases: dict[str, float], numbers: dict[str, float]) -> None:
        """A step was taken, by all ranks.

        phases: this rank's seconds by phase; numbers: what is logged of it, of which the heartbeat
        shows time and speed.
        """
        speed: dict[str, Any] = {
            name: round(x, 1) for name, x in numbers.items() if name.startswith("tokens_per_s")
        }
        self.heartbeat.beat(step=step, seconds_per_step=round(numbers["seconds"], 3), **speed)
        if self.window is None or self.parallel.world_size == 1:
            return
        self.steps.append(phases)
        if len(self.steps) == self.window:
            self._look(step)
            self.steps = []

    def _look(self, step: int) -> None:
        """One line about the straggler of the window, if there is one. All ranks come here."""
        # Medians: who is slow once has not to be looked for.
        names = {name for phases in self.steps for name in phases}
        typical = {
            name: statistics.median(phases.get(name, 0.0) for phases in self.steps)
            for name in names
        }
        every: list[Any] = [None] * self.parallel.world_size
        dist.all_gather_object(every, (platform.node(), typical))
        slow = straggler([of_rank for _, of_rank in every])
        if slow is not None:
            first = step - len(self.steps) + 1
            self.log.warning(
                f"steps {first} to {step}: rank {slow.rank} on {every[slow.rank][0]} is slow: "
                f"{slow.phase} takes it {slow.seconds:.3f} s a step, the others {slow.others:.3f} "
                f"s ({slow.seconds / max(slow.others, 1e-9):.1f} times)"
            )

    def saved(self, step: int) -> None:
        """A step is being saved."""
        self.heartbeat.beat(saved_step=step)

    def end(self, phase: str) -> None:
        """The run ends in order. phase: how, such as "finished"."""
        clock.listener = None
        self.heartbeat.beat(at_once=True, phase=phase)
