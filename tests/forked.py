"""Processes of Python that are forks of one that has PyTorch already.

    python tests/forked.py SOCKET

A server: tests/launch.py asks it for a script, or for torchrun, whose ranks are forks then, too, so
that none starts Python and imports PyTorch anew, which takes seconds of a core each. torchrun is
PyTorch's own: its rendezvous, its watch over the ranks, its ways of ending them. What forks do not
have of their own is an order of sets of strings, their memory from the start, and the end of the
interpreter: where these matter, and in `make faults`, processes are started as a user does. For
Linux.
"""

import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # a first optimizer would import it, on each rank
import torch.distributed as dist
import transformers.tokenization_utils_base  # noqa: F401  # so would a first tokenizer, this
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler


class Fork:
    """A rank as its launcher sees it: the part of `subprocess.Popen` that it uses."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str]) -> None:
        self.args = args
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            script = next(i for i, word in enumerate(args) if word.endswith(".py"))
            _become(lambda: _run(list(args[script:])), env)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        if self.poll() is None:
            ended = select.poll()
            descriptor = os.pidfd_open(self.pid)
            ended.register(descriptor, select.POLLIN)
            due = ended.poll(None if timeout is None else 1000 * timeout)
            os.close(descriptor)
            if not due:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.poll()


def _run(args: list[str]) -> None:
    """`python SCRIPT …`."""
    sys.argv, sys.path[0] = args, str(Path(args[0]).parent)
    runpy.run_path(args[0], run_name="__main__")


def _become(program: Callable[[], object], env: dict[str, str]) -> None:
    """Be a process that runs this, with this environment, and end as Python would."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the launcher's, until now
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(env)
        # what PyTorch has read of it
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
        dist.set_debug_level_from_env()
        try:
            program()
            code = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]  # as Python ends
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # nothing that is another process' is ended here, such as its threads
        os._exit(code)


def _serve(requests: socket.socket) -> None:
    """Until the other end is closed.

    A request is JSON of `program` (a script, or "torchrun"), `args`, `env` and `cwd`. With it come
    files for stdout, for stderr, and for what is said of the process: its number and, when it has
    ended, its exit code, a line each.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who waits for the process
    while True:
        request, files, _, _ = socket.recv_fds(requests, 2**20, 3)
        if not request:
            return
        if os.fork() == 0:
            requests.close()
            try:
                _look_after(json.loads(request), *files)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        for file in files:
            os.close(file)


def _look_after(request: dict, stdout: int, stderr: int, answers: int) -> None:
    """Start the process that is asked for, wait for it, and say what is to be said."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if process == 0:
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        for file in (stdout, stderr, answers):
            os.close(file)
        os.chdir(request["cwd"])
        program, args = request["program"], request["args"]
        launcher = program == "torchrun"
        _become(lambda: run.main(args) if launcher else _run([program, *args]), request["env"])
    nowhere = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1, 2):  # the tests' own, which a run that is left over would keep open
        os.dup2(nowhere, file)
    os.close(stdout)
    os.close(stderr)
    os.write(answers, f"{process}\n".encode())
    _, status = os.waitpid(process, 0)
    os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    SubprocessHandler._popen = lambda self, args, env: Fork(args, env)
    _serve(socket.socket(fileno=int(sys.argv[1])))
