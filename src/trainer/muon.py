"""Muon's change of matrices that lie in parts on several ranks: each is computed by one of them.

Muon (https://kellerjordan.github.io/posts/muon; arXiv 2502.16982) makes a matrix's update
orthogonal, which takes all of it. What several ranks hold in parts goes to an owner among them,
and the change comes back in parts. Who owns what is the same on all ranks by counting alone, and
in each round nobody owns more than one matrix.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from src.models.exchange import exchanged
from src.models.layout import TensorSpec
from src.models.places import Placement, is_empty
from src.parallel.setup import Parallel

DECAY = 0.95  # of the momentum


class InFloat32(TorchFunctionMode):
    """Lets torch's Muon compute in fp32 where it says bf16: many CPUs have no such products."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].float().clone()  # which is then divided in place
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Matrix:
    """One matrix: how it lies on ranks, and this rank's part of it (empty where it has none)."""

    spec: TensorSpec
    placement: Placement
    part: Tensor

    def holders(self, ranks: int) -> list[int]:
        return [r for r in range(ranks) if not is_empty(self.placement.box(self.spec, r))]


def matrices_of(part: Tensor, spec: TensorSpec, placement: Placement, rank: int) -> list[Matrix]:
    """The matrix that a parameter is, or each expert's. part: this rank's, whose views these are.

    placement: of the parameter on the ranks, of which this is the number `rank`.
    """
    if len(spec.shape) == 2:
        return [Matrix(spec, placement, part)]
    dim = None if spec.dim is None else spec.dim - 1
    one = replace(spec, shape=spec.shape[1:], dim=dim)
    if not placement.sharded:
        return [Matrix(one, placement, each) for each in part]
    # Data-parallel ranks that share the rows have whole experts, as far as these are not cut.
    share = -(-spec.shape[0] // placement.dp)
    dp_rank = (rank - placement.first) // placement.tp
    return [
        Matrix(
            one,
            Placement(placement.tp, first=placement.first + expert // share * placement.tp),
            part[expert % share] if expert // share == dp_rank else part.new_empty(0, 0),
        )
        for expert in range(spec.shape[0])
    ]


def orthogonalize(matrices: list[Matrix], lr: float, parallel: Parallel, shared: bool) -> None:
    """Put the change of each matrix, times −lr, in place of the update. A collective.

    shared: whether data-parallel ranks share rows, so that all ranks take part, and not only those
    of one model. On all ranks the same matrices, in the same order.
    """
    group, rank = parallel.mp_group, parallel.mp_rank
    if shared:
        group, rank = parallel.world, parallel.rank
    ranks = dist.get_world_size(group)
    work, owned = [0] * ranks, [[] for _ in range(ranks)]  # type: tuple[list[int], list[list]]
    for matrix in matrices:
        owner = min(matrix.holders(ranks), key=lambda holder: work[holder])
        rows, columns = matrix.spec.shape
        work[owner] += rows * columns * min(rows, columns)
        owned[owner].append(matrix)
    for round_ in zip_longest(*owned):
        one_each = [
            (matrix, Placement(1, first=owner))
            for owner, matrix in enumerate(round_)
            if matrix is not None
        ]
        wholes = [
            exchanged(m.part.to(parallel.device), m.spec, m.placement, at_owner, rank, group)
            for m, at_owner in one_each
        ]
        changes = [change(whole, lr) if whole.numel() else whole for whole in wholes]
        del wholes
        for (m, at_owner), whole in zip(one_each, changes):
            part = exchanged(whole, m.spec, at_owner, m.placement, rank, group)
            if m.part.numel():
                m.part.copy_(part)


def change(update: Tensor, lr: float) -> Tensor:
    """What Muon adds to a matrix, whose root mean square is like that of AdamW's steps.

    update: [rows, columns], with the momentum in it.
    """
    moved = torch.zeros_like(update)
    moved.grad = update
    muon = torch.optim.Muon(
        [moved], lr, 0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
    )
    numbers: AbstractContextManager = nullcontext() if update.is_cuda else InFloat32()
    with numbers:
        muon.step()
    return moved
