"""What tells how a long run is: its heartbeat, its slowest rank, and its time."""

import json
import os
import platform
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from src.logs import RunLog
from src.parallel.clock import clock
from src.trainer import time_limit
from src.trainer.monitor import Monitor, Straggler, straggler
from src.trainer.time_limit import TimeLimit
from tests.launch import ROOT

FOUR = [{"forward": 0.10, "backward": 0.20, "communication": 0.10} for _ in range(4)]


def with_rank(rank: int, **seconds: float) -> list[dict[str, float]]:
    return [times | seconds if i == rank else times for i, times in enumerate(FOUR)]


@pytest.mark.parametrize(
    "ranks, found",
    [
        (FOUR, None),
        (with_rank(2, backward=0.24), None),  # by a fifth
        (with_rank(2, backward=0.26), Straggler(2, "backward", 0.26, 0.20)),
        (with_rank(3, forward=0.2, backward=0.26), Straggler(3, "forward", 0.2, 0.1)),
        (with_rank(1, communication=9.0), None),  # it waits for others
        (with_rank(0, data=5.0), None),  # it has this phase alone
        ([{"data": 0.001, "forward": 1.0}, {"data": 0.002, "forward": 1.0}], None),  # of no weight
        ([{"forward": 1.0}, {"forward": 1.5}], Straggler(1, "forward", 1.5, 1.0)),
        ([{"forward": 1.0}], None),
        ([{}, {}], None),
    ],
)
def test_a_straggler_is_slower_than_the_others_median_and_it_matters(ranks, found):
    assert straggler(ranks) == found


@pytest.fixture
def log(tmp_path):
    with RunLog(str(tmp_path), "test", {}, rank=0) as log:
        yield log


@pytest.fixture
def gathered(monkeypatch):
    """A second rank, for the all-gather: what it says."""
    other = {}

    def gather(every, own):
        every[:] = [own, ("other", other)]

    monkeypatch.setattr("src.trainer.monitor.dist.all_gather_object", gather)
    return other


def test_a_window_s_typical_step_counts_and_not_one_that_was_slow_once(log, gathered, tmp_path):
    monitor = Monitor(log, SimpleNamespace(world_size=2), window=5)
    gathered["forward"] = 1.0
    numbers = {"seconds": 1.0}
    for step in range(1, 11):
        once = 50.0 if step in (2, 4) else 1.0
        monitor.took(step, {"forward": once if step <= 5 else 2.0}, numbers)
    lines = (tmp_path / "test.log").read_text().splitlines()
    said = [line for line in lines if "is slow" in line]
    assert len(said) == 1
    name = platform.node()
    assert f"WARNING steps 6 to 10: rank 0 on {name} is slow: forward takes it 2.000 s" in said[0]


def test_a_heartbeat_tells_step_phase_and_time_and_gets_old_in_a_hang(log, tmp_path, monkeypatch):
    def heartbeat():
        return json.loads((tmp_path / "heartbeat.json").read_text())

    now = [100.0]
    monkeypatch.setattr("src.trainer.monitor.time.monotonic", lambda: now[0])
    monitor = Monitor(log, SimpleNamespace(world_size=1), window=None)
    monitor.begin(3, 90)
    facts = {"pid": os.getpid(), "host": platform.node(), "step": 3, "steps": 90}
    assert heartbeat().items() >= (facts | {"phase": "start", "saved_step": 3}).items()
    try:
        with clock.phase("forward"):
            assert heartbeat()["phase"] == "start", "a second has not passed"
        now[0] += 1.1
        with clock.phase("backward"), clock.communication():
            assert heartbeat()["phase"] == "backward"
        now[0] += 1.1
        monitor.took(4, {}, {"seconds": 0.12345, "tokens_per_s": 99.99, "loss": 1.0})
        read = heartbeat()
        assert (read["step"], read["seconds_per_step"], read["tokens_per_s"]) == (4, 0.123, 100.0)
        assert "loss" not in read and abs(_age(read)) < 60
        monitor.saved(4)
        monitor.end("finished")
        assert heartbeat()["phase"] == "finished" and heartbeat()["saved_step"] == 4
    finally:
        clock.listener = None
    assert [path.name for path in tmp_path.glob("heartbeat*")] == ["heartbeat.json"]


def _age(read: dict) -> float:
    from datetime import datetime

    return (datetime.now().astimezone() - datetime.fromisoformat(read["time"])).total_seconds()


def test_a_heartbeat_ends_with_its_log(tmp_path):
    with RunLog(str(tmp_path), "test", {}, rank=0) as log:
        monitor = Monitor(log, SimpleNamespace(world_size=1), window=None)
    monitor.begin(0, 1)
    clock.listener = None
    assert not (tmp_path / "heartbeat.json").exists()


def test_a_process_is_as_old_as_it_is():
    """A process that is started now: by the clock of who starts it."""
    code = "import time; from src.trainer.time_limit import process_age as age; "
    code += "print(time.monotonic() - age())"
    before = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    after = time.monotonic()
    began = float(process.communicate()[0])
    if platform.system() == "Linux":  # it counts in hundredths
        assert before - 0.05 < began < after + 0.05
    else:
        assert before < began


def test_time_is_up_when_another_step_and_its_saving_would_not_end_before_the_limit(monkeypatch):
    age, now = [0.0], [0.0]
    monkeypatch.setattr(time_limit, "process_age", lambda: age[0])
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: now[0])
    limit = TimeLimit(minutes=2.0)
    for seconds in (8.0, 3.0):  # the longest counts
        limit.begin()
        now[0] += seconds
        limit.end()
    limit.longest_save = 12.0
    age[0] = 120 - 1.25 * 20 - 0.1
    assert not limit.is_up() and not limit.is_past()
    age[0] += 0.2
    assert limit.is_up() and not limit.is_past()
    age[0] = 120.0
    assert limit.is_past()
    none = TimeLimit(None)
    age[0] = 1e9
    assert not none.is_up() and not none.is_past()
