"""Who is missing where others wait, found out beside NCCL, whose own end tells nobody.

A collective over gloo, or through shared memory, that a rank does not come to is a Python error in
those that wait. NCCL's is no error: a thread of its own ends the process. So each rank says in the
rendezvous store how many collectives of each group it has begun; one that has begun no more for
--timeout, while others of a group are behind it, names these. NCCL itself gets a little longer.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from src.parallel.flight_recorder import dumps

PERIOD_S = 1.0  # between looks
GRACE = timedelta(seconds=15)  # that NCCL waits longer: a few looks, and the launcher's end


def lost(ranks: Sequence[int], world_size: int) -> str:
    """The message that names them, and where their last collectives are recorded."""
    names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {world_size}"
    message = (
        f"error: {names} did not come to what all ranks do together (--timeout): hanging, or gone"
    )
    files = dumps()
    if files is None:
        return message
    return (
        f"{message}\nNCCL's flight recorder writes what each rank N did last to {files} on its "
        "machine (torchfrtrace reads such files)"
    )


class RollCall:
    """One rank's part: says where it is, and looks where the others are."""

    def __init__(
        self,
        groups: list[tuple[Any, list[int]]],
        rank: int,
        world_size: int,
        limit_s: float,
    ) -> None:
        """groups: process groups that this rank is in, each with its ranks' numbers in the run."""
        self.groups, self.rank, self.world_size = groups, rank, world_size
        self.limit_s, self.has_spoken = limit_s, False
        self.counts: dict[str, int] = {}  # collectives that this rank has begun, of each group
        self.since = 0.0  # when the last of them began

    def add(self, groups: list[tuple[Any, list[int]]]) -> None:
        """Groups that were made later; the thread that looks sees all of them or none."""
        self.groups = [*self.groups, *groups]

    def look(self, store: dist.Store, now: float) -> str | None:
        """The message about who is missing, once, and from one rank of those that wait; or None.

        now: seconds of a clock.
        """
        groups = self.groups
        counts = {g.group_name: g._get_sequence_number_for_group() for g, _ in groups}
        if counts != self.counts:
            self.counts, self.since = counts, now
            store.set(str(self.rank), json.dumps(counts))
        if now - self.since < self.limit_s or self.has_spoken:
            return None
        for group, ranks in groups:
            name = group.group_name
            begun = {rank: self._begun(store, rank, name) for rank in ranks}
            behind = [rank for rank in ranks if begun[rank] < counts[name]]
            waiting = [rank for rank in ranks if begun[rank] >= counts[name]]
            if behind and self.rank == min(waiting):
                self.has_spoken = True
                return lost(behind, self.world_size)
        return None

    def _begun(self, store: dist.Store, rank: int, group: str) -> int:
        if rank == self.rank:
            return self.counts[group]
        return json.loads(store.get(str(rank))).get(group, 0) if store.check([str(rank)]) else 0


class Watch:
    """The thread that looks, as long as the process group lives."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.thread: threading.Thread | None = None
        self.call: RollCall | None = None

    def start(self, call: RollCall, say: Callable[[str], None] | None = None) -> None:
        """A thread with a connection of its own to the store: the other's may be waiting."""
        from torch.distributed.rendezvous import rendezvous

        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=call.limit_s)))
        store = dist.PrefixStore("collectives", store)

        def work() -> None:
            try:
                while not self.over.wait(PERIOD_S):
                    if message := call.look(store, time.monotonic()):
                        (say or _say)(message)
            except dist.DistError:  # the store is gone, and with it the launcher
                return

        self.over.clear()
        self.call = call
        self.thread = threading.Thread(target=work, name="roll call", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        if self.thread is not None:
            self.over.set()
            self.thread.join()
            self.thread = self.call = None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


roll_call = Watch()
