"""Whether training got slower: this tree and another one of the repository, step by step in turns.

    git worktree add ../before COMMIT
    python benchmarks/before.py --before ../before --only sft --steps 30

One process of each tree with the 58M Llama, two threads, fp32; each takes a step while the other
waits, so that a machine whose speed changes is as slow for both. Random tokens: 4 rows of 120
(SFT), 2 pairs of rows of 120 that share 60 (verifier), 8 prompts of 60 and 40 new ones (PPO).
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("sft", "verifier", "ppo")
WARM = 2  # steps that do not count


def training_step(kind: str, folder: str) -> Callable[[int], object]:
    """What takes the step of a number."""
    from types import SimpleNamespace

    import torch

    from src.checkpoint.load import load_model
    from src.checkpoint.source import Checkpoint
    from src.data.encoding import Comparison
    from src.models.batch import Sequence
    from src.parallel.setup import reuse_memory, start
    from src.trainer.fit import train_step
    from src.trainer.optimizer import Optimizer
    from src.trainer.solver import SolverObjective
    from src.trainer.verifier import VerifierObjective

    parallel, rng = start(1), random.Random(0)
    reuse_memory()
    if kind == "ppo":
        return _iteration(folder, parallel)

    def row(length: int) -> list[int]:
        return [rng.randrange(3, 32000) for _ in range(length)]

    head = "score" if kind == "verifier" else "lm"
    model = load_model(Checkpoint.open(folder), parallel, torch.float32, head)
    optimizer = Optimizer(model, parallel)
    if kind == "sft":
        n, rows = 4, [Sequence(row(120), 60) for _ in range(64)]
        objective = SolverObjective(rows, parallel.device)
    else:
        n, pairs = 2, []
        for _ in range(64):
            prompt = row(60)
            sides = [[Sequence([*prompt, *row(60)], 60)] for _ in range(2)]
            pairs.append(Comparison.of_sides(*sides))
        objective = VerifierObjective(pairs, parallel.device)
    batches = SimpleNamespace(max_batch_size=n, max_tokens_per_batch=None)

    def step(number: int) -> None:
        chosen = [(number * n + i) % 64 for i in range(n)]
        train_step(model, optimizer, objective, chosen, batches, parallel, 1e-5)

    return step


def _iteration(folder: str, parallel) -> Callable[[int], object]:
    """What makes the PPO iteration of a number."""
    import torch

    from src.checkpoint.load import load_model
    from src.checkpoint.source import Checkpoint
    from src.data.encoding import Prompt
    from src.generation.engine import Engine
    from src.generation.sampling import Sampling
    from src.ppo.kl import KLController
    from src.ppo.roles import Role, Stage
    from src.ppo.trainer import PPO
    from src.settings.declaration import build
    from src.settings.ppo import PPOSettings
    from src.trainer.optimizer import Optimizer

    class ByLength:
        name = "length"

        def __call__(self, rollouts) -> torch.Tensor:
            return torch.tensor([float(len(x) % 3) for x in rollouts.responses()])

    sizes = dict(max_batch_size=8, max_buffer_size=8, mini_batches=2, ppo_epochs=2)
    settings = build(PPOSettings, sizes | dict(seed=1, max_new_tokens=40, temperature=1.0))
    stage = Stage(False, parallel.device)
    for name, head in (("policy", "lm"), ("value", "score"), ("reference", "lm")):
        model = load_model(Checkpoint.open(folder), parallel, torch.float32, head)
        trained = name != "reference"
        optimizer = Optimizer(model, parallel, eps=1e-5) if trained else None
        stage.add(Role(name, model.requires_grad_(trained), parallel, optimizer))
    engine = Engine(stage.roles["policy"].model, parallel, 16, 256)
    sampling = Sampling(max_new_tokens=40, temperature=1.0, seed=1)
    kl = KLController(0.05)
    ppo = PPO(stage, [(1.0, ByLength())], engine, sampling, {2}, kl, settings, parallel)
    rng = random.Random(0)
    prompts = [Prompt([rng.randrange(3, 32000) for _ in range(60)], None, {}) for _ in range(8)]
    return lambda number: ppo.iteration(number, prompts, 1e-6, 1e-6)


def work(kind: str, folder: str) -> None:
    """A step for each line that comes; says how long it took."""
    step = training_step(kind, folder)
    for number, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        step(number)
        print("took", time.perf_counter() - began, flush=True)


def in_turns(kind: str, trees: dict[str, Path], folder: Path, steps: int) -> dict[str, list[float]]:
    """Name of a tree → its seconds of each step."""
    command = [sys.executable, __file__, "--worker", kind, "--folder", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = {
        name: subprocess.Popen(
            command,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(tree)},
            **pipes,
        )
        for name, tree in trees.items()
    }
    found: dict[str, list[float]] = {name: [] for name in trees}
    for number in range(WARM + steps):
        for name in list(trees)[:: 1 if number % 2 else -1]:
            process = processes[name]
            process.stdin.write("\n")
            process.stdin.flush()
            lines = iter(process.stdout.readline, "")
            said = next((line for line in lines if line.startswith("took ")), None)
            if said is None:
                raise RuntimeError(f"{kind}: the process of {trees[name]} has ended")
            found[name].append(float(said.split()[1]))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return {name: seconds[WARM:] for name, seconds in found.items()}


def main(
    before: str = "",
    only: str | None = None,
    steps: int = 30,
    out: str | None = None,
    worker: str = "",
    folder: str = "",
) -> None:
    """before: the other tree; only: "sft", "verifier" or "ppo". The rest is for its processes."""
    if worker:
        return work(worker, folder)
    from common import make_model, median, report

    from src.errors import UserError

    trees = {"before": Path(before).resolve(), "now": ROOT}
    if not (trees["before"] / "src/cli.py").is_file() or trees["before"] == ROOT:
        raise UserError(f"--before {before}: must be another tree of this repository")
    model = make_model(Path(tempfile.gettempdir()) / "58M")

    def table(kind: str) -> list[str]:
        n = steps if kind != "ppo" else max(4, steps // 4)
        seconds = in_turns(kind, trees, model, n)
        ratio = median([b / a for a, b in zip(seconds["before"], seconds["now"])])
        medians = ", ".join(f"{name} {median(times):.4f} s" for name, times in seconds.items())
        return [f"{kind}, {n} steps: {medians}, ratio {ratio:.3f}"]

    report({kind: lambda kind=kind: table(kind) for kind in KINDS}, only, out)


if __name__ == "__main__":
    sys.path.append(str(ROOT))  # behind the tree that a worker is of
    from src.cli import run

    run(main)
