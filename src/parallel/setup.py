"""Processes, devices and groups: what torchrun started, and how it is divided.

Ranks are laid out as [data parallel, context parallel, pipeline, model parallel]: neighbours share
a stage's tensors, stages a model, and models the tokens of the same rows. The groups are made here,
with a timeout each, and handed to FairScale, whose own initialiser clamps a wrong degree in
silence, prints, and makes groups that wait for half an hour.
"""

import ctypes
import functools
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

# Imported before there is a group, which would become the default of its functions and never end.
import torch.distributed.nn.functional
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as fairscale_groups

from src.errors import UserError
from src.parallel import flight_recorder
from src.parallel.context import ALONE, ContextGroup
from src.parallel.deterministic import turn_off, turn_on
from src.parallel.layout import Layout
from src.parallel.roll_call import GRACE, RollCall, roll_call
from src.parallel.shared_memory import forget, share_memory
from src.parallel.threads import settle_number, watch

T = TypeVar("T")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Parallel:
    """Where this process stands in a layout.

    mp_*: among the ranks that share tensors; pp_*: among the stages of a model; model_*: among all
    ranks of a model, which without a pipeline are those of mp_*; dp_*: among the models. In
    training neighbours among the models may divide the tokens of the same rows (`context`);
    data_*: among those that have rows of their own. A rank of the run that the layout leaves out
    (not `is_member`) is alone in groups of its own, so that what its division does together costs
    it nothing, and holds no part of a model.
    """

    rank: int
    world_size: int
    layout: Layout
    is_member: bool
    mp_rank: int
    mp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    mp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    timeout: timedelta
    pp_rank: int = 0
    pp_size: int = 1
    pp_group: dist.ProcessGroup | None = None  # where there is a pipeline
    ends_group: dist.ProcessGroup | None = None  # of a rank of the first or the last stage: both
    context: ContextGroup = ALONE
    _data_group: dist.ProcessGroup | None = None  # where that is not dp_group
    _replicas: dict[int, dist.ProcessGroup] = field(default_factory=dict)

    @property
    def world(self) -> dist.ProcessGroup:
        """All ranks of the run."""
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def model_size(self) -> int:
        return self.mp_size * self.pp_size

    @property
    def model_rank(self) -> int:
        return self.pp_rank * self.mp_size + self.mp_rank

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that speaks for its model, all of whose ranks have the same."""
        return self.is_member and self.model_rank == 0

    @property
    def data_size(self) -> int:
        """Among how many the rows of a training step are divided."""
        return self.dp_size // self.context.size

    @property
    def data_rank(self) -> int:
        return self.dp_rank // self.context.size

    @property
    def data_group(self) -> dist.ProcessGroup:
        return self.dp_group if self._data_group is None else self._data_group

    @property
    def described(self) -> str:
        """In words, for the log."""
        return self.layout.described

    def divided(self, mp_size: int) -> "Parallel":
        """The same ranks as more, smaller models: neighbours share one.

        All ranks must ask together; `active` switches to it.
        """
        if mp_size < 1 or self.mp_size % mp_size:
            raise UserError(
                f"{mp_size} ranks per model do not divide the {self.mp_size} of "
                "--model_parallel_size"
            )
        return self.regrouped(mp_size)

    def regrouped(self, mp_size: int) -> "Parallel":
        """All ranks of the run as other models, also larger ones: see `laid_out`."""
        return self.laid_out(Layout(self.world_size // mp_size, tp=mp_size))

    def laid_out(self, layout: Layout) -> "Parallel":
        """Where this process stands in another layout: made once, by all ranks together."""
        return _divide(self.rank, self.world_size, layout, self.device, self.timeout)

    def known_to_all(self, value: T) -> T:
        """What the division's first rank has, on all ranks of the run; its own where all are in it.

        For what a division's ranks have alike. All ranks come here.
        """
        if self.layout.size == self.world_size:
            return value
        outcome = [value]
        dist.broadcast_object_list(outcome, src=self.layout.first)
        return outcome[0]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the layers' collectives go over this division for a while."""
        before = fairscale_groups._MODEL_PARALLEL_GROUP, fairscale_groups._DATA_PARALLEL_GROUP
        _hand_over(self.mp_group, self.dp_group)
        try:
            yield
        finally:
            _hand_over(*before)

    def replicas(self, size: int) -> dist.ProcessGroup | None:
        """This rank's group when each `size` neighbours in a model hold the same; None for 1.

        All ranks of the run must ask for the same sizes in the same order, since they make the
        groups together; one that is not a member asks for what it is no part of.
        """
        if size > 1 and size not in self._replicas:
            models = torch.tensor(self.layout.ranks).split(self.layout.tp)
            neighbours = [ranks.tolist() for model in models for ranks in model.split(size)]
            self._replicas[size] = _own_group(neighbours, self.rank, self.timeout)
        return self._replicas.get(size)


def start(
    model_parallel_size: int | None = None,
    timeout: float = 1800,
    deterministic: bool = False,
    pipeline_parallel_size: int = 1,
    context_parallel_size: int = 1,
    layout: str | None = None,
) -> Parallel:
    """Join the process group (one process needs no launcher) and divide it.

    model_parallel_size: ranks that share a tensor, all of a stage's by default; timeout: seconds a
    collective may take; deterministic: see `deterministic.py`; pipeline_parallel_size: stages that
    a model's layers are divided into; context_parallel_size: models that divide the tokens of their
    rows; layout: all of these as one text instead (--actor_train), see `Layout.parsed`. Raises
    UserError when the degrees do not divide the number of ranks.
    """
    if deterministic:
        turn_on("cuda" if torch.cuda.is_available() else "cpu")
    device = pick_device()
    limit = timedelta(seconds=timeout) + (GRACE if device.type == "cuda" else timedelta())
    if device.type == "cuda":
        # cuDNN's attention makes a plan for each shape that it has not seen, and decoding never
        # stops bringing new ones (docs/performance.md).
        torch.backends.cuda.enable_cudnn_sdp(False)
        flight_recorder.turn_on()
    if not dist.is_initialized():
        # With its device a rank need not guess it from its number, which differs across nodes.
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=limit, device_id=bound)
        else:
            store = dist.HashStore()
            dist.init_process_group(
                backend, store=store, rank=0, world_size=1, timeout=limit, device_id=bound
            )
    rank, world = dist.get_rank(), dist.get_world_size()
    pp, cp = pipeline_parallel_size, context_parallel_size
    if layout is None:
        mp = tensor_degree(world, model_parallel_size, pp, cp)
        division = Layout(world // (mp * pp * cp), pp, mp, cp=cp)
    else:
        division = Layout.parsed(layout, world, "--actor_train")
    warn_of_tensors_across_nodes(division.tp, rank, world)
    if device.type == "cpu":
        settle_number()
        settle_vector_math()
        watch.start()
    parallel = _divide(rank, world, division, device, limit)
    _hand_over(parallel.mp_group, parallel.dp_group)
    if device.type == "cuda" and world > 1:
        watch_collectives(parallel, timeout)
    return parallel


def tensor_degree(world: int, mp: int | None, pp: int, cp: int) -> int:
    """How many ranks share a tensor: as asked for, or as many as there are for it.

    Raises UserError when the degrees do not divide the number of ranks.
    """
    degrees = {"model": 1 if mp is None else mp, "pipeline": pp, "context": cp}
    asked = [f"--{name}_parallel_size {n}" for name, n in degrees.items() if n != 1]
    product = math.prod(degrees.values())
    if product < 1 or world % product:
        do, instead = (
            ("do", "lower degrees") if len(asked) > 1 else ("does", f"a divisor of {world}")
        )
        raise UserError(
            f"{' x '.join(asked)} {do} not divide the {world} rank{'s' * (world > 1)} of this run: "
            f"start a multiple of {product} ranks (torchrun --nproc_per_node N) or give {instead}"
        )
    return world // (pp * cp) if mp is None else mp


def warn_of_tensors_across_nodes(mp: int, rank: int, world: int) -> None:
    """Rank 0 warns when ranks that share tensors lie on several nodes.

    A launcher numbers its ranks one after the other, so many of them as LOCAL_WORLD_SIZE says.
    """
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if rank == 0 and per_node < world and per_node % mp:
        logging.getLogger(__name__).warning(
            "--model_parallel_size %d: ranks that share tensors lie on several nodes of %d rank%s "
            "each, and wait for the network twice in every layer; a divisor of %d keeps them "
            "inside a node, and --pipeline_parallel_size divides a model across nodes "
            "(docs/clusters.md)",
            mp,
            per_node,
            "s" * (per_node > 1),
            per_node,
        )


def watch_collectives(parallel: Parallel, timeout: float) -> None:
    """Let a rank that does not come to a collective be named after so many seconds."""
    assert dist.group.WORLD is not None
    groups = [dist.group.WORLD, parallel.mp_group, parallel.dp_group]
    if parallel.context.group is not None:
        groups.append(parallel.context.group)
    if parallel.pp_group is not None:
        groups += [parallel.pp_group, parallel.model_group]
    with_ranks = [(group, dist.get_process_group_ranks(group)) for group in groups]
    roll_call.stop()
    roll_call.start(RollCall(with_ranks, parallel.rank, parallel.world_size, timeout))


def _divide(
    rank: int, world: int, layout: Layout, device: torch.device, limit: timedelta
) -> Parallel:
    """See `_divided`: what is no matter of groups makes no further ones."""
    of_groups = replace(layout, sp=False, zero=1, vp=1)
    return replace(_divided(rank, world, of_groups, device, limit), layout=layout)


@functools.cache  # a group is threads that never rest: each division has its own once
def _divided(
    rank: int, world: int, layout: Layout, device: torch.device, limit: timedelta
) -> Parallel:
    pp, mp, cp, is_member = layout.pp, layout.tp, layout.cp, rank in layout.ranks
    outsiders = [[other] for other in range(world) if other not in layout.ranks]

    def group_of(divisions: torch.Tensor) -> Any:
        """The rank's own: a row of these, or itself alone."""
        return _own_group(divisions.tolist() + outsiders, rank, limit)

    grid = torch.tensor(layout.ranks).view(-1, pp, mp)  # [models, stages, model parallel]
    mp_group, dp_group = group_of(grid.flatten(0, 1)), group_of(grid.flatten(1).T)
    groups, model_group = [mp_group, dp_group], mp_group
    pipeline: dict = {}
    number = rank - layout.first  # among the layout's ranks
    if pp > 1:
        stages = grid.transpose(1, 2).flatten(0, 1)  # [models · mp, stages]
        pp_group, ends_group = group_of(stages), group_of(stages[:, [0, -1]])
        pipeline = {
            "pp_rank": number // mp % pp,
            "pp_size": pp,
            "pp_group": pp_group,
            "ends_group": ends_group,
        }
        model_group = group_of(grid.flatten(1))
        groups += [pp_group, model_group]
    context: dict = {}
    if cp > 1:
        rows = grid.view(-1, cp, pp * mp)  # [data parallel, context parallel, a model's ranks]
        cp_group = group_of(rows.transpose(1, 2).flatten(0, 1))
        context = {
            "context": ContextGroup(cp_group, number // (mp * pp) % cp, cp),
            "_data_group": group_of(rows.flatten(1).T),
        }
        groups += [cp_group, context["_data_group"]]
    for group in groups:
        share_memory(group, device, limit.total_seconds())
    if roll_call.call is not None:  # another division than the run began with
        roll_call.call.add([(group, dist.get_process_group_ranks(group)) for group in groups])
    mp_rank, dp_rank, models = number % mp, number // (mp * pp), layout.models
    if not is_member:
        mp_rank, mp, dp_rank, models, pipeline, context = 0, 1, 0, 1, {}, {}
    return Parallel(
        rank,
        world,
        layout,
        is_member,
        mp_rank,
        mp,
        dp_rank,
        models,
        device,
        mp_group,
        dp_group,
        model_group,
        limit,
        **pipeline,
        **context,
    )


def _hand_over(mp_group: dist.ProcessGroup, dp_group: dist.ProcessGroup) -> None:
    """Give FairScale's layers the groups that they talk over."""
    fairscale_groups._MODEL_PARALLEL_GROUP = mp_group
    fairscale_groups._DATA_PARALLEL_GROUP = dp_group


def _own_group(divisions: list[list[int]], rank: int, limit: timedelta) -> Any:
    """The group, one of `divisions`, that this rank is in; None if in none.

    Every rank must make every group.
    """
    groups = [dist.new_group(ranks, timeout=limit) for ranks in divisions]
    return next((group for ranks, group in zip(divisions, groups) if rank in ranks), None)


def stop() -> None:
    """Leave the process group, after all ranks have come here."""
    if dist.is_initialized():
        dist.barrier()
        leave()


def leave() -> None:
    """Let go of the process group, whatever other ranks do; gloo's threads end with it."""
    watch.stop()
    roll_call.stop()
    turn_off()
    _divided.cache_clear()
    if dist.is_initialized():
        forget()
        fairscale_groups.destroy_model_parallel()
        dist.destroy_process_group()


def pick_device() -> torch.device:
    """The local rank's GPU where there are any, else the CPU.

    Raises UserError when this rank has none of its own.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
        raise UserError(
            f"{os.environ['LOCAL_WORLD_SIZE']} ranks were started on a machine with {gpus} "
            f"GPU{'s' * (gpus > 1)}: start --nproc_per_node {gpus}, or run on the CPU with "
            "CUDA_VISIBLE_DEVICES= in front"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """bf16, fp16 or fp32 by name; by default bf16 on a GPU and fp32 on the CPU.

    Rank 0 warns of one in which this processor has no products.
    """
    name = name or ("bf16" if device.type == "cuda" else "fp32")
    if device.type == "cpu" and not has_products_in(DTYPES[name]) and not dist.get_rank():
        logging.getLogger(__name__).warning(
            "--dtype %s: this processor has no products in it, and PyTorch's own are up to fifty "
            "times slower than fp32's: --dtype fp32 is quicker here",
            name,
        )
    return DTYPES[name]


def has_products_in(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies numbers of the dtype at a speed to speak of.

    For bf16 that takes AVX-512 or better on x86, which many a laptop lacks. A build without the
    library that would know says yes.
    """
    if dtype == torch.float32 or not torch.backends.mkldnn.is_available():
        return True
    operators = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return operators._is_mkldnn_bf16_supported()
    return operators._is_mkldnn_fp16_supported()


def reuse_memory() -> None:
    """Let freed tensors' memory stay with the process (glibc).

    A training step asks for the same again, and new pages cost as much as what is computed in them.
    Does nothing elsewhere, and for GPUs, whose memory PyTorch keeps anyway.
    """
    if platform.system() != "Linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
        library.mallopt(option, value)


def settle_vector_math() -> None:
    """Let one thread make the process's first call of the vector math library (MKL's).

    It picks its kernels in the first call. When several threads make that at once, one in fifty or
    so gets others, and its exponentials differ by 1e-4 of themselves from the same call a moment
    later.
    """
    torch.exp(torch.ones(1))


LONG_PRODUCT = 0.1  # seconds; the next one takes some eight times as long


@functools.cache
def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of a few square matrix products: what a model's could reach at most.

    On the CPU they grow as long as they are quick: in bf16 some processors take minutes for one.
    """
    sizes = [8192] * 4 if device.type == "cuda" else [128, 256, 512, 1024, 2048, 2048]
    # A GPU multiplies constants faster than numbers.
    generator = torch.Generator(device).manual_seed(0)
    best = 0.0
    for n in sizes:  # the first warms up
        x = torch.randn(n, n, device=device, generator=generator).to(dtype)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        F.linear(x, x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        best = max(best, 2 * n**3 / took)
        if device.type == "cpu" and took > LONG_PRODUCT:
            break
    return best


def agreed(check: Callable[[], T]) -> T:
    """Run `check` on every rank; if any raises UserError, all raise the first rank's.

    So none is left waiting.
    """
    result, problem = None, None
    try:
        result = check()
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    first = next((p for p in problems if p is not None), None)
    if first is not None:
        raise UserError(first)
    return cast(T, result)  # which may be None, if that is what `check` returned
