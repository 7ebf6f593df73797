"""A batch whose tokens ranks divide, beside one that each has whole: context_worker.py OUT.json."""

import itertools
import json
import sys
from pathlib import Path

import torch

from src.models.attention import Packed
from src.models.context import Divided
from src.parallel.context import Share
from src.parallel.setup import start, stop

DIM = 4
# Pieces' lengths and what each goes on from; fewer tokens than ranks among them.
LAYOUTS = {
    "one token": ([1], None),
    "two tokens": ([2], None),
    "packed": ([5, 1, 7, 3], None),
    "a prompt's responses": ([4, 3, 1, 5], [None, 0, 0, 0]),
}
HEADS = ((6, 6), (6, 3), (6, 2), (6, 1))
WINDOWS = (0, 3)


def attended(layout, inputs: list, up: torch.Tensor, window: int) -> list[torch.Tensor]:
    """The output, and the inputs' gradients."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = layout.attend(0, *inputs, window)
    return [y.detach(), *torch.autograd.grad(y, inputs, up)]


def main(out: str) -> None:
    parallel = start(1, timeout=60, context_parallel_size=int(sys.argv[2]))
    context = parallel.context
    apart: dict[str, float] = {}
    for (name, (lengths, prefixes)), (heads, kv_heads), window in itertools.product(
        LAYOUTS.items(), HEADS, WINDOWS
    ):
        whole, n = Packed(lengths, prefixes=prefixes), sum(lengths)
        share = Share(n, context)
        divided = Divided(whole, share)
        generator = torch.Generator().manual_seed(n)
        sizes = (heads, kv_heads, kv_heads, heads)
        *inputs, up = [torch.randn(n, size, DIM, generator=generator) for size in sizes]

        want = attended(whole, inputs, up, window)
        got = attended(divided, [share.of(x) for x in inputs], share.of(up), window)
        place = f"{name}, {heads} heads of {kv_heads}, window {window}"
        apart[place] = max(float((a - share.of(b)).abs().max()) for a, b in zip(got, want))
        assert torch.equal(divided.positions, share.of(whole.positions))

        # Each sequence's mean, the same on all ranks, and each rank's part of its gradient.
        x = torch.randn(n, 3, generator=generator)
        part, x = share.of(x).requires_grad_(), x.requires_grad_()
        means, of_part = whole.means(x), divided.means(part)
        (want_grad,) = torch.autograd.grad(means.square().sum(), x)
        (got_grad,) = torch.autograd.grad(of_part.square().sum(), part)
        distances = (of_part - means).abs().max(), (got_grad - share.of(want_grad)).abs().max()
        apart[f"{name}: means"] = float(max(distances))

        # Results of some rows, put together of those who have them.
        rows = torch.arange(0, n, 2)
        own = share.within(rows)
        of_own = rows[own].double().requires_grad_()
        joined = share.joined(of_own, own, len(rows))
        (grad,) = torch.autograd.grad((joined * rows).sum(), of_own)
        assert torch.equal(joined, rows.double()) and torch.equal(grad, of_own)
        assert all(share.first <= row < share.last for row in rows[own].tolist())
        total = share.summed(torch.tensor(float(own.stop - own.start)))
        assert float(total) == len(rows)
    if parallel.is_main:
        Path(out).write_text(json.dumps(apart))
    stop()


if __name__ == "__main__":
    main(sys.argv[1])
