"""Layers that rest in host memory and come to the device in turn, for models larger than it.

As DeepSpeed's ZeRO-Inference (arXiv 2207.00032): a layer's weights serve all tokens of a forward,
and the next layer's come meanwhile. To compute with, not to train.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from src.models.quantize import plain_parts
from src.parallel.host import HostBuffer, aligned, bytes_of, storages_of
from src.parallel.layers import stacks_of

BUFFERS = 2  # on the device: one layer is computed while the next one comes


def tensors_of(layer: nn.Module) -> list[Tensor]:
    """The plain tensors that a layer computes with, among them views of one another."""
    parts = [part for weight in layer.parameters() for part in plain_parts(weight)]
    joined = [x for stack in stacks_of(layer) for x in (stack.weight, stack.bias) if x is not None]
    return parts + joined


class StreamedLayers:
    """A model's layers in host memory, and two buffers of the device where they are computed.

    Layers take turns in a buffer, those of even and of odd number; a layer's tensors are views of
    its buffer for good, and hold its weights when its turn comes. As soon as it is computed the
    next of this buffer begins to come, on a stream of its own, while the layer in the other buffer
    is computed. An odd number of layers leaves the last and the first in one buffer: these wait for
    one another. On the CPU copies are plain, in the same order.
    """

    def __init__(self, layers: Iterable[nn.Module], device: torch.device) -> None:
        """layers: in the order in which they are computed, in host memory; for `device`."""
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.host: list[HostBuffer] = []  # each layer, as it lies in its buffer
        layers = list(layers)
        sizes = [sum(aligned(s.nbytes()) for s in _storages(layer)) for layer in layers]
        self.buffers = [
            torch.empty(max(sizes), dtype=torch.uint8, device=device)
            for _ in range(min(BUFFERS, len(layers)))
        ]
        self.holds: list[int | None] = [None] * len(self.buffers)  # which layer, or is to hold
        self.arrived: list[torch.cuda.Event | None] = [None] * len(self.buffers)
        for number, layer in enumerate(layers):
            self._take(layer, self._buffer_of(number))
            layer.register_forward_pre_hook(partial(self._begin, number))
            layer.register_forward_hook(partial(self._end, number))
        if self.stream is not None:
            for buffer in self.buffers:  # whose memory is not given to others before copies end
                buffer.record_stream(self.stream)
        for number in range(len(self.buffers)):
            self._bring(number)

    def __del__(self) -> None:
        stream = getattr(self, "stream", None)
        if stream is not None:
            stream.synchronize()  # a layer may be on its way out of memory that is let go

    @property
    def device_bytes(self) -> int:
        """Of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def host_bytes(self) -> int:
        """Of all layers."""
        return sum(layer.memory.nbytes for layer in self.host)

    def _buffer_of(self, number: int) -> int:
        return number % len(self.buffers)

    def _take(self, layer: nn.Module, buffer: int) -> None:
        """Copy a layer to page-locked memory, and make its tensors views of its buffer."""
        tensors = tensors_of(layer)
        storages = storages_of(tensors)
        host = HostBuffer([storage.nbytes() for storage in storages.values()], self.device)
        starts = {}
        for (key, storage), place in zip(storages.items(), host.places):
            place[: storage.nbytes()].copy_(bytes_of(storage))
            starts[key] = place.storage_offset()
        keys = [x.untyped_storage()._cdata for x in tensors]
        for x, key in zip(tensors, keys):
            first = starts[key] // x.element_size() + x.storage_offset()
            numbers = self.buffers[buffer].view(x.dtype)
            x.data = numbers.as_strided(x.size(), x.stride(), first)
        self.host.append(host)

    def _begin(self, number: int, *_) -> None:
        """Before a layer is computed: after it has come."""
        buffer = self._buffer_of(number)
        if self.holds[buffer] != number:  # the forward before this one was not whole
            self._bring(number)
        event = self.arrived[buffer]
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def _end(self, number: int, *_) -> None:
        """After a layer was computed: let the next one of its buffer come."""
        following = number + len(self.buffers)
        if following >= len(self.host):
            following = self._buffer_of(number)  # of the next forward
        if following != number:
            self._bring(following)

    def _bring(self, number: int) -> None:
        """Begin to copy a layer to its buffer, after what was computed so far."""
        buffer, host = self._buffer_of(number), self.host[number].memory
        place = self.buffers[buffer][: host.nbytes]
        self.holds[buffer] = number
        if self.stream is None:
            place.copy_(host)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            place.copy_(host, non_blocking=True)
            self.arrived[buffer] = self.stream.record_event()


def _storages(layer: nn.Module) -> Iterable[torch.UntypedStorage]:
    return storages_of(tensors_of(layer)).values()
