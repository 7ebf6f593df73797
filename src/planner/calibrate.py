"""What a machine reaches, measured by the trainers' own passes while all its ranks are at work.

A few models and batches of different kinds are timed; of the seconds and of what there was to do
(`work.py`) come the rates, by least squares of the relative errors, none below zero.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from src.errors import UserError
from src.generation.engine import Engine
from src.generation.sampling import Sampling
from src.models.batch import response_logprobs
from src.parallel.layout import Layout
from src.parallel.setup import Parallel, matmul_rate
from src.parallel.shared_memory import all_reduce, gather_into
from src.parallel.threads import cores
from src.planner.hardware import Hardware, Link, Links, Rates, made
from src.planner.measure import (
    llama_of,
    most_of_ranks,
    random_folder,
    role_of,
    sizes_by_name,
    some_sequences,
    timed,
)
from src.planner.work import (
    MicroBatch,
    Work,
    backward_of,
    decode_head,
    decode_layer,
    head_forward,
    head_training,
    layers_forward,
    sizes_of,
)
from src.ppo.roles import Role
from src.trainer.activations import USABLE
from src.trainer.solver import SolverObjective

Batches = list[tuple[int, int, int]]
Samples = list[tuple[Work, float]]  # what there was to do, and the seconds that it took


@dataclass(frozen=True)
class Timed:
    """What is timed on a device: models that keep it busy, and are through with soon.

    models: their sizes; batches: (rows, tokens of each, response tokens among them); generated:
    (sequences, prompt tokens, response tokens); exchanged: bytes.
    """

    models: list[dict[str, int]]
    batches: Batches
    generated: Batches
    exchanged: tuple[int, ...]


ON = {
    "cpu": Timed(
        [
            sizes_by_name(256, 4, 4, 4, 688, 2048),
            sizes_by_name(512, 3, 8, 4, 1376, 8192),
            sizes_by_name(768, 2, 12, 12, 2048, 4096),
        ],
        [(1, 48, 24), (4, 64, 32), (4, 128, 64), (2, 320, 64), (1, 768, 384)],
        [(1, 32, 32), (8, 32, 32), (32, 64, 32), (8, 512, 16)],
        (2**12, 2**18, 2**24),
    ),
    "cuda": Timed(
        [
            sizes_by_name(1024, 8, 8, 8, 2752, 8192),
            sizes_by_name(2048, 4, 16, 8, 5504, 32000),
            sizes_by_name(4096, 2, 32, 8, 14336, 8192),
        ],
        [(1, 64, 32), (4, 256, 128), (8, 512, 256), (4, 2048, 512), (1, 8192, 4096)],
        [(1, 64, 64), (32, 64, 64), (128, 128, 64), (32, 1024, 32)],
        (2**14, 2**22, 2**28),
    ),
}
MANY = 8  # exchanges that are timed together
TURNS = 3
LEAST = 1e-15  # seconds of a unit: what is found to cost nothing


def ranks_here() -> int:
    """How many ranks this machine has: GPUs, or else cores."""
    return torch.cuda.device_count() or cores()


def launched(ranks: int, cases: list[dict], rates: bool) -> dict:
    """What src/planner/trial.py finds on so many ranks of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        request, out = Path(folder) / "request.json", Path(folder) / "out.json"
        request.write_text(json.dumps({"folder": folder, "cases": cases, "rates": rates}))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        worker = ["-m", "src.planner.trial", str(request), str(out)]
        command = [sys.executable, *(launcher if ranks > 1 else []), *worker]
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path})
        if done.returncode:
            raise UserError(f"measuring on {ranks} ranks failed (exit code {done.returncode})")
        return json.loads(out.read_text())


def calibrated(ranks: int) -> Hardware:
    """This machine, as one node of so many ranks."""
    return hardware_from(launched(ranks, [], rates=True)["rates"])


def hardware_from(values: dict) -> Hardware:
    return made(Hardware, values)


# --- On the ranks ---------------------------------------------------------------------------------


def measured_rates(folder: Path, parallel: Parallel) -> dict:
    """A `Hardware` as a dict; each rank has a model of its own. A collective of all ranks."""
    samples: dict[str, Samples] = {"score": [], "train": [], "decode": []}
    begun: Samples = []
    numbers_per_second: list[float] = []
    alone = parallel.laid_out(Layout(parallel.world_size, zero=0))
    for number, sizes in enumerate(ON[parallel.device.type].models):
        config = llama_of(sizes)
        path = folder / f"rates-{number}"
        if parallel.is_main:
            random_folder(path, config)
        dist.barrier()
        role = role_of(path, "model", "lm", alone, "none")
        _measure_passes(role, samples)
        numbers_per_second.append(_update_rate(role))
        _measure_tokens(role, samples["decode"], begun)
    rates = {kind: fitted(of_kind) for kind, of_kind in samples.items()}
    # Of the seconds until a first token, those that are not the prompts'.
    preparing = [
        max(took - work.seconds(rates["score"]), 1e-4) / work.weights for work, took in begun
    ]
    links = {kind: vars(link) for kind, link in vars(measured_links(parallel)).items()}
    return {
        "name": _name(parallel),
        "memory": _memory(parallel),
        "per_node": parallel.world_size,
        **{kind: vars(of_kind) for kind, of_kind in rates.items()},
        "numbers": float(np.median(numbers_per_second)),
        "session": 1 / float(np.median(preparing)),
        **_copy_rates(parallel.device),
        "node": links,
        "network": links,
        "peak": most_of_ranks(matmul_rate(role.model.dtype, parallel.device)),
        "kind": parallel.device.type,
    }


def _measure_passes(role: Role, samples: dict[str, Samples]) -> None:
    """Of a model, forward alone, and forward and backward, on batches of several kinds."""
    model, config, size = role.model, role.model.config, role.model.dtype.itemsize
    sizes, rank, device = sizes_of(config, 1), role.parallel.rank, role.parallel.device
    for rows, length, response in ON[device.type].batches:
        sequences = some_sequences(rows, length - response, response, config.vocab_size, rank)
        objective, every = SolverObjective(sequences, device), [*range(rows)]
        batch = MicroBatch.of_rows(rows, length, response)
        forward = layers_forward(config, sizes, batch, size)

        def score(objective=objective, every=every) -> None:
            with torch.no_grad():
                response_logprobs(model, objective.batch(every), 1.0)

        def train(objective=objective, every=every) -> None:
            objective.loss(model, every, 1.0)[0].backward()

        whole = forward + head_forward(sizes, batch, size) + Work(calls=1)
        samples["score"].append((whole, seconds_of(score)))
        both = forward + backward_of(forward, sizes)
        whole = both + head_training(sizes, batch, size) + Work(calls=1)
        samples["train"].append((whole, seconds_of(train)))


def _update_rate(role: Role) -> float:
    """Numbers that an optimizer's step takes in a second, without what ranks exchange."""
    optimizer = role.optimizer
    assert optimizer is not None
    gradients = [(p, p.grad) for p in optimizer.parameters]
    optimizer.buckets = None

    def update() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        optimizer.step(0.0)

    return sum(p.numel() for p in optimizer.parameters) / seconds_of(update)


def _measure_tokens(role: Role, tokens: Samples, begun: Samples) -> None:
    """Of a model: until each of some sequences has its first token, and each further one."""
    config, size = role.model.config, role.model.dtype.itemsize
    generated = ON[role.parallel.device.type].generated
    most, longest = max(n for n, *_ in generated), max(p + r + 1 for _, p, r in generated)
    engine = Engine(role.model, role.parallel, most, longest)
    sizes, rank = sizes_of(config, 1), role.parallel.rank
    for count, prompt, response in generated:
        rows = some_sequences(count, prompt, response, config.vocab_size, rank)
        prompts = [list(row.tokens[:prompt]) for row in rows]

        def generate(new: int, prompts=prompts) -> None:
            sampling = Sampling(max_new_tokens=new, temperature=1.0, seed=1)
            engine.generate(prompts, sampling, set(), [*range(len(prompts))])

        first = seconds_of(partial(generate, 1))
        batch = MicroBatch.of_rows(count, prompt, 1)
        read = layers_forward(config, sizes, batch, size) + head_forward(sizes, batch, size)
        begun.append((read + Work(calls=1), first))
        took = seconds_of(partial(generate, response + 1)) - first
        step = decode_layer(sizes, count, prompt + response / 2, size) * config.n_layers
        step = step + decode_head(sizes, count, size)
        tokens.append((step, max(took / response, 1e-9)))


def _copy_rates(device: torch.device, size: int = 2**26) -> dict[str, float]:
    """Bytes/s that are copied to where memory is in use already, and to new memory."""
    x = torch.ones(size // 4, device=device)
    known = partial(torch.empty_like(x).copy_, x)
    return {"copies": size / seconds_of(known), "fresh": size / seconds_of(x.clone)}


def measured_links(parallel: Parallel) -> Links:
    """Latency and bytes/s of the exchanges among all ranks; of one rank alone nothing."""
    n, device = parallel.world_size, parallel.device
    if n == 1:
        nothing = Link(0.0, 1e12)
        return Links(nothing, nothing, nothing)
    group, share = parallel.laid_out(Layout(tp=n)).mp_group, (n - 1) / n
    samples: dict[str, list[tuple[float, float]]] = {"reduce": [], "gather": [], "send": []}
    for size in ON[device.type].exchanged:
        x = torch.zeros(size // 4, device=device)
        part, received = x[: size // 4 // n].contiguous(), torch.zeros_like(x)
        gathered = part.new_empty(n * part.numel())
        reduce = partial(all_reduce, x, group)
        samples["reduce"].append((2 * share * size, seconds_of(reduce, MANY)))
        gather = partial(gather_into, gathered, part, group)
        samples["gather"].append((share * size, seconds_of(gather, MANY)))
        ring = partial(_pass_on, x, received, parallel)
        samples["send"].append((size, seconds_of(ring, MANY)))
    return Links(**{kind: _link(of_kind) for kind, of_kind in samples.items()})


def _pass_on(x: torch.Tensor, received: torch.Tensor, parallel: Parallel) -> None:
    """To the next rank, from the one before."""
    n, rank, world = parallel.world_size, parallel.rank, parallel.world
    operations = [
        dist.P2POp(dist.isend, x, group=world, group_peer=(rank + 1) % n),
        dist.P2POp(dist.irecv, received, group=world, group_peer=(rank - 1) % n),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def seconds_of(work: Callable[[], object], times: int = 1) -> float:
    """Seconds of the slowest rank, the median of a few turns of so many times each."""

    def several() -> None:
        for _ in range(times):
            work()

    work()
    return most_of_ranks(statistics.median(timed(several) for _ in range(TURNS))) / times


def _link(samples: Iterable[tuple[float, float]]) -> Link:
    """Latency and bandwidth from (bytes, seconds)."""
    rows = [(np.array([1.0, traffic]), took) for traffic, took in samples]
    latency, of_byte = nonnegative([x for x, _ in rows], [took for _, took in rows])
    return Link(float(latency), 1 / max(of_byte, LEAST))


def fitted(samples: Samples) -> Rates:
    """Rates from what was to be done and the seconds that it took."""
    seconds = nonnegative([work.numbers for work, _ in samples], [took for _, took in samples])
    products, attention, elements, weights = (1 / max(float(x), LEAST) for x in seconds[:4])
    return Rates(products, attention, elements, weights, float(seconds[4]), float(seconds[5]))


def nonnegative(rows: Any, values: Any, sweeps: int = 20_000) -> np.ndarray:
    """x ≥ 0 that makes Σ ((row · x − value) / value)² least: by turns, a coordinate at a time."""
    of_one = np.asarray(rows, dtype=float) / np.asarray(values, dtype=float)[:, None]
    scale = np.sqrt((of_one**2).sum(0))
    scale[scale == 0] = 1.0
    a = of_one / scale
    gram, target = a.T @ a, a.T @ np.ones(len(a))
    x = np.zeros(a.shape[1])
    for _ in range(sweeps):
        before = x.copy()
        for i in range(len(x)):
            if gram[i, i]:
                x[i] = max(0.0, x[i] + (target[i] - gram[i] @ x) / gram[i, i])
        if np.abs(x - before).max() <= 1e-12:
            break
    return x / scale


def _memory(parallel: Parallel) -> float:
    """Bytes that a rank may use: of its GPU, or its share of the host's."""
    if parallel.device.type == "cuda":
        return USABLE * torch.cuda.get_device_properties(parallel.device).total_memory
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return USABLE * whole / parallel.world_size


def _name(parallel: Parallel) -> str:
    if parallel.device.type == "cuda":
        return torch.cuda.get_device_name(parallel.device)
    threads = torch.get_num_threads()
    return f"{cores()} cores, {parallel.world_size} ranks of {threads} threads"
