"""What happens to a training run when something goes wrong, and that nothing is lost.

Times to detection are printed (-s).
"""

import os
import random
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from src.checkpoint.manifest import problems, read_manifest
from src.checkpoint.steps import list_steps
from src.errors import STOPPED
from tests.faults.harness import (
    Run,
    alive,
    curve,
    hashes,
    kill_at_random,
    recorded,
    steps_in,
)
from tests.launch import ROOT, children_of, start
from tests.test_scripts import call, refused
from tests.trainer.test_saving import STAGES

# Kills in `make test`; 20 of each trainer and degree in `make faults`.
CUT = {("SFT", 1): 1, ("SFT, ZeRO 3", 2): 1, ("SFT, PP 2", 2): 1}


def whole_steps(state) -> None:
    for step in list_steps(state):
        assert problems(step, read_manifest(step)) == []


def finished(command: list[str], ranks: int, log) -> str:
    run = Run(command, ranks, log)
    assert run.wait() == 0, run.said()[-3000:]
    return run.said()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("trainer", ["SFT", "verifier", "PPO", "SFT, ZeRO 3", "SFT, PP 2"])
def test_killed_at_random_moments_a_run_goes_on_bit_for_bit(
    command, undisturbed, full, tmp_path, trainer, ranks
):
    kills = 20 if full else CUT.get((trainer, ranks), 0)
    if not kills:
        pytest.skip("tried by `make faults`")
    if trainer == "SFT, PP 2" and ranks == 1:
        pytest.skip("a pipeline of two stages takes two ranks")
    rng, done, arguments = random.Random(f"{trainer} {ranks}"), 0, command(trainer, tmp_path)
    logs, state = tmp_path / "model-logs", tmp_path / "model-state"
    within = 4 if trainer == "PPO" else 12
    while done < kills:
        run = Run(arguments, ranks, tmp_path / "log")
        done += kill_at_random(run, logs, rng, within)
        over = run.wait() == 0
        assert not over or done == kills, "the run was over before all kills: give it more steps"
        whole_steps(state)
        if (state / "finished.json").exists():
            break
    finished(arguments, ranks, tmp_path / "log")
    weights, losses = undisturbed(trainer, ranks)
    assert hashes(tmp_path / "model") == weights
    assert curve(logs) == losses
    print(f"{trainer}, {ranks} ranks: {done} kills, weights and curve the same")


@pytest.mark.parametrize("trainer", ["SFT", "verifier", "PPO"])
def test_killed_at_every_stage_of_a_save_a_run_goes_on_bit_for_bit(
    command, undisturbed, full, tmp_path, trainer
):
    """One kill a launch, of the rank that writes the manifest and of another one.

    Each launch goes on from the last whole step.
    """
    if not full:
        pytest.skip("tried by `make faults`")
    arguments, state, ranks, newest = command(trainer, tmp_path), tmp_path / "model-state", 2, []
    for stage in STAGES:
        rank = 0 if stage in ("written", "manifest", "renamed") else 1  # rank 0 writes the manifest
        run = Run(["tests/faults/killed.py", stage, str(rank), *arguments], ranks, tmp_path / "log")
        assert run.wait() != 0
        whole_steps(state)
        newest.append(max(steps_in(state), default=0))
    every = 2 if trainer == "PPO" else 4
    gained = [(after - before) // every for before, after in zip([0, *newest], newest)]
    assert gained[:3] == [0, 0, 0] and gained[3] == 1, "a step counts from its renaming on"
    finished(arguments, ranks, tmp_path / "log")
    weights, losses = undisturbed(trainer, ranks)
    assert hashes(tmp_path / "model") == weights and curve(tmp_path / "model-logs") == losses
    print(
        f"{trainer}: killed at {', '.join(STAGES)}; newest steps {newest}; "
        "weights and curve the same"
    )


def test_an_offloaded_run_is_saved_role_by_role_and_goes_on(command, tmp_path):
    """Also back to an older step, whose successors are set aside, and from it to the same end."""
    arguments = command("PPO", tmp_path, offload=True, keep=50, iterations=6)
    finished(command("PPO", tmp_path / "plain", iterations=6), 1, tmp_path / "log")
    finished(arguments, 1, tmp_path / "log")
    first, state = hashes(tmp_path / "model"), tmp_path / "model-state"
    older = list_steps(state)[1]
    finished([*arguments, "--resume", str(older)], 1, tmp_path / "log")
    assert hashes(tmp_path / "model") == first and (state / "aside-1" / "finished.json").is_file()
    assert first == hashes(tmp_path / "plain" / "model"), "offloading changes nothing"


def test_sigterm_to_a_single_process_saves_and_says_how_to_go_on(command, undisturbed, tmp_path):
    arguments = command("SFT", tmp_path, save_every=1000)
    run = Run(arguments, 1, tmp_path / "log")
    run.until(lambda: recorded(tmp_path / "model-logs") >= 3, "three steps")
    began = time.monotonic()
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() == STOPPED
    print(f"SIGTERM to one process: saved and gone in {time.monotonic() - began:.2f} s")
    assert "stopped by a signal after step" in run.said() and "Traceback" not in run.said()
    assert len(steps_in(tmp_path / "model-state")) == 1 and not (tmp_path / "model").exists()
    finished(arguments, 1, tmp_path / "log")
    assert hashes(tmp_path / "model") == undisturbed("SFT", 1)[0]


@pytest.mark.parametrize("to", ["launcher", "one rank"])
def test_sigterm_under_the_launcher_saves_on_all_ranks(command, undisturbed, full, tmp_path, to):
    if to == "launcher" and not full:
        pytest.skip("tried by `make faults`")
    arguments = command("SFT", tmp_path, save_every=1000)
    run = Run(arguments, 2, tmp_path / "log")
    run.until(lambda: recorded(tmp_path / "model-logs") >= 3, "three steps")
    began = time.monotonic()
    os.kill(run.process.pid if to == "launcher" else run.workers()[1], signal.SIGTERM)
    assert run.wait() != 0
    print(f"SIGTERM to {to}: saved and gone in {time.monotonic() - began:.2f} s")
    assert len(steps_in(tmp_path / "model-state")) == 1
    finished(arguments, 2, tmp_path / "log")
    assert hashes(tmp_path / "model") == undisturbed("SFT", 2)[0]


def test_workers_stop_when_their_launcher_is_killed(command, full, tmp_path):
    if not full:
        pytest.skip("tried by `make faults`")
    run = Run(command("SFT", tmp_path, save_every=1000, epochs=400), 2, tmp_path / "log")
    run.until(lambda: recorded(tmp_path / "model-logs") >= 3, "three steps")
    workers, began = run.workers(), time.monotonic()
    os.kill(run.process.pid, signal.SIGKILL)
    while any(map(alive, workers)) and time.monotonic() - began < 60:
        time.sleep(0.01)
    took = time.monotonic() - began
    left = [pid for pid in workers if alive(pid)]
    run.end()
    print(f"launcher killed: workers gone in {took:.2f} s")
    assert not left and steps_in(tmp_path / "model-state"), run.said()[-2000:]


def test_a_rank_that_hangs_is_named(command, full, tmp_path):
    if not full:
        pytest.skip("tried by `make faults`")
    run = Run(command("SFT", tmp_path, epochs=400, timeout=8), 2, tmp_path / "log")
    run.until(lambda: recorded(tmp_path / "model-logs") >= 3, "three steps")
    began = time.monotonic()
    os.kill(run.workers()[1], signal.SIGSTOP)
    run.until(lambda: "did not come to" in run.said(), "a message")
    print(f"SIGSTOP of a rank: noticed in {time.monotonic() - began:.1f} s (--timeout 8)")
    assert "rank 1 of 2" in run.said()
    run.end()


@pytest.mark.parametrize("watched", [[], ["--watched"]], ids=["by gloo", "by the roll call"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_hangs_while_gloo_reduces_is_named(full, tmp_path, ranks, watched):
    if not full and (ranks == 3 or watched):
        pytest.skip("tried by `make faults`")
    run = Run(["tests/faults/lost.py", *watched], ranks, tmp_path / "log")
    run.until(lambda: run.workers() and "did not come to" in run.said(), "a message")
    message = f"error: rank 1 of {ranks} did not come to what all ranks do together"
    assert run.said().count(message) == 1, run.said()[-3000:]
    run.end()


@pytest.mark.parametrize("ranks", [2])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(command, tmp_path, ranks):
    """The second data-parallel rank's third loss is NaN; later all of them.

    Until the run gives up and names the rows.
    """
    arguments = command(
        "SFT", tmp_path, model_parallel_size=1, epochs=2, save_every=1000, max_skipped_steps=3
    )
    run = Run(["tests/faults/poisoned.py", "3", "5", *arguments], ranks, tmp_path / "log")
    assert run.wait() != 0
    log = run.said()
    assert "step 3: the gradient norm is nan, the step is skipped" in log and "step 4:" not in log
    assert "not finite in 3 steps in a row (--max_skipped_steps), the last on rows [" in log
    assert "Traceback (most" not in log.split("error:")[0]


def test_a_full_disk_is_named_and_older_steps_stay(command, full, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", place]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here: it needs root")
    try:
        log_dir = tmp_path / "logs"
        arguments = command("verifier", place, keep=50, save_every=1, log_dir=log_dir)
        run = Run(arguments, 1, tmp_path / "log 1")
        assert run.wait() == 2, run.said()[-2000:]
        message = "are needed for 51 steps (--save_every, --keep)"
        assert message in run.said(), run.said()[-2000:]
        assert recorded(log_dir) == 0 and not list(place.iterdir()), "a step was taken first"
        arguments = command("verifier", place, keep=1, save_every=1, log_dir=log_dir)
        run = Run(arguments, 1, tmp_path / "log")
        run.until(lambda: steps_in(place / "model-state"), "a step")
        # somebody fills the disk, and what becomes free
        with (place / "others").open("wb", buffering=0) as others:
            while run.process.poll() is None:
                with suppress(OSError):
                    others.write(bytes(4096))
        assert run.wait() == 2, run.said()[-2000:]
        assert "No space left" in run.said() or "os error 28" in run.said(), run.said()[-2000:]
        assert steps_in(place / "model-state") and not list((place / "model-state").glob(".tmp*"))
        whole_steps(place / "model-state")
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("trainer", ["SFT", "verifier", "PPO"])
def test_no_thread_of_a_process_group_outlives_a_refusal(command, full, tmp_path, trainer):
    """One that lets go of a tensor while Python shuts down ends in SIGABRT, not in code 2."""
    if trainer != "PPO" and not full:
        pytest.skip("tried by `make faults`")
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are read from /proc")
    arguments = ["tests/faults/leaving.py", *command(trainer, tmp_path)]
    run = Run(arguments, 1, tmp_path / "log", forked=False)
    assert run.wait() == 2, run.said()
    before, after = (
        int(re.search(rf"gloo's threads {when}: (\d+)", run.said())[1])
        for when in ("before", "after")
    )
    assert before > 0 and after == 0, run.said()


def test_the_same_run_is_known_and_another_refused_before_any_work(
    command, base, tmp_path, monkeypatch
):
    def asked(**more):
        return call(*command("SFT", tmp_path, epochs=1, **more))

    def load_model(*_):
        pytest.fail("a model was loaded")

    assert asked().code == 0
    before = hashes(tmp_path / "model")
    monkeypatch.setattr("src.checkpoint.load.load_model", load_model)
    data, state = base / "data", tmp_path / "model-state"
    for same in (
        {},
        dict(train_file=data / ".." / "data" / "train.json"),
        dict(max_batch_size=2, accumulation_steps=2),
        dict(keep=9),
    ):
        done = asked(**same)
        assert done.code == 0
        assert "this run finished after step 12; --resume none runs it again" in done.err
    changed = {
        "--lr 0.01 → 0.02": dict(lr=2e-2),
        "test.json": dict(train_file=data / "test.json"),
        "--label_file None → ": dict(task="GSM8K", label_file=data / "test.json"),
        "--rows_per_step 4 → 2": dict(max_batch_size=2),
        "--config_file None → ": dict(config_file=base / "start" / "config.json"),
        "nowhere: is no saved step": dict(resume="nowhere"),
    }
    for message, more in changed.items():
        refused(asked(**more), message)
    (state / "finished.json").unlink()
    file = next(list_steps(state)[-1].glob("model*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    refused(asked(), f"{file}: its SHA-256 is not that of what was written")
    assert hashes(tmp_path / "model") == before


def test_collectives_that_do_not_match_are_python_errors_in_the_tests():
    done = start(2, "tests/faults/apart.py")
    assert done.returncode != 0
    assert "mismatch between collectives" in done.stderr and "RuntimeError" in done.stderr


def test_the_supervisor_starts_again_while_there_is_progress(command, undisturbed, full, tmp_path):
    if not full:
        pytest.skip("tried by `make faults`")
    arguments = command("SFT", tmp_path, resume="none")  # of the first attempt alone
    supervisor = [str(ROOT / "deploy" / "run.sh")]
    run = Run(arguments, 1, tmp_path / "log", supervisor)
    run.until(lambda: steps_in(tmp_path / "model-state"), "a step")
    os.kill(children_of(run.process.pid)[0], signal.SIGKILL)
    assert run.wait() == 0, run.said()[-2000:]
    assert "restart 1" in run.said() and hashes(tmp_path / "model") == undisturbed("SFT", 1)[0]
    arguments = command("SFT", tmp_path / "other", ckpt_dir=tmp_path / "nowhere")
    hopeless = Run(arguments, 1, tmp_path / "log 2", supervisor)
    assert hopeless.wait() == 2 and "nowhere" in hopeless.said() and "run.sh" not in hopeless.said()
