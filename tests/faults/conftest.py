"""A small model, data, and the command lines of the three trainers; made once."""

import json

import pytest

from tests.faults.harness import Run, curve, hashes
from tests.test_scripts import flags, must


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("faults")
    must("dataset/build.py", "arithmetic", *flags(save_dir=base / "data", n_train=48, n_test=5))
    must(
        "dataset/start.py",
        *flags(
            train_file=base / "data" / "train.json",
            save_dir=base / "start",
            vocab_size=430,
            dim=32,
            n_layers=1,
            n_heads=4,
        ),
    )
    rows = json.loads((base / "data" / "train.json").read_text())
    pairs = [
        {"instruction": row["instruction"], "chosen": row["output"], "rejected": other["output"]}
        for row, other in zip(rows, rows[1:])
    ]
    (base / "pairs.json").write_text(json.dumps(pairs))
    must(
        "verifier_train.py",
        *flags(
            ckpt_dir=base / "start",
            save_dir=base / "verifier",
            train_file=base / "pairs.json",
            max_batch_size=16,
            lr=1e-3,
        ),
    )
    return base


@pytest.fixture(scope="session")
def command(base, full):
    """(trainer, folder, more flags) → its command line; the model goes to folder/model. As long as the kills need."""
    epochs, iterations = (16, 64) if full else (10, 12)

    def of(trainer: str, folder, **more) -> list[str]:
        script, given = {
            "SFT": (
                "solver_train.py",
                dict(
                    ckpt_dir=base / "start",
                    train_file=base / "data" / "train.json",
                    lora_dropout=0.1,
                    lora_rank=4,
                    max_batch_size=4,
                    epochs=epochs,
                    lr=1e-2,
                    save_every=4,
                ),
            ),
            "verifier": (
                "verifier_train.py",
                dict(
                    ckpt_dir=base / "start",
                    train_file=base / "pairs.json",
                    max_batch_size=4,
                    epochs=epochs,
                    lr=1e-3,
                    save_every=4,
                ),
            ),
            "PPO": (
                "ppo_train.py",
                dict(
                    actor_ckpt_dir=base / "start",
                    critic_ckpt_dir=base / "verifier",
                    reward_model_ckpt_dir=base / "verifier",
                    train_file=base / "data" / "train.json",
                    max_batch_size=4,
                    max_buffer_size=8,
                    iterations=iterations,
                    mini_batches=2,
                    ppo_epochs=2,
                    max_new_tokens=6,
                    lr=1e-3,
                    critic_lr=1e-3,
                    kl_target=1.0,
                    kl_horizon=50.0,
                    value_norm=True,
                    reward_norm=True,
                    ref_ema=0.9,
                    save_every=2,
                ),
            ),
        }[trainer]
        saved = (
            {"actor_save_dir": folder / "model", "critic_save_dir": folder / "critic"}
            if trainer == "PPO"
            else {"save_dir": folder / "model"}
        )
        return [script, *flags(**given | saved | more)]

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
