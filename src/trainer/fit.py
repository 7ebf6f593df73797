"""The training loop of all that learns from rows: epochs, batches, steps, evaluations."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from src.data.mixture import Mixture
from src.errors import UserError
from src.logs import RunLog
from src.models.elementwise import compile_elementwise
from src.models.fp8 import use_fp8
from src.models.init import generator_for
from src.models.lora import freeze_layers
from src.models.transformer import Transformer
from src.parallel.clock import clock
from src.parallel.setup import Parallel, reuse_memory
from src.parallel.shared_memory import all_reduce
from src.progress import Progress
from src.settings.model import PackedBatchSettings, TrainingBatchSettings
from src.settings.run import TrainingRunSettings
from src.settings.scripts import TrainSettings
from src.settings.training import OptimizerSettings
from src.trainer.activations import described, held_bytes, limited
from src.trainer.batches import shares_of, turns_of
from src.trainer.meter import Meter, phases_of, profiler
from src.trainer.objective import Objective
from src.trainer.optimizer import Optimizer, lr_at
from src.trainer.passes import Passes, from_last_stage, passes_of
from src.trainer.saving import Saving


def prepare(
    model: Transformer,
    optimizer: OptimizerSettings,
    run: TrainingRunSettings,
    parallel: Parallel,
) -> None:
    """What the settings say of a model in training, and the state that dropout is drawn from.

    Recomputation, compilation, frozen layers, and the weight of the experts' balance.
    """
    if parallel.device.type == "cpu":
        reuse_memory()
    if run.fp8:
        use_fp8(model)
    if run.compile:
        check_compiler(parallel.device.type)
        compile_elementwise()
    # Ranks that share a model must draw the same dropout; others have other tokens.
    torch.manual_seed(generator_for(run.seed, f"dropout/{parallel.dp_rank}").initial_seed())
    model.recompute = run.checkpoint_activations
    if run.sequence_parallel and parallel.layout.tp == 1:
        raise UserError(
            "--sequence_parallel: has no effect with 1 rank per model; give "
            "--model_parallel_size 2 or more, or leave it out"
        )
    model.sequence_parallel = run.sequence_parallel
    freeze_layers(model, optimizer.freeze_layers)
    if optimizer.router_aux_loss_coef is not None:
        model.router_aux_loss_coef = optimizer.router_aux_loss_coef


def check_compiler(device_type: str) -> None:
    """Raise UserError where --compile would find no C compiler for a GPU.

    Triton makes the GPU's code itself, and what launches it by a compiler of the system. (The CPU's
    need is checked by `compile_elementwise`.)
    """
    if device_type != "cuda":
        return
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        raise UserError(
            f"--compile: on a GPU torch.compile needs a C compiler, and there is no "
            f"{' or '.join(names)}: install gcc, or leave --compile out"
        )


def rows_per_step(batches: TrainingBatchSettings, data_size: int) -> int:
    """Rows of one optimizer step, over all ranks."""
    return batches.max_batch_size * batches.accumulation_steps * data_size


def fit(
    model: Transformer,
    optimizer: Optimizer,
    objective: Objective,
    settings: TrainSettings,
    parallel: Parallel,
    log: RunLog,
    evaluate: Callable[[str, int], None],
    saving: Saving | None = None,
    mixture: Mixture | None = None,
) -> list[dict[str, float]]:
    """Train, from where an earlier run stopped. Returns the scalars of each step that was taken.

    `evaluate` is called before the first step and then as the settings say, with a name ("epoch 1")
    and its number. mixture: of the objective's rows; an epoch has all of them when not given.
    """
    plan = settings.optimizer
    batch_size = rows_per_step(settings.batches, parallel.data_size)
    steps = objective.steps(batch_size, plan.epochs, settings.run.seed, mixture)
    total, in_epoch = steps.total, steps.in_epoch
    epochs, eval_every = -(-total // in_epoch), settings.evaluation.eval_every
    unit, every = ("step", eval_every) if eval_every else ("epoch", in_epoch)
    history: list[dict[str, float]] = []

    # Go on where an earlier run stopped, or measure the untrained model first.
    step = saving.resume(total) if saving else 0
    held = held_bytes([model, *objective.held], [optimizer])
    batches = limited(settings.batches, [(model, optimizer)], held, parallel)
    for line in described(batches.max_tokens_per_batch):
        log.info(line)
    meter = Meter(model, objective, parallel)
    passes = passes_of(model, parallel, optimizer)
    tokens_left = objective.tokens_per_row * batch_size * (total - step)

    def evaluate_aside(bar: Progress, name: str, number: int) -> None:
        clock.announce("evaluation")
        with bar.aside(left=-(-total // every) - -(-step // every)):
            evaluate(name, number)

    with (
        profiler(settings.saving.profile, log) as profile,
        log.progress(total, "training", unit="step", initial=step, work=tokens_left) as bar,
    ):
        if step == 0:
            evaluate_aside(bar, f"{unit} 0", 0)
        while step < total:
            epoch = step // in_epoch + 1
            bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
            batch = steps.batch(step)

            # One optimizer step on the whole batch, of which each rank computes its share.
            meter.start()
            lr = lr_at(step, total, plan.lr, plan.warmup, plan.schedule)
            objective.begin(step, batch, model)
            roles = model, optimizer, objective
            scalars = train_step(*roles, batch, batches, parallel, lr, passes)
            step += 1
            if scalars["skipped"]:
                norm = scalars["grad_norm"]
                log.warning(f"step {step}: the gradient norm is {norm}, the step is skipped")
                rows = f"rows {batch} of the train file (from 0)"
                optimizer.check_skipped(plan.max_skipped_steps, rows)

            # What it brought and what it cost.
            scalars |= {"lr": lr, **objective.noted, **meter.read(batch)}
            history.append(scalars)
            log.scalars(step, scalars)
            tokens = sum(objective.lengths[i] for i in batch)
            shown = {name: scalars[name] for name in ("loss", "lr", "mfu")}
            bar.update(1, tokens=tokens, work=tokens, **shown)
            profile.step()
            if saving:
                saving.monitor.took(step, phases_of(scalars), scalars)

            # Evaluate and save when it is time.
            if step % every == 0 or step == total:
                number = epoch if unit == "epoch" else step
                evaluate_aside(bar, f"{unit} {number}", number)
            if saving:
                saving.after(step)
    return history


def train_step(
    model: Transformer,
    optimizer: Optimizer,
    objective: Objective,
    batch: list[int],
    batches: PackedBatchSettings,
    parallel: Parallel,
    lr: float,
    passes: Passes | None = None,
) -> dict[str, float]:
    """One optimizer step on a batch of all ranks' rows.

    Returns the objective's sums, the gradient norm, and `skipped`. passes: the model's, made when
    not given.
    """
    names = objective.stats + (("balance_loss",) if model.config.n_experts else ())
    if not any(objective.weights[i] for i in batch):  # nothing to learn from: no step is taken
        return dict.fromkeys((*names, "grad_norm", "skipped"), 0.0)
    with clock.phase("data"):
        batch = [i for i in batch if objective.weights[i]]
        denominator = sum(objective.weights[i] for i in batch)
        limits = batches.max_batch_size, batches.max_tokens_per_batch
        shares = shares_of(batch, objective.lengths, parallel.data_size, *limits)
        turns = turns_of(shares, parallel.data_rank, optimizer.shares_weights)
    with clock.phase("forward"):
        objective.consult([rows for rows in turns if rows is not None])
    sums: dict[str, Tensor] = {}

    # Each micro-batch's loss is its sum over the whole batch's count: gradients simply add up.
    def loss_of(rows: list[int]) -> Tensor:
        loss, stats = objective.loss(model, rows, denominator)
        for name, value in {"loss": loss.detach(), **stats}.items():
            sums[name] = sums[name] + value if name in sums else value
        return loss

    passes = passes_of(model, parallel, optimizer) if passes is None else passes
    passes.train(turns, objective.batch, loss_of)
    with clock.phase("optimizer"):
        done = optimizer.step(lr)
        return {**summed(sums, names, parallel), **done}


def summed(sums: dict[str, Tensor], names: tuple[str, ...], parallel: Parallel) -> dict[str, float]:
    """The named sums, 0 where this rank has none, added over the data-parallel ranks.

    Those of a pipeline are its last stage's.
    """
    zero = torch.zeros((), dtype=torch.float64, device=parallel.device)
    values = torch.stack([sums[name].double() if name in sums else zero for name in names])
    all_reduce(values, parallel.data_group)
    return dict(zip(names, from_last_stage(values, parallel).tolist()))
