"""`--deterministic`: the same bits again, run after run and whatever else is in the batch.

PyTorch's own switches see to the first: no sums in the order in which threads happen to come. The
second is of our making. Libraries pick a product's kernel, and PyTorch the way of a sum, by the
number of rows; here they get tiles of one shape, so that what a row gives does not depend on how
many others there are.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from src.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # with these cuBLAS is deterministic; the first is set
# Rows of a tile. A GPU reads the weights once for each; the CPU is busy with few.
TILE_ROWS = {"cuda": 256, "cpu": 16}
MANY_ROWS = 256  # where there are many anyway

_tile_rows: int | None = None  # set by `turn_on`


def turn_on(device_type: str) -> None:
    """From now on, in this process; to be called before CUDA starts.

    Raises UserError when the environment asks cuBLAS for something else.
    """
    global _tile_rows
    workspace = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if workspace not in WORKSPACES:
        raise UserError(
            f"--deterministic: {WORKSPACE} is {workspace!r}, with which cuBLAS may give other bits "
            f"each time: unset it, or set it to {' or '.join(WORKSPACES)}"
        )
    torch.use_deterministic_algorithms(True)
    # It would also fill every new tensor; nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    products = torch.backends.cuda.matmul
    products.allow_tf32 = False
    products.allow_bf16_reduced_precision_reduction = False
    products.allow_fp16_reduced_precision_reduction = False
    _tile_rows = TILE_ROWS[device_type]


def turn_off() -> None:
    """As it was before; for processes that start several runs."""
    global _tile_rows
    if _tile_rows is not None:
        torch.use_deterministic_algorithms(False)
        _tile_rows = None


def is_on() -> bool:
    return _tile_rows is not None


@contextmanager
def same_rows() -> Iterator[None]:
    """For a while, what a row gives does not depend on how many others there are.

    For scoring: tiles of many rows, which cost little where there are as many.
    """
    global _tile_rows
    before = _tile_rows
    _tile_rows = before or MANY_ROWS
    try:
        yield
    finally:
        _tile_rows = before


@contextmanager
def known_order() -> Iterator[None]:
    """For operations that PyTorch holds to be undeterministic and that are not, as they are used.

    Such as a cumulative sum along rows on a GPU, where each row has one order.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def by_tiles(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), which makes something of each row by itself: [N, …] → [N, …].

    Where --deterministic asks for it, on tiles of one number of rows, zeros behind the last.
    """
    if _tile_rows is None or not len(x):
        return function(x)
    missing = -len(x) % _tile_rows
    if missing or not x.is_contiguous():
        x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)).contiguous()
    tiles = [function(tile) for tile in x.split(_tile_rows)]
    return torch.cat(tiles)[: len(x) - missing]


class _TiledLinear(torch.autograd.Function):
    """x Wᵀ + b by tiles; the gradients are one product each, over all rows.

    Tile by tile the weight's would be rounded as often as there are tiles.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return by_tiles(lambda tile: F.linear(tile, weight, bias), x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            grad @ weight if needs_x else None,
            grad.t() @ x if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, by tiles where that is asked for: [N, in] → [N, out]."""
    if _tile_rows is not None and not torch.is_grad_enabled() and hasattr(weight, "dequantized"):
        weight = weight.dequantized(weight.dtype)  # once for all tiles
    if _tile_rows is not None and torch.is_grad_enabled() and weight.requires_grad:
        return _TiledLinear.apply(x, weight, bias)
    return by_tiles(lambda tile: F.linear(tile, weight, bias), x)
