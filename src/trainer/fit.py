"""The training loop of solver and verifier: epochs, batches, steps, evaluations."""

import random
from dataclasses import dataclass
from typing import Callable, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from src.errors import UserError
from src.logs import RunLog
from src.models.batch import micro_batches
from src.models.init import generator_for
from src.models.lora import freeze_layers
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.trainer.optimizer import Optimizer, lr_at


class Objective(Protocol):
    """What is trained: rows, how much each counts, and the loss of some of them."""

    lengths: list[int]  # tokens of each row
    weights: list[int]  # what each row adds to the denominator of the loss
    stats: tuple[str, ...]  # names of what `loss` returns to be logged, "loss" among them

    def loss(self, model: Transformer, rows: list[int], denominator: float) -> tuple[Tensor, dict[str, float]]:
        """The rows' share of the loss (their sum over the whole batch's denominator), and sums to be logged."""


@dataclass(frozen=True)
class FitSettings:
    """batch = max_batch_size × accumulation_steps × data-parallel ranks rows per optimizer step."""

    lr: float
    epochs: int
    max_batch_size: int
    accumulation_steps: int = 1
    warmup: float = 0.03
    schedule: str = "cosine"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.max_batch_size, self.accumulation_steps) < 1 or self.lr <= 0 or not 0 <= self.warmup < 1:
            raise UserError(
                f"--lr {self.lr} --epochs {self.epochs} --max_batch_size {self.max_batch_size} --accumulation_steps "
                f"{self.accumulation_steps} --warmup {self.warmup}: lr must be positive, the counts 1 or more, warmup in [0, 1)"
            )


def prepare(model: Transformer, settings: dict, parallel: Parallel) -> None:
    """What a training script's flags say of the model: recomputation, frozen layers, the weight of the experts' balance;

    and the state that dropout is drawn from, which must be the same on all ranks that share a model.
    """
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


def share_of(batch: list[int], lengths: list[int], parallel: Parallel, max_batch_size: int) -> list[list[int]]:
    """This data-parallel rank's rows of a batch, in micro-batches. Dealt by length, so that all get alike."""
    order = sorted(batch, key=lambda i: (-lengths[i], i))
    mine = order[parallel.dp_rank :: parallel.dp_size]
    return [[mine[i] for i in group] for group in micro_batches([lengths[i] for i in mine], max_batch_size)]


def fit(
    model: Transformer,
    optimizer: Optimizer,
    objective: Objective,
    settings: FitSettings,
    parallel: Parallel,
    log: RunLog,
    evaluate: Callable[[int], None],
) -> list[dict[str, float]]:
    """Train; `evaluate(epoch)` is called before the first epoch (0) and after every one. Returns each step's scalars."""
    batch_size = settings.max_batch_size * settings.accumulation_steps * parallel.dp_size
    steps_per_epoch = -(-len(objective.lengths) // batch_size)
    total, step, history = steps_per_epoch * settings.epochs, 0, []
    names = objective.stats + (("balance_loss",) if model.config.n_experts else ())
    evaluate(0)
    for epoch in range(1, settings.epochs + 1):
        with log.progress(steps_per_epoch, f"epoch {epoch}/{settings.epochs}", unit="step") as bar:
            for batch in epoch_batches(len(objective.lengths), batch_size, settings.seed, epoch):
                denominator = sum(objective.weights[i] for i in batch)
                sums: dict[str, float] = {}
                for rows in share_of(batch, objective.lengths, parallel, settings.max_batch_size):
                    loss, stats = objective.loss(model, rows, denominator)
                    optimizer.backward(loss)
                    for name, value in {"loss": float(loss.detach()), **stats}.items():
                        sums[name] = sums.get(name, 0.0) + value
                lr = lr_at(step, total, settings.lr, settings.warmup, settings.schedule)
                scalars = {**summed(sums, names, parallel), "lr": lr, **optimizer.step(lr)}
                step += 1
                if scalars["skipped"]:
                    log.warning(f"step {step}: the gradient norm is {scalars['grad_norm']}, the step is skipped")
                history.append(scalars)
                log.scalars(step, scalars)
                tokens = sum(objective.lengths[i] for i in batch)
                bar.update(1, tokens=tokens, loss=scalars["loss"], lr=lr)
        evaluate(epoch)
    return history


def summed(sums: dict[str, float], names: tuple[str, ...], parallel: Parallel) -> dict[str, float]:
    """The named sums, 0 where this rank has none, added over the data-parallel ranks."""
    values = torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64, device=parallel.device)
    dist.all_reduce(values, group=parallel.dp_group)
    return dict(zip(names, values.tolist()))
