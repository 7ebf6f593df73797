"""Saves a model in training at each degree and brings it back at every other.

What differs is written down.

    torchrun --nproc_per_node 4 tests/trainer/saving_worker.py FOLDER

FOLDER holds the models `lm` and `score`; FOLDER/saving.pt gets, for every pair of degrees, the
names of what was not the same bit for bit.
"""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from src.checkpoint.steps import Steps, list_steps, open_step
from src.models.lora import LoRAConfig, add_lora
from src.parallel.host import HostCopies
from src.parallel.setup import Parallel, start, stop
from src.trainer.optimizer import Optimizer
from src.trainer.state import (
    SavedModel,
    bytes_of,
    counters_of,
    file_of,
    restore,
    specs_of,
    tensors_of,
)
from tests.trainer.tiny import ours

DEGREES = (1, 2, 4)
KINDS = {
    "full fp32": (torch.float32, False),
    "full bf16": (torch.bfloat16, False),
    "LoRA": (torch.float32, True),
}


def made(folder: Path, parallel: Parallel, kind: str, seed: int) -> tuple:
    dtype, adapted = KINDS[kind]
    model = ours(folder / "lm", parallel, dtype)
    if adapted:
        add_lora(model, LoRAConfig(rank=3), seed, parallel)
    generator = torch.Generator().manual_seed(seed)
    optimizer = Optimizer(model, parallel, weight_decay=0.1)
    specs = specs_of(model)
    names = {p: name for name, p in model.named_parameters()}
    for _ in range(2):
        for parameter in optimizer.parameters:
            spec = specs[names[parameter]]
            whole = torch.randn(spec.shape, generator=generator)
            parameter.grad = (
                spec.cut(whole, parallel.mp_rank, parallel.mp_size).clone() / parallel.dp_size
            )
        optimizer.step(1e-2)
    return model, optimizer


def copies(model, optimizer) -> dict[str, torch.Tensor]:
    return HostCopies(optimizer.parallel.device).of("model", tensors_of(model, optimizer))


def whole_state(model, optimizer) -> dict[str, torch.Tensor]:
    """Weights, masters and averages of all ranks put together; padding cut off."""
    parallel, specs = optimizer.parallel, specs_of(model)
    every = [None] * parallel.world_size
    dist.all_gather_object(every, (parallel.mp_rank, copies(model, optimizer)))
    parts = [{} for _ in range(parallel.mp_size)]
    for rank, tensors in every:
        parts[rank] |= tensors
    return {
        key: specs[key.split("/", 1)[1]].join([part[key] for part in parts]) for key in parts[0]
    }


def main(folder: Path) -> None:
    wrong = {}
    for kind in KINDS:
        for a in DEGREES:
            parallel = start(a, timeout=120)
            model, optimizer = made(folder, parallel, kind, seed=1)
            want = whole_state(model, optimizer)
            place = folder / f"steps {kind} {a}"
            steps = Steps(place, 2, parallel)
            tensors, counters = copies(model, optimizer), counters_of(optimizer)
            foretold = [None] * parallel.world_size
            dist.all_gather_object(
                foretold, bytes_of(model, optimizer) == sum(x.nbytes for x in tensors.values())
            )
            files = (
                {file_of("model", parallel.mp_rank, parallel.dp_rank): tensors} if tensors else {}
            )
            steps.save(
                7, files, {"layout": {"mp": a, "dp": parallel.dp_size}, "counters": counters}
            )
            steps.wait()
            for b in DEGREES:
                other = start(b, timeout=120)
                model, optimizer = made(folder, other, kind, seed=2)
                manifest = open_step(list_steps(place)[-1], other)
                restore(
                    model,
                    optimizer,
                    SavedModel(list_steps(place)[-1], "model", manifest["layout"]),
                    manifest["counters"],
                )
                got = whole_state(model, optimizer)
                differ = sorted(want.keys() ^ got.keys()) + [
                    k for k in want.keys() & got.keys() if not torch.equal(want[k], got[k])
                ]
                wrong[kind, a, b] = (
                    differ
                    + ["counters"] * (counters_of(optimizer) != counters)
                    + ["size"] * (not all(foretold))
                )
            dist.barrier()
            if parallel.is_main:
                shutil.rmtree(place)
    if dist.get_rank() == 0:
        torch.save(
            {"wrong": wrong, "tensors": {key: tuple(x.shape) for key, x in want.items()}},
            folder / "saving.pt",
        )
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
