"""Optimizer steps: a model as a whole, and one with an adapter."""

import torch
from common import free_memory, median, random_model

from gpu_stages.shared import Say, Sizes
from src.models.batch import Sequence
from src.models.elementwise import compile_elementwise
from src.models.lora import LoRAConfig, add_lora
from src.parallel.setup import Parallel, start, stop
from src.settings.model import PackedBatchSettings
from src.trainer.fit import train_step
from src.trainer.meter import Meter
from src.trainer.optimizer import Optimizer
from src.trainer.solver import SolverObjective

PUBLISHED = 989e12  # FLOP/s of an H100's dense bf16 products, by its maker


def whole(sizes: Sizes, say: Say) -> None:
    parallel = start()
    on_gpu = parallel.device.type == "cuda"
    for recompute, compiled in (("none", False), ("selective", False), ("none", True)):
        if compiled:
            if not on_gpu:  # whose compiler takes longer than all else
                continue
            compile_elementwise()
        step(sizes, say, parallel, lora=False, recompute=recompute, compiled=compiled)
    stop()


def lora(sizes: Sizes, say: Say) -> None:
    parallel = start()
    for recompute in ("full", "selective"):
        step(sizes, say, parallel, lora=True, recompute=recompute, compiled=False)
    stop()


def step(
    sizes: Sizes, say: Say, parallel: Parallel, lora: bool, recompute: str, compiled: bool
) -> None:
    """Says what a step costs, or that it does not fit."""
    model = random_model(sizes.decoder if lora else sizes.trained, parallel)
    row = dict(
        parameters=sum(p.numel() for p in model.parameters()) * parallel.mp_size,
        trained="LoRA of rank 16" if lora else "whole",
        recompute=recompute,
        compiled=compiled,
        rows=sizes.rows,
        length=sizes.length,
    )
    if lora:
        add_lora(model.requires_grad_(False), LoRAConfig(16), 0, parallel)
    model.recompute = recompute
    try:
        say(**row, **measured(model, parallel, sizes))
    except torch.OutOfMemoryError:
        say(**row, fits=False)
    del model  # before the next is made
    free_memory()


def measured(model, parallel: Parallel, sizes: Sizes) -> dict:
    """Of the median step, after one that warms up. Half of each sequence is prompt."""
    tokens = [1 + j % (sizes.trained.vocab_size - 1) for j in range(sizes.length)]
    rows = [Sequence(tokens, sizes.length // 2)] * (sizes.rows * parallel.dp_size)
    objective = SolverObjective(rows, parallel.device)
    batches = PackedBatchSettings(max_batch_size=sizes.rows)
    optimizer, meter = Optimizer(model, parallel), Meter(model, objective, parallel)
    if parallel.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps, numbers = [], list(range(len(rows)))
    for _ in range(sizes.rounds + 1):
        meter.start()
        train_step(model, optimizer, objective, numbers, batches, parallel, 1e-5)
        steps.append(meter.read(numbers))
    typical = {name: median([step[name] for step in steps[1:]]) for name in steps[-1]}
    return {
        "s": typical["seconds"],
        "tokens_per_s": typical["tokens_per_s"],
        "mfu_of_measured": typical["mfu"],
        "mfu_of_published": typical["flops_per_s"] / PUBLISHED / parallel.world_size,
        "memory_gb": typical["memory_gb"],
        "phases": {
            name.split("/")[1]: value
            for name, value in typical.items()
            if name.startswith("seconds/")
        },
    }
