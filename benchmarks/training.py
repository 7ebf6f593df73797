"""Training beside other software, on the same rows in the same order, and beside the machine.

    python benchmarks/training.py --train_file GSM8K/train.jsonl --out docs/performance-training.md
    # one table of the seven
    python benchmarks/training.py --train_file GSM8K/train.jsonl --only sft

The machine: what it could do. The 58M Llama with random weights, batches of 8, AdamW without decay,
clipping at 1, a constant learning rate. Each run is a process of its own; runs alternate and
medians are given; the first steps of a run are not timed. bf16 has fp32 master weights on all
sides. The other software: `pip install -r benchmarks/requirements.txt`.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from common import ROOT, alternate, make_model, make_tokenizer, median, report, torchrun

from src.cli import run
from src.parallel.setup import has_products_in

# What the machine has products in: without, bf16 takes 50 times as long, on all sides.
DTYPES = {
    name: dtype
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items()
    if torch.cuda.is_available() or has_products_in(dtype)
}
BATCH, LR, WARM = 8, 1e-4, 5  # steps that are not timed
# "quickest" is what made TRL so on the machine that the tables are from.
KEPT = {"precompute_ref_log_probs": True}
TRL_SETTINGS = {
    "quickest": {"sft": {"padding_free": True, "torch_compile": True}},
    "padding_free": {"sft": {"padding_free": True}},
    "compiled": dict.fromkeys(("sft", "verifier", "dpo", "dpo-kept"), {"torch_compile": True}),
    "default": {},
}
# What is trained: its title, and what is counted.
TASKS = {
    "sft": ("SFT", "examples"),
    "verifier": ("Verifier", "pairs"),
    "dpo": ("DPO", "pairs"),
    "dpo-kept": ("DPO, the reference's log-probabilities kept", "pairs"),
}


def ours(folder: Path, job: dict) -> dict:
    """Our own loop, as solver_train.py, verifier_train.py and preference_train.py run it."""
    from src.checkpoint.load import load_model
    from src.checkpoint.source import Checkpoint
    from src.data.encoding import Comparison
    from src.logs import RunLog
    from src.models.batch import Sequence
    from src.parallel.setup import start
    from src.settings.declaration import build
    from src.settings.scripts import SolverTrainSettings
    from src.trainer import fit as fitting
    from src.trainer.losses import Knobs
    from src.trainer.objective import Objective
    from src.trainer.optimizer import Optimizer
    from src.trainer.preference import PreferenceObjective
    from src.trainer.reference import KeptReference, LiveReference, score_all
    from src.trainer.solver import SolverObjective
    from src.trainer.verifier import VerifierObjective

    parallel = start(job.get("mp"))
    task, dtype = job["task"], DTYPES[job["dtype"]]
    checkpoint, head = Checkpoint.open(str(folder)), "score" if task == "verifier" else "lm"
    model = load_model(checkpoint, parallel, dtype, head).train()
    rows = [row for batch in job["batches"] for row in batch]
    objective: Objective
    if task != "sft":
        pairs = [[Sequence(tokens, row[2]) for tokens in row[:2]] for row in rows]
        comparisons = [Comparison.of_sides([chosen], [rejected]) for chosen, rejected in pairs]
        groups = [c.responses for c in comparisons]
    if task == "verifier":
        objective = VerifierObjective(comparisons, parallel.device)
    elif task == "dpo":
        reference = LiveReference(load_model(checkpoint, parallel, dtype, head), True, parallel)
        objective = PreferenceObjective(comparisons, [(1, "dpo")], Knobs(), reference, parallel)
    elif task == "dpo-kept":
        with RunLog(None, "benchmark", {}, 1) as log:
            numbers = score_all(model, groups, True, (BATCH, 2**15), parallel, log)
        kept = KeptReference(numbers, parallel.device)
        objective = PreferenceObjective(comparisons, [(1, "dpo")], Knobs(), kept, parallel)
    else:
        objective = SolverObjective([Sequence(**row) for row in rows], parallel.device)
    order = iter(range(len(rows)))
    batches = [[next(order) for _ in batch] for batch in job["batches"]]
    fitting.epoch_batches = lambda *_: batches  # the peers' order
    ends: list[float] = []

    class Clock(RunLog):
        def scalars(self, *_, **__):
            ends.append(time.perf_counter())

    flags = {
        **dict.fromkeys(("ckpt_dir", "save_dir", "train_file"), "-"),  # nothing is read or saved
        "max_batch_size": BATCH // parallel.dp_size,
        "lr": LR,
        "warmup": 0.0,
        "schedule": "constant",
        "seed": 0,
        "compile": job.get("compile", False),
        "checkpoint_activations": job.get("recompute", "none"),
    }
    settings = build(SolverTrainSettings, flags)
    fitting.prepare(model, settings.optimizer, settings.run, parallel)
    optimizer = Optimizer(model, parallel)

    def evaluate(name: str, number: int) -> None:
        """Nothing: only training is timed."""

    with Clock(None, "benchmark", {}, 1) as log:
        history = fitting.fit(model, optimizer, objective, settings, parallel, log, evaluate)
    timed = history[WARM:]
    mfu = median([step["mfu"] for step in timed])
    names = [name for name in history[0] if name.startswith("seconds")]
    phases = {name: median([step[name] for step in timed]) for name in names}
    losses = [step["loss"] for step in history]
    return {"losses": losses, "ends": ends, "mfu": mfu, "phases": phases, "main": parallel.is_main}


def worker(system: str, folder: str, job_file: str) -> None:
    """One run: prints examples per second, losses, and the most memory this process ever held."""
    import peers

    job = json.loads(Path(job_file).read_text())
    result = {"ours": ours, "trl": peers.trl, "plain": peers.plain_loop}[system](Path(folder), job)
    if result.pop("main", True):
        ends, sizes = result.pop("ends"), [len(batch) for batch in job["batches"]]
        result["examples_per_s"] = sum(sizes[WARM:]) / (ends[-1] - ends[WARM - 1])
        result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("RESULT " + json.dumps(result), flush=True)


def launch(system: str, folder: Path, job_file: Path, ranks: int = 1) -> dict:
    cores = len(os.sched_getaffinity(0))
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores // ranks), "HF_HUB_OFFLINE": "1"}
    if system == "ours":
        environment["THP_MEM_ALLOC_ENABLE"] = "1"  # as src/cli.py does for our scripts
    command = [*torchrun(ranks), __file__, "worker", system, str(folder), str(job_file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"{system} gave no result:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(line.removeprefix("RESULT "))


def read_questions(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def texts_of(rows: list[dict]) -> list[str]:
    """What the tokenizer is trained on."""
    return [row["question"] + "\n" + row["answer"] for row in rows]


def write_rows(path: Path, rows: list[dict]) -> None:
    """Rows as solver_train.py reads them."""
    examples = [{"instruction": row["question"], "output": row["answer"]} for row in rows]
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))


def make_batches(
    rows: list[dict], tokenizer, task: str, steps: int, batch: int = BATCH
) -> list[list]:
    """Batches of rows: {"tokens", "prompt_length"}.

    Or for the verifier (chosen tokens, rejected tokens, prompt length).
    """
    examples = []
    for number, row in enumerate(rows[: steps * batch]):
        prompt = [1, *tokenizer.encode(row["question"] + "\n")]
        answer = [*tokenizer.encode(row["answer"]), 2]
        if task == "sft":
            examples.append({"tokens": prompt + answer, "prompt_length": len(prompt)})
        else:  # the wrong answer is another question's
            wrong = [*tokenizer.encode(rows[number + 1]["answer"]), 2]
            examples.append((prompt + answer, prompt + wrong, len(prompt)))
    return [examples[i : i + batch] for i in range(0, len(examples), batch)]


def model_for(task: str, work: Path) -> Path:
    if task == "verifier":
        return make_model(work / "58m-score", head="score")
    return make_model(work / "58m")


def prepared(
    task: str, dtype: str, train_file: str, work: Path, steps: int, **more
) -> tuple[Path, Path]:
    """The model's folder and the file that says what to do."""
    import sentencepiece

    rows = read_questions(train_file)
    folder = model_for(task, work)
    path = make_tokenizer(work / "58m", texts_of(rows))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    batches = make_batches(rows, tokenizer, task, steps + WARM)
    job = {"task": task, "dtype": dtype, "lr": LR, "batches": batches, **more}
    job_file = work / f"{task}-{dtype}.json"
    job_file.write_text(json.dumps(job))
    return folder, job_file


def beside_others(
    task: str, train_file: str, work: Path, rounds: int, steps: int, trl: str
) -> list[str]:
    """Examples (pairs) per second and the most memory held.

    Of ours, of TRL's trainer, and of a plain transformers loop.
    """
    title, unit = TASKS[task]
    lines = [
        f"| {title} | ours, {unit}/s | TRL | ratio | plain loop | ratio "
        "| ours, GB | TRL, GB | ratio | MFU | losses apart |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    settings = TRL_SETTINGS[trl].get(task, {}) | (KEPT if task == "dpo-kept" else {})
    for dtype in DTYPES:
        folder, job_file = prepared(task, dtype, train_file, work, steps, trl=settings)
        runs = {name: partial(launch, name, folder, job_file) for name in ("ours", "trl", "plain")}
        results = alternate(runs, rounds, warm_up=False)
        rate = {name: median([run["examples_per_s"] for run in results[name]]) for name in runs}
        peak = {name: median([run["peak"] for run in results[name]]) / 1e9 for name in runs}
        mfu = median([run["mfu"] for run in results["ours"]])
        losses = zip(results["ours"][0]["losses"], results["plain"][0]["losses"])
        apart = max(abs(a - b) for a, b in losses)
        lines.append(
            f"| {dtype} | {rate['ours']:.2f} "
            f"| {rate['trl']:.2f} | {rate['ours'] / rate['trl']:.2f} "
            f"| {rate['plain']:.2f} | {rate['ours'] / rate['plain']:.2f} "
            f"| {peak['ours']:.2f} | {peak['trl']:.2f} | {peak['ours'] / peak['trl']:.2f} "
            f"| {mfu:.2f} | {apart:.1e} |"
        )
        print(lines[-1], flush=True)
    return lines


def ranks_against_process(train_file: str, work: Path, rounds: int, steps: int) -> list[str]:
    cores = len(os.sched_getaffinity(0))
    lines = [
        f"| SFT, examples/s | 1 process × {cores} threads | {cores} ranks × 1 thread | ratio |",
        "|---|---|---|---|",
    ]
    for dtype in DTYPES:
        folder, job_file = prepared("sft", dtype, train_file, work, steps)
        runs = {n: partial(launch, "ours", folder, job_file, n) for n in (1, cores)}
        results = alternate(runs, rounds, warm_up=False)
        one, many = (median([run["examples_per_s"] for run in results[n]]) for n in (1, cores))
        lines.append(f"| {dtype} | {one:.2f} | {many:.2f} | {many / one:.2f} |")
        print(lines[-1], flush=True)
    return lines


def length_of_the_run(
    train_file: str, work: Path, sizes: tuple[int, ...] = (1000, 10_000, 100_000)
) -> list[str]:
    """A small model over ever more examples: time per token, and memory while training."""
    lines = [
        "| examples | tokens/s | memory after the first tenth, GB | at the end, GB |",
        "|---|---|---|---|",
    ]
    rows = read_questions(train_file)
    folder = make_model(
        work / "tiny", dim=64, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=172, vocab_size=4000
    )
    tokenizer = make_tokenizer(folder, texts_of(rows))
    for size in sizes:
        data, logs = work / "many.jsonl", work / f"many-{size}-logs"
        write_rows(data, [rows[i % len(rows)] for i in range(size)])
        arguments = (folder, tokenizer, data, logs, work)
        command = command_of("solver_train.py", *arguments, 1, max_batch_size=100)
        subprocess.run(command, check=True, capture_output=True)
        text = (logs / "solver_train.jsonl").read_text()
        steps = [json.loads(line) for line in text.splitlines()]
        steps = [step for step in steps if step["event"] == "scalars" and "train/seconds" in step]
        warm = steps[len(steps) // 10 :]
        tokens = sum(step["train/tokens_per_s"] * step["train/seconds"] for step in warm)
        rate = tokens / sum(step["train/seconds"] for step in warm)
        first, last = (step["train/memory_gb"] for step in (warm[0], steps[-1]))
        lines.append(f"| {size} | {rate:.0f} | {first:.3f} | {last:.3f} |")
        print(lines[-1], flush=True)
    return lines


def command_of(
    script: str,
    folder: Path,
    tokenizer: Path,
    data: Path,
    logs: Path,
    work: Path,
    ranks: int,
    **flags,
) -> list[str]:
    """A training script's command line on a data file; `logs` is emptied."""
    shutil.rmtree(logs, ignore_errors=True)
    flags = {
        "ckpt_dir": folder,
        "tokenizer_file": tokenizer,
        "train_file": data,
        "save_dir": work / "saved",
        "log_dir": logs,
        **flags,
    }
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*torchrun(ranks), str(ROOT / script), *arguments]


def start_up(train_file: str, work: Path, rounds: int) -> list[str]:
    """From the command to the end of the first step of 8 rows on 2 ranks.

    With all of the train file.
    """
    rows = read_questions(train_file)
    data, logs, folder = work / "all.jsonl", work / "start-logs", model_for("sft", work)
    write_rows(data, rows)
    tokenizer = make_tokenizer(work / "58m", texts_of(rows))
    took = []
    for _ in range(rounds):
        arguments = (folder, tokenizer, data, logs, work)
        command = command_of("solver_train.py", *arguments, 2, max_batch_size=BATCH)
        began = time.time()
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        first = None
        while first is None and run.poll() is None:
            time.sleep(0.05)
            log = logs / "solver_train.jsonl"
            lines = log.read_text().splitlines(True) if log.exists() else []
            events = [json.loads(line) for line in lines if line.endswith("\n")]
            first = next((event for event in events if event["event"] == "scalars"), None)
        run.terminate()
        run.wait()
        took.append(datetime.fromisoformat(first["time"]).timestamp() - began)
    return [
        f"From the command to the end of the first step, 58M, 2 ranks, {len(rows)} rows: "
        f"{median(took):.1f} s."
    ]


def main(
    train_file: str,
    out: str | None = None,
    only: Literal["sft", "verifier", "dpo", "dpo-kept", "ranks", "length", "start"] | None = None,
    rounds: int = 3,
    steps: int = 20,
    work_dir: str | None = None,
    trl: Literal["quickest", "padding_free", "compiled", "default"] = "quickest",
):
    """Measure and print the tables.

    Args:
        train_file: a .jsonl with "question" and "answer" in each line, such as GSM8K's.
        out: a Markdown file for the tables.
        only: one of the tables.
        rounds: runs of each side.
        steps: timed steps of a run.
        work_dir: for models and data, to be used again; a temporary one when not given.
        trl: its settings.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(work_dir or temporary)
        work.mkdir(parents=True, exist_ok=True)
        tables = {
            **{
                task: partial(beside_others, task, train_file, work, rounds, steps, trl)
                for task in TASKS
            },
            "ranks": lambda: ranks_against_process(train_file, work, rounds, steps),
            "length": lambda: length_of_the_run(train_file, work),
            "start": lambda: start_up(train_file, work, rounds),
        }
        report(tables, only, out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        run(main)
