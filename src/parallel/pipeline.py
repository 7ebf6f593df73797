"""A model's stages at work on the micro-batches of a step, by `torch.distributed.pipelining`.

Its schedules say what each rank computes, and when: one forward, one backward (1F1B, arXiv
2006.09503), or interleaved where a rank has several stages (arXiv 2104.04473). Shapes are known to
all ranks beforehand, micro-batch by micro-batch: nothing is padded, and no rank asks another.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.pipelining.schedules import FULL_BACKWARD, RECV_B, RECV_F

SENDS_UNDER_WAY = 4
# (one of the rank's stages, what it received, the micro-batch's number) → what goes to the next
# stage, or, of the last one, the loss
Compute = Callable[[int, tuple[Tensor, ...], int], tuple[Tensor, ...] | Tensor]


@dataclass(frozen=True)
class Boundary:
    """A tensor that goes from stage to stage: rows of each micro-batch, the rest of its shape."""

    rows: list[int]
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Stage(PipelineStage):
    """PyTorch's stage, with as few receive buffers as it needs, of each micro-batch's own rows."""

    boundaries: list[Boundary] = []
    buffers: dict[str, int] = {}  # "forward", "backward": how many are there, taken in turns
    sending: "_Sends | None" = None  # where PyTorch's schedule would keep every send
    before_last_backward = staticmethod(lambda: None)

    def _validate_stage_tensors(self, *args, **kwargs) -> None:
        """PyTorch expects the same rows of all micro-batches."""

    def _setup_forward_recv_info(self, num_microbatches, has_backward):
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        if not self.is_first:
            self._share_buffers(self.args_recv_info, num_microbatches, "forward")

    def _setup_backward_recv_info(self, num_microbatches):
        super()._setup_backward_recv_info(num_microbatches)
        self._share_buffers(self.grad_recv_info, num_microbatches, "backward")

    def _share_buffers(self, infos, n: int, direction: str) -> None:
        """PyTorch makes a buffer for each micro-batch, all as large as the largest."""
        kept = min(self.buffers.get(direction, n), n)
        buffers = [[info.buffer for info in infos[i]] for i in range(kept)]
        for i in range(n):
            for info, buffer, boundary in zip(infos[i], buffers[i % kept], self.boundaries):
                info.buffer = None if buffer is None else buffer[: boundary.rows[i]]

    def forward_one_chunk(self, fwd_chunk_id, *args, **kwargs):
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if not self.has_backward:  # PyTorch keeps all that goes in and out to the end
            given, _ = self.fwd_cache[fwd_chunk_id]
            self.fwd_cache[fwd_chunk_id] = (() if self.is_last else given, [])
        return output

    def backward_one_chunk(self, bwd_chunk_id, loss=None, full_backward=True, last_backward=False):
        if last_backward:
            self.before_last_backward()
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def get_fwd_send_ops(self, fwd_chunk_id):
        received = [] if self.is_first else self.args_recv_info[fwd_chunk_id]
        operations = self._sent(super().get_fwd_send_ops(fwd_chunk_id), received)
        if not self.has_backward:
            del self.fwd_cache[fwd_chunk_id]
        return operations

    def get_bwd_send_ops(self, bwd_chunk_id):
        received = self.grad_recv_info.get(bwd_chunk_id, ())
        return self._sent(super().get_bwd_send_ops(bwd_chunk_id), received)

    def _sent(self, operations, received):
        """PyTorch's schedules may keep every send, and its tensor, until their end.

        received: buffers, which are used again. What is passed on as it came is copied first, such
        as the gradient of routers' decisions, which are added up.
        """
        buffers = {
            info.buffer.untyped_storage().data_ptr() for info in received if info.buffer is not None
        }
        for operation in operations:
            if operation.tensor.untyped_storage().data_ptr() in buffers:
                operation.tensor = operation.tensor.clone()
        if self.sending is None:
            return operations
        self.sending.begin(operations)
        return []


class _Sends:
    """What a rank is sending: few at a time, so that their tensors are let go of."""

    def __init__(self) -> None:
        self.under_way: deque[dist.Work] = deque()

    def begin(self, operations: list[dist.P2POp]) -> None:
        for p2p in operations:
            # In a batch of its own, as PyTorch receives: NCCL tells batches from single exchanges.
            self.under_way.extend(dist.batch_isend_irecv([p2p]))
        self.finish(SENDS_UNDER_WAY)

    def finish(self, left: int = 0) -> None:
        while len(self.under_way) > left:
            self.under_way.popleft().wait()


class _Part(nn.Module):
    """What PyTorch's stage calls: a function of what came in and of the micro-batch's number."""

    def __init__(self, compute: Compute, stage: int) -> None:
        super().__init__()
        self.compute, self.stage = compute, stage

    def forward(self, *received: Tensor, number: Tensor) -> tuple[Tensor, ...] | Tensor:
        return self.compute(self.stage, received, int(number))


class Pipeline:
    """This rank's stages of a model that lies over the ranks of `group`."""

    def __init__(
        self,
        compute: Compute,
        count: int,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """count: stages in all, rank r has r, r + ranks, …."""
        self.compute, self.count, self.group, self.device = compute, count, group, device
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.local = list(range(self.rank, count, self.ranks))

    def idle_needed(self, n: int) -> int:
        """Micro-batches of nothing that are to be added to n, so that the schedule takes them."""
        if len(self.local) == 1 or not n:
            return 0
        more = 0
        while (n + more) % max(1, (n + more) // self.ranks):
            more += 1
        return more

    def train(
        self,
        n: int,
        boundaries: list[Boundary],
        trains: list[bool],
        before_last_backward: Callable[[], None] = lambda: None,
    ) -> None:
        """Forward and backward of n micro-batches; gradients are added up.

        trains: which of all stages train weights; before_last_backward: is called when this rank's
        last backward of the step is to come.
        """
        if n:
            stages = [self._stage(index, boundaries, trains) for index in self.local]
            # The rank's last backward of all is its lowest stage's.
            stages[0].before_last_backward = before_last_backward
            numbers = torch.arange(n)
            self._run(stages, n, numbers, loss_fn=lambda loss, number: loss, target=numbers)

    def score(self, n: int, boundaries: list[Boundary]) -> None:
        """Forward of n micro-batches, without gradients."""
        if n:
            trains = [False] * self.count
            stages = [self._stage(index, boundaries, trains) for index in self.local]
            self._run(stages, n, torch.arange(n))

    def _run(
        self,
        stages: list[_Stage],
        n: int,
        numbers: Tensor,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        target: Tensor | None = None,
    ) -> None:
        """By a schedule that is made anew, which takes no time to speak of: n may be another."""
        sends = _Sends()
        schedule = self._schedule(stages, n, sends, {"loss_fn": loss_fn, "scale_grads": False})
        schedule.step(numbers, number=numbers, target=target, return_outputs=False)
        sends.finish()

    def _stage(self, index: int, boundaries: list[Boundary], trains: list[bool]) -> _Stage:
        stage = _Stage(
            _Part(self.compute, self.local.index(index)),
            index,
            self.count,
            self.device,
            input_args=self._shapes(index, boundaries, trains),
            output_args=self._shapes(index + 1, boundaries, trains),
            group=self.group,
        )
        stage.boundaries = boundaries
        return stage

    def _shapes(
        self, index: int, boundaries: list[Boundary], trains: list[bool]
    ) -> tuple[Tensor, ...]:
        """What comes into a stage: numbers of micro-batches first, a loss out of the last."""
        meta = torch.device("meta")
        if index == 0:
            return (torch.empty(1, dtype=torch.long, device=meta),)
        has_gradient = any(trains[:index])
        if index == self.count:
            return (torch.empty((), device=meta, requires_grad=has_gradient),)
        return tuple(
            torch.empty(max(b.rows), *b.shape, dtype=b.dtype, device=meta).requires_grad_(
                has_gradient
            )
            for b in boundaries
        )

    def _schedule(self, stages: list[_Stage], n: int, sends: _Sends, options: dict[str, Any]):
        if len(stages) > 1:
            schedule = ScheduleInterleaved1F1B([*stages], n, **options)
            for stage in stages:
                stage.sending = sends
                stage.buffers = buffers_needed(schedule, self.rank, stage.stage_index)
            return schedule
        (stage,) = stages
        if options["loss_fn"] is None:  # forward alone
            stage.sending, stage.buffers = sends, {"forward": 1}
            return ScheduleGPipe(stage, n, **options)
        if n < self.count:  # 1F1B wants as many as there are stages
            return ScheduleGPipe(stage, n, **options)
        stage.buffers = {"forward": self.count - stage.stage_index, "backward": 1}
        return Schedule1F1B(stage, n, **options)


def buffers_needed(schedule: Any, rank: int, stage: int) -> dict[str, int]:
    """How many receive buffers a stage uses at a time, by its rank's actions in their order."""
    frees = {FULL_BACKWARD: ("forward", "backward")}
    takes = {RECV_F: "forward", RECV_B: "backward"}
    now, most = {"forward": 0, "backward": 0}, {"forward": 1, "backward": 1}
    actions: list[Any] = schedule.pipeline_order_with_comms[rank]
    for action in actions:
        if action.stage_index != stage:
            continue
        kind = action.computation_type
        if kind in takes:
            now[takes[kind]] += 1
            most[takes[kind]] = max(most[takes[kind]], now[takes[kind]])
        for direction in frees.get(kind, ()):
            now[direction] -= 1
    return most
