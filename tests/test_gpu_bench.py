"""`make gpu` on the CPU: every stage measures, and what goes wrong in one costs only that one."""

import contextlib
import json
import os
import select
import sys
from pathlib import Path

import pytest

from src.errors import UserError
from tests.launch import ROOT
from tests.test_scripts import must

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
from gpu_stages import scripts, tables

BREAKS = {  # a stage's code, and how it is said to have ended
    "print('fine')": "done",
    "raise ValueError('no such thing')": "failed with exit code 1: ValueError: no such thing",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "killed by SIGKILL",
    "import signal; signal.pause()": "stopped after its limit of 1 s",
}


def in_this_process(command: list[str], log: Path, limit: float) -> str:
    """A stage without the seconds that a process needs to start."""
    stage, out = (command[command.index(flag) + 1] for flag in ("--stage", "--out"))
    assert "--small" in command and limit <= gpu.STAGES[stage].limit
    gpu.measure(stage, small=True, folder=Path(out))
    return "done"


def script_in_this_process(say, *command: str, **flags) -> None:
    must(*command, *(word for name, value in flags.items() for word in (f"--{name}", str(value))))
    say(script=command[0], s=0.1)


def test_every_stage_measures(tmp_path, monkeypatch, capsys):
    run_alone, stages = gpu.run_alone, dict(gpu.STAGES)
    monkeypatch.setattr(scripts, "script", script_in_this_process)
    monkeypatch.setattr(gpu, "run_alone", in_this_process)
    monkeypatch.setattr(gpu, "STAGES", {k: v for k, v in stages.items() if k != "correct"})
    gpu.main(out=str(tmp_path))
    # tests/gpu start a process group of their own
    monkeypatch.setattr(gpu, "STAGES", stages)
    log = tmp_path / "correct.log"
    command = [sys.executable, gpu.__file__, "--stage", "correct", "--out", str(tmp_path)]
    assert run_alone(command, log, 240) == "done", log.read_text()[-3000:]

    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    by_stage = {name: [r for r in records if r["stage"] == name] for name in stages}
    for name, found in by_stage.items():
        assert found and (name == "correct" or found[-1]["ended"] == "done"), name
    assert [r["batch"] for r in by_stage["decode"][:-1]] == [1, 3]
    assert all(isinstance(r["ms"], float) for r in by_stage["decode"][:-1])  # noise, at this size
    tokens = [r["tokens"] for r in by_stage["rollouts"][:-1]]
    assert tokens[0] == 4 * 8 and len(tokens) == 3  # slots times new tokens
    assert [r["recompute"] for r in by_stage["lora"][:-1]] == ["full", "selective"]
    assert {r["iteration"] for r in by_stage["scripts"] if "iteration" in r} == {"GRPO", "PPO"}
    outcomes = [r["outcome"] for r in by_stage["correct"]]
    assert outcomes.count("passed") > 80 and "failed" not in outcomes

    # The tables have a row for each result.
    text = tables.tables(records)
    for part in ("batch 3", "a queue of twice as many", "whole", "LoRA", "GRPO, 16 × 6", "vllm"):
        assert part in text, text
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize("code", BREAKS)
def test_a_stage_that_breaks_is_told_of(tmp_path, code):
    limit = 1 if "limit" in BREAKS[code] else 60
    ended = gpu.run_alone([sys.executable, "-c", code], tmp_path / "log", limit)
    assert ended == BREAKS[code]


def test_what_a_stage_started_ends_with_it(tmp_path):
    pid = tmp_path / "pid"
    child = f"import signal, os; open({str(pid)!r}, 'w').write(str(os.getpid())); signal.pause()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert "limit" in gpu.run_alone([sys.executable, "-c", code], tmp_path / "log", 3)
    with contextlib.suppress(ProcessLookupError):  # gone already
        ended = os.pidfd_open(int(pid.read_text()))
        assert select.select([ended], [], [], 60)[0], "still there"
        os.close(ended)


def test_the_next_stage_runs_and_what_has_no_time_is_left_out(tmp_path, monkeypatch):
    ran = []

    def failing(command, log, limit):
        ran.append((command[command.index("--stage") + 1], limit))
        return "killed by SIGKILL"

    monkeypatch.setattr(gpu, "run_alone", failing)
    gpu.main(only="decode,env", out=str(tmp_path), seconds=40)
    assert [name for name, _ in ran] == ["decode", "env"]
    assert all(limit <= 40 for _, limit in ran)
    ran.clear()
    gpu.main(only="decode,env", out=str(tmp_path), seconds=gpu.SHORTEST / 2)
    assert not ran and "no time left" in (tmp_path / "table.md").read_text()


def test_a_row_that_does_not_fit_or_was_not_measured_says_so():
    step = dict(stage="lora", parameters=7e9, trained="LoRA", recompute="selective", compiled=True)
    text = tables.tables([step | dict(rows=8, length=2048, fits=False)])
    assert "| 7.00B, LoRA, recomputed in part, compiled, 8 × 2048 tokens | does not fit |" in text
    text = tables.tables([dict(stage="decode", batch=1, ms=5.0, tokens_per_s=200.0, roofline=0.9)])
    assert "| batch 1 | 5.00 | 200 | 0.90 | not measured | not measured |" in text


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(UserError, match="decodes: stages are env, correct, decode"):
        gpu.main(only="env,decodes", out=str(tmp_path))
