"""What each layout of a model over ranks takes of memory and time, and how a pipeline waits.

    python benchmarks/layouts.py --out runs/layouts.md             # all tables
    python benchmarks/layouts.py --only memory --n_layers 4        # a smaller model

Memory: a random Llama on 4 ranks in fp32, three steps of SFT; bytes per rank of weights, gradients,
optimizer and of what autograd keeps, beside what `training_budget` and `activations` say; all that
is allocated at once in a step beside their sum and what ZeRO puts together; and the growth of the
process's own memory, which keeps nothing that was freed here. Linux; weights, gradients and
averages of 22 layers (1B) are 16 GB over all ranks; with ZeRO 3 the ranks take 19 GB in all.

Idle: forward and backward of a step's micro-batches through stages. Two ranks compute on a core
each; where there are more ranks than cores, and to see the schedule by itself, stages wait for a
fixed time in place of computing, as a device would be busy.

Zero: a step of the 58M Llama on two data-parallel ranks, by ZeRO's stage.

Exchange: the same model in bf16 goes on 4 ranks from one layout to another in memory: bytes between
the ranks beside what each lacks, what is allocated at most beside the part that it comes from, and
seconds, the median of three. 22 layers take 12 GB over all ranks.
"""

import json
import math
import os
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from checkpoint_memory import status_bytes
from common import make_model, median, report, torchrun

from src.cli import run
from src.planner.measure import most_allocated

GB = 1e9
LAYOUTS = {  # name: --model_parallel_size, --pipeline_parallel_size, --zero, --sequence_parallel
    "TP 4": (4, 1, 1, False),
    "TP 4, sequence parallel": (4, 1, 1, True),
    "ZeRO 3": (1, 1, 3, False),
    "TP 2, ZeRO 3": (2, 1, 3, False),
    "TP 2, ZeRO 3, sequence parallel": (2, 1, 3, True),
    "PP 4": (1, 4, 1, False),
    "PP 2, TP 2": (2, 2, 1, False),
}
WIDTH = dict(dim=2048, n_heads=32, n_kv_heads=4, hidden_dim=5632, vocab_size=8192)
TOKENS, MICRO_BATCHES = 64, 8  # tokens of a micro-batch, micro-batches of a model
# What stages compute: the 58M Llama, or as wide a model of more layers and few words.
MODELS = {"58M": {}, "16 layers": dict(n_layers=16, vocab_size=2048)}
# (stages' ranks, stages of each, micro-batches, a model, or None where they wait)
PIPELINES = [
    (2, 1, 4, "58M"),
    (2, 1, 8, "58M"),
    (2, 2, 8, "58M"),
    (2, 1, 4, "16 layers"),
    (2, 1, 8, "16 layers"),
    (2, 2, 4, "16 layers"),
    (2, 2, 8, "16 layers"),
    (2, 1, 8, None),
    (2, 2, 8, None),
    (4, 1, 4, None),
    (4, 1, 8, None),
    (4, 1, 16, None),
    (4, 2, 8, None),
    (4, 2, 16, None),
]
EXCHANGES = [("pp2 tp2", "dp4"), ("tp4", "dp4"), ("tp4", "tp2"), ("zero3", "dp4")]  # from, to
WAIT = 0.06  # seconds of a rank's forward of a micro-batch, where it waits; backward takes twice


class Kept:
    """Bytes that autograd keeps for backward, each piece of memory once; weights do not count."""

    def __init__(self, weights: Callable[[], list]) -> None:
        """weights: what a model has of them at the time."""
        self.weights, self.most = weights, 0
        self.held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(self, tensor):
        holder = _Held(tensor)
        self.held.add(holder)
        # Shared weights that were put together give their memory back before they are let go.
        memory = {}
        for kept in self.held:
            storage = kept.tensor.untyped_storage()
            memory[storage._cdata] = storage.nbytes()
        for weight in self.weights():
            memory.pop(weight.untyped_storage()._cdata, None)
        self.most = max(self.most, sum(memory.values()))
        return holder

    @staticmethod
    def unpack(held):
        return held.tensor


class _Held:
    def __init__(self, tensor) -> None:
        self.tensor = tensor


class Peak:
    """The process's own memory at its most, sampled."""

    def __init__(self) -> None:
        self.most, self.over = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.over.wait(0.005):
            self.most = max(self.most, status_bytes("RssAnon"))

    def __enter__(self) -> "Peak":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()


def memory_of(folder: str, name: str, out: str) -> None:
    """One layout, on the ranks that run."""
    import torch
    import torch.distributed as dist

    from src.checkpoint.load import load_model
    from src.checkpoint.source import Checkpoint
    from src.models.batch import Sequence
    from src.parallel.setup import start, stop
    from src.parallel.sharding import own
    from src.trainer.activations import activations, gathered_bytes
    from src.trainer.batches import turns_of
    from src.trainer.budget import training_budget
    from src.trainer.optimizer import Optimizer
    from src.trainer.passes import passes_of
    from src.trainer.solver import SolverObjective

    mp, pp, zero, sequence_parallel = LAYOUTS[name]
    parallel = start(mp, pipeline_parallel_size=pp)
    torch.set_num_threads(1)
    before = status_bytes("RssAnon")
    model = load_model(Checkpoint.open(folder), parallel, torch.float32, "lm", zero=zero)
    model.sequence_parallel = sequence_parallel
    optimizer = Optimizer(model, parallel, zero=zero)
    # Each data-parallel rank its share of the micro-batches, of one row each.
    rows = MICRO_BATCHES if pp > 1 else 1
    generator = torch.Generator().manual_seed(parallel.dp_rank)
    ids = torch.randint(3, WIDTH["vocab_size"], (rows, TOKENS), generator=generator).tolist()
    objective = SolverObjective([Sequence(row, 1) for row in ids], parallel.device)
    turns = turns_of([[[i] for i in range(rows)]], 0, together=False)
    passes = passes_of(model, parallel, optimizer)
    kept = Kept(lambda: [own(p) for p in model.parameters()])

    def train() -> None:
        passes.train(turns, objective.batch, lambda i: objective.loss(model, i, rows * TOKENS)[0])

    with Peak() as peak:
        # The first step makes the averages.
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            train()
        gradients = sum(own(p.grad).nbytes for p in optimizer.parameters if p.grad is not None)
        optimizer.step(1e-4)
        train()
        optimizer.step(1e-4)
    new = most_allocated(lambda: (train(), optimizer.step(1e-4)))
    stages = model.stages
    plan = training_budget(
        model.config, mp, parallel.dp_size, torch.float32, zero=zero, stages=stages
    )
    of_layers = activations(
        model.config, mp, torch.float32, "none", sequence_parallel=sequence_parallel
    )
    weights = sum(own(p).nbytes for p in model.parameters())
    averages = sum(x.nbytes for x in optimizer.state_tensors())
    own_figures = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": averages,
        "activations": kept.most,
        "gathered": gathered_bytes(model),
        "allocated": weights + averages + new,
        "growth": peak.most - before,
    }
    every: list[dict] = [{}] * parallel.world_size
    dist.all_gather_object(every, own_figures)
    if parallel.is_main:
        fullest = {key: max(of_rank[key] for of_rank in every) for key in own_figures}
        planned = {
            "weights": plan.weights,
            "gradients": plan.gradients,
            "optimizer": plan.optimizer,
            "activations": of_layers.per_token * TOKENS,
        }
        of_each = [of_rank["activations"] for of_rank in every]
        result = {"measured": fullest, "planned": planned, "activations": of_each}
        Path(out).write_text(json.dumps(result))
    stop()


def idle_of(folder: str, ranks: int, per_rank: int, n: int, out: str) -> None:
    """The share of the passes in which ranks were idle, and the seconds: medians of some steps.

    folder: of the model that is computed, "" where stages wait.
    """
    import torch
    import torch.distributed as dist

    from src.parallel.pipeline import Boundary, Pipeline, _Stage
    from src.parallel.setup import start, stop

    parallel = start(1, pipeline_parallel_size=ranks)
    torch.set_num_threads(1)
    busy = [0.0]

    def timed(function):
        def call(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            busy[0] += time.perf_counter() - began
            return result

        return call

    class Busy(torch.autograd.Function):
        """Takes its time, and is the same."""

        @staticmethod
        def forward(ctx, x):
            time.sleep(WAIT / per_rank)
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            time.sleep(2 * WAIT / per_rank)
            return grad * 1.0

    _Stage.forward_one_chunk = timed(_Stage.forward_one_chunk)
    _Stage.backward_one_chunk = timed(_Stage.backward_one_chunk)
    if folder:
        step = _training_step(folder, parallel, per_rank, n)
    else:
        weight = torch.zeros(1, requires_grad=True)

        def compute(stage: int, received: tuple, number: int):
            index = pipeline.local[stage]
            x = torch.ones(TOKENS, 64) * (1.0 + weight) if index == 0 else received[0]
            x = Busy.apply(x)
            return x.sum() if index == ranks * per_rank - 1 else (x,)

        assert parallel.pp_group is not None
        pipeline = Pipeline(compute, ranks * per_rank, parallel.pp_group, parallel.device)
        boundaries = [Boundary([TOKENS] * n, (64,), torch.float32)]

        def step() -> None:
            pipeline.train(n, boundaries, [True] * (ranks * per_rank))

    figures = []
    for _ in range(5):
        dist.barrier()
        busy[0], began = 0.0, time.perf_counter()
        step()
        dist.barrier()
        figures.append((busy[0], time.perf_counter() - began))
    shares = median([of_step / took for of_step, took in figures[1:]])
    every: list[float] = [0.0] * ranks
    dist.all_gather_object(every, shares)
    if parallel.is_main:
        idle = 1 - sum(every) / ranks
        Path(out).write_text(json.dumps({"idle": idle, "seconds": median([t for _, t in figures])}))
    stop()


def zero_of(folder: str, n: int, out: str) -> None:
    """Seconds of a step of n micro-batches at each of ZeRO's stages, which take turns."""
    import torch
    from common import alternate

    from src.parallel.setup import start, stop

    parallel = start(1)
    torch.set_num_threads(1)
    steps = {zero: _training_step(folder, parallel, 1, n, zero) for zero in (0, 1, 2, 3)}

    def timed(zero: int) -> float:
        torch.distributed.barrier()
        began = time.perf_counter()
        steps[zero]()
        torch.distributed.barrier()
        return time.perf_counter() - began

    found = alternate({str(zero): lambda zero=zero: timed(zero) for zero in steps}, 7)
    if parallel.is_main:
        Path(out).write_text(json.dumps({zero: median(times) for zero, times in found.items()}))
    stop()


def exchange_of(folder: str, name: str, out: str) -> None:
    """One change of layout, on the ranks that run. name: "from > to"."""
    import torch
    import torch.distributed as dist

    from src.checkpoint.load import load_model
    from src.checkpoint.source import Checkpoint
    from src.generation.relayout import Relayout
    from src.models.places import common
    from src.parallel.layout import Layout
    from src.parallel.setup import start, stop

    parallel = start(1)
    torch.set_num_threads(1)
    source, target = (Layout.parsed(text, 4, "layout", 0) for text in name.split(" > "))
    before, after = parallel.laid_out(source), parallel.laid_out(target)
    checkpoint = Checkpoint.open(folder)
    model = load_model(checkpoint, before, torch.bfloat16, "lm", zero=source.zero)
    relayout = Relayout(model, before, after)
    lacking = 0
    for move in relayout.exchange.moves.values():
        has, wants = (p.box(move.spec, parallel.rank) for p in (move.source, move.target))
        lacking += math.prod(b - a for a, b in wants) - math.prod(
            b - a for a, b in common(has, wants)
        )
    copies: list = []
    most = most_allocated(lambda: copies.append(relayout()))
    own = sum(weight.nbytes for weight in copies.pop().parameters())
    seconds = []
    for _ in range(3):
        relayout()
        seconds.append(relayout.seconds)
    figures = {
        "sent": relayout.exchange.sent,
        "lacking": 2 * lacking,
        "own": own,
        "most": most,
        "seconds": median(seconds),
    }
    every: list[dict] = [{}] * parallel.world_size
    dist.all_gather_object(every, figures)
    if parallel.is_main:
        Path(out).write_text(json.dumps({key: [x[key] for x in every] for key in figures}))
    stop()


def _training_step(folder: str, parallel, per_rank: int, n: int, zero: int | None = None):
    """What makes a step's passes over n micro-batches of a real model.

    zero: ZeRO's stage; without one no step is taken.
    """
    import torch

    from src.checkpoint.load import load_model
    from src.checkpoint.source import Checkpoint
    from src.models.batch import Sequence
    from src.parallel.setup import reuse_memory
    from src.trainer.optimizer import Optimizer
    from src.trainer.passes import passes_of
    from src.trainer.solver import SolverObjective

    reuse_memory()
    checkpoint = Checkpoint.open(folder)
    how = {"stages_per_rank": per_rank, "zero": zero or 0}
    model = load_model(checkpoint, parallel, torch.float32, "lm", **how)
    optimizer = Optimizer(model, parallel, zero=zero or 0)
    generator = torch.Generator().manual_seed(parallel.dp_rank)
    ids = torch.randint(3, model.config.vocab_size, (n, 4 * TOKENS), generator=generator).tolist()
    objective = SolverObjective([Sequence(row, 1) for row in ids], parallel.device)
    passes = passes_of(model, parallel, optimizer)

    def step() -> None:
        turns = [[i] for i in range(n)]
        passes.train(turns, objective.batch, lambda i: objective.loss(model, i, n)[0])
        if zero is not None:
            optimizer.step(1e-5)
        for parameter in optimizer.parameters:
            parameter.grad = None

    return step


def _launched(ranks: int, *arguments: object) -> dict:
    """What a worker of this file, on so many ranks, found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        given = [str(x) for x in (*arguments, "--out", out)]
        # glibc gives what is freed back to the system at once
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**16)}
        subprocess.run([*torchrun(ranks), __file__, *given], check=True, env=env)
        return json.loads(out.read_text())


def memory_table(n_layers: int) -> list[str]:
    folder = Path(tempfile.gettempdir()) / f"layouts-memory-{n_layers}"
    make_model(folder, n_layers=n_layers, **WIDTH)
    kinds = ("weights", "gradients", "optimizer", "activations")
    head = [*(f"{kind}, planned" for kind in kinds), "all at once", "sum", "and put together"]
    head.append("process grew")
    lines = [
        f"4 ranks, fp32, {n_layers} layers of width {WIDTH['dim']}; {TOKENS} tokens in a "
        f"micro-batch, {MICRO_BATCHES} micro-batches through a pipeline, else one. GB of the "
        "fullest rank:",
        "",
        "| layout | " + " | ".join(head) + " | activations of each rank |",
        "|---" * (len(head) + 2) + "|",
    ]
    for name in LAYOUTS:
        found = _launched(4, "--worker", "memory", "--folder", folder, "--name", name)
        measured, planned = found["measured"], found["planned"]
        cells = [f"{measured[kind] / GB:.4f}, {planned[kind] / GB:.4f}" for kind in kinds]
        total = sum(measured[kind] for kind in kinds)
        others = measured["allocated"], total, total + measured["gathered"], measured["growth"]
        cells += [f"{x / GB:.3f}" for x in others]
        each = ", ".join(f"{x / GB:.4f}" for x in found["activations"])
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {each} |")
    return lines


def exchange_table(n_layers: int) -> list[str]:
    from src.models.exchange import BUCKET

    folder = Path(tempfile.gettempdir()) / f"layouts-memory-{n_layers}"
    make_model(folder, n_layers=n_layers, **WIDTH)
    lines = [
        f"4 ranks, bf16, {n_layers} layers of width {WIDTH['dim']}, buckets of {BUCKET / GB:.3f} "
        "GB. GB over all ranks, and of the fullest rank:",
        "",
        "| from | to | sent by all | lacking to all | new part | allocated at most | seconds |",
        "|---" * 7 + "|",
    ]
    for source, target in EXCHANGES:
        name = f"{source} > {target}"
        found = _launched(4, "--worker", "exchange", "--folder", folder, "--name", name)
        sums = [f"{sum(found[key]) / GB:.4f}" for key in ("sent", "lacking")]
        highs = [f"{max(found[key]) / GB:.4f}" for key in ("own", "most")]
        cells = [source, target, *sums, *highs, f"{max(found['seconds']):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def folder_of(model: str) -> Path:
    name = f"layouts-{model.replace(' ', '-')}"
    return make_model(Path(tempfile.gettempdir()) / name, **MODELS[model])


def idle_table() -> list[str]:
    lines = [
        "| ranks | stages of each | micro-batches | | idle | (P − 1) / (P − 1 + V · m) | seconds |",
        "|---" * 7 + "|",
    ]
    for ranks, per_rank, n, model in PIPELINES:
        given = dict(worker="idle", ranks=ranks, per_rank=per_rank, micro_batches=n)
        if model is not None:
            given["folder"] = folder_of(model)
        found = _launched(ranks, *[x for k, v in given.items() for x in (f"--{k}", v)])
        formula = (ranks - 1) / (ranks - 1 + per_rank * n)
        how = "waits" if model is None else model
        figures = f"{found['idle']:.3f} | {formula:.3f} | {found['seconds']:.2f}"
        lines.append(f"| {ranks} | {per_rank} | {n} | {how} | {figures} |")
    return lines


def zero_table() -> list[str]:
    folder = folder_of("58M")
    lines = ["Seconds of a step:", "", "| micro-batches | --zero 0 | 1 | 2 | 3 |", "|---" * 5 + "|"]
    for n in (1, 4):
        found = _launched(2, "--worker", "zero", "--folder", folder, "--micro_batches", n)
        lines.append(f"| {n} | " + " | ".join(f"{found[str(z)]:.3f}" for z in range(4)) + " |")
    return lines


def main(
    only: str | None = None,
    out: str | None = None,
    n_layers: int = 22,
    worker: str | None = None,
    folder: str = "",
    name: str = "",
    ranks: int = 2,
    per_rank: int = 1,
    micro_batches: int = 8,
) -> None:
    """only: "memory", "idle", "zero" or "exchange". The rest is for its own processes."""
    if worker == "memory":
        return memory_of(folder, name, str(out))
    if worker == "idle":
        return idle_of(folder, ranks, per_rank, micro_batches, str(out))
    if worker == "zero":
        return zero_of(folder, micro_batches, str(out))
    if worker == "exchange":
        return exchange_of(folder, name, str(out))
    tables = {"memory": lambda: memory_table(n_layers), "idle": idle_table, "zero": zero_table}
    tables["exchange"] = lambda: exchange_table(n_layers)
    report(tables, only, out)


if __name__ == "__main__":
    run(main)
