"""What reinforcement learning adds to supervised training on the embedded arithmetic.

    python benchmarks/learning.py --seeds 0,1,2 --work_dir runs/learning --out runs/learning.md \\
        --plot docs/learning.svg

By method and over seeds. For each seed: quickstart.py's data, SFT and verifier (`--until verifier`;
what is there already is used), then 40 iterations of 256 rollouts by each method from that same SFT
policy, evaluated greedily on 600 held-out problems every 8 iterations. "constant": PPO whose reward
is the same number for every response: a policy that moves then, moves by noise, or by what its
critic knew when it began: a critic that starts from the verifier prefers what that prefers until it
has learned that nothing matters. Methods share the cores: one process of one thread each.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from common import ROOT, draw_band

from src.cli import run

ITERATIONS, EVERY = 40, 8
COMMON = {
    "max_batch_size": 64,
    "max_buffer_size": 256,
    "iterations": ITERATIONS,
    "eval_every": EVERY,
    "max_new_tokens": 90,
    "max_seq_len": 256,
    "task": "GSM8K",
    "ppo_epochs": 2,
    "lr": 2e-4,
    "schedule": "linear",
    "log_samples": 0,
}
GROUPS = {"samples_per_prompt": 8, "reward": "rule", "kl_coef": 0.02}
CONSTANT = {"reward": "format", "format_pattern": ""}  # 1 for every response
PPO = {"critic_lr": 5e-4, "kl_coef": 0.1}
METHODS = {
    "PPO (verifier)": PPO,
    "PPO (rule)": {"critic_lr": 5e-4, "kl_coef": 0.02, "reward": "rule"},
    "GRPO (rule)": {"advantage": "grpo", **GROUPS},
    "RLOO (rule)": {"advantage": "rloo", **GROUPS},
    "GRPO (constant)": {"advantage": "grpo", **GROUPS, **CONSTANT},
    "PPO (constant)": {"critic": "sft", **PPO, "lam": 1.0, **CONSTANT},
    "PPO (constant; λ 0.95)": {"critic": "sft", **PPO, **CONSTANT},
    "PPO (constant; λ 0.95; critic from the verifier)": {**PPO, **CONSTANT},
}


def name_of(method: str) -> str:
    return re.sub(r"\W+", "-", method.lower()).strip("-")


def flags_of(method: str, seed: int, work: Path, out: Path) -> list[str]:
    """The command line of one run, but for the interpreter."""
    flags = {
        "actor_ckpt_dir": work / "sft",
        "actor_save_dir": out,
        "train_file": work / "data" / "train.json",
        "label_file": work / "data" / "test.json",
        "seed": seed,
        **COMMON,
        **METHODS[method],
    }
    critic = flags.pop("critic", "verifier")
    if "advantage" not in flags:
        flags |= {"critic_ckpt_dir": work / critic, "critic_save_dir": f"{out}-critic"}
    if "reward" not in flags:
        flags["reward_model_ckpt_dir"] = work / "verifier"
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["ppo_train.py", *words]


def curve(logs: Path) -> tuple[dict[int, float], int]:
    """(iteration → accuracy, tokens generated) from a run's log."""
    records = [json.loads(line) for line in (logs / "ppo_train.jsonl").read_text().splitlines()]
    scalars = [r for r in records if r["event"] == "scalars"]
    accuracy = {r["step"]: r["eval/GSM8K/accuracy"] for r in scalars if "eval/GSM8K/accuracy" in r}
    lengths = [r["ppo/response_length"] for r in scalars if "ppo/response_length" in r]
    return accuracy, int(sum(lengths) * COMMON["max_buffer_size"])


def main(
    seeds: list[int] | None = None,
    work_dir: str = "runs/learning",
    quickstart_dir: str = "runs/quickstart",
    methods: list[str] | None = None,
    jobs: int = 2,
    out: str | None = None,
    plot: str | None = None,
):
    """Run what has not been run, and write the table and the curves.

    Args:
        seeds: of data, weights and training; 0,1,2 when not given.
        work_dir: where the runs go; a run whose log says that it finished is not run again.
        quickstart_dir: quickstart.py's folders, QUICKSTART_DIR-SEED.
        methods: some of the methods' names; all when not given.
        jobs: runs at a time, each on a core of its own.
        out: a Markdown file for the tables.
        plot: an .svg or .png file for the curves.
    """
    seeds, names = seeds or [0, 1, 2], methods or list(METHODS)
    work, cores = ROOT / work_dir, Queue()
    work.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        folder = f"{quickstart_dir}-{seed}"
        if not (ROOT / folder / "verifier" / "params.json").is_file():
            arguments = ["--seed", str(seed), "--work_dir", folder, "--until", "verifier"]
            subprocess.run([sys.executable, "quickstart.py", *arguments], cwd=ROOT, check=True)
    for core in sorted(os.sched_getaffinity(0))[:jobs]:
        cores.put(core)

    def one(job: tuple[str, int]) -> None:
        method, seed = job
        folder = work / f"{name_of(method)}-{seed}"
        log = folder.parent / f"{folder.name}-logs" / "ppo_train.jsonl"
        if log.is_file() and '"outcome": "finished"' in log.read_text():
            return
        log.unlink(missing_ok=True)
        core = cores.get()
        try:
            flags = flags_of(method, seed, ROOT / f"{quickstart_dir}-{seed}", folder)
            command = [sys.executable, *flags]
            pinned = {"preexec_fn": lambda: os.sched_setaffinity(0, {core})}
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, **pinned)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, [(method, seed) for seed in seeds for method in names]))
    results = {m: [curve(work / f"{name_of(m)}-{seed}-logs") for seed in seeds] for m in names}
    text = table(results, seeds)
    print(text)
    if out:
        Path(out).write_text(text + "\n")
    if plot:
        draw(results, plot)


def table(results: dict[str, list[tuple[dict[int, float], int]]], seeds: list[int]) -> str:
    """Accuracy at the start and the end of each run, in per cent, and the tokens it generated."""
    columns = " | ".join(f"seed {seed}" for seed in seeds)
    lines = [
        f"| method | {columns} | mean gain | tokens generated |",
        "|---|" + "---|" * (len(seeds) + 2),
    ]
    for method, runs in results.items():
        ends = [(100 * curve[0], 100 * curve[max(curve)]) for curve, _ in runs]
        cells = [f"{first:.1f} → {last:.1f} ({last - first:+.1f})" for first, last in ends]
        gain = sum(last - first for first, last in ends) / len(ends)
        tokens = " / ".join(f"{count / 1e3:.0f}k" for _, count in runs)
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {gain:+.1f} | {tokens} |")
    return "\n".join(lines)


def draw(results: dict[str, list[tuple[dict[int, float], int]]], path: str) -> None:
    """Mean over seeds as a line, smallest to largest as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for method, runs in results.items():
        steps = sorted(runs[0][0])
        values = [[100 * curve[step] for step in steps] for curve, _ in runs]
        draw_band(axes, steps, values, method)
    iterations = f"iterations of {COMMON['max_buffer_size']} rollouts"
    axes.set(xlabel=iterations, ylabel="greedy accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    run(main)
