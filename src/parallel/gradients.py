"""Gradients summed over the data-parallel ranks, a bucket at a time, while backward still runs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from src.parallel.setup import Parallel
from src.parallel.shared_memory import all_reduce_start

BUCKET_BYTES = 25 * 2**20


class GradientBuckets:
    """Sums `parameter.grad` over a group.

    Call `arm` before the last backward of a step, and `finish` after it. PyTorch's
    DistributedDataParallel would add up micro-batches, and ranks, in the weights' own dtype; here
    both are done in that of the gradients, fp32. Buckets go off in one order on every rank,
    whatever order their gradients come in; a rank that has nothing to do in a step takes part with
    zeros.
    """

    def __init__(self, parameters: list[nn.Parameter], parallel: Parallel) -> None:
        self.group = parallel.dp_group
        self.buckets: list[list[nn.Parameter]] = []
        size = BUCKET_BYTES
        for parameter in reversed(parameters):  # about the order in which backward comes to them
            if size + 4 * parameter.numel() > BUCKET_BYTES:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(parameter)
            size += 4 * parameter.numel()
        self.bucket_of = {
            parameter: number for number, bucket in enumerate(self.buckets) for parameter in bucket
        }
        # gradients that each bucket waits for; None: not armed
        self.missing: list[int] | None = None
        # the buckets that went off, in their order: the sum, and how to wait for it
        self.under_way: list[tuple[Tensor, Callable[[], object]]] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def arm(self) -> None:
        """The next backward is this step's last."""
        self.missing = [len(bucket) for bucket in self.buckets]

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self.missing is None:
            return
        self.missing[self.bucket_of[parameter]] -= 1
        # A full bucket waits for those before it.
        while len(self.under_way) < len(self.buckets) and self.missing[len(self.under_way)] == 0:
            self._start()

    def _start(self) -> None:
        """The next bucket's sum begins."""
        bucket = self.buckets[len(self.under_way)]
        grads = [
            torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad for p in bucket
        ]
        if len(grads) == 1:
            flat = grads[0].contiguous().view(-1)
        else:
            flat = torch.cat([grad.flatten() for grad in grads])
        for parameter in bucket:
            parameter.grad = None
        self.under_way.append((flat, all_reduce_start(flat, self.group)))

    def start_rest(self) -> None:
        """Begin what no backward of this rank has begun."""
        while len(self.under_way) < len(self.buckets):
            self._start()

    def finish(self) -> None:
        """Every parameter's gradient is the sum over the ranks, from now on."""
        self.start_rest()
        for bucket, (flat, wait) in zip(self.buckets, self.under_way):
            wait()
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket])):
                parameter.grad = part.view_as(parameter)
        self.missing, self.under_way = None, []
