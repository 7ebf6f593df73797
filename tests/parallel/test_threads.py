"""src/parallel/threads.py: how many threads there are, and that they yield on a crowded machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.parallel import threads

ROOT = Path(__file__).resolve().parents[2]
CORES = threads.cores()


def started(code: list[str], ranks: int = 1, **env: str) -> str:
    """What Python prints on so many ranks, with OMP_NUM_THREADS only where it is given."""
    foreign = ("OMP", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE", "TORCHELASTIC")
    kept = {k: v for k, v in os.environ.items() if not any(part in k for part in foreign)}
    kept |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **env}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), *code]
    ran = subprocess.run(command, capture_output=True, text=True, env=kept, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize(
    "ranks, given, expected",
    [
        (1, {}, f"{CORES} None"),
        (1, {"OMP_NUM_THREADS": "3"}, "3 3"),
        (1, {"OMP_NUM_THREADS": "1"}, "1 1"),
        # torchrun sets it to 1 itself: that is not the user's
        (2, {}, f"{max(1, CORES // 2)} {max(1, CORES // 2)} 1"),
        (2, {"OMP_NUM_THREADS": "3"}, "3 3 3"),
    ],
)
def test_the_users_number_of_threads_or_a_share_of_the_cores(ranks, given, expected):
    assert started(["tests/parallel/threads_worker.py"], ranks, **given) == expected


@pytest.mark.parametrize(
    "launcher, value, decided",
    [
        ({}, None, False),
        ({}, "1", True),
        ({"TORCHELASTIC_RUN_ID": "x"}, "2", True),
        ({"TORCHELASTIC_RUN_ID": "x"}, "1", False),
        ({"TORCHELASTIC_RUN_ID": "x", "GIVEN": "1"}, "1", True),
    ],
)
def test_a_one_is_the_users_if_the_launcher_was_started_with_it(launcher, value, decided):
    """The launcher is a process between: it has the variable from its start, or adds it."""
    code = "from src.parallel.threads import _user_decided; print(_user_decided())"
    between = f"""
import os, subprocess, sys
env = {{**os.environ}}
if {value!r}: env["OMP_NUM_THREADS"] = {value!r}
sys.exit(subprocess.run([sys.executable, "-c", {code!r}], env=env).returncode)
"""
    given = {"OMP_NUM_THREADS": "1"} if launcher.pop("GIVEN", None) else {}
    assert started(["-c", between], **launcher, **given) == str(decided)


def control_groups(root: Path, lines: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "lines, files, expected",
    [
        ("0::/\n", {}, 8),
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000\n", "job/cpu.max": "300000 100000"}, 3),
        ("0::/outside\n", {"cpu.max": "150000 100000"}, 2),  # a container's own root
        ("0::/\n", {"cpu.max": "20000 100000"}, 1),
        ("0::/\n", {"cpu.max": "6400000 100000"}, 8),
        (
            "5:memory:/m\n4:cpu,cpuacct:/a/b\n0::/\n",
            {
                "cpu/a/cpu.cfs_quota_us": "400000\n",
                "cpu/a/cpu.cfs_period_us": "100000\n",
                "cpu/a/b/cpu.cfs_quota_us": "-1\n",
                "cpu/a/b/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
    ],
)
def test_cores_are_what_affinity_and_control_groups_allow(
    tmp_path, monkeypatch, lines, files, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert threads.cores(control_groups(tmp_path, lines, files)) == expected


@pytest.fixture
def machine(monkeypatch):
    """What the kernel tells of the clock and of the threads' waiting, to be set."""
    tells = {"at": 100.0, "stood": {"1": 5.0}}
    monkeypatch.setattr(threads, "_lines_stood", lambda: dict(tells["stood"]))
    monkeypatch.setattr(threads.time, "monotonic", lambda: tells["at"])
    return tells


def test_the_watch_tells_a_crowd_from_a_moment(machine):
    watch = threads.Watch()
    looks = watch.looks()

    def seen(seconds: float, **stood: float) -> tuple[bool, bool]:
        machine["at"] += seconds
        for thread, more in stood.items():
            machine["stood"][thread[1:]] = machine["stood"].get(thread[1:], 0.0) + more
        next(looks)
        return watch.crowded, watch._surplus is not None

    next(looks)
    assert seen(1.0, t1=0.15, t2=0.15) == (False, False)  # what it stood before does not count
    assert seen(1.0, t1=0.3) == (True, True)
    assert seen(3.0) == (True, True)
    assert seen(1.5) == (True, True)
    assert seen(1.0) == (False, False)
    assert seen(0.5, t2=0.3) == (True, True)
    looks.close()
    assert not watch.crowded and watch._surplus is None


def test_the_watch_leaves_to_users_what_they_have_decided(monkeypatch):
    for name in threads.DECIDED:
        monkeypatch.delenv(name, raising=False)
    watch = threads.Watch()
    watch.start()
    assert (watch._thread is not None) == Path("/proc/self/schedstat").exists()
    watch.stop()
    assert watch._thread is None
    for name in threads.DECIDED:
        monkeypatch.setenv(name, "1")
        watch.start()
        assert watch._thread is None
        monkeypatch.delenv(name)


SPIN = """
import os, time, torch
from src.parallel.threads import Surplus
torch.set_num_threads(2)
a = torch.randn(512, 512)
def spent() -> float:
    a @ a
    began = time.process_time()
    for _ in range(20):
        a @ a
        time.sleep(0.03)  # the work of one thread, while the other waits
    return time.process_time() - began
tasks = lambda: len(os.listdir("/proc/self/task"))
alone = spent(); before = tasks()
surplus = Surplus(); beside = spent()
surplus.end(); deadline = time.monotonic() + 30
while tasks() > before and time.monotonic() < deadline:  # they end by themselves
    os.sched_yield()
print(alone, beside, tasks() - before)
"""


@pytest.mark.skipif(CORES < 2 or sys.platform != "linux", reason="one core, or no libgomp")
def test_threads_beside_a_surplus_sleep_while_they_wait():
    alone, beside, left = map(float, started(["-c", SPIN]).split())
    assert beside < 0.6 * alone
    assert left <= 0, "the surplus is gone"
