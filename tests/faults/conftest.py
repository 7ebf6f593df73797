"""A small model, data, and the command lines of the three trainers; made once."""

import json

import pytest

from tests.faults import harness
from tests.faults.harness import Run, curve, hashes
from tests.test_scripts import flags, must


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("faults")
    must("dataset/build.py", "arithmetic", *flags(save_dir=base / "data", n_train=48, n_test=5))
    train_file, start = base / "data" / "train.json", base / "start"
    sizes = dict(vocab_size=430, dim=32, n_layers=2, n_heads=4)
    must("dataset/start.py", *flags(train_file=train_file, save_dir=start, **sizes))
    rows = json.loads(train_file.read_text())
    pairs = [
        {"instruction": row["instruction"], "chosen": row["output"], "rejected": other["output"]}
        for row, other in zip(rows, rows[1:])
    ]
    (base / "pairs.json").write_text(json.dumps(pairs))
    verifier = dict(train_file=base / "pairs.json", max_batch_size=16, lr=1e-3)
    must("verifier_train.py", *flags(ckpt_dir=start, save_dir=base / "verifier", **verifier))
    return base


@pytest.fixture(scope="session")
def command(base, full):
    """(trainer, folder, more flags) → its command line; the model goes to folder/model.

    The run is as long as the kills need.
    """
    epochs, iterations = (16, 64) if full else (10, 12)
    start, verifier = base / "start", base / "verifier"
    train_file, pairs = base / "data" / "train.json", base / "pairs.json"
    supervised = dict(ckpt_dir=start, max_batch_size=4, epochs=epochs, save_every=4)
    settings = {
        "SFT": supervised | dict(train_file=train_file, lora_dropout=0.1, lora_rank=4, lr=1e-2),
        "verifier": supervised | dict(train_file=pairs, lr=1e-3),
        "SFT, ZeRO 3": supervised
        | dict(train_file=train_file, lr=1e-3, zero=3, model_parallel_size=1),
        "PPO": dict(actor_ckpt_dir=start, critic_ckpt_dir=verifier, reward_model_ckpt_dir=verifier)
        | dict(train_file=train_file, max_batch_size=4, max_buffer_size=8, iterations=iterations)
        | dict(mini_batches=2, ppo_epochs=2, max_new_tokens=6, lr=1e-3, critic_lr=1e-3)
        | dict(kl_target=1.0, kl_horizon=50.0, value_norm=True, reward_norm=True, ref_ema=0.9)
        | dict(save_every=2),
    }
    settings["SFT, PP 2"] = settings["SFT"] | dict(
        model_parallel_size=1, pipeline_parallel_size=2, max_batch_size=2, accumulation_steps=2
    )
    scripts = {"verifier": "verifier_train.py", "PPO": "ppo_train.py"}

    def of(trainer: str, folder, **more) -> list[str]:
        saved = {"save_dir": folder / "model"}
        if trainer == "PPO":
            saved = {"actor_save_dir": folder / "model", "critic_save_dir": folder / "critic"}
        script = scripts.get(trainer, "solver_train.py")
        return [script, *flags(**settings[trainer] | saved | more)]

    return of


@pytest.fixture(scope="session")
def undisturbed(command, tmp_path_factory):
    """(trainer, ranks) → the weights and the curve of a run that nothing happened to."""
    known = {}

    def of(trainer: str, ranks: int) -> tuple:
        if (trainer, ranks) not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            run = Run(command(trainer, folder), ranks, folder / "log")
            assert run.wait() == 0, run.said()[-3000:]
            known[trainer, ranks] = hashes(folder / "model"), curve(folder / "model-logs")
        return known[trainer, ranks]

    return of


@pytest.fixture(scope="session")
def full(request):
    """Whether everything is to be tried (`make faults`), or a shorter cut."""
    return request.config.getoption("--full-faults")


@pytest.fixture(scope="session", autouse=True)
def as_a_user_starts_them(full):
    if full:
        harness.FORKED = False
