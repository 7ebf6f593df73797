"""A model in training and its optimizer as named tensors, and back at any degree, exactly."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from src.checkpoint.steps import file_of
from src.errors import UserError
from src.models.layout import TensorSpec, tensor_table
from src.models.lora import lora_layers, lora_table
from src.models.transformer import Transformer
from src.trainer.optimizer import Optimizer

WEIGHT, MASTER, MEAN, SQUARE = "weight", "master", "exp_avg", "exp_avg_sq"


def specs_of(model: Transformer) -> dict[str, TensorSpec]:
    """How each trained parameter is cut, by its name in the model."""
    layers = lora_layers(model)
    table = {
        **tensor_table(model.config),
        **(lora_table(model.config, layers[0][1].config) if layers else {}),
    }
    return {
        name: table[name.replace(".base.", ".")]
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def tensors_of(model: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    """This rank's share.

    Trained weights (from the first data-parallel rank), and the optimizer's state of the parameters
    that it keeps it for.
    """
    out: dict[str, Tensor] = {}
    parallel = optimizer.parallel
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    if parallel.dp_rank == 0:
        out |= {f"{WEIGHT}/{name}": p for p, name in names.items()}
    first = parallel.dp_rank == 0 or optimizer.sharded
    for parameter, kept in optimizer.kept():
        name, state = names[parameter], optimizer.local.state.get(kept, {})
        if not first:
            continue  # without ZeRO all data-parallel ranks hold the same
        if kept is not parameter:
            out[f"{MASTER}/{name}"] = kept
        out |= {f"{kind}/{name}": state[kind] for kind in (MEAN, SQUARE) if kind in state}
    return out


def bytes_of(model: Transformer, optimizer: Optimizer) -> int:
    """What `tensors_of` takes on this rank, once the optimizer has averages."""
    first = optimizer.parallel.dp_rank == 0
    weights = sum(p.nbytes for p in model.parameters() if p.requires_grad) if first else 0
    if not (first or optimizer.sharded):
        return weights
    fp32 = 4  # bytes of a number in the averages
    return weights + sum(
        2 * fp32 * kept.numel() + (kept is not p) * kept.nbytes for p, kept in optimizer.kept()
    )


def counters_of(optimizer: Optimizer) -> dict:
    """What belongs to the optimizer beside tensors."""
    steps = [int(state["step"]) for state in optimizer.local.state.values() if "step" in state]
    return {
        "adam_step": max(steps, default=0),
        "fp16": int(optimizer.fp16),
        "loss_scale": optimizer.loss_scale,
        "good_steps": optimizer.good_steps,
        "skipped_in_a_row": optimizer.skipped_in_a_row,
    }


class SavedModel:
    """One model's files in a saved step; gives any rank's part of any tensor at any degree."""

    def __init__(self, folder: Path, name: str, layout: dict[str, int]) -> None:
        """layout: {"mp": …, "dp": …} of the run that saved it."""
        self.folder, self.mp_size = folder, layout["mp"]
        # Of each model-parallel rank: key → file.
        self.places: list[dict[str, Any]] = [{} for _ in range(self.mp_size)]
        for mp_rank in range(self.mp_size):
            for dp_rank in range(layout["dp"]):
                path = folder / file_of(name, mp_rank, dp_rank)
                if path.is_file():
                    file = safe_open(path, framework="pt")
                    self.places[mp_rank] |= dict.fromkeys(file.keys(), file)

    def __contains__(self, key: str) -> bool:
        return key in self.places[0]

    def local(self, key: str, spec: TensorSpec, rank: int, n: int) -> Tensor:
        """Rank `rank` of `n`'s part of a tensor that is cut by `spec`."""
        if key not in self:
            raise UserError(
                f"{self.folder}: has no {key}; it was saved by a run of another model or other "
                "trained layers"
            )
        if spec.dim is None:
            return self.places[0][key].get_tensor(key)
        if n == self.mp_size:
            return self.places[rank][key].get_tensor(key)
        start, stop = spec.local_range(rank, n)
        pieces = []
        for owner, first, last in spec.owners(self.mp_size):
            low, high = max(start, first), min(stop, last)
            if low < high:
                cut = tuple(
                    slice(low - first, high - first) if d == spec.dim else slice(None)
                    for d in range(spec.dim + 1)
                )
                pieces.append(self.places[owner][key].get_slice(key)[cut])
        if not pieces:
            whole = self.places[0][key].get_slice(key)
            empty = tuple(
                slice(0, 0) if d == spec.dim else slice(None) for d in range(spec.dim + 1)
            )
            pieces = [whole[empty]]
        return spec.padded(torch.cat(pieces, spec.dim), n)


@torch.no_grad()
def restore(model: Transformer, optimizer: Optimizer, saved: SavedModel, counters: dict) -> None:
    """Put weights and the optimizer's state back, also in another dtype.

    Raises UserError when the step is of another model.
    """
    parallel, specs = optimizer.parallel, specs_of(model)
    parameters = dict(model.named_parameters())

    def fill(tensor: Tensor, name: str, *kinds: str) -> None:
        """Copy the first of the kinds that there is: what was read is the file's memory."""
        key = next((f"{k}/{name}" for k in kinds if f"{k}/{name}" in saved), f"{kinds[0]}/{name}")
        part = saved.local(key, specs[name], parallel.mp_rank, parallel.mp_size)
        if part.shape != tensor.shape:
            raise UserError(
                f"{saved.folder}: {key} has shape {list(part.shape)} on this rank, and the model's "
                f"{list(tensor.shape)}: it was saved by a run of another model"
            )
        tensor.copy_(part)

    for name in specs:
        weight = parameters[name]
        # In fp32 a weight is its own master, whatever it was before.
        fill(weight, name, *((MASTER, WEIGHT) if weight.dtype == torch.float32 else (WEIGHT,)))
    names: dict[Tensor, str] = {p: name for name, p in parameters.items()}
    for parameter, kept in optimizer.kept():
        name = names[parameter]
        if kept is not parameter:
            fill(kept, name, MASTER, WEIGHT)  # a run in fp32 has no masters: its weights are them
        if counters["adam_step"]:
            averages = {
                kind: torch.empty_like(kept, dtype=torch.float32) for kind in (MEAN, SQUARE)
            }
            for kind, average in averages.items():
                fill(average, name, kind)
            step = torch.tensor(
                float(counters["adam_step"]), dtype=torch.float32, device=kept.device
            )
            optimizer.local.state[kept] = {"step": step, **averages}
    if counters.get("fp16", optimizer.fp16) == optimizer.fp16:  # else the scale is of another dtype
        optimizer.loss_scale, optimizer.good_steps = counters["loss_scale"], counters["good_steps"]
    optimizer.skipped_in_a_row = counters["skipped_in_a_row"]
