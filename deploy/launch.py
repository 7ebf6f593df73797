r"""One node's launcher: torchrun, for jobs that are stopped and begun again.

    python deploy/launch.py --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d \
        --rdzv_endpoint FIRST-NODE:29500 ppo_train.py --actor_save_dir OUT ...

All flags are torchrun's, and the ranks are started by it. Three things differ, for the sake of
what started the launcher (a scheduler, or deploy/run.sh):

- It ends with what its ranks end with, where torchrun ends with 1: with 75 (a step is saved, and
  the same command goes on) and with 2 (wrong input), when one of them does; else with the code of
  the first that failed.
- A SIGTERM goes to the ranks, which save a step and end in their own time. torchrun kills them
  after 30 seconds.
- The launcher that the others meet at may end a moment before them. They let their own ranks end,
  too, where torchrun would stop them, and say that it has lost a connection.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

WRONG_INPUT, STOPPED = 2, 75  # what a script ends with (src/cli.py), whatever becomes of others
OTHER_SIGNALS = "SIGINT,SIGHUP,SIGQUIT"  # that stay torchrun's
PATIENCE_S = 60.0  # between the end of the launcher where all meet, and that of the others


def main() -> None:
    """Start this node's ranks, and end with what they end with."""
    signal.signal(signal.SIGTERM, hand_on)
    # or ranks that are started again may dial addresses of the last attempt
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    asked = DynamicRendezvousHandler.num_nodes_waiting
    DynamicRendezvousHandler.num_nodes_waiting = patient(asked)  # type: ignore[assignment]
    try:
        run.main(["--signals-to-handle", OTHER_SIGNALS, *sys.argv[1:]])
    except ChildFailedError as error:
        code = exit_code(error.failures.values())
        if code not in (WRONG_INPUT, STOPPED):  # these two have been explained
            print(error, file=sys.stderr)
        sys.exit(code)


def hand_on(number: int, _: object) -> None:
    """Send a signal to the ranks; end by it while there are none. (Found by Linux's /proc.)"""
    ranks = " ".join(
        path.read_text() for path in Path("/proc/self/task").glob("*/children")
    ).split()
    if not ranks:
        sys.exit(128 + number)
    for rank in ranks:
        os.kill(int(rank), number)


def exit_code(failures: Collection[ProcessFailure]) -> int:
    """What a launcher ends with whose ranks failed so; by a signal: 128 and its number."""
    codes = [failure.exitcode for failure in failures]
    for code in (WRONG_INPUT, STOPPED):
        if code in codes:
            return code
    first = min(failures, key=lambda failure: failure.timestamp).exitcode
    return first if first >= 0 else 128 - first


def patient(num_nodes_waiting: Callable[[Any], int]) -> Callable[[Any], int]:
    """The same answer to "does a node want to join", which is no for a while where nobody can tell.

    torchrun asks between two looks at its ranks, and takes a lost connection for its own failure.
    """
    lost_at: float | None = None

    def asked(handler: Any) -> int:
        nonlocal lost_at
        try:
            return num_nodes_waiting(handler)
        except RendezvousConnectionError:
            now = time.monotonic()
            lost_at = now if lost_at is None else lost_at
            if now - lost_at > PATIENCE_S:
                raise
            return 0

    return asked


if __name__ == "__main__":
    main()
