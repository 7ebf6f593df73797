"""Host memory for what lies on a GPU otherwise: page-locked, of its exact size, and kept.

PyTorch's own page-locked memory comes in powers of two, up to twice what is asked for. On the CPU
the same code runs on plain memory.
"""

import mmap
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; of each tensor's place in a buffer

Storages = dict[int, torch.UntypedStorage]  # by their identity


def aligned(size: int) -> int:
    """The bytes of a place that holds so many."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def storages_of(tensors: Iterable[Tensor]) -> Storages:
    """The tensors' memory, each piece once, by its identity.

    Views of one piece, such as stacked weights, share it.
    """
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages}


class HostBuffer:
    """One piece of host memory of whole pages; page-locked where `device` is a GPU."""

    def __init__(self, sizes: Iterable[int], device: torch.device) -> None:
        """sizes: of the places in it, in bytes."""
        padded = [aligned(size) for size in sizes]
        self.memory = torch.frombuffer(mmap.mmap(-1, max(sum(padded), 1)), dtype=torch.uint8)
        self.places = self.memory[: sum(padded)].split(padded)  # [size, padded] each
        self.locked = device.type == "cuda"
        if self.locked:
            cudart = torch.cuda.cudart()
            status = cudart.cudaHostRegister(self.memory.data_ptr(), self.memory.nbytes, 0)
            torch.cuda.check_error(int(status))

    def __del__(self) -> None:
        if getattr(self, "locked", False):
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())


def host_tensors(
    forms: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device
) -> tuple[dict[str, Tensor], HostBuffer]:
    """(zeros by name, of a shape and dtype each; their memory, to be kept as long as they are)."""
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in forms.values()]
    buffer = HostBuffer(sizes, device)
    tensors = {
        name: place[:size].view(dtype).view(shape)
        for (name, (shape, dtype)), size, place in zip(forms.items(), sizes, buffer.places)
    }
    return tensors, buffer


class Ferry:
    """Copies of parts of what rests in host memory to where it is worked on, and back.

    To the device, or of gradients to the host. They go on streams of their own, beside what is
    computed; few parts are under way at a time. On the CPU they are plain copies.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        self.coming = torch.cuda.Stream(device) if on_gpu else None
        self.leaving = torch.cuda.Stream(device) if on_gpu else None
        self.under_way: deque[torch.cuda.Event] = deque()  # on the way back

    def bring(
        self, tensors: Iterable[Tensor], to: torch.device
    ) -> tuple[list[Tensor], torch.cuda.Event | None]:
        """Begin to copy, after what was computed so far: (copies, which are for `arrived`)."""
        if self.coming is None:
            return [x.clone() for x in tensors], None
        main = torch.cuda.current_stream(self.device)
        self.coming.wait_stream(main)
        with torch.cuda.stream(self.coming):
            here = []
            for x in tensors:
                copy = torch.empty_like(x, device=to, pin_memory=to.type == "cpu")
                copy.copy_(x, non_blocking=True)
                (copy if copy.is_cuda else x).record_stream(main if copy.is_cuda else self.coming)
                here.append(copy)
            return here, self.coming.record_event()

    def arrived(self, event: torch.cuda.Event | None, to: torch.device) -> None:
        """What is computed from here on may use what was brought."""
        if event is not None and to.type == "cpu":
            event.synchronize()
        elif event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def send(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Begin to copy each second one to the first, after what was computed so far.

        Waits for what was sent before the last time: memory would fill with parts else.
        """
        if self.leaving is None:
            for place, x in pairs:
                place.copy_(x)
            return
        self.leaving.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.leaving):
            for place, x in pairs:
                if x.is_cuda:
                    x.record_stream(self.leaving)
                elif x.dtype != place.dtype:  # rounded here, into memory that is copied from beside
                    x = torch.empty_like(x, dtype=place.dtype, pin_memory=True).copy_(x)
                place.copy_(x, non_blocking=True)
            self.under_way.append(self.leaving.record_event())
        if len(self.under_way) > 1:
            self.under_way.popleft().synchronize()

    def finish(self) -> None:
        """Wait until all is where it belongs."""
        while self.under_way:
            self.under_way.popleft().synchronize()


class HostCopies:
    """Copies of tensors in host memory; on a GPU in memory that is kept for the next ones."""

    def __init__(self, device: torch.device, keep: bool | None = None) -> None:
        """keep: on a GPU only, when not given."""
        self.device, self.keep = device, device.type == "cuda" if keep is None else keep
        self.buffers: dict[str, tuple[list[int], HostBuffer]] = {}

    def of(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A copy of each, contiguous; where memory is kept, until the next call with this name."""
        tensors = {key: x.detach() for key, x in tensors.items()}
        if not self.keep:
            return {key: x.to(device="cpu", copy=True).contiguous() for key, x in tensors.items()}
        sizes = [x.numel() * x.element_size() for x in tensors.values()]
        if name not in self.buffers or self.buffers[name][0] != sizes:
            self.buffers.pop(name, None)  # before there is another
            self.buffers[name] = sizes, HostBuffer(sizes, self.device)
        out = {}
        for (key, x), size, place in zip(tensors.items(), sizes, self.buffers[name][1].places):
            out[key] = place[:size].view(x.dtype).view(x.shape)
            out[key].copy_(x, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return out


class Offload:
    """Storages of a device that may lie in host memory instead, and come back bit for bit.

    A storage that is away is empty, so that tensors, their views and optimizer states keep their
    identity. Copies go on a stream of their own, beside what the device computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.away: Storages = {}
        # where each storage that was ever away has its place, and the buffer that it is part of
        self.places: dict[int, tuple[Tensor, HostBuffer]] = {}

    def send(self, storages: Storages) -> None:
        """To host memory, after what was computed so far."""
        sizes = {key: storage.nbytes() for key, storage in storages.items()}
        new = [key for key in storages if not self._has_place(key, sizes[key])]
        if new:  # such as a whole role, or its optimizer's state: one buffer for all of it
            buffer = HostBuffer([sizes[key] for key in new], self.device)
            for key, place in zip(new, buffer.places):
                self.places[key] = place[: sizes[key]], buffer
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._beside():
            for key, storage in storages.items():
                self.places[key][0].copy_(bytes_of(storage), non_blocking=True)
                self._used_by(storage, self.stream)
        for storage in storages.values():
            storage.resize_(0)
        self.away |= storages

    def begin_to_fetch(self, keys: Iterable[int]) -> None:
        """Bring storages back, beside what is computed meanwhile; see `arrived`.

        Their memory is the copying stream's own, which nobody computes in any more.
        """
        main = torch.cuda.current_stream(self.device) if self.stream is not None else None
        with self._beside():
            for key in keys:
                storage, place = self.away.pop(key), self.places[key][0]
                storage.resize_(place.numel())
                bytes_of(storage).copy_(place, non_blocking=True)
                self._used_by(storage, main)

    def arrived(self) -> None:
        """What is computed from here on may use what was fetched."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def forget_all_but(self, present: Iterable[int]) -> None:
        """Let go of the places of storages that there are no longer."""
        self.places = {key: self.places[key] for key in present if key in self.places}

    def size_of(self, storages: Storages) -> int:
        """Their bytes on the device, once all of them are there."""
        away = (self.places[key][0].numel() for key in storages if key in self.away)
        return sum(away) + sum(storage.nbytes() for storage in storages.values())

    def spare(self) -> int:
        """Bytes of the device that nothing has needed so far; 0 where it is no GPU."""
        if self.device.type != "cuda":
            return 0
        free, _ = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device)
        return free + held - torch.cuda.max_memory_reserved(self.device)

    def _has_place(self, key: int, size: int) -> bool:
        return key in self.places and self.places[key][0].numel() == size

    def _beside(self) -> AbstractContextManager:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _used_by(self, storage: torch.UntypedStorage, stream: torch.cuda.Stream | None) -> None:
        """Its memory is not given to others, once it is free, before `stream` has come so far."""
        if stream is not None:
            bytes_of(storage).record_stream(stream)


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """All of a storage as numbers."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
