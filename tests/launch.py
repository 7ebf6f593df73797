"""Runs a script of the repository on n ranks, the way a user would.

The end of its log is shown when it fails.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TypeVar

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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    n: int, script: Path | str, *args: str, timeout: float = 240, forked: bool = FORKS
) -> subprocess.CompletedProcess:
    """Run `script` (relative to the repository root) on n ranks and return whatever it came to.

    n == 1 is plain Python without torch.distributed. On a timeout all of it is ended, so that no
    rank outlives its test. forked: they are forks of a process that has PyTorch already
    (tests/forked.py), which have its memory.
    """
    env = environment()
    # collectives that do not match become Python errors; at more ranks that takes minutes
    if n == 2:
        env["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    command = command_of(n, str(script), *map(str, args))
    with places(n):
        return ended(command, env, timeout, forked)


def ended(
    command: list[str], env: dict[str, str], timeout: float, forked: bool = FORKS
) -> subprocess.CompletedProcess:
    """What a command came to: a script and its arguments, or `torchrun` before them."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        process = (Forked if forked else started)(command, env, out, err)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            for pid in (*children_of(process.pid), process.pid):
                with suppress(ProcessLookupError):  # each has a session of its own
                    os.killpg(pid, signal.SIGKILL)
            process.wait()
            code = None
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read(), err.read()
    if code is None:
        shown = " ".join(command)
        raise AssertionError(f"{shown} ran past {timeout} s\n{_tail(stdout)}\n{_tail(stderr)}")
    return subprocess.CompletedProcess(command, code, stdout, stderr)


def environment() -> dict[str, str]:
    """For a process with its share of the cores.

    A launcher's variables inherited from an outer torchrun would turn it into a rank of that.
    """
    of_launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in of_launcher}
    return env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command_of(
    n: int, script: str, *args: str, nodes: int = 1, node: int = 0, port: int | None = None
) -> list[str]:
    """A script of the repository, on one rank, or behind `torchrun` and its flags.

    n: ranks of the node, which is one of several, all on this machine, that meet at the port.
    """
    command = [str(ROOT / script), *args]
    if n == nodes == 1:
        return command
    address = ["--master_addr", "127.0.0.1", "--master_port", str(port or free_port())]
    place = ["--nnodes", str(nodes), "--node_rank", str(node), "--nproc_per_node", str(n)]
    return ["torchrun", *place, *address, *command]


def started(
    command: list[str],
    env: dict[str, str],
    out: IO,
    err: IO,
    launcher: list[str] | None = None,
    cwd: Path = ROOT,
) -> subprocess.Popen:
    """A process of such a command, in a session of its own. launcher: a program that starts it."""
    if command[0] == "torchrun":
        command = ["-m", "torch.distributed.run", *command[1:]]
    return subprocess.Popen(
        [*(launcher or []), sys.executable, *command],
        cwd=cwd,
        env=env,
        start_new_session=True,
        stdout=out,
        stderr=err,
    )


def children_of(pid: int) -> list[int]:
    """The processes that it started and that have not ended. Linux; elsewhere none are found."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # gone meanwhile
        if int(fields[1]) == pid and fields[0] != "Z":
            children.append(int(stat.parent.name))
    return children


class Forked:
    """The same by tests/forked.py: what is used of `subprocess.Popen`."""

    def __init__(
        self, command: list[str], env: dict[str, str], out: IO, err: IO, cwd: Path = ROOT
    ) -> None:
        self.args, self.returncode = command, None
        program, *args = command
        request = {"program": program, "args": args, "env": env, "cwd": str(cwd)}
        self.answers, answers = os.pipe()
        files = [out.fileno(), err.fileno(), answers]
        socket.send_fds(_parent_of_forks(), [json.dumps(request).encode()], files)
        os.close(answers)
        assert select.select([self.answers], [], [], 60)[0], "tests/forked.py does not answer"
        self.pid = self._answer()

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._answer()
            os.close(self.answers)
        return self.returncode

    def _answer(self) -> int:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self.answers, 1)
            assert byte, "tests/forked.py has ended"
            line += byte
        return int(line)


@functools.cache
def _parent_of_forks() -> socket.socket:
    """Where tests/forked.py is asked, which ends with this process."""
    requests, received = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen(
        [sys.executable, str(ROOT / "tests/forked.py"), str(received.fileno())],
        env=environment(),
        pass_fds=[received.fileno()],
        start_new_session=True,
    )
    received.close()
    return requests


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
