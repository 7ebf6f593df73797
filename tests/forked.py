"""torchrun whose ranks are forks of it.

    python tests/forked.py --nproc_per_node N … SCRIPT …

The launcher is PyTorch's own: its rendezvous, its watch over the ranks, its ways of ending them.
Only that no rank starts Python and imports PyTorch anew, which takes seconds of a core each. What
ranks do not have of their own so is an order of sets of strings, and their memory from the start.
Runs that are killed (tests/faults/harness.py) are started as a user does. For Linux.
"""

import atexit
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import torch
import torch._dynamo  # a first optimizer would import it, on each rank
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
            code = 1
            try:
                code = _rank(list(args), env)
            finally:  # nothing that is the launcher's is ended here, such as its threads
                os._exit(code)

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


def _rank(args: list[str], env: dict[str, str]) -> int:
    """Be `python -u SCRIPT …` with this environment; the exit code."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the launcher's, until now
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    script = next(i for i, word in enumerate(args) if word.endswith(".py"))
    sys.argv = args[script:]
    sys.path[0] = str(Path(args[script]).parent)
    try:
        runpy.run_path(args[script], run_name="__main__")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as Python ends
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    SubprocessHandler._popen = lambda self, args, env: Fork(args, env)
    run.main(sys.argv[1:])
