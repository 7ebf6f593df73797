"""A model in training and its optimizer as named tensors, and back at any degree, exactly."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from src.checkpoint.steps import file_of
from src.errors import UserError
from src.models.exchange import placement_of, specs_of
from src.models.layout import TensorSpec
from src.models.places import Box, Placement, pieces_of, within
from src.models.transformer import Transformer
from src.parallel.sharding import let_go, own
from src.trainer.averages import ABSMAX, MEAN, SQUARE, STEP, dequantized, write
from src.trainer.optimizer import Optimizer, has_master

WEIGHT, MASTER = "weight", "master"


def tensors_of(model: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    """This rank's share.

    Trained weights (from the first data-parallel rank, unless all share them), and the optimizer's
    state of the parameters that it keeps it for.
    """
    out: dict[str, Tensor] = {}
    parallel, shared = optimizer.parallel, optimizer.shares_weights
    trained = [(name, own(p)) for name, p in model.named_parameters() if p.requires_grad]
    names = {weight: name for name, weight in trained}
    if parallel.dp_rank == 0 or shared:
        # What is shared of a model in half precision are its masters.
        kind = MASTER if shared and model.dtype != torch.float32 else WEIGHT
        out |= {f"{kind}/{name}": weight for name, weight in trained}
    first = parallel.dp_rank == 0 or optimizer.sharded
    for parameter, kept in optimizer.kept():
        name, state = names[parameter], optimizer.local.state.get(kept, {})
        if not first:
            continue  # without ZeRO all data-parallel ranks hold the same
        if has_master(parameter, kept):
            out[f"{MASTER}/{name}"] = kept
        out |= {f"{kind}/{name}": x for kind, x in state.items() if kind != STEP}
    return out


def bytes_of(model: Transformer, optimizer: Optimizer) -> int:
    """What `tensors_of` takes on this rank, once the optimizer has averages."""
    first = optimizer.parallel.dp_rank == 0
    weights = 0
    if first or optimizer.shares_weights:
        weights = sum(own(p).nbytes for p in model.parameters() if p.requires_grad)
    if not (first or optimizer.sharded):
        return weights
    return weights + optimizer.state_bytes()


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
    """One model's files in a saved step; gives any rank's part of any tensor in any placement."""

    def __init__(
        self,
        folder: Path,
        name: str,
        saved: dict[str, int],
        keys: dict[str, list[str]] | None = None,
        fetched: Path | None = None,
    ) -> None:
        """saved: how the run that saved it had the model, as `layout_facts` says.

        keys: the tensors in each of the step's files, where not all of these are in the folder;
        fetched: another folder, where those that are not may be, and which counts first.
        """
        self.folders = [folder] if fetched is None else [fetched, folder]
        self.folder, self.opened = folder, dict[str, Any]()
        tp, dp, pp = saved["mp"], saved["dp"], saved.get("pp", 1)
        self.placement = Placement(tp, dp, bool(saved.get("shared")), pp)
        # Of each rank: key → file. Where weights are not shared, whichever data-parallel rank has
        # the key.
        self.places: list[dict[str, str]] = [{} for _ in range(tp * pp * dp)]
        for rank in range(len(self.places)):
            dp_rank, of_model = divmod(rank, pp * tp)
            file = file_of(name, of_model % tp, dp_rank, of_model // tp)
            held = [] if keys is None else keys.get(file, [])
            if keys is None and (folder / file).is_file():
                held = list(self._open(file).keys())
            first = rank if self.placement.sharded else of_model
            self.places[first] |= dict.fromkeys(held, file)

    def __contains__(self, key: str) -> bool:
        return any(key in places for places in self.places)

    def _open(self, file: str) -> Any:
        if file not in self.opened:
            paths = [folder / file for folder in self.folders]
            path = next((path for path in paths if path.is_file()), paths[-1])
            self.opened[file] = safe_open(path, framework="pt")
        return self.opened[file]

    def _near(self, key: str, placement: Placement, rank: int) -> tuple[Placement, int]:
        """How a tensor was saved, and the rank there whose part is the likeliest."""
        if key not in self:
            raise UserError(
                f"{self.folder}: has no {key}; it was saved by a run of another model or other "
                "trained layers"
            )
        tp = self.placement.tp
        stage = next(i for i, places in enumerate(self.places) if key in places) // tp
        source = self.placement.held_by([stage % self.placement.pp])
        of_tp = (rank - placement.first) % tp if placement.tp == tp else 0
        return source, stage % self.placement.pp * tp + of_tp

    def _pieces(
        self, key: str, spec: TensorSpec, placement: Placement, rank: int
    ) -> Iterator[tuple[int, Box, Box]]:
        """(the rank that saved it, that one's box, what is wanted of it), of all pieces of a part.

        Of a part of padding alone, or without rows, there are none.
        """
        source, near = self._near(key, placement, rank)
        own_box = None if source.sharded else source.box(spec, near)
        box, owners = placement.box(spec, rank), source.owners(spec, near)
        for owner, owned, overlap in pieces_of(box, owners, own_box):
            yield near if owner is None else owner, owned, overlap

    def _any_holder(self, key: str) -> int:
        return next(rank for rank, places in enumerate(self.places) if key in places)

    def files_of(self, key: str, spec: TensorSpec, placement: Placement, rank: int) -> set[str]:
        """The files that `local` reads a part from."""
        ranks = [piece[0] for piece in self._pieces(key, spec, placement, rank)]
        return {self.places[owner][key] for owner in ranks or [self._any_holder(key)]}

    def local(self, key: str, spec: TensorSpec, placement: Placement, rank: int) -> Tensor:
        """A rank's part, in its placement, of a tensor that is cut by `spec`."""
        source, _ = self._near(key, placement, rank)
        box, part = placement.box(spec, rank), None
        for rank_of_piece, owned, overlap in self._pieces(key, spec, placement, rank):
            saved_part, saved_shape = self._source(key, rank_of_piece)
            shape = source.local_shape(spec, rank_of_piece)
            if tuple(saved_shape) != shape:
                raise UserError(
                    f"{self.folder}: {key} has shape {list(saved_shape)} on rank {rank_of_piece}, "
                    f"and the model's {list(shape)}: it was saved by a run of another model"
                )
            piece = saved_part[within(overlap, owned)]
            if part is None:
                shape = placement.local_shape(spec, rank)
                if piece.shape == shape:
                    return piece
                part = piece.new_zeros(shape)
            part[within(overlap, box)] = piece
        if part is None:  # padding alone, or no rows
            saved_part, _ = self._source(key, self._any_holder(key))
            part = saved_part[:0].new_zeros(placement.local_shape(spec, rank))
        return part

    def _source(self, key: str, rank: int) -> tuple[Any, Sequence[int]]:
        """(what a rank has of it, to be sliced, its shape); of 8-bit codes what they stand for.

        Codes are read whole: their scales are of numbers in a row, wherever rows end.
        """
        file, (kind, _, name) = self._open(self.places[rank][key]), key.partition("/")
        scales = f"{kind}{ABSMAX}/{name}"
        if scales not in self.places[rank]:
            part = file.get_slice(key)
            return part, part.get_shape()
        codes, absmax = file.get_tensor(key), file.get_tensor(scales)
        whole = dequantized(codes, absmax, kind)
        return whole, whole.shape

    def codes(
        self, kind: str, name: str, spec: TensorSpec, placement: Placement, rank: int
    ) -> tuple[Tensor, Tensor] | None:
        """An average's codes and scales as they are, where some rank had the very same part."""
        key, scales = f"{kind}/{name}", f"{kind}{ABSMAX}/{name}"
        place = self.place_of_codes(kind, name, spec, placement, rank)
        if place is None:
            return None
        file = self._open(place)
        return file.get_tensor(key), file.get_tensor(scales)

    def place_of_codes(
        self, kind: str, name: str, spec: TensorSpec, placement: Placement, rank: int
    ) -> str | None:
        """The file that `codes` reads."""
        key, scales = f"{kind}/{name}", f"{kind}{ABSMAX}/{name}"
        wanted = placement.box(spec, rank), placement.local_shape(spec, rank)
        for other, places in enumerate(self.places):
            source = self.placement.held_by([other // self.placement.tp % self.placement.pp])
            has = source.box(spec, other), source.local_shape(spec, other)
            if scales in places and has == wanted:
                return places[key]
        return None

    def first_of(self, name: str, kinds: Sequence[str]) -> str:
        """The key of the first of the kinds that there is of a tensor; of the first where none."""
        return next((f"{k}/{name}" for k in kinds if f"{k}/{name}" in self), f"{kinds[0]}/{name}")


def layout_facts(optimizer: Optimizer) -> dict[str, int]:
    """How a model's files in a saved step are cut."""
    layout = optimizer.parallel.layout
    more = {"shared": 1} if optimizer.shares_weights else {}
    more |= {"pp": layout.pp} if layout.pp > 1 else {}
    return {"mp": layout.tp, "dp": layout.models, **more}


def kinds_of(weight: Tensor) -> tuple[str, str]:
    """What a weight is read from: in fp32 it is its own master, whatever it was before."""
    return (MASTER, WEIGHT) if weight.dtype == torch.float32 else (WEIGHT, MASTER)


def files_read(
    model: Transformer, optimizer: Optimizer, saved: SavedModel, counters: dict
) -> set[str]:
    """The files of a step that `restore` reads on this rank."""
    parallel, specs = optimizer.parallel, specs_of(model)
    place = placement_of(model, parallel).held_by([parallel.pp_rank]), parallel.rank
    weights = {name: own(p) for name, p in model.named_parameters()}
    names = {weight: name for name, weight in weights.items()}
    forms = dict(optimizer.local.forms())
    keys = [(name, saved.first_of(name, kinds_of(weights[name]))) for name in specs]
    files: set[str] = set()
    for parameter, kept in optimizer.kept():
        name = names[parameter]
        if kept is not parameter:
            keys.append((name, saved.first_of(name, (MASTER, WEIGHT))))
        for kind in forms[kept] if counters["adam_step"] else ():
            if kind.endswith(ABSMAX):
                continue  # beside its codes
            as_saved = None
            if kind + ABSMAX in forms[kept]:
                as_saved = saved.place_of_codes(kind, name, specs[name], *place)
            if as_saved is None:
                keys.append((name, f"{kind}/{name}"))
            else:
                files.add(as_saved)
    return files.union(*(saved.files_of(key, specs[name], *place) for name, key in keys))


@torch.no_grad()
def restore(model: Transformer, optimizer: Optimizer, saved: SavedModel, counters: dict) -> None:
    """Put weights and the optimizer's state back, also in another dtype.

    Raises UserError when the step is of another model.
    """
    parallel, specs = optimizer.parallel, specs_of(model)
    placement, rank = placement_of(model, parallel), parallel.rank
    placement = placement.held_by([parallel.pp_rank])  # of what is this rank's own
    weights = {name: own(p) for name, p in model.named_parameters()}

    def fill(tensor: Tensor, name: str, *kinds: str) -> None:
        """Copy the first of the kinds that there is: what was read is the file's memory."""
        tensor.copy_(saved.local(saved.first_of(name, kinds), specs[name], placement, rank))

    for name in specs:
        fill(weights[name], name, *kinds_of(weights[name]))
    if optimizer.shares_weights:
        let_go(model)
    names = {weight: name for name, weight in weights.items()}
    forms = dict(optimizer.local.forms())
    for parameter, kept in optimizer.kept():
        name = names[parameter]
        if kept is not parameter:
            fill(kept, name, MASTER, WEIGHT)  # a run in fp32 has no masters: its weights are them
        if not counters["adam_step"]:
            continue
        state = optimizer.local.state[kept] = optimizer.local.begin(kept, forms[kept])
        state[STEP].fill_(counters["adam_step"])
        if MEAN + ABSMAX in state:
            spec = specs[name]
            as_saved = {k: saved.codes(k, name, spec, placement, rank) for k in (MEAN, SQUARE)}
            for kind, found in as_saved.items():
                if found is not None:
                    state[kind].copy_(found[0])
                    state[kind + ABSMAX].copy_(found[1])
            if None in as_saved.values():  # the cut is another: blocks are other numbers
                averages = [torch.empty_like(kept, dtype=torch.float32) for _ in as_saved]
                for average, kind in zip(averages, as_saved):
                    fill(average, name, kind)
                write(state, *averages)
            continue
        for kind in forms[kept]:
            fill(state[kind], name, kind)
    if counters.get("fp16", optimizer.fp16) == optimizer.fp16:  # else the scale is of another dtype
        optimizer.loss_scale, optimizer.good_steps = counters["loss_scale"], counters["good_steps"]
    optimizer.skipped_in_a_row = counters["skipped_in_a_row"]
