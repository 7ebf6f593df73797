"""A cluster of this machine alone: the programs that scripts of deploy/ call are stubs of it.

`srun` starts its command once for each node, `scancel` signals what it started, `scontrol` answers
and notes what it is told; `python` starts Python, as a fork where there are any (tests/launch.py).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

from tests.faults.harness import alive
from tests.launch import FORKS, ROOT, Forked, children_of, environment, started

PROGRAMS = ("srun", "scancel", "scontrol", "python")
PATIENCE_S = 240


class Cluster:
    """Context manager. Everything that it started has ended when it is left."""

    def __init__(self, folder: Path, nodes: int = 1, **env: str) -> None:
        """folder: for outputs; env: of what is run here, beside the stubs' PATH."""
        self.folder, self.nodes = folder, nodes
        self.calls: list[list[str]] = []  # of all stubs: program and arguments
        self.state = "RUNNING"  # of the job, as scontrol tells
        self.ends: list[int] = []  # what srun and python end with, in turn, without running a thing
        self.tasks: list[subprocess.Popen | Forked] = []  # that run
        self.scripts: list[subprocess.Popen] = []
        self.pythons: list[subprocess.Popen | Forked] = []
        self._sockets = tempfile.TemporaryDirectory()  # a short path, which a socket's name is
        address = Path(self._sockets.name) / "s"
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(address))
        self._server.listen(16)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        stubs = folder / "bin"
        stubs.mkdir(parents=True)
        stub = f"exec {sys.executable} -S -E {ROOT}/tests/deploy/stub.py {address}"
        for program in PROGRAMS:
            (stubs / program).write_text(f'#!/bin/sh\n{stub} {program} "$@"\n')
            (stubs / program).chmod(0o755)
        path = f"{stubs}:{os.environ['PATH']}"
        self.env = environment() | {"CUDA_VISIBLE_DEVICES": "", "PATH": path, **env}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.scripts, *self.pythons):
            for pid in (*children_of(process.pid), process.pid):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
        for script in self.scripts:
            script.wait(10)
        self._server.shutdown(socket.SHUT_RDWR)  # ends the thread, which may listen to nothing else
        self._thread.join()
        self._server.close()
        self._sockets.cleanup()

    def run(self, *command: str, name: str = "out", **env: str) -> subprocess.Popen:
        """Start a script of deploy/; what it says goes to the file `name`."""
        with (self.folder / name).open("wb") as out:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.env | env,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.scripts.append(process)
        return process

    def said(self) -> str:
        """By all that ran."""
        files = (file for file in self.folder.iterdir() if file.is_file())
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)

    def called(self, program: str) -> list[list[str]]:
        """The arguments of each call of a stub."""
        return [args for name, *args in self.calls if name == program]

    # --- the other side of stub.py --------------------------------------------------------------

    def _serve(self) -> None:
        with suppress(OSError):  # closed: the end
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        messages = connection.makefile()
        request = json.loads(messages.readline())
        program, args, env = request["program"], request["args"], request["env"]
        self.calls.append([program, *args])
        answer: dict[str, str | int] = {"out": "", "code": 1}
        try:
            if program in ("srun", "python"):
                answer["code"] = self._ended(program, args, env, messages)
            elif program == "scancel":
                self._signal(args)
                answer["code"] = 0
            else:
                answer = {"out": self._about(args), "code": 0}
        finally:  # nobody waits for what goes wrong here
            connection.sendall(json.dumps(answer).encode() + b"\n")

    def _ended(self, program: str, args: list[str], env: dict[str, str], messages: IO[str]) -> int:
        """Start tasks, and wait for them: what srun, or Python, ends with."""
        if self.ends:
            return self.ends.pop(0)
        tasks = self._launch(args, env) if program == "srun" else [self._python(args, env)]

        def told() -> None:
            for line in messages:
                # srun kills what it has started (SLURM's srun_job.c), Python gets the signal
                number = json.loads(line)["signal"]
                for task in tasks:
                    os.kill(task.pid, signal.SIGKILL if program == "srun" else number)

        threading.Thread(target=told, daemon=True).start()
        codes = [task.wait() or 0 for task in tasks]
        return max(128 - code if code < 0 else code for code in codes)  # as srun has it

    def _signal(self, args: list[str]) -> None:
        """scancel: all processes of the job's steps."""
        assert args[0] == "--signal=TERM"
        for task in self.tasks:
            for pid in (*children_of(task.pid), task.pid):
                os.kill(pid, signal.SIGTERM)

    def _about(self, args: list[str]) -> str:
        """What scontrol says."""
        if args[:2] == ["show", "hostnames"]:
            return "127.0.0.1\n" * self.nodes
        if args[:2] == ["show", "job"]:
            return f"JobId={args[-1]} JobState={self.state} Restarts=0\n"
        return ""

    def _launch(self, args: list[str], env: dict[str, str]) -> list[subprocess.Popen | Forked]:
        """srun's tasks, one for each node."""
        first = next(i for i, word in enumerate(args) if not word.startswith("--"))
        program, *words = args[first:]
        assert program == "python"
        tasks = [
            self._python(words, env | {"SLURM_NODEID": str(node)}) for node in range(self.nodes)
        ]
        self.tasks += tasks
        return tasks

    def _python(self, words: list[str], env: dict[str, str]) -> subprocess.Popen | Forked:
        command = [str(ROOT / words[0]), *words[1:]]
        with (self.folder / f"python-{len(self.pythons)}").open("wb") as out:
            process = (Forked if FORKS else started)(command, env, out, out)
        self.pythons.append(process)
        return process


def until(
    condition: Callable[[], bool], cluster: Cluster, *running: subprocess.Popen | Forked
) -> None:
    """Until the condition holds. Fails when one of those that are running has ended."""
    began = time.monotonic()
    while not condition():
        assert all(process.poll() is None for process in running), cluster.said()
        assert time.monotonic() - began < PATIENCE_S, cluster.said()
        time.sleep(0.01)
