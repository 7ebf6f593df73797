"""What a GPU gives, in eight minutes: correctness first, then the speed of each part.

    make gpu                                         # or, with what the code needs installed:
    python benchmarks/gpu.py
    python benchmarks/gpu.py --only decode,rollouts  # some of the stages
    python benchmarks/gpu.py --small                 # tiny models: whether every stage works

Random weights of released shapes in bf16. Each stage is a process of its own with a limit: one that
fails, hangs or runs out of memory costs only itself. Every result is a line of JSON in
runs/gpu/results.jsonl as soon as it is known, every stage's output in runs/gpu/STAGE.log; at the
end come tables for docs/performance.md, also in runs/gpu/table.md. Without a GPU sizes are tiny and
the figures say nothing.
"""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NEEDED = ("torch", "fairscale", "fire", "safetensors", "sentencepiece", "transformers", "pytest")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(
        f"error: {sys.executable} lacks {', '.join(missing)}: install requirements.txt, or give a "
        "folder of wheels: make gpu WHEELS=DIR"
    )

from src.cli import run  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.settings.declaration import AtLeast, Unit  # noqa: E402

SHORTEST = 15  # seconds; with less left a stage is not begun


@dataclass(frozen=True)
class Stage:
    """A function of gpu_stages, "module.function", and the seconds that it may take at most."""

    function: str
    limit: float


# In the order in which they are wanted most.
STAGES = {
    "env": Stage("environment.measure", 60),
    "correct": Stage("correctness.measure", 120),
    "decode": Stage("generation.decode", 100),
    "rollouts": Stage("generation.rollouts", 90),
    "train": Stage("training.whole", 70),
    "lora": Stage("training.lora", 70),
    "scripts": Stage("scripts.measure", 150),
    "peers": Stage("peers.measure", 70),
    "kernels": Stage("kernels.measure", 70),
}


def main(
    only: Annotated[str | None, "stages, separated by commas"] = None,
    small: Annotated[bool, "tiny models, as without a GPU"] = False,
    seconds: Annotated[
        float, AtLeast(1), Unit("seconds"), "for all; what does not fit is left out, and said"
    ] = 470,
    out: Annotated[str, "folder of the results; those of the same name are replaced"] = "runs/gpu",
    stage: Annotated[str | None, "measure this one here and now, and add to the results"] = None,
) -> None:
    """Run the stages, one after the other, and print the tables."""
    import torch
    from gpu_stages.tables import tables

    wanted = only.split(",") if only else list(STAGES)
    if unknown := [name for name in [*wanted, *filter(None, [stage])] if name not in STAGES]:
        raise UserError(f"{', '.join(unknown)}: stages are {', '.join(STAGES)}")
    small, folder = small or not torch.cuda.is_available(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if stage:
        return measure(stage, small, folder)

    began, results = time.perf_counter(), folder / "results.jsonl"
    results.unlink(missing_ok=True)
    for name in wanted:
        left = seconds - (time.perf_counter() - began)
        record = {"stage": name, "ended": "left out: no time left", "took": 0.0}
        if left >= SHORTEST:
            command = [sys.executable, __file__, "--stage", name, "--out", out]
            command += ["--small"] * small
            began_stage, limit = time.perf_counter(), min(left, STAGES[name].limit)
            ended = run_alone(command, folder / f"{name}.log", limit)
            record |= {"ended": ended, "took": time.perf_counter() - began_stage}
        print(f"{name}: {record['ended']}, {record['took']:.0f} s", flush=True)
        with open(results, "a") as file:
            file.write(json.dumps(record) + "\n")
    text = tables([json.loads(line) for line in results.read_text().splitlines()])
    (folder / "table.md").write_text(text)
    print(f"\n{text}")


def measure(stage: str, small: bool, folder: Path) -> None:
    """The stage, in this process."""
    from gpu_stages.shared import FULL, SMALL, sayer

    module, function = STAGES[stage].function.split(".")
    work = getattr(importlib.import_module(f"gpu_stages.{module}"), function)
    work(SMALL if small else FULL, sayer(folder, stage))


def run_alone(command: list[str], log: Path, limit: float) -> str:
    """Run it with its output in a file, and everything that it started ended with it.

    Returns how it ended, in words.
    """
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after its limit of {limit:.0f} s"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        return f"failed with exit code {code}: {''.join(last)[:200]}"
    return "done"


if __name__ == "__main__":
    run(main)
