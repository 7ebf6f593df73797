"""What preference learning, best-of-n and distillation add to supervised training.

    python benchmarks/preferences.py --seeds 0,1,2 --out runs/preferences.md

On the embedded arithmetic, by method and over seeds. For each seed: quickstart.py as a whole (what
is there already is used). Then, from its SFT policy, each method of `METHODS`: the offline ones on
the pairs that its verifier was trained on, 4 samples of each of 4,000 training prompts; online DPO
on 2,048 of these prompts; best-of-n on the right ones of 4 samples of the 4,000. And distillation:
a student of half the size, trained like the SFT policy, then on 4,000 of the prompts once more:
supervised, or on its own answers by the quickstart's PPO policy. Greedy accuracy on 600 held-out
problems. Methods share the cores: one process of one thread each.
"""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from common import ROOT

from src.cli import run

ROWS = {"max_seq_len": 256, "max_new_tokens": 90, "task": "GSM8K"}
PAIRS = {"train_file": "data/pairs-train.json", "max_batch_size": 32, **ROWS}
METHODS = {
    "DPO": ("preference_train.py", {**PAIRS, "loss": "dpo", "lr": 1e-4}),
    "ORPO": ("preference_train.py", {**PAIRS, "loss": "orpo", "lr": 3e-4}),
    "SimPO": ("preference_train.py", {**PAIRS, "loss": "simpo", "lr": 1e-4}),
    "KTO": ("preference_train.py", {**PAIRS, "loss": "kto", "lr": 1e-4}),
    "online DPO": (
        "preference_train.py",
        {
            **PAIRS,
            "train_file": "2048.json",
            "online": True,
            "samples_per_prompt": 4,
            "reward": "rule",
            "lr": 2e-4,
        },
    ),
    "best of n": (
        "solver_train.py",
        {**PAIRS, "train_file": "kept.jsonl", "epochs": 2, "lr": 1e-3},
    ),
}
STUDENT = {"dim": 64, "n_layers": 2}
SFT = {"max_batch_size": 32, "beta2": 0.99, "lr": 4e-3, "epochs": 4, **ROWS}
AGAIN = {"train_file": "4000.json", "max_batch_size": 32, "lr": 1e-3, **ROWS}
DISTILLED = {
    "student, supervised once more": ("solver_train.py", {**AGAIN, "lr": 3e-4}),
    "student, on-policy distillation": (
        "distill_train.py",
        {**AGAIN, "on_policy": 1.0, "divergence": "reverse_kl"},
    ),
}


def name_of(method: str) -> str:
    return re.sub(r"\W+", "-", method.lower()).strip("-")


def words(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


class Work:
    """One seed's folders."""

    def __init__(self, quickstart: Path, folder: Path, seed: int) -> None:
        self.quickstart, self.folder, self.seed = quickstart, folder, seed
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, file: str) -> Path:
        """A data file: the quickstart's, or one made here."""
        return self.quickstart / file if file.startswith("data/") else self.folder / file

    def subsets(self) -> None:
        """The first rows of the training file, as prompts and as rows."""
        rows = json.loads((self.quickstart / "data" / "train.json").read_text())
        for n in (2048, 4000):
            (self.folder / f"{n}.json").write_text(json.dumps(rows[:n]))

    def training(self, method: str, script: str, flags: dict, **given) -> list[str]:
        """A training command, with the evaluation before and after it."""
        flags = {
            **flags,
            "train_file": self.path(flags["train_file"]),
            "label_file": self.quickstart / "data" / "test.json",
            "save_dir": self.folder / name_of(method),
            "seed": self.seed,
            **given,
        }
        return [script, *words(flags)]


def launch(command: list[str], cores: Queue, done: Path) -> None:
    """Run a script on a core of its own, unless it has run; its seconds stay in a file."""
    if done.is_file():
        return
    core, began = cores.get(), time.perf_counter()
    try:
        pinned = {"preexec_fn": lambda: os.sched_setaffinity(0, {core})}
        result = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, **pinned
        )
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}\n{result.stderr[-3000:]}")
        done.write_text(json.dumps({"minutes": (time.perf_counter() - began) / 60}))
    finally:
        cores.put(core)


def measured(work: Work, method: str, script: str) -> dict:
    """Accuracy before and after, in per cent, generated tokens, and minutes."""
    folder = work.folder / f"{name_of(method)}-logs"
    lines = (folder / f"{script.removesuffix('.py')}.jsonl").read_text().splitlines()
    scalars = [r for r in map(json.loads, lines) if r["event"] == "scalars"]
    accuracy = [100 * r["eval/GSM8K/accuracy"] for r in scalars if "eval/GSM8K/accuracy" in r]
    tokens = sum(r.get("train/generated_tokens", 0) for r in scalars)
    minutes = json.loads((work.folder / f"{name_of(method)}.done").read_text())["minutes"]
    return {"before": accuracy[0], "after": accuracy[-1], "tokens": tokens, "minutes": minutes}


def main(
    seeds: list[int] | None = None,
    work_dir: str = "runs/preferences",
    quickstart_dir: str = "runs/quickstart",
    methods: list[str] | None = None,
    jobs: int = 2,
    out: str | None = None,
):
    """Run what has not been run, and write the table.

    Args:
        seeds: of data, weights and training; 0,1,2 when not given.
        work_dir: where the runs go; what is there already is not run again.
        quickstart_dir: quickstart.py's folders, QUICKSTART_DIR-SEED.
        methods: some of the methods' names; all when not given.
        jobs: runs at a time, each on a core of its own.
        out: a Markdown file for the table.
    """
    seeds, known = seeds or [0, 1, 2], {**METHODS, **DISTILLED}
    names, cores = methods or list(known), Queue()
    for core in sorted(os.sched_getaffinity(0))[:jobs]:
        cores.put(core)
    works = []
    for seed in seeds:
        folder = ROOT / f"{quickstart_dir}-{seed}"
        if not (folder / "summary.json").is_file():
            arguments = ["--seed", str(seed), "--work_dir", str(folder)]
            subprocess.run([sys.executable, "quickstart.py", *arguments], cwd=ROOT, check=True)
        works.append(Work(folder, ROOT / f"{work_dir}-{seed}", seed))
        works[-1].subsets()

    def before(work: Work) -> None:
        """What methods start from: kept samples, and the student."""
        folder, rows = work.folder, work.path("4000.json")
        sampling = {
            "ckpt_dir": work.quickstart / "sft",
            "input_file": rows,
            "output_file": folder / "kept.jsonl",
            "num_samples": 4,
            "temperature": 1.0,
            "best_of": "rule",
            "keep": "right",
            "max_new_tokens": 90,
            "max_seq_len": 256,
            "seed": work.seed,
        }
        if "best of n" in names:
            launch(["solver_generate.py", *words(sampling)], cores, folder / "kept.done")
        if set(DISTILLED) & set(names):
            train = work.quickstart / "data" / "train.json"
            begin = {"train_file": train, "save_dir": folder / "start", **STUDENT}
            begin["seed"] = work.seed
            launch(["dataset/start.py", *words(begin)], cores, folder / "start.done")
            command = work.training(
                "student", "solver_train.py", {**SFT, "train_file": "data/train.json"},
                ckpt_dir=folder / "start",
            )  # fmt: skip
            launch(command, cores, folder / "student.done")

    def one(job: tuple[str, Work]) -> None:
        method, work = job
        script, flags = known[method]
        given = {"ckpt_dir": work.quickstart / "sft"}
        if method in DISTILLED:
            given = {"ckpt_dir": work.folder / "student"}
        if script == "distill_train.py":
            given["teacher_ckpt_dir"] = work.quickstart / "ppo"
        command = work.training(method, script, flags, **given)
        launch(command, cores, work.folder / f"{name_of(method)}.done")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(before, works))
        list(pool.map(one, [(method, work) for work in works for method in names]))
    found = {m: [measured(work, m, known[m][0]) for work in works] for m in names}
    text = table(found, seeds, works)
    print(text)
    if out:
        Path(out).write_text(text + "\n")


def table(found: dict[str, list[dict]], seeds: list[int], works: list[Work]) -> str:
    """Accuracy before and after in each seed, tokens generated in training, and minutes."""
    columns = " | ".join(f"seed {seed}" for seed in seeds)
    lines = [
        f"| method | {columns} | mean gain | tokens generated | minutes |",
        "|---|" + "---|" * (len(seeds) + 3),
    ]
    # The pairs' and the kept samples' tokens were generated before training.
    sampled = [sampled_tokens(work.quickstart / "samples-train.jsonl") for work in works]
    for method, runs in found.items():
        cells = [f"{r['before']:.1f} → {r['after']:.1f}" for r in runs]
        gain = sum(r["after"] - r["before"] for r in runs) / len(runs)
        is_offline = method in METHODS and method != "online DPO"
        tokens = sampled if is_offline else [r["tokens"] for r in runs]
        shown = " / ".join(f"{n / 1e3:.0f}k" for n in tokens)
        minutes = " / ".join(f"{r['minutes']:.1f}" for r in runs)
        lines.append(f"| {method} | {' | '.join(cells)} | {gain:+.1f} | {shown} | {minutes} |")
    return "\n".join(lines)


def sampled_tokens(path: Path) -> int:
    return sum(len(json.loads(line)["tokens"]) for line in path.read_text().splitlines())


if __name__ == "__main__":
    run(main)
