"""A run that goes on with other settings than it began with: those that are named, no others."""

import json
import shutil

import pytest

from src.checkpoint.manifest import read_manifest
from src.checkpoint.steps import list_steps
from src.trainer.optimizer import lr_at
from tests.faults.harness import hashes
from tests.test_scripts import call, flags, must, refused, rows_of


@pytest.fixture(scope="module")
def left(command, tmp_path_factory):
    """A finished run of 12 steps; steps 8 and 12 are there."""
    folder = tmp_path_factory.mktemp("changed")
    must(*command("SFT", folder, epochs=1))
    return folder


@pytest.fixture
def asked(command, left, tmp_path):
    """Asks for the run once more, with other settings, in a copy of what it left."""
    shutil.copytree(left, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model-logs" / "solver_train.jsonl").unlink()

    def run(**more):
        return call(*command("SFT", tmp_path, **dict(epochs=1) | more))

    return run


def ended(done, message: str) -> None:
    """A refusal once the log is open."""
    assert done.code == 2 and message in done.err, done.err
    assert done.err.count("error:") == 1 and "Traceback" not in done.err


def rates(folder, name="solver_train") -> dict[int, float]:
    records = rows_of(folder / "model-logs" / f"{name}.jsonl")
    return {r["step"]: r["train/lr"] for r in records if "train/lr" in r}


def told(folder, name="solver_train") -> list[dict]:
    """The records of changes in a run's log."""
    records = rows_of(folder / "model-logs" / f"{name}.jsonl")
    return [r for r in records if r["event"] == "text" and r["name"] == "resume_changed"]


def test_another_learning_rate_holds_from_there_on_and_is_recorded(asked, tmp_path):
    state = tmp_path / "model-state"
    again = dict(resume=state / "step-00000008", lr=2e-3)
    refused(asked(**again), "--lr 0.01 → 0.002); give these, --resume none, or another folder")
    refused(asked(**again), "or, to go on with what is new, --resume_changed lr\n")
    done = asked(**again, resume_changed="lr, seed")
    assert done.code == 0
    assert "WARNING goes on with another setting (--resume_changed): --lr 0.01 → 0.002" in done.err
    assert "--resume_changed seed: there is nothing that it has changed from" in done.err
    (record,) = told(tmp_path)
    assert record["step"] == 8 and record["text"] == "--lr 0.01 → 0.002"
    # It is the schedule's from the ninth step on; not what the optimizer had.
    assert rates(tmp_path) == {
        step + 1: pytest.approx(lr_at(step, 12, 2e-3, 0.03, "cosine")) for step in range(8, 12)
    }
    # The run is now known by its new settings, and its steps tell how it came to them.
    for facts in (
        read_manifest(list_steps(state)[-1]),
        json.loads((state / "finished.json").read_text()),
    ):
        assert facts["settings"]["lr"] == 2e-3
        assert facts["changes"] == [
            {"after_step": 8, "name": "lr", "before": 1e-2, "now": 2e-3},
        ]
    assert "this run finished after step 12" in asked(lr=2e-3).err
    assert "this run finished after step 12" in asked(lr=2e-3, resume_changed="lr").err
    refused(asked(), "--lr 0.002 → 0.01")

    # Then the finished run goes on for longer; the second change stands beside the first.
    longer, before = dict(lr=2e-3, weight_decay=0.1, epochs=2), hashes(tmp_path / "model")
    refused(asked(**longer), "finished.json: belongs to a run with other settings (--epochs 1 → 2")
    done = asked(**longer, resume_changed="weight_decay,epochs")
    assert done.code == 0 and "goes on after step 12" in done.err
    assert sorted(rates(tmp_path)) == list(range(9, 25))
    assert hashes(tmp_path / "model") != before
    changes = read_manifest(list_steps(state)[-1])["changes"]
    assert [(c["after_step"], c["name"]) for c in changes] == [
        (8, "lr"),
        (12, "epochs"),
        (12, "weight_decay"),
    ]
    assert "this run finished after step 24" in asked(**longer).err


def test_all_changes_must_be_named_and_the_advice_names_them(asked):
    both = dict(lr=2e-3, weight_decay=0.1)
    done = asked(**both, resume_changed="lr")
    refused(done, "(--weight_decay 0.0 → 0.1)")
    assert "--resume_changed lr,weight_decay" in done.err


def test_what_cannot_change_is_refused_by_name_and_reason(asked):
    done = asked(lora_rank=8, lr=2e-3)
    refused(done, "--lora_rank 4 → 8")
    assert "no run can go on with another lora_rank" in done.err
    assert "--resume_changed" not in done.err
    why = "--resume_changed lora_rank: it decides what a saved step holds"
    refused(asked(lora_rank=8, resume_changed="lora_rank"), why)
    done = asked(max_batch_size=2, resume_changed="max_batch_size")
    refused(done, "no run can go on with another rows_per_step")


def test_where_nothing_is_left_to_do_nothing_is_moved(asked, tmp_path):
    before = hashes(tmp_path / "model")
    done = asked(lr=2e-3, resume_changed="lr")
    ended(done, "was the last of 12 steps, and nothing is left to do with what is new (--lr 0.01")
    assert (
        hashes(tmp_path / "model") == before and (tmp_path / "model-state/finished.json").exists()
    )
    for step in list_steps(tmp_path / "model-state"):
        shutil.rmtree(step)
    message = "this run finished after step 12 and kept no step to go on from (--save_every)"
    refused(asked(epochs=2, resume_changed="epochs"), message)


def test_a_damaged_list_of_changes_is_refused(asked, tmp_path):
    (tmp_path / "model-state" / "finished.json").unlink()
    path = list_steps(tmp_path / "model-state")[-1] / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"changes": 3}))
    refused(asked(), "step-00000012: changes is 3: damaged")


# --- PPO ------------------------------------------------------------------------------------------

REWARD = """
def score(prompts, responses, rows):
    {failing}
    return [float(len(text) % 3) for text in responses]
"""
FAILS = """
    from pathlib import Path
    count = Path(__file__).with_suffix(".count")
    calls = int(count.read_text()) + 1 if count.exists() else 1
    count.write_text(str(calls))
    if calls == 4:
        raise RuntimeError("judge timed out")
"""


@pytest.fixture
def grpo(base, tmp_path):
    """A run in tmp_path/NAME with the reward tmp_path/mine.py; what may fail, and more flags."""
    settings = dict(
        actor_ckpt_dir=base / "start",
        train_file=base / "data" / "train.json",
        advantage="grpo",
        samples_per_prompt=2,
        reward="file",
        reward_file=f"{tmp_path}/mine.py:score",
        max_batch_size=4,
        max_buffer_size=4,
        iterations=4,
        mini_batches=2,
        ppo_epochs=1,
        max_new_tokens=6,
        lr=1e-3,
    )

    def run(name: str, failing: str = "", **more):
        (tmp_path / "mine.py").write_text(REWARD.format(failing=failing))
        return call(
            "ppo_train.py",
            *flags(**settings | dict(actor_save_dir=tmp_path / name / "model") | more),
        )

    return run


def test_a_reward_that_failed_and_was_repaired_goes_on_to_the_same_bits(grpo, tmp_path):
    """Also without --save_every: what was learned until then is saved."""
    assert grpo("undisturbed").code == 0
    done = grpo("run", FAILS)  # tried, and then at the third iteration
    ended(done, f"RuntimeError: judge timed out ({tmp_path}/mine.py:")
    assert "step 2 is saved: the same command goes on from there, also with a repaired" in done.err
    state = tmp_path / "run" / "model-state"
    assert [step.name for step in list_steps(state)] == ["step-00000002"]
    refused(grpo("run", lr=2e-3), "(--lr 0.001 → 0.002)")
    done = grpo("run")
    assert done.code == 0
    assert "another setting (it had failed before): --reward_file" in done.err
    (record,) = told(tmp_path / "run", "ppo_train")
    assert record["step"] == 2 and record["text"].endswith("mine.py:score holds something else now")
    assert hashes(tmp_path / "run" / "model") == hashes(tmp_path / "undisturbed" / "model")


def test_a_reward_that_did_not_fail_is_changed_by_name_alone(grpo, tmp_path):
    assert grpo("run", save_every=2, iterations=2, kl_coef=0.1).code == 0
    longer = dict(iterations=3, kl_coef=0.4, save_every=2)
    done = grpo("run", "x = 1", **longer, resume_changed="iterations,kl_coef")
    refused(done, "mine.py:score holds something else now")
    assert "--resume_changed iterations,kl_coef,reward_file" in done.err
    done = grpo("run", "x = 1", **longer, resume_changed="iterations,kl_coef,reward_file")
    assert done.code == 0 and "goes on after step 2" in done.err
    records = rows_of(tmp_path / "run" / "model-logs" / "ppo_train.jsonl")
    used = {r["step"]: r["ppo/kl_coef"] for r in records if "ppo/kl_coef" in r}
    assert used == {1: 0.1, 2: 0.1, 3: 0.4}, "the coefficient that was saved is not taken up"
    assert len(told(tmp_path / "run", "ppo_train")) == 3


def test_a_step_without_a_value_model_cannot_be_gone_on_from_with_one(grpo, base):
    assert grpo("run", save_every=2, iterations=2).code == 0
    critic = dict(critic_ckpt_dir=base / "verifier", critic_save_dir=base / "critic")
    names = "iterations,advantage,critic_ckpt_dir"
    done = grpo("run", iterations=3, advantage="gae", **critic, resume_changed=names)
    ended(done, "step-00000002: holds no value: the run that saved it")
