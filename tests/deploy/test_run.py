"""deploy/run.sh: when a command is started again, and what it ends with."""

import signal
import subprocess
import time

import pytest

from tests.launch import ROOT

RUN = str(ROOT / "deploy/run.sh")
# A run: each attempt saves a step if `saves` says so, and ends with the next of `codes`.
COMMAND = """
n=$(cat attempts 2>/dev/null || echo 0); echo $((n + 1)) >attempts; echo "$@" >>words
step=out-state/step-0000000$n
[ $saves = no ] || { mkdir -p $step && touch $step/manifest.json; }
set -- $codes; shift $n; exit $1
"""


def attempt(folder, codes: str, saves: str = "yes", words: tuple[str, ...] = (), **env: str):
    """(what it came to, how often it was started)."""
    command = [RUN, "bash", "-c", COMMAND, "run", "--save_dir", "out", *words]
    env = {"PATH": "/usr/bin:/bin", "codes": codes, "saves": saves, **env}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    return done, int((folder / "attempts").read_text())


@pytest.mark.parametrize(
    "codes, saves, ends, attempts",
    [
        ("0", "yes", 0, 1),
        ("1 1 0", "yes", 0, 3),
        ("1 0", "no", 1, 1),  # no progress
        ("2 0", "yes", 2, 1),  # wrong input
        ("75 0", "yes", 75, 1),  # told to stop
        ("1 75 0", "yes", 75, 2),
        ("137 1 134 9", "yes", 134, 3),  # MAX_RESTARTS=2
    ],
)
def test_a_command_is_started_again_while_it_saves(tmp_path, codes, saves, ends, attempts):
    done, started = attempt(tmp_path, codes, saves, MAX_RESTARTS="2")
    assert (done.returncode, started) == (ends, attempts), done.stderr
    first, *others = (tmp_path / "words").read_text().splitlines()
    assert first == "--save_dir out" and set(others) <= {"--save_dir out --resume=auto"}


@pytest.mark.parametrize("code, ends", [("75", 143), ("2", 2), ("0", 0)])
def test_a_stop_is_said_in_a_schedulers_own_code(tmp_path, code, ends):
    assert attempt(tmp_path, code, EXIT_STOPPED="143")[0].returncode == ends


def test_a_signal_is_handed_on_and_ends_the_supervision(tmp_path):
    run = """
    trap "sleep 0.2; exit 75" TERM
    mkdir -p out-state/step-00000001; touch out-state/step-00000001/manifest.json ready
    while :; do sleep 0.05; done
    """
    command = [RUN, "bash", "-c", run, "run", "--save_dir", "out"]
    process = subprocess.Popen(command, cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
