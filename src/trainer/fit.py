"""The training loop of solver and verifier: epochs, batches, steps, evaluations."""

import itertools
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from src.errors import UserError
from src.logs import RunLog
from src.models.batch import micro_batches
from src.models.elementwise import compile_elementwise
from src.models.flops import TrainingFlops, attention_pairs
from src.models.init import generator_for
from src.models.lora import freeze_layers
from src.models.transformer import Transformer
from src.parallel.clock import clock
from src.parallel.setup import Parallel, matmul_rate, reuse_memory
from src.trainer.optimizer import Optimizer, lr_at
from src.trainer.saving import Saving

PROFILED_STEPS = (3, 2)  # steps that pass before the profile, and steps in it


class Objective(Protocol):
    """What is trained: rows, how much each counts, and the loss of some of them."""

    lengths: list[int]  # tokens of each row
    weights: list[int]  # what each row adds to the denominator of the loss
    needed: list[int]  # positions of each row whose last hidden state the loss needs
    stats: tuple[str, ...]  # names of what `loss` returns to be logged, "loss" among them

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """How a row's tokens are computed: (tokens, tokens before them that they see too) of each piece."""

    def loss(
        self, model: Transformer, rows: list[int], denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The rows' share of the loss (their sum over the whole batch's denominator), and sums to be logged."""


@dataclass(frozen=True)
class FitSettings:
    """batch = max_batch_size × accumulation_steps × data-parallel ranks rows per optimizer step, in micro-batches of at most

    max_batch_size rows and max_tokens_per_batch tokens. Evaluations come every `eval_every` steps, or after each epoch.
    """

    lr: float
    epochs: int
    max_batch_size: int
    accumulation_steps: int = 1
    warmup: float = 0.03
    schedule: str = "cosine"
    seed: int = 0
    max_tokens_per_batch: int | None = None
    eval_every: int | None = None
    profile: bool = False
    max_skipped_steps: int = 30

    @classmethod
    def of(cls, settings: dict) -> "FitSettings":
        """From a script's flags, which have the same names."""
        return cls(**{field.name: settings[field.name] for field in fields(cls)})

    def __post_init__(self) -> None:
        if (
            min(self.epochs, self.max_batch_size, self.accumulation_steps) < 1
            or self.lr <= 0
            or not 0 <= self.warmup < 1
        ):
            raise UserError(
                f"--lr {self.lr} --epochs {self.epochs} --max_batch_size {self.max_batch_size} --accumulation_steps "
                f"{self.accumulation_steps} --warmup {self.warmup}: lr must be positive, the counts 1 or more, warmup in [0, 1)"
            )


def prepare(model: Transformer, settings: dict, parallel: Parallel) -> None:
    """What a training script's flags say of the model: recomputation, compilation, frozen layers, the weight of the experts'

    balance; and the state that dropout is drawn from, which must be the same on all ranks that share a model.
    """
    if parallel.device.type == "cpu":
        reuse_memory()
    if settings["compile"]:
        compile_elementwise()
    torch.manual_seed(generator_for(settings["seed"], f"dropout/{parallel.dp_rank}").initial_seed())
    model.recompute = settings["checkpoint_activations"]
    freeze_layers(model, settings["freeze_layers"])
    if settings["router_aux_loss_coef"] is not None:
        model.router_aux_loss_coef = settings["router_aux_loss_coef"]


def epoch_batches(n_rows: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Every row once, in random batches, in an order fixed by seed and epoch alone.

    Batches are not sorted by length, which would sort them by content: packing makes that needless. Inside a batch,
    `share_of` puts rows alike in length into the same micro-batch.
    """
    order = list(range(n_rows))
    random.Random(f"{seed}/epoch {epoch}").shuffle(order)
    return [order[i : i + batch_size] for i in range(0, n_rows, batch_size)]


class EndlessBatches:
    """Batches of row numbers without end. Every pass shuffles all rows anew; batches are always full."""

    def __init__(self, n_rows: int, batch_size: int, seed: str) -> None:
        self.taken, self._batches = 0, self._endless(n_rows, batch_size, seed)

    @staticmethod
    def _endless(n_rows: int, batch_size: int, seed: str) -> Iterator[list[int]]:
        waiting: list[int] = []
        for epoch in itertools.count(1):
            order = list(range(n_rows))
            random.Random(f"{seed}/epoch {epoch}").shuffle(order)
            waiting += order
            while len(waiting) >= batch_size:
                yield waiting[:batch_size]
                waiting = waiting[batch_size:]

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        self.taken += 1
        return next(self._batches)

    @property
    def part(self) -> tuple[Callable, Callable]:
        """How to get and set what a saved run must keep of it."""
        return (lambda: self.taken), self.wind_to

    def wind_to(self, taken: int) -> None:
        """Forward to where so many have been taken."""
        while self.taken < taken:
            next(self)


def share_of(
    batch: list[int],
    lengths: list[int],
    parallel: Parallel,
    max_batch_size: int,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """This data-parallel rank's rows of a batch, in micro-batches.

    Row after row, the longest first, goes to the rank with the fewest tokens, while that has not got its share of rows.
    """
    order = sorted(batch, key=lambda i: (-lengths[i], i))
    most, shares = -(-len(batch) // parallel.dp_size), [[] for _ in range(parallel.dp_size)]
    for i in order:
        open_shares = (share for share in shares if len(share) < most)
        min(open_shares, key=lambda share: sum(lengths[j] for j in share)).append(i)
    mine = shares[parallel.dp_rank]
    return [
        [mine[i] for i in group]
        for group in micro_batches([lengths[i] for i in mine], max_batch_size, max_tokens)
    ]


def fit(
    model: Transformer,
    optimizer: Optimizer,
    objective: Objective,
    settings: FitSettings,
    parallel: Parallel,
    log: RunLog,
    evaluate: Callable[[str, int], None],
    saving: Saving | None = None,
) -> list[dict[str, float]]:
    """Train, from where an earlier run stopped; `evaluate` is called before the first step and then as the settings say, with a name

    ("epoch 1") and its number. Returns the scalars of each step that was taken.
    """
    batch_size = settings.max_batch_size * settings.accumulation_steps * parallel.dp_size
    steps_per_epoch = -(-len(objective.lengths) // batch_size)
    total, history = steps_per_epoch * settings.epochs, []
    step = saving.resume(total) if saving else 0
    unit, every = (
        ("step", settings.eval_every) if settings.eval_every else ("epoch", steps_per_epoch)
    )
    meter = Meter(model, objective, parallel)
    if step == 0:
        evaluate(f"{unit} 0", 0)
    with _profiler(settings.profile, log) as profiler:
        for epoch in range(step // steps_per_epoch + 1, settings.epochs + 1):
            begin = step % steps_per_epoch
            with log.progress(
                steps_per_epoch, f"epoch {epoch}/{settings.epochs}", unit="step", initial=begin
            ) as bar:
                for batch in epoch_batches(
                    len(objective.lengths), batch_size, settings.seed, epoch
                )[begin:]:
                    meter.start()
                    lr = lr_at(step, total, settings.lr, settings.warmup, settings.schedule)
                    scalars = {
                        **train_step(model, optimizer, objective, batch, settings, parallel, lr),
                        "lr": lr,
                    }
                    step += 1
                    if scalars["skipped"]:
                        log.warning(
                            f"step {step}: the gradient norm is {scalars['grad_norm']}, the step is skipped"
                        )
                        optimizer.check_skipped(
                            settings.max_skipped_steps, f"rows {batch} of the train file (from 0)"
                        )
                    scalars |= meter.read(batch)
                    history.append(scalars)
                    log.scalars(step, scalars)
                    tokens = sum(objective.lengths[i] for i in batch)
                    bar.update(1, tokens=tokens, loss=scalars["loss"], lr=lr, mfu=scalars["mfu"])
                    profiler.step()
                    if step % every == 0 or step == total:
                        number = epoch if unit == "epoch" else step
                        evaluate(f"{unit} {number}", number)
                    if saving:
                        saving.after(step)
    return history


def train_step(
    model: Transformer,
    optimizer: Optimizer,
    objective: Objective,
    batch: list[int],
    settings: FitSettings,
    parallel: Parallel,
    lr: float,
) -> dict[str, float]:
    """One optimizer step on a batch of all ranks' rows; returns the objective's sums, the gradient norm, and `skipped`."""
    names = objective.stats + (("balance_loss",) if model.config.n_experts else ())
    sums: dict[str, Tensor] = {}
    with clock.phase("data"):
        denominator = sum(objective.weights[i] for i in batch)
        share = share_of(
            batch,
            objective.lengths,
            parallel,
            settings.max_batch_size,
            settings.max_tokens_per_batch,
        )
    for rows in share:
        with clock.phase("forward"):
            loss, stats = objective.loss(model, rows, denominator)
        with clock.phase("backward"):
            optimizer.backward(loss, last=rows is share[-1])
        for name, value in {"loss": loss.detach(), **stats}.items():
            sums[name] = sums.get(name, 0.0) + value
    with clock.phase("optimizer"):
        done = optimizer.step(lr)
        return {**summed(sums, names, parallel), **done}


class Meter:
    """What a step cost: tokens/s, FLOP/s and their share of what matrix products reach on these ranks (MFU), time, memory."""

    def __init__(self, model: Transformer, objective: Objective, parallel: Parallel) -> None:
        self.objective, self.parallel, self.config, self.flops = (
            objective,
            parallel,
            model.config,
            TrainingFlops.of(model),
        )
        rate = torch.tensor(
            matmul_rate(model.norm.weight.dtype, parallel.device),
            dtype=torch.float64,
            device=parallel.device,
        )
        dist.all_reduce(rate)  # of all ranks, measured at the same time
        self.rate = float(rate)

    def start(self) -> None:
        """A step begins. What lies between steps, such as evaluations, is not theirs."""
        clock.take()
        self.began = time.perf_counter()

    def read(self, batch: list[int]) -> dict[str, float]:
        """Of the step on `batch`, which has just ended."""
        phases = clock.take()
        took = time.perf_counter() - self.began
        o = self.objective
        tokens = sum(o.lengths[i] for i in batch)
        pairs = sum(attention_pairs(self.config, *piece) for i in batch for piece in o.pieces(i))
        flops = self.flops(tokens, sum(o.needed[i] for i in batch), pairs)
        memory = torch.tensor(
            peak_memory(self.parallel.device), dtype=torch.float64, device=self.parallel.device
        )
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        return {
            "tokens_per_s": tokens / took,
            "flops_per_s": flops / took,
            "mfu": flops / took / self.rate,
            "memory_gb": float(memory) / 1e9,
            "seconds": took,
            **{f"seconds/{phase}": seconds for phase, seconds in phases.items()},
        }


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most so far: on a GPU of tensors, else all of its memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _profiler(wanted: bool, log: RunLog):
    """A context manager with `step()`: the profile of a few steps as a trace that Perfetto shows, a file for each rank."""
    if not wanted:
        return nullcontext(_NoProfiler())
    wait, active = PROFILED_STEPS

    def write(profiler) -> None:
        path = Path(log.log_dir) / f"trace-rank-{log.rank}.json"
        profiler.export_chrome_trace(str(path))
        log.info(
            f"profile of steps {wait + 1} to {wait + active}: {path}, for https://ui.perfetto.dev"
        )

    schedule = torch.profiler.schedule(wait=wait - 1, warmup=1, active=active, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True)


class _NoProfiler:
    def step(self) -> None:
        pass


def summed(sums: dict[str, Tensor], names: tuple[str, ...], parallel: Parallel) -> dict[str, float]:
    """The named sums, 0 where this rank has none, added over the data-parallel ranks."""
    zero = torch.zeros((), dtype=torch.float64, device=parallel.device)
    values = torch.stack([sums[name].double() if name in sums else zero for name in names])
    dist.all_reduce(values, group=parallel.dp_group)
    return dict(zip(names, values.tolist()))
