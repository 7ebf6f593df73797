"""One GRPO and one PPO iteration by phase, by the scripts as a user runs them."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT

from gpu_stages.shared import FULL, Say, Sizes

SAMPLES = 8  # of each prompt, in GRPO
# PPO trains two models on as many rollouts as GRPO has prompts, twice.
KINDS = {
    "GRPO": (SAMPLES, dict(advantage="grpo", samples_per_prompt=SAMPLES)),
    "PPO": (2, dict(ppo_epochs=1)),
}


def measure(sizes: Sizes, say: Say) -> None:
    with tempfile.TemporaryDirectory(prefix="gpu-scripts-") as work:
        iterations(sizes, say, Path(work))


def iterations(sizes: Sizes, say: Say, work: Path) -> None:
    n_train = 4000 if sizes is FULL else 60
    script(say, "dataset/build.py", "arithmetic", save_dir=work / "data", n_train=n_train, n_test=8)
    rows, start = work / "data" / "train.json", work / "start"
    script(say, "dataset/start.py", train_file=rows, save_dir=start, **sizes.start)
    for name, (samples, flags) in KINDS.items():
        rollouts = samples * sizes.prompts
        critic = dict(critic_ckpt_dir=start, critic_save_dir=work / "critic")
        script(
            say,
            "ppo_train.py",
            actor_ckpt_dir=start,
            actor_save_dir=work / name,
            **(critic if name == "PPO" else {}),
            reward="rule",
            train_file=rows,
            max_batch_size=min(256, rollouts),
            max_buffer_size=rollouts,
            max_tokens_per_batch=16384,
            iterations=1,
            max_new_tokens=sizes.response,
            min_new_tokens=sizes.response,
            max_seq_len=512,
            **flags,
        )
        found = costs(work / f"{name}-logs" / "ppo_train.jsonl")
        say(
            iteration=name,
            rollouts=rollouts,
            tokens=sizes.response,
            s=found["seconds"],
            phases={
                key.split("/")[1]: value
                for key, value in found.items()
                if key.startswith("seconds/")
            },
            generated_per_s=found["tokens_per_s/generate"],
            updated_per_s=found["tokens_per_s/update"],
            memory_gb=found["memory_gb"],
        )


def costs(log: Path) -> dict[str, float]:
    """What the only iteration's record says of PPO."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    (record,) = [record for record in records if "ppo/seconds" in record]
    found = {key: value for key, value in record.items() if key.startswith("ppo/")}
    return {key.removeprefix("ppo/"): value for key, value in found.items()}


def script(say: Say, *command: str, **flags) -> None:
    """Run it, and say how long the process took; its end is shown when it fails."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command, *words], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
        sys.exit(f"{command[0]} ended with exit code {done.returncode}")
    say(script=command[0], s=time.perf_counter() - began)
