"""The whole job on a laptop: data, tokenizer, a small Llama, SFT, a verifier, PPO.

    make quickstart                 (or: python quickstart.py --seed 0 --work_dir runs/quickstart-0)

It ends with what each step brought. Every step is the real script with its real flags, printed
before it runs: copy a line to run that step alone.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from src.cli import run
from src.errors import UserError
from src.stages import ROOT, Stages, accuracy_in


def main(
    seed: Annotated[int, "of the data, the weights and the training"] = 0,
    work_dir: Annotated[
        str | None, "where everything goes; runs/quickstart-SEED when not given"
    ] = None,
    ranks: Annotated[int, "model-parallel ranks: 1, 2 or 4"] = 2,
    until: Annotated[
        Literal["end", "verifier"], 'the last stage; "verifier" leaves what PPO starts from'
    ] = "end",
) -> None:
    """Run everything and print the table."""
    if ranks not in (1, 2, 4):
        raise UserError(
            f"--ranks {ranks}: the small model has 4 heads; 1, 2 or 4 ranks can share them"
        )
    work = Path(work_dir or f"runs/quickstart-{seed}")
    data, base, shards, sft = work / "data", work / "base", work / "base-shards", work / "sft"
    verifier, policy, critic = work / "verifier", work / "ppo", work / "ppo-critic"
    train, test, stages = data / "train.json", data / "test.json", Stages("quickstart", ranks)
    answers = {"max_new_tokens": 90, "max_seq_len": 256}

    stages.run(
        "data", "dataset/build.py arithmetic", save_dir=data, n_train=20000, n_test=600, seed=seed
    )
    stages.run(
        "start", "dataset/start.py", train_file=train, save_dir=base, dim=96, n_layers=2, seed=seed
    )
    stages.run("start", "checkpoint_split.py", ckpt_file=base, save_path=shards, n=ranks)
    stages.torchrun(
        "SFT",
        "solver_train.py",
        ckpt_dir=shards,
        save_dir=sft,
        train_file=train,
        max_batch_size=32,
        lr=4e-3,
        beta2=0.99,
        epochs=4,
        task="GSM8K",
        label_file=test,
        seed=seed,
        **answers,
    )
    stages.torchrun(
        "evaluate",
        "solver_evaluate.py",
        task="GSM8K",
        ckpt_dir=sft,
        log_dir=work / "sft-evaluation",
        label_file=test,
        **answers,
    )
    for part, file, rows in (("train", train, 4000), ("test", test, 600)):
        samples = work / f"samples-{part}.jsonl"
        stages.torchrun(
            "sample",
            "solver_generate.py",
            ckpt_dir=sft,
            input_file=file,
            output_file=samples,
            max_rows=rows,
            num_samples=4,
            temperature=1.0,
            seed=seed,
            **answers,
        )
        stages.run(
            "sample",
            "dataset/build.py pairs",
            train_file=file,
            predictions=samples,
            save_file=data / f"pairs-{part}.json",
        )
    stages.torchrun(
        "verifier",
        "verifier_train.py",
        ckpt_dir=sft,
        save_dir=verifier,
        train_file=data / "pairs-train.json",
        max_batch_size=32,
        lr=1e-3,
        epochs=2,
        label_file=data / "pairs-test.json",
        seed=seed,
        max_seq_len=256,
    )
    if until == "verifier":
        print(f"{sft} and {verifier} are there; PPO was left out (--until verifier)")
        return
    stages.torchrun(
        "PPO",
        "ppo_train.py",
        actor_ckpt_dir=sft,
        actor_save_dir=policy,
        critic_ckpt_dir=verifier,
        critic_save_dir=critic,
        reward_model_ckpt_dir=verifier,
        train_file=train,
        max_batch_size=64,
        max_buffer_size=256,
        iterations=40,
        lr=2e-4,
        critic_lr=5e-4,
        ppo_epochs=2,
        kl_coef=0.1,
        seed=seed,
        **answers,
    )
    stages.torchrun(
        "evaluate",
        "solver_evaluate.py",
        task="GSM8K",
        ckpt_dir=policy,
        log_dir=work / "ppo-evaluation",
        label_file=test,
        **answers,
    )
    stages.run("merge", "checkpoint_merge.py", ckpt_dir=policy, save_dir=work / "ppo-huggingface")

    results = {
        "solver before training": accuracy_in(work / "sft-logs" / "results-epoch-0.json"),
        "solver after SFT": accuracy_in(work / "sft-evaluation" / "results.json"),
        "solver after PPO": accuracy_in(work / "ppo-evaluation" / "results.json"),
        "verifier (pairs)": accuracy_in(work / "verifier-logs" / "results-epoch-2.json"),
    }
    summary = {
        "seed": seed,
        "accuracy": results,
        "seconds": stages.seconds,
        "minutes": stages.minutes,
    }
    (ROOT / work / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\nSeed {seed}: accuracy on held-out problems (GSM8K's official rule)")
    for name, accuracy in results.items():
        print(f"  {name:24} {100 * accuracy:5.1f} %")
    stages.print_minutes()
    print(
        f"Everything lies in {work}: {sft.name}, {verifier.name}, {policy.name} and {critic.name} "
        "(shards), ppo-huggingface (for transformers), *-logs (TensorBoard), *-evaluation "
        "(predictions), summary.json"
    )


if __name__ == "__main__":
    run(main)
