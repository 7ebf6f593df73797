"""Runs a script of the repository on n ranks, the way a user would.

The end of its log is shown when it fails.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
FORKS = sys.platform == "linux"  # elsewhere a process with PyTorch in it may not be forked
ROOT = Path(__file__).resolve().parent.parent
PLACES = 4  # for ranks that are launched from here and run at a time, over the suite's processes


@contextmanager
def places(n: int) -> Iterator[None]:
    """Waits until n more ranks may run: four at once are slow enough on two cores.

    Places are locked files, which become free with their process.
    """
    folder = Path(tempfile.gettempdir()) / f"places-for-ranks-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    with ExitStack() as held:
        files = [held.enter_context(open(folder / f"{i}", "w")) for i in range(PLACES)]
        with open(folder / "queue", "w") as queue:  # one waits at a time, so that all get theirs
            fcntl.flock(queue, fcntl.LOCK_EX)
            taken: list = []
            for waits in (False, True):  # first what is free, then what gets free
                for file in files:
                    if len(taken) < n and file not in taken:
                        with suppress(BlockingIOError):
                            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
                            taken.append(file)
        yield


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    n: int, script: Path | str, *args: str, timeout: float = 240, forked: bool = FORKS
) -> subprocess.CompletedProcess:
    """Run `script` (relative to the repository root) on n ranks and return whatever it came to.

    n == 1 is plain Python without torch.distributed. On a timeout the whole process group is ended,
    so no rank outlives its test. forked: ranks are forks of the launcher (tests/forked.py), which
    have its memory.
    """
    # A launcher's variables inherited from an outer torchrun would turn one plain process into a
    # rank of it.
    of_launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in of_launcher}
    env.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    # collectives that do not match become Python errors; at more ranks that takes minutes
    if n == 2:
        env["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    command = [sys.executable]
    if n > 1:
        launcher = [str(ROOT / "tests/forked.py")] if forked else ["-m", "torch.distributed.run"]
        command += [*launcher, "--nnodes", "1", "--nproc_per_node", str(n)]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(_free_port())]
    command += [str(ROOT / script), *map(str, args)]
    with places(n):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            raise AssertionError(
                f"{script} on {n} ranks ran past {timeout} s\n{_tail(stdout)}\n{_tail(stderr)}"
            ) from None
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def launch(
    n: int, script: Path | str, *args: str, timeout: float = 240, forked: bool = FORKS
) -> subprocess.CompletedProcess:
    """`start`, and the run must succeed."""
    done = start(n, script, *args, timeout=timeout, forked=forked)
    assert done.returncode == 0, (
        f"{script} on {n} ranks ended with {done.returncode}\n--- stdout\n"
        f"{_tail(done.stdout)}\n--- stderr\n{_tail(done.stderr)}"
    )
    return done


def once(run: Callable[[int], T]) -> Callable[[int], T]:
    """`run(n)` at most once for each n: the first call's result or failure, again and again."""
    known = {}

    def remembered(n: int) -> T:
        if n not in known:
            try:
                known[n] = run(n), None
            except Exception as error:
                known[n] = None, error
        result, error = known[n]
        if error is not None:
            raise error
        return result

    return remembered


def _tail(text: str, lines: int = 60) -> str:
    return "\n".join(text.splitlines()[-lines:])
