"""Context parallelism: ranks that divide the tokens of a batch, for rows longer than one can hold.

Between attentions each has its share of the tokens. In attention it has all of them, of its share
of the heads: one all-to-all there and one back (Ulysses, arXiv 2309.14509).
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from src.parallel.mappings import LinearExchange, padded
from src.parallel.shared_memory import all_to_all, summed


@dataclass(frozen=True)
class ContextGroup:
    """Ranks that divide the tokens of a batch."""

    group: dist.ProcessGroup | None = None  # where there is more than one
    rank: int = 0
    size: int = 1


ALONE = ContextGroup()


class Share:
    """This rank's share of a batch's N tokens: m = ⌈N / C⌉ neighbours, of C ranks.

    first, last: these are [first, last) of the batch; behind the last of all stand zeros.
    """

    def __init__(self, tokens: int, ranks: ContextGroup = ALONE) -> None:
        self.tokens, self.ranks, self.size = tokens, ranks, ranks.size
        self.m = -(-tokens // ranks.size)
        self.first = min(ranks.rank * self.m, tokens)
        self.last = min(self.first + self.m, tokens)

    def of(self, x: Tensor) -> Tensor:
        """This rank's tokens of what all have alike, without gradient: [N, …] → [m, …]."""
        return x if self.size == 1 else padded(x[self.first : self.last], self.m)

    def placed(self, x: Tensor) -> Tensor:
        """Where they are in the batch, zeros for the others': [m, …] → [N, …]."""
        around = self.first, self.tokens - self.last
        return F.pad(x[: self.last - self.first], (0, 0) * (x.dim() - 1) + around)

    def within(self, rows: Tensor) -> slice:
        """Which of some rows of the batch, in ascending order, are this rank's."""
        if self.size == 1:
            return slice(0, rows.size(0))
        bounds = torch.tensor([self.first, self.last], device=rows.device)
        first, last = torch.searchsorted(rows.contiguous(), bounds).tolist()
        return slice(first, last)

    def by_heads(self, x: Tensor) -> Tensor:
        """All tokens, of this rank's heads: [C, m, heads / C, head_dim] → [N, heads / C, head_dim].

        x: this rank's tokens, of the heads of each rank.
        """
        return self._exchanged(x).flatten(0, 1)[: self.tokens]

    def by_tokens(self, x: Tensor) -> Tensor:
        """The inverse, heads side by side: [N, heads / C, head_dim] → [m, heads, head_dim]."""
        x = padded(x, self.size * self.m).unflatten(0, (self.size, self.m))
        return self._exchanged(x).transpose(0, 1).flatten(1, 2)

    def _exchanged(self, x: Tensor) -> Tensor:
        """Row r of every rank's x to rank r: [C, …] → [C, …]."""
        group = self.ranks.group
        assert group is not None
        return LinearExchange.apply(
            x, lambda x: all_to_all(x, group), lambda grad: all_to_all(grad, group)
        )

    def joined(self, x: Tensor, places: slice | Tensor, n: int) -> Tensor:
        """What each rank has of n results, for what all compute alike of it: [r, …] → [n, …].

        places: which of them this rank's are. Each gets the gradient of its own.
        """
        group = self.ranks.group
        if group is None:
            return x

        def there(x: Tensor) -> Tensor:
            whole = x.new_zeros(n, *x.shape[1:])
            whole[places] = x
            return summed(whole, group)

        return LinearExchange.apply(x, there, lambda grad: grad[places])

    def summed(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, for what all compute alike of it."""
        group = self.ranks.group
        if group is None:
            return x
        return LinearExchange.apply(x, lambda x: summed(x, group), lambda grad: grad)


def repeats_of(kv_heads: int, ranks: int) -> int:
    """How often each kv head is repeated, so that ranks can divide the heads evenly.

    Query heads that the ranks divide stay with a copy of theirs, as many with each.
    """
    return ranks // math.gcd(kv_heads, ranks)
