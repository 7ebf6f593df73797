"""A fixed generation beside 0, 1, 2 and 4 busy processes, and the share of the cores that is fair.

    python benchmarks/crowded.py all --out docs/performance-crowded.md

A random Llama of SmolLM2-135M's shape writes a fixed number of tokens, as one process of several
threads and as ranks. Beside k busy processes t threads of ours should have t of t + k parts of the
machine: the fair time is the quiet one, times (t + k) / t. Runs that let threads spin as libgomp
does by itself ("before") and runs by src/parallel/threads.py ("after") alternate, on processes that
stay; medians. What others used of the machine meanwhile is said too.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import torch
from common import ROOT, machine, make_model, median, torchrun

from src.cli import run

SHAPE = dict(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=49152)
PROMPTS, PROMPT_LENGTH = 16, 64
BUSY = [sys.executable, "-c", "while True: pass"]
# The first sets what libgomp's default comes to, and with that turns the watch off.
VARIANTS = {"before": {"GOMP_SPINCOUNT": "300000"}, "after": {}}


def rank_main(folder: str, address: str, new: int) -> None:
    """A rank of a generation: whenever rank 0 is told to, all generate.

    Rank 0 answers with seconds, and CPU seconds of all ranks.
    """
    import torch.distributed as dist

    from src.checkpoint.load import load_model
    from src.checkpoint.source import Checkpoint
    from src.generation.engine import Engine
    from src.generation.sampling import Sampling
    from src.parallel.setup import start, stop

    parallel = start()
    model = load_model(Checkpoint.open(folder), parallel, torch.float32).eval()
    engine = Engine(model, parallel, PROMPTS, PROMPT_LENGTH + new)
    prompts = torch.randint(SHAPE["vocab_size"], (PROMPTS, PROMPT_LENGTH)).tolist()
    dist.broadcast_object_list(both := [prompts])
    sampling = Sampling(max_new_tokens=new, temperature=0.0)
    driver = Client(address) if parallel.is_main else None
    while True:
        dist.broadcast_object_list(told := [driver.recv() if driver else None])
        if told[0] is None:
            break
        cpu, began = sum(os.times()[:2]), time.perf_counter()
        engine.generate(both[0], sampling, set())
        took = time.perf_counter() - began
        used = torch.tensor(sum(os.times()[:2]) - cpu, dtype=torch.float64)
        dist.all_reduce(used)
        if driver:
            driver.send((took, float(used)))
    stop()


class Workers:
    """The ranks of one variant, which wait between runs."""

    def __init__(self, folder: Path, ranks: int, env: dict[str, str], new: int) -> None:
        with tempfile.TemporaryDirectory() as place, Listener(f"{place}/socket") as listener:
            command = [*torchrun(ranks), __file__, "rank", f"--folder={folder}"]
            command += [f"--address={listener.address}", f"--new={new}"]
            unset = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
            self.process = subprocess.Popen(command, cwd=ROOT, env={**unset, **env})
            self.connection: Connection = listener.accept()

    def run(self) -> tuple[float, float]:
        self.connection.send("run")
        return self.connection.recv()

    def end(self) -> None:
        self.connection.send(None)
        self.process.wait()


@contextlib.contextmanager
def busy(n: int) -> Iterator[list[subprocess.Popen]]:
    processes = [subprocess.Popen(BUSY) for _ in range(n)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def cpu_of(process: subprocess.Popen) -> float:
    """CPU seconds of a process that runs."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_of_machine() -> float:
    """CPU seconds that all processes have used."""
    user, nice, system = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def measured(workers: Workers, beside: list[subprocess.Popen]) -> tuple[float, float, float]:
    """Seconds, our CPU seconds, and the cores that others used meanwhile."""
    everyone, theirs = cpu_of_machine(), sum(map(cpu_of, beside))
    took, ours = workers.run()
    theirs = sum(map(cpu_of, beside)) - theirs
    return took, ours, max(0.0, (cpu_of_machine() - everyone - theirs - ours) / took)


def main(
    ranks: list[int] | None = None,
    crowds: list[int] | None = None,
    rounds: int = 3,
    new: int = 16,
    out: str | None = None,
    work_dir: str = "runs/bench-crowded",
) -> None:
    """Print the table as Markdown, and write it to `out`."""
    folder = make_model(Path(work_dir) / "model", tie_word_embeddings=True, **SHAPE)
    cores = len(os.sched_getaffinity(0))
    lines = [
        f"Machine: {machine()}. {PROMPTS} prompts of {PROMPT_LENGTH} tokens, {new} new each.",
        "",
        "| ranks × threads | busy | variant | seconds | of the fair time | cores used | others' |",
        "|---|---|---|---|---|---|---|",
    ]
    for n in ranks or [1, 2, 4]:
        threads = max(n, cores)
        workers = {name: Workers(folder, n, env, new) for name, env in VARIANTS.items()}
        for w in workers.values():
            w.run()
        quiet: dict[str, float] = {}
        for crowd in crowds or [0, 1, 2, 4]:
            runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in workers}
            with busy(crowd) as beside:
                for _ in range(rounds):
                    for name, w in workers.items():
                        runs[name].append(measured(w, beside))
            for name, results in runs.items():
                took, ours, others = (median(list(column)) for column in zip(*results))
                quiet.setdefault(name, took)
                used = ours / took
                fair = quiet["before"] * (threads + crowd) / threads
                lines.append(
                    f"| {n} × {threads // n} | {crowd} | {name} | {took:.2f} | {took / fair:.2f} "
                    f"| {used:.2f} | {others:.2f} |"
                )
                print(lines[-1], flush=True)
        for w in workers.values():
            w.end()
    text = "\n".join(lines)
    print(text)
    if out:
        Path(out).write_text(text + "\n")


if __name__ == "__main__":
    run({"all": main, "rank": rank_main})
