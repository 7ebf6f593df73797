"""src/logs.py: what a run leaves behind, and what it must not leave."""

import json
import math
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from src.errors import UserError
from src.logs import RunLog, plain

REPO = Path(__file__).resolve().parent.parent


def records(folder, name="run"):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_records_lines_and_event_files(tmp_path, capsys):
    threads = threading.active_count()
    with RunLog(str(tmp_path), "run", {"lr": 1e-3}, rank=0) as log:
        log.info("two\nlines")
        log.warning("careful")
        log.scalars(7, {"loss": 0.5, "bad": math.nan, "worse": -math.inf, "loss_per_token": 2})
        log.scalars(8, {"accuracy": 1}, prefix="eval")
        log.text(8, "sample", "2 + 2 = 4")
    assert threading.active_count() == threads, "TensorBoard's writer was left open"
    start, info, warning, first, second, text, end = records(tmp_path)
    assert [(r["event"], r["level"], r["message"]) for r in (info, warning)] == [
        ("message", "info", "two\nlines"),
        ("message", "warning", "WARNING careful"),
    ]
    assert start["event"] == "start" and start["settings"] == {"lr": 1e-3}
    assert set(start["versions"]) == {"python", "torch", "transformers", "fairscale"}
    assert start["versions"]["torch"]
    assert start["versions"]["python"] == sys.version.split()[0] and "T" in start["time"]
    assert (first["step"], first["train/loss"], first["train/loss_per_token"]) == (7, 0.5, 2.0)
    assert first["train/bad"] is None and first["train/worse"] is None
    assert (second["step"], second["eval/accuracy"]) == (8, 1.0)
    assert (text["name"], text["text"]) == ("sample", "2 + 2 = 4")
    assert end["outcome"] == "finished"

    stamped = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank 0 (.*)")
    lines = [stamped.fullmatch(line)[1] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert lines == ["two", "lines", "WARNING careful", "finished"]
    shown = [stamped.fullmatch(line)[1] for line in capsys.readouterr().err.splitlines()]
    assert shown == lines[:-1]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(7, 0.5)]
    assert math.isnan(events.Scalars("train/bad")[0].value)


def test_what_libraries_warn_of_is_logged(tmp_path, capsys):
    before = warnings.showwarning
    with RunLog(tmp_path, "run", {}, 0), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("this goes away in 3.0", FutureWarning, stacklevel=1)
    warned = [r for r in records(tmp_path) if r.get("level") == "warning"]
    assert len(warned) == 1 and warned[0]["rank"] == 0
    assert warned[0]["message"].startswith("WARNING FutureWarning: this goes away in 3.0 (")
    assert "test_logs.py" in warned[0]["message"]
    assert "WARNING FutureWarning" in (tmp_path / "run.log").read_text()
    assert "WARNING FutureWarning" in capsys.readouterr().err
    assert warnings.showwarning is before


def test_what_libraries_warn_of_on_other_ranks_is_not_said_again(capsys):
    before = warnings.showwarning
    with RunLog(None, "run", {}, rank=1), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("this goes away in 3.0", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "" and warnings.showwarning is before


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_do_nothing(tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with RunLog(str(tmp_path / "logs"), "run", {}, rank=1) as log:
        log.info("x")
        log.warning("x")
        log.scalars(1, {"loss": 1.0})
        log.text(1, "sample", "x")
        with log.progress(2, "train") as progress:
            progress.update(1, tokens=5, loss=1.0)
    assert capsys.readouterr() == ("", "") and not (tmp_path / "logs").exists()


def test_without_a_folder_lines_still_reach_stderr(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog(None, "run", {}, rank=0) as log:
        log.info("hello")
        log.scalars(1, {"loss": 1.0})
        log.text(1, "sample", "x")
    assert capsys.readouterr().err.endswith("rank 0 hello\n") and not list(tmp_path.iterdir())


def test_no_secret_and_no_environment_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    secrets = ("token", "hub_token", "HF_TOKEN", "client_secret", "password", "wandb_api_key")
    hidden = dict.fromkeys(secrets, "s3cret")
    kept = {"tokenizer_file": "t.json", "max_new_tokens": 8, "tokens": 3, "names": ["a"]}
    kept["top_p"] = math.inf
    with RunLog(str(tmp_path), "run", {**hidden, **kept, "hub": dict(hidden)}, rank=0):
        pass
    start = records(tmp_path)[0]
    written = start["settings"]
    assert all(written[name] == written["hub"][name] == "<redacted>" for name in hidden)
    assert {name: written[name] for name in kept} == {**kept, "top_p": None}
    assert start["environment"]["OMP_NUM_THREADS"] == "1"
    allowed = {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}
    assert set(start["environment"]) <= allowed
    assert not any("s3cret" in file.read_text() for file in tmp_path.iterdir())


def test_plain_keeps_an_absent_token_visible_and_writes_objects_as_text():
    written = plain({"hub_token": None, "folder": Path("a/b"), "flag": True})
    assert written == {"hub_token": None, "folder": "a/b", "flag": True}


def test_a_failed_run_says_so_in_its_files_and_a_resumed_one_appends(tmp_path, capsys):
    with pytest.raises(ValueError), RunLog(str(tmp_path), "run", {}, rank=0):
        raise ValueError("boom")
    with RunLog(str(tmp_path), "run", {}, rank=0):
        pass
    outcomes = [None, "stopped by ValueError: boom", None, "finished"]
    assert [r.get("outcome") for r in records(tmp_path)] == outcomes
    assert "stopped by ValueError: boom" in (tmp_path / "run.log").read_text()
    assert capsys.readouterr().err == ""


def test_an_unusable_folder_is_the_users_to_fix(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the log .*file"):
        RunLog(str(tmp_path / "file"), "run", {}, rank=0).__enter__()


@pytest.mark.parametrize("git", ["works", "fails", "missing"])
def test_git_revision(tmp_path, monkeypatch, git):
    if git != "missing":
        (tmp_path / "git").write_text(f"#!/bin/sh\necho abc123\nexit {int(git == 'fails')}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with RunLog(str(tmp_path), "run", {}, rank=0):
        pass
    assert records(tmp_path)[0]["git"] == ("abc123" if git == "works" else None)


def test_progress_off_a_terminal_is_sparse_plain_lines(tmp_path):
    script = """
from src.logs import RunLog
with RunLog(None, "run", {}, rank=0) as log, log.progress(5000, "train", unit="step") as progress:
    for step in range(5000):
        progress.update(1, tokens=10, loss=0.25)
        if step == 100:
            log.info("message")
"""
    command, env = [sys.executable, "-c", script], {**os.environ, "PYTHONPATH": str(REPO)}
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ran.returncode == 0 and "\r" not in ran.stderr and "\x1b" not in ran.stderr
    begin, message, end = ran.stderr.splitlines()
    assert "0/5000" in begin and message.endswith("rank 0 message")
    parts = ("train: 100%", "5000/5000", "step/s", "loss=0.25", "tokens/s=")
    assert all(part in end for part in parts)
    assert float(re.search(r"tokens/s=([\d.e+]+)", end)[1]) > 100


@pytest.fixture
def clock(monkeypatch):
    """The seconds that bars and the log see, [now]."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("src.logs.time.monotonic", lambda: now[0])
    return now


def test_progress_off_a_terminal_is_a_line_a_minute_whatever_bars_are_open(clock, capsys):
    with RunLog(None, "run", {}, rank=0) as log:
        with log.progress(100, "train", unit="step") as outer:
            for step in range(100):
                clock[0] += 7
                outer.update(1)
                if step % 5 == 4:  # short bars inside, longer than a minute once
                    with log.progress(4, "evaluating") as inner:
                        for _ in range(4):
                            clock[0] += 30 if step == 49 else 1
                            inner.update(1)
        for name in ("first", "second"):  # one after the other
            with log.progress(2, name) as bar:
                clock[0] += 1
                bar.update(2)
    lines = [line.split("rank 0 ")[1] for line in capsys.readouterr().err.splitlines()]
    *during, first, second = lines
    minutes = (100 * 7 + 19 * 4 + 120) / 60
    assert "train:   0%" in during[0] and "train: 100%|" in during[-1]
    assert minutes - 3 < len(during) <= minutes + 2, "one a minute, none left out, and the last"
    inside = sum(line.startswith("evaluating:") for line in during)
    assert 1 <= inside <= 4, "20 of them began and ended"
    assert first.startswith("first: 100%") and second.startswith("second: 100%")


def test_progress_on_a_terminal_is_one_bar_that_messages_do_not_tear(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with RunLog(None, "run", {}, rank=0) as log, log.progress(2, "train") as progress:
        progress.update(1, loss=0.5)
        log.info("message")
        progress.update(1, loss=0.25)
    written = capsys.readouterr().err
    assert "\rtrain:" in written and re.search(r"\r\d{4}[^\r]* rank 0 message\n", written)
