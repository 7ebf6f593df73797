"""Saves a model in training in each layout and brings it back in every other.

What differs is written down.

    torchrun --nproc_per_node 4 tests/trainer/saving_worker.py FOLDER

FOLDER holds the models `lm` and `score`; FOLDER/saving.pt gets, for every pair of layouts, the
names of what was not the same bit for bit.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from src.checkpoint.steps import Steps, list_steps, open_step
from src.models.exchange import placement_of
from src.models.layout import tensor_table
from src.models.lora import LoRAConfig, lora_layers, lora_table
from src.models.places import within
from src.parallel.host import HostCopies
from src.parallel.setup import Parallel, start, stop
from src.parallel.sharding import fill
from src.trainer import averages
from src.trainer.averages import Method
from src.trainer.optimizer import Optimizer
from src.trainer.state import (
    SavedModel,
    bytes_of,
    counters_of,
    file_of,
    layout_facts,
    restore,
    specs_of,
    tensors_of,
)
from tests.trainer.tiny import ours

# name: (model-parallel ranks of the four, ZeRO's stage, stages of a pipeline)
LAYOUTS = {
    "DP 4": (1, 1, 1),
    "TP 2, DP 2": (2, 1, 1),
    "TP 4": (4, 1, 1),
    "ZeRO 3": (1, 3, 1),
    "TP 2, ZeRO 3": (2, 3, 1),
    "PP 2, TP 2": (2, 1, 2),
}
KINDS = {  # (dtype, adapted, method)
    "full fp32": (torch.float32, False, Method()),
    "full bf16": (torch.bfloat16, False, Method()),
    "LoRA": (torch.float32, True, Method()),
    "8 bits, updated on the CPU": (
        torch.bfloat16,
        False,
        Method("adamw8bit", offload=True, on_cpu=True),
    ),
    "Muon, state in host memory": (torch.bfloat16, False, Method("muon", offload=True)),
}
CODES = "8 bits, updated on the CPU"
# Layouts that kinds with less of their own are tried in.
FEW = ("DP 4", "TP 4", "TP 2, ZeRO 3", "PP 2, TP 2")


def pairs() -> Iterator[tuple[str, str, str]]:
    """(kind, layout, layout) of what is saved in the first and brought back in the second."""
    for kind in KINDS:
        layouts = tuple(LAYOUTS) if kind.startswith("full") else FEW
        layouts = layouts[2:] if kind.startswith("Muon") else layouts
        yield from ((kind, before, after) for before in layouts for after in layouts)


def made(folder: Path, parallel: Parallel, kind: str, seed: int, zero: int = 1) -> tuple:
    dtype, adapted, method = KINDS[kind]
    averages.SMALLEST = 1500  # numbers, of which these models have few more
    adapter = LoRAConfig(rank=3) if adapted else None
    model = ours(folder / "lm", parallel, dtype, seed=seed, lora=adapter, zero=zero)
    generator = torch.Generator().manual_seed(seed)
    optimizer = Optimizer(model, parallel, weight_decay=0.1, method=method)
    specs = specs_of(model)
    names = {p: name for name, p in model.named_parameters()}
    for _ in range(2):
        for parameter in optimizer.parameters:
            spec = specs[names[parameter]]
            whole = torch.randn(spec.shape, generator=generator)
            part = spec.cut(whole, parallel.mp_rank, parallel.mp_size)
            # Shared weights' gradients are summed as they come, others' in the step.
            ranks = 1 if model.shard_stage else parallel.dp_size
            parameter.grad = torch.empty_like(parameter, dtype=torch.float32)
            fill(parameter.grad, part / ranks)
        optimizer.step(1e-2)
    return model, optimizer


def copies(model, optimizer) -> dict[str, torch.Tensor]:
    return HostCopies(optimizer.parallel.device).of("model", tensors_of(model, optimizer))


def decoded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With what 8-bit averages stand for, by bitsandbytes' own function, in their place."""
    from bitsandbytes.functional import create_dynamic_map

    out = {}
    for key, x in tensors.items():
        kind, name = key.split("/", 1)
        scales = tensors.get(f"{kind}_absmax/{name}")
        if scales is not None:
            levels = create_dynamic_map(signed=kind == "exp_avg")[x.flatten().long()]
            x = (levels * scales.repeat_interleave(256)[: x.numel()]).view(x.shape)
        if not kind.endswith("_absmax"):
            out[key] = x
    return out


def whole_state(model, optimizer) -> dict[str, torch.Tensor]:
    """Weights, masters and averages of all ranks put together; padding cut off.

    Padding that is not zero becomes a state of its own, which no other has.
    """
    parallel, adapters = optimizer.parallel, lora_layers(model)
    table = tensor_table(model.config)
    table |= lora_table(model.config, adapters[0][1].config) if adapters else {}
    every, of_model = [None] * parallel.world_size, placement_of(model, parallel)
    dist.all_gather_object(every, copies(model, optimizer))
    state: dict[str, torch.Tensor] = {}
    for rank, tensors in enumerate(every):
        for key, part in decoded(tensors).items():
            name = key.split("/", 1)[1]
            spec = table[name.replace(".base.", ".")]
            layout = of_model.held_by([rank // parallel.mp_size % parallel.pp_size])
            whole = state.setdefault(key, torch.full(spec.shape, torch.nan, dtype=part.dtype))
            box = layout.box(spec, rank)
            whole[tuple(slice(*ends) for ends in box)] = part[within(box, box)]
            padded = part.clone()
            padded[within(box, box)] = 0
            if padded.any():
                state[f"padding of {key} on rank {rank}"] = padded
    return state


def alike(a: torch.Tensor, b: torch.Tensor, exact: bool) -> bool:
    """8-bit averages of other blocks are rounded once more: by a hundredth or so."""
    return torch.equal(a, b) if exact else bool((a - b).norm() <= 0.02 * a.norm())


def as_in_fp32(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the weights that masters were rounded to: ranks that share them keep none."""
    rounded = {key.replace("master/", "weight/") for key in state if key.startswith("master/")}
    return {key: x for key, x in state.items() if key not in rounded}


def main(folder: Path) -> None:
    wrong, kept = {}, {}
    for kind in KINDS:
        layouts = [name for of_kind, name, after in pairs() if of_kind == kind and name == after]
        for a in layouts:
            mp_size, zero, stages = LAYOUTS[a]
            parallel = start(mp_size, timeout=120, pipeline_parallel_size=stages)
            model, optimizer = made(folder, parallel, kind, 1, zero)
            want = whole_state(model, optimizer)
            tensors, counters = copies(model, optimizer), counters_of(optimizer)
            kept[kind, a] = sorted({key.split("/")[0] for key in tensors})
            place = folder / f"steps {kind} {a}"
            steps = Steps(place, 2, parallel)
            foretold = [None] * parallel.world_size
            dist.all_gather_object(
                foretold, bytes_of(model, optimizer) == sum(x.nbytes for x in tensors.values())
            )
            files = (
                {file_of("model", parallel.mp_rank, parallel.dp_rank, parallel.pp_rank): tensors}
                if tensors
                else {}
            )
            steps.save(7, files, {"layout": layout_facts(optimizer), "counters": counters})
            steps.wait()
            for b in layouts:
                other_mp_size, other_zero, other_stages = LAYOUTS[b]
                other = start(other_mp_size, timeout=120, pipeline_parallel_size=other_stages)
                model, optimizer = made(folder, other, kind, 2, other_zero)
                manifest = open_step(list_steps(place)[-1], other)
                restore(
                    model,
                    optimizer,
                    SavedModel(list_steps(place)[-1], "model", manifest["layout"]),
                    manifest["counters"],
                )
                got = whole_state(model, optimizer)
                wanted = want
                if zero != other_zero:
                    wanted, got = as_in_fp32(want), as_in_fp32(got)
                differ = sorted(wanted.keys() ^ got.keys()) + [
                    k
                    for k in wanted.keys() & got.keys()
                    if not alike(wanted[k], got[k], exact="exp_avg" not in k or kind != CODES)
                    or (a == b and not torch.equal(wanted[k], got[k]))
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
        torch.save({"wrong": wrong, "kept": kept}, folder / "saving.pt")
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
