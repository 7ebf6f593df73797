"""Runs that last: ended before their job's limit, watched on the way."""

import json

from src.errors import STOPPED
from tests.faults.harness import Run, steps_in
from tests.test_scripts import call, refused


def test_a_run_whose_time_is_up_saves_on_all_ranks_and_goes_on(command, tmp_path):
    """By the clock of one rank, which is slow by its own account, and is named."""
    sizes = dict(model_parallel_size=1, max_batch_size=2, epochs=1, save_every=1000)
    arguments = command("SFT", tmp_path, **sizes)
    more = ["--max_minutes", "30", "--straggler_window", "4"]
    run = Run(["tests/faults/slow.py", "9", *arguments, *more], 2, tmp_path / "log")
    assert run.wait() != 0
    said, heartbeat = run.said(), tmp_path / "model-logs" / "heartbeat.json"
    message = "stopped by --max_minutes 30 after step 9, which is saved; the same command goes on"
    assert message in said and "Traceback" not in said.split("stopped by")[0], said[-3000:]
    for window in ("1 to 4", "5 to 8"):
        assert f"WARNING steps {window}: rank 1 on " in said and "is slow: forward takes it" in said
    assert steps_in(tmp_path / "model-state") == [9]
    read = json.loads(heartbeat.read_text())
    assert (read["step"], read["saved_step"], read["phase"]) == (9, 9, "stopped")

    run = Run(arguments, 2, tmp_path / "log 2")
    assert run.wait() == 0, run.said()[-3000:]
    assert json.loads(heartbeat.read_text())["phase"] == "finished"


def test_ppo_ends_in_time_with_the_code_of_a_signal(command, tmp_path, monkeypatch):
    ages = iter([*[0.0] * 3, *[599.99] * 100])  # before the first step, after two, and later
    monkeypatch.setattr("src.trainer.time_limit.process_age", lambda: next(ages))
    arguments = command("PPO", tmp_path, iterations=4, save_every=1000)
    done = call(*arguments, "--max_minutes", "10")
    assert done.code == STOPPED, done.err
    assert "stopped by --max_minutes 10 after step 3, which is saved" in done.err
    assert steps_in(tmp_path / "model-state") == [3] and not (tmp_path / "model").exists()
    read = json.loads((tmp_path / "model-logs" / "heartbeat.json").read_text())
    assert read["step"] == 3 and read["steps"] == 4 and read["tokens_per_s/generate"] > 0
    monkeypatch.undo()
    assert call(*arguments).code == 0 and (tmp_path / "model").is_dir()


def test_a_limit_that_has_passed_before_the_first_step_is_refused(command, tmp_path, monkeypatch):
    monkeypatch.setattr("src.trainer.time_limit.process_age", lambda: 61.0)
    monkeypatch.setattr("src.trainer.saving.process_age", lambda: 61.0)
    arguments = command("SFT", tmp_path, epochs=1)
    done = call(*arguments, "--max_minutes", "1")
    assert done.code == 2 and "--max_minutes 1: 1.0 minutes have gone into starting" in done.err
    assert not (tmp_path / "model-state").exists()
    refused(call(*arguments, "--max_minutes", "0"), "--max_minutes 0.0: must be above 0")
