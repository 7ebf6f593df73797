"""All-reduce, all-gather, reduce-scatter, all-to-all among ranks of one machine, in shared memory.

On the CPU it is far quicker than gloo over the loopback. Each rank writes its tensor into its own
slot, says so, waits until the others have, and reads all slots; sums go in the order of ranks, so
that all get the same bits. Two slots in turn are enough: a rank that has seen the others' word for
one tensor knows that they are done with the one before.
"""

import ctypes
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from src.parallel import deterministic
from src.parallel.clock import clock
from src.parallel.threads import cores, watch

SLOT_BYTES = 2**22  # longer tensors go in pieces
BITS = 24  # of a flag, for the number of bytes
LINE = 8  # flags of 8 bytes each, a cache line apart
# Looks at a flag before a rank sleeps: where ranks have a core each, and where cores are shared.
PATIENCE, PATIENCE_SHARED = 2000, 20
FUTEX, FUTEX_WAIT, FUTEX_WAKE = 202, 0, 1  # Linux on x86-64: the call, and what is wanted of it
NAP_S = 1  # a sleeping rank looks at the clock as often

Operation = dist.ReduceOp.RedOpType
_OPERATIONS: dict[Operation, Callable[..., Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
}
_groups: dict[dist.ProcessGroup, "SharedSlots"] = {}


class _Duration(ctypes.Structure):
    """C's timespec."""

    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class SharedSlots:
    """The shared memory of one group. Made by all its ranks together."""

    def __init__(self, group: dist.ProcessGroup, timeout: float, path: str, total: int) -> None:
        """path: a file of `total` bytes in the machine's memory, which all ranks open."""
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.ranks = dist.get_process_group_ranks(group)  # their numbers in the run, for messages
        self.timeout, self.turn = timeout, 0
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        self.shares_cores = ranks_here > cores()
        self.syscall, self.nap = ctypes.CDLL(None).syscall, _Duration(NAP_S, 0)
        memory = torch.from_file(path, shared=True, size=total, dtype=torch.uint8)
        flag_bytes = self.size * LINE * 8
        # Each rank's word: the number of the tensor that it last wrote, and how many bytes that
        # had, written in one go.
        self.flags = memory[:flag_bytes].view(torch.int64).view(self.size, LINE).numpy()
        self.slots = memory[flag_bytes:].view(2, self.size, SLOT_BYTES)
        first, stride = self.flags.ctypes.data, self.flags.strides[0]
        self.places = [ctypes.c_void_p(first + rank * stride) for rank in range(self.size)]

    def all_reduce(self, x: Tensor, out: Tensor, op: Operation) -> None:
        """`x` over all ranks into `out`, which may be `x`; both contiguous."""
        combine, length = _OPERATIONS[op], SLOT_BYTES // x.element_size()
        for piece, result in zip(x.view(-1).split(length), out.view(-1).split(length)):
            first, *others = self._exchange(piece)
            for i, slot in enumerate(others):
                combine(result if i else first, slot, out=result)

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        """Every rank's `x` into `out`, [ranks, numbers of x]; x contiguous."""
        length = SLOT_BYTES // x.element_size()
        for piece, result in zip(x.view(-1).split(length), out.split(length, 1)):
            result.copy_(self._exchange(piece))

    def reduce_scatter(self, x: Tensor, out: Tensor) -> None:
        """This rank's row of the sum over all ranks: x, [ranks, numbers of out]; out contiguous."""
        length = SLOT_BYTES // x.element_size() // self.size
        for piece, result in zip(x.split(length, 1), out.split(length)):
            slots = self._exchange(piece.contiguous().view(-1))
            first, *others = slots.view(self.size, self.size, -1)[:, self.rank]
            for i, slot in enumerate(others):
                torch.add(result if i else first, slot, out=result)

    def all_to_all(self, x: Tensor, out: Tensor) -> None:
        """This rank's row of every rank's `x` into out, by rank: [ranks, numbers] each."""
        length = SLOT_BYTES // x.element_size() // self.size
        for piece, result in zip(x.split(length, 1), out.split(length, 1)):
            slots = self._exchange(piece.contiguous().view(-1))
            result.copy_(slots.view(self.size, self.size, -1)[:, self.rank])

    def _exchange(self, x: Tensor) -> Tensor:
        """Every rank's `x`, [ranks, numbers of x], until this rank's next exchange."""
        self.turn += 1
        slots = self.slots[self.turn % 2, :, : x.nbytes].view(x.dtype)  # [ranks, numbers of x]
        slots[self.rank].copy_(x)
        # The word comes after the data: x86 keeps the order of stores.
        self.flags[self.rank, 0] = self.turn << BITS | x.nbytes
        self._futex(self.rank, FUTEX_WAKE, self.size, None)
        for rank in range(self.size):
            if rank != self.rank:
                self._wait_for(rank, x.nbytes)
        return slots

    def _wait_for(self, rank: int, size: int) -> None:
        flags, looks = self.flags, 0
        patience = PATIENCE_SHARED if self.shares_cores or watch.crowded else PATIENCE
        began: float | None = None
        while (word := int(flags[rank, 0])) >> BITS < self.turn:
            looks += 1
            if looks % patience == 0:
                # sleeps, unless the flag has changed meanwhile
                self._futex(rank, FUTEX_WAIT, word & 0xFFFFFFFF, ctypes.byref(self.nap))
                began = began or time.monotonic()
                if time.monotonic() - began > self.timeout:
                    raise RuntimeError(
                        f"rank {self.ranks[rank]} of {dist.get_world_size()} did not come to "
                        f"exchange {self.turn} within {self.timeout:g} s (--timeout): it hangs, "
                        "or is gone"
                    )
        # A word of a later turn is fine: that rank has gone on, which takes our word for this one.
        other_size = word & (1 << BITS) - 1
        if word >> BITS == self.turn and other_size != size:
            raise RuntimeError(
                f"rank {self.ranks[rank]} exchanges {other_size} bytes, rank "
                f"{self.ranks[self.rank]} {size}: they went apart"
            )

    def _futex(self, rank: int, what: int, value: int, nap) -> None:
        """Wait for a rank's flag, or wake who waits for it: futex(2), on the flag's lower half.

        That half has the size and the last eight bits of the turn, so that neighbouring turns
        differ.
        """
        self.syscall(FUTEX, self.places[rank], what, ctypes.c_uint32(value), nap, None, 0)


def share_memory(group: dist.ProcessGroup, device: torch.device, timeout: float) -> None:
    """Let the group's exchanges go through shared memory where that works.

    That is Linux on x86, the CPU, ranks of one machine. All ranks of the group come here and decide
    alike; where there is no memory for it, gloo's way stays.
    """
    size = dist.get_world_size(group)
    if size == 1 or device.type != "cpu":
        return
    # Whether this rank could, and then whether all can, on one machine.
    works = (
        platform.system() == "Linux"
        and platform.machine() in ("x86_64", "AMD64")
        and os.access("/dev/shm", os.W_OK)
    )
    answers: list = [None] * size
    # Of one launcher: containers may have a machine's name in common, and not its memory.
    machine = platform.node(), os.environ.get("GROUP_RANK")
    dist.all_gather_object(answers, (machine, works), group=group)
    if any(node != answers[0][0] or not able for node, able in answers):
        return
    # The first rank makes the file, all open it.
    total = size * LINE * 8 + 2 * size * SLOT_BYTES
    paths = [_file(total) if dist.get_rank(group) == 0 else None]
    dist.broadcast_object_list(paths, dist.get_global_rank(group, 0), group=group)
    if paths[0] is None:
        return
    _groups[group] = SharedSlots(group, timeout, paths[0], total)
    dist.barrier(group)
    if dist.get_rank(group) == 0:
        Path(paths[0]).unlink()  # the memory lives as long as someone has it mapped


def _file(total: int) -> str | None:
    """A file of zeros whose memory is set aside, or None where there is not so much."""
    try:
        descriptor, path = tempfile.mkstemp(dir="/dev/shm", prefix="all-reduce-")
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, total)
        return path
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(descriptor)


def forget() -> None:
    """Before the groups end."""
    _groups.clear()


def all_reduce(x: Tensor, group: dist.ProcessGroup, op: Operation = dist.ReduceOp.SUM) -> None:
    """In place over the group, by the quickest way that there is."""
    slots = _groups.get(group)
    if deterministic.is_on() and slots is None and op == dist.ReduceOp.SUM:
        x.copy_(_summed_in_order(x, group))
        return
    with clock.communication():
        if slots is None or not x.is_contiguous():
            dist.all_reduce(x, op=op, group=group)
        elif x.numel():
            slots.all_reduce(x, x, op)


def all_reduce_start(x: Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    """Begin to sum in place over the group.

    The result is there when the returned function has been called.
    """
    if group in _groups:
        all_reduce(x, group)
        return lambda: None
    work = dist.all_reduce(x, group=group, async_op=True)

    def wait() -> None:
        with clock.communication():
            work.wait()

    return wait


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group, in a new tensor."""
    x, slots = x.contiguous(), _groups.get(group)
    if deterministic.is_on() and slots is None:
        return _summed_in_order(x, group)
    with clock.communication():
        if slots is None:
            out = x.clone()
            dist.all_reduce(out, group=group)
        else:
            out = torch.empty_like(x)
            if x.numel():
                slots.all_reduce(x, out, dist.ReduceOp.SUM)
    return out


def scattered_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's row of the sum over the group, in a new tensor: [ranks, …] → […].

    The bits of `summed`.
    """
    if deterministic.is_on() and group not in _groups:
        return summed(x, group)[dist.get_rank(group)]
    out = torch.empty_like(x[0], memory_format=torch.contiguous_format)
    scatter_sum_into(out, x.contiguous(), group)
    return out


def gather_into(
    out: Tensor, x: Tensor, group: dist.ProcessGroup, async_op: bool = False
) -> dist.Work | None:
    """Every rank's x into out, one after the other; both contiguous."""
    slots = _groups.get(group)
    with clock.communication():
        if slots is None:
            flat = out.view(-1), x.view(-1)
            return dist.all_gather_into_tensor(*flat, group=group, async_op=async_op)
        if x.numel():
            slots.all_gather(x, out.view(slots.size, -1))
    return None


def scatter_sum_into(
    out: Tensor, x: Tensor, group: dist.ProcessGroup, async_op: bool = False
) -> dist.Work | None:
    """This rank's part of the sum over the group of x into out; both contiguous."""
    slots = _groups.get(group)
    with clock.communication():
        if slots is None:
            flat = out.view(-1), x.view(-1)
            return dist.reduce_scatter_tensor(*flat, group=group, async_op=async_op)
        if x.numel():
            slots.reduce_scatter(x.view(slots.size, -1), out.view(-1))
    return None


def _summed_in_order(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum in the order of ranks, in a new tensor.

    In which order a library adds depends on a number's place in the tensor, and on its size.
    """
    total, *others = gathered(x, group).unbind()
    for part in others:
        total = total + part
    return total


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's tensor, of one shape, in a new one: [ranks, …]."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    gather_into(out, x.contiguous(), group)
    return out


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's row of every rank's x, by rank, in a new tensor: [ranks, …] → [ranks, …]."""
    x, slots = x.contiguous(), _groups.get(group)
    out = torch.empty_like(x)
    with clock.communication():
        if slots is None:
            dist.all_to_all_single(out, x, group=group)
        elif x.numel():
            slots.all_to_all(x.view(slots.size, -1), out.view(slots.size, -1))
    return out
