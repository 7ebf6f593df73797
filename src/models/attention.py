"""Sequences laid end to end, without padding, each attending to itself alone."""

import torch
import torch.nn.functional as F
from torch import Tensor


class _Scatter(torch.autograd.Function):
    """rows[i] → out[index[i]], the rest zero. Its gradient is the gather, and the other way round: no accumulation."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """out[i] = rows[index[i]] for distinct indices."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = x.size(0)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        index = ctx.saved_tensors[0]
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, index, grad), None


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for distinct indices, [N, …] → [M, …], with a backward that copies instead of accumulating."""
    return _Gather.apply(x, index)


def band(length: int, window: int, device: torch.device) -> Tensor:
    """True where a query (row) may look at a key (column): itself and the window − 1 tokens before it, [length, length]."""
    back = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    return (back >= 0) & (back < window)


class Packed:
    """The layout of a batch of sequences laid end to end: N tokens in all, the i-th sequence `lengths[i]` long.

    Everything outside attention works on the N real tokens. Attention alone sees a rectangle [sequences, longest]:
    causal attention with the padding on the right needs no mask, since no real token looks to its right.
    """

    balance_loss: Tensor | None = None  # of each sequence, after a forward with experts

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu") -> None:
        self.lengths = lengths
        self.longest = self.context = max(lengths)  # positions that the rotary table must cover
        self.size = torch.tensor(lengths)
        self.starts = (self.size.cumsum(0) - self.size).to(device)
        sequence = torch.arange(len(lengths)).repeat_interleave(self.size)
        positions = torch.arange(int(self.size.sum())) - (self.size.cumsum(0) - self.size)[sequence]
        self.positions = positions.to(device)
        self.full = min(lengths) == self.longest  # a rectangle already
        self.index = (sequence * self.longest + positions).to(device)
        self._bands: dict[int, Tensor] = {}

    @property
    def ends(self) -> Tensor:
        """The row of each sequence's last token, [sequences]."""
        return self.starts + self.size.to(self.starts.device) - 1

    @property
    def prompt_lengths(self) -> Tensor:
        """For each token how long its sequence was when it was first seen: whole, [N]."""
        return self.size.repeat_interleave(self.size).to(self.starts.device)

    def means(self, x: Tensor) -> Tensor:
        """Each sequence's mean over its tokens, [N, …] → [sequences, …]."""
        size = self.size.to(x.device).view(-1, *(1,) * (x.dim() - 1))
        return self.pad(x).sum(1) / size

    def pad(self, x: Tensor) -> Tensor:
        """[N, …] → [sequences, longest, …], zeros on the right."""
        if not self.full:
            x = _Scatter.apply(x, self.index, len(self.lengths) * self.longest)
        return x.view(len(self.lengths), self.longest, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """[sequences, longest, …] → [N, …]; the inverse of `pad`."""
        x = x.flatten(0, 1)
        return x if self.full else _Gather.apply(x, self.index)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        """Causal attention inside each sequence, over the last `window` tokens (0: all).

        q: [N, heads, head_dim]; k, v: [N, kv heads, head_dim]; → like q.
        """
        q, k, v = (self.pad(x).transpose(1, 2) for x in (q, k, v))
        grouped = q.size(1) != k.size(1)
        if 0 < window < self.longest:
            if window not in self._bands:
                self._bands[window] = band(self.longest, window, q.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bands[window], enable_gqa=grouped)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.unpad(out.transpose(1, 2))
