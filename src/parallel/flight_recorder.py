"""PyTorch's record of each rank's last NCCL collectives, written when one of them takes too long.

Its variables have two names, of which PyTorch reads the newer one first: both are set, unless the
user has set either.
"""

import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

EVENTS = "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"  # collectives that are remembered
DUMP_ON_TIMEOUT = ("TORCH_NCCL_DUMP_ON_TIMEOUT",)
PREFIX = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"  # a rank's number follows
N_EVENTS = 2000


def turn_on(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let a collective that takes too long leave a file on each rank; before there is a group.

    They lie in the folder for temporary files, by the number of the rendezvous' port: those of two
    runs on one machine are two.
    """
    run = f"{os.getuid()}-{environment.get('MASTER_PORT', 'alone')}"
    prefix = Path(tempfile.gettempdir()) / f"flight-recorder-{run}-rank-"
    values = {EVENTS: str(N_EVENTS), DUMP_ON_TIMEOUT: "1", PREFIX: str(prefix)}
    for names, value in values.items():
        given = next((environment[name] for name in names if name in environment), value)
        for name in names:
            environment.setdefault(name, given)


def dumps(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Where each rank's record will be, with N for its number; None where none is kept."""
    prefix = environment.get(PREFIX[0])
    is_on = environment.get(DUMP_ON_TIMEOUT[0], "0") not in ("0", "", "false", "False")
    return f"{prefix}N" if prefix and is_on and environment.get(EVENTS[0], "0") != "0" else None
