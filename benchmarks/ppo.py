"""One PPO iteration beside TRL's PPOTrainer, and PPO's memory beside SFT's with a shared trunk.

    python benchmarks/ppo.py --train_file GSM8K/train.jsonl \\
        --trl_python .venv-bench-ppo/bin/python --out runs/ppo.md
    # one table of the two; needs no TRL
    python benchmarks/ppo.py --train_file GSM8K/train.jsonl --only memory

TRL is 0.24. The trunk is shared by adapters. Policy, value, reference and reward model: the 58M
Llama with random weights, fp32, all in one process. 32 questions as prompts, 64 new tokens each, 4
epochs of 4 minibatches; the reward is the verifier's score. Ours is `ppo_train.py` as anyone runs
it; TRL's side is `peer_ppo.py`, in an environment of its own:
`pip install -r benchmarks/requirements-ppo.txt`. Each run is a process of its own; runs alternate,
the first iteration of each is not counted, and medians are given.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from common import ROOT, alternate, make_model, make_tokenizer, median, report

from src.cli import run

PROMPTS, NEW, EPOCHS, MINI_BATCHES, KL_COEF, LORA_RANK = 32, 64, 4, 4, 0.05, 16
PHASES = ("generate", "score", "update")
# What was tried on the machine that the tables are from; "quickest" was.
TRL_SETTINGS = {
    "quickest": {"compile": True},
    "plain": {},
    "rollout_8": {"rollout": 8},
    "micro_4": {"micro": 4},
    "cached": {"use_cache": True},
    "eager": {"attention": "eager"},
}


def prepare(train_file: str, work: Path) -> None:
    """Models, tokenizer and data.

    In a process of its own, lest its memory be taken for that of the runs.
    """
    import sentencepiece

    policy, verifier = make_model(work / "58m"), make_model(work / "58m-score", head="score")
    rows = [json.loads(line) for line in Path(train_file).read_text().splitlines()]
    path = make_tokenizer(policy, [row["question"] + "\n" + row["answer"] for row in rows])
    shutil.copy(path, verifier)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [row["answer"] + "\n" + row["question"] for row in rows[: PROMPTS + 1]]
    answers = [tokenizer.encode(text) for text in texts]
    outputs = [tokenizer.decode(answer[: NEW - 1]) for answer in answers]  # EOS makes it 64
    chosen = rows[:PROMPTS]
    write_rows(work / "prompts.jsonl", [{"instruction": row["question"]} for row in chosen])
    examples = [
        {"instruction": row["question"], "output": output} for row, output in zip(chosen, outputs)
    ]
    write_rows(work / "sft.jsonl", examples)
    pairs = [
        {"instruction": row["question"], "chosen": right, "rejected": wrong}
        for row, right, wrong in zip(chosen, outputs, outputs[1:])
    ]
    write_rows(work / "pairs.jsonl", pairs)
    # as ppo_train.py reads an instruction
    ids = [[1, *tokenizer.encode(row["question"])] for row in chosen]
    (work / "prompts.json").write_text(json.dumps(ids))


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def child(command: list[str], **environment: str) -> tuple[str, int]:
    """What a process said, and the most memory it ever held, in bytes."""
    env = {**os.environ, **environment}
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        output = file.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{output[-6000:]}")
    if usage.ru_maxrss <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
        raise SystemExit(
            "the child's peak memory cannot be told from that of this process, which it begins with"
        )
    return output, usage.ru_maxrss * 1024


def script(
    name: str, work: Path, switches: tuple[str, ...] = (), **flags
) -> tuple[list[dict], int]:
    """One of our scripts: what it logged of each step, and its peak memory."""
    logs = work / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    flags = {**flags, "log_dir": logs, "dtype": "fp32"}
    arguments = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    _, peak = child([sys.executable, str(ROOT / name), *arguments, *switches])
    lines = (logs / name).with_suffix(".jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [event for event in events if event["event"] == "scalars"], peak


def ppo_script(
    work: Path, actor: Path, verifier: Path, batch: int, iterations: int, *switches: str, **flags
) -> dict:
    """`ppo_train.py`: seconds per iteration and phase, peak memory.

    Fails unless the work was as long as the table says.
    """
    steps, peak = script(
        "ppo_train.py",
        work,
        switches,
        actor_ckpt_dir=actor,
        actor_save_dir=work / "saved-actor",
        critic_ckpt_dir=verifier,
        critic_save_dir=work / "saved-critic",
        reward_model_ckpt_dir=verifier,
        tokenizer_file=work / "58m" / "tokenizer.model",
        train_file=work / "prompts.jsonl",
        max_batch_size=batch,
        max_buffer_size=PROMPTS,
        samples_per_prompt=1,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        max_seq_len=512,
        mini_batches=MINI_BATCHES,
        ppo_epochs=EPOCHS,
        kl_coef=KL_COEF,
        iterations=iterations,
        **flags,
    )
    wanted = (iterations, {EPOCHS * MINI_BATCHES}, {float(NEW)})
    updates = {step[f"ppo/{role}_steps"] for step in steps for role in ("policy", "value")}
    if (len(steps), updates, {step["ppo/response_length"] for step in steps}) != wanted:
        raise SystemExit(
            f"iterations, steps of each and tokens per response are not {wanted}: {steps}"
        )
    return {
        "seconds": [step["ppo/seconds"] for step in steps],
        "phases": [phases_of(step) for step in steps],
        "peak": peak,
    }


def phases_of(step: dict) -> dict[str, float]:
    """Seconds logged: generation, all forwards without gradients, both models' updates."""
    phases = dict.fromkeys(PHASES, 0.0)
    for name, took in step.items():
        if name.startswith("ppo/seconds/"):
            phase = name.removeprefix("ppo/seconds/").split("_")[0]
            phases[phase if phase in phases else "score"] += took
    return phases


def theirs(python: str, work: Path, iterations: int, settings: dict) -> dict:
    """`peer_ppo.py`, on as many threads as there are cores."""
    job = {
        "policy": str(work / "58m"),
        "verifier": str(work / "58m-score"),
        "prompts": json.loads((work / "prompts.json").read_text()),
        "iterations": iterations,
        "epochs": EPOCHS,
        "mini_batches": MINI_BATCHES,
        "new": NEW,
        "kl_coef": KL_COEF,
        "out": str(work / "trl"),
        "settings": settings,
    }
    path = work / "trl.json"
    path.write_text(json.dumps(job))
    output, peak = child(
        [python, str(ROOT / "benchmarks" / "peer_ppo.py"), str(path)],
        OMP_NUM_THREADS=str(len(os.sched_getaffinity(0))),
        HF_HUB_OFFLINE="1",
        TRL_EXPERIMENTAL_SILENCE="1",
    )
    line = next((line for line in output.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"TRL gave no result:\n{output[-6000:]}")
    return {**json.loads(line.removeprefix("RESULT ")), "peak": peak}


def beside_trl(
    work: Path, python: str, rounds: int, iterations: int, batch: int, settings: dict
) -> list[str]:
    """Seconds per iteration and phase, and memory.

    They are medians over the iterations after the first of all runs.
    """
    runs = {
        "ours": lambda: ppo_script(work, work / "58m", work / "58m-score", batch, iterations),
        "trl": lambda: theirs(python, work, iterations, settings),
    }
    results = alternate(runs, rounds, warm_up=False)
    seconds = {
        side: [took for run in of_side for took in run["seconds"][1:]]
        for side, of_side in results.items()
    }
    rows: dict[str, dict[str, float]] = {name: {} for name in ("seconds", *PHASES, "memory")}
    for side, of_side in results.items():
        rows["seconds"][side] = median(seconds[side])
        phases = [step for run in of_side for step in run["phases"][1:]]
        for phase in PHASES:
            rows[phase][side] = median([step[phase] for step in phases])
        rows["memory"][side] = median([run["peak"] for run in of_side]) / 1e9
    labels = {
        "seconds": "seconds per iteration",
        "generate": "of them generation",
        "score": "rewards, log-probabilities, values",
        "update": f"{EPOCHS * MINI_BATCHES} optimizer steps",
    }
    lines = ["| PPO, fp32 | ours | TRL | TRL / ours |", "|---|---|---|---|"]
    for name, label in labels.items():
        a, b = rows[name]["ours"], rows[name]["trl"]
        lines.append(f"| {label} | {a:.2f} | {b:.2f} | {b / a:.2f} |")
    a, b = rows["memory"]["ours"], rows["memory"]["trl"]
    lines.append(f"| peak memory, GB | {a:.2f} | {b:.2f} | ours / TRL {a / b:.2f} |")
    ranges = [f"{side} {min(took):.1f} to {max(took):.1f} s" for side, took in seconds.items()]
    last = (
        f"Single iterations: {', '.join(ranges)}; {rounds} runs of each side, "
        f"{iterations - 1} counted in each."
    )
    return [*lines, "", last]


def lora_memory(work: Path, rounds: int, batch: int, iterations: int = 2) -> list[str]:
    """Peak memory of four roles as adapters on one trunk, and of the same without sharing.

    And of the solver's fine-tuning.
    """
    adapter = work / "verifier-adapter"

    def train(name: str, data: str, saved: Path, epochs: int = 1) -> int:
        return script(
            name,
            work,
            ckpt_dir=work / "58m",
            save_dir=saved,
            train_file=work / data,
            epochs=epochs,
            max_batch_size=batch,
            max_seq_len=512,
            lora_rank=LORA_RANK,
        )[1]

    def ppo(*switches: str) -> int:
        arguments = (work, work / "58m", adapter, batch, iterations, *switches)
        return ppo_script(*arguments, lora_rank=LORA_RANK)["peak"]

    def sft() -> int:
        return train("solver_train.py", "sft.jsonl", work / "saved-sft", EPOCHS)

    train("verifier_train.py", "pairs.jsonl", adapter)
    runs = {
        "solver_train.py": sft,
        "ppo_train.py, four roles on one trunk": lambda: ppo("--shared_trunk"),
        "ppo_train.py, a trunk for each role": ppo,
    }
    results = alternate(runs, rounds, warm_up=False)
    gigabytes = {name: median(peaks) / 1e9 for name, peaks in results.items()}
    first = next(iter(gigabytes.values()))
    return [
        f"| LoRA rank {LORA_RANK}, fp32, {batch} sequences at a time | peak memory, GB | ratio |",
        "|---|---|---|",
        *(f"| {name} | {peak:.2f} | {peak / first:.2f} |" for name, peak in gigabytes.items()),
    ]


def main(
    train_file: str,
    trl_python: str | None = None,
    out: str | None = None,
    only: Literal["trl", "memory"] | None = None,
    rounds: int = 3,
    iterations: int = 3,
    max_batch_size: int = 8,
    trl: Literal["quickest", "plain", "rollout_8", "micro_4", "cached", "eager"] = "quickest",
    work_dir: str | None = None,
):
    """Measure and print the tables.

    Args:
        train_file: a .jsonl with "question" and "answer" in each line, such as GSM8K's.
        trl_python: the Python of the environment with TRL 0.24.
        out: a Markdown file for the tables.
        only: one of the tables.
        rounds: runs of each side.
        iterations: of a run; the first is not counted.
        max_batch_size: of our side: sequences in one forward and backward.
        trl: its settings.
        work_dir: for models and data, to be used again; a temporary one when not given.
    """
    if only != "memory" and trl_python is None:
        raise SystemExit("--trl_python: the environment with TRL is needed, or --only memory")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(work_dir or temporary).resolve()
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, "prepare", train_file, str(work)], check=True)
        settings = TRL_SETTINGS[trl]
        tables = {
            "trl": lambda: beside_trl(
                work, trl_python, rounds, iterations, max_batch_size, settings
            ),
            "memory": lambda: lora_memory(work, rounds, max_batch_size),
        }
        report(tables, only, out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["prepare"]:
        prepare(sys.argv[2], Path(sys.argv[3]))
    else:
        run(main)
