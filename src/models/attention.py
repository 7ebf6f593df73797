"""Sequences laid end to end, without padding, each attending to itself alone."""

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Scatter(torch.autograd.Function):
    """rows[i] → out[index[i]], the rest zero.

    Its gradient is the gather, and the other way round: no accumulation.
    """

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


def gather_rows(x: Tensor, index: Tensor | None) -> Tensor:
    """x[index] for distinct indices, [N, …] → [M, …]; None: all of x.

    Backward copies instead of accumulating.
    """
    return x if index is None else _Gather.apply(x, index)


def band(queries: range, keys: int, window: int, device: torch.device) -> Tensor:
    """True where a query (row) may look at a key (column): [queries, keys].

    It sees itself and what is before it, at most `window` in all (0: any).
    """
    query = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
    back = query - torch.arange(keys, device=device)
    return (back >= 0) & (back < window) if window else back >= 0


def flash_takes(head_dim: int) -> bool:
    """Whether FlashAttention has kernels for heads of this width."""
    return head_dim % 8 == 0 and head_dim <= 256


class Packed:
    """The layout of a batch of sequences laid end to end, the i-th `lengths[i]` long: N tokens.

    prefixes: for each sequence the number of the one that it goes on from (a prompt, whole, with no
    prefix of its own), or None. Its tokens then see that prompt's too, which is computed once for
    all that go on from it. before: how long each one's prefix is, where that lies elsewhere; see
    `with_prefixes`.
    """

    fuses = False  # whether it takes queries, keys and values as the product gives them
    is_whole = True  # whether the tokens are whole sequences, as in training and scoring
    balance_loss: Tensor | None = None  # of each sequence, after a forward with experts

    def __init__(
        self,
        lengths: list[int],
        device: torch.device | str = "cpu",
        prefixes: list[int | None] | None = None,
        before: list[int] | None = None,
    ) -> None:
        self.lengths, self.prefixes = lengths, prefixes or [None] * len(lengths)
        if before is None:
            before = [0 if p is None else lengths[p] for p in self.prefixes]
        self.before = before  # tokens of each sequence's prefix
        self.longest = max(lengths, default=0)
        # positions that the rotary table must cover
        self.context = max(map(int.__add__, lengths, before), default=0)
        self.size = torch.tensor(lengths, dtype=torch.long)
        starts = self.size.cumsum(0) - self.size
        self.starts = starts.to(device)
        sequence = torch.arange(len(lengths)).repeat_interleave(self.size)  # of each token, [N]
        positions = torch.arange(int(self.size.sum())) - starts[sequence]
        self.positions = (positions + torch.tensor(before, dtype=torch.long)[sequence]).to(device)
        self.full = min(lengths, default=0) == self.longest  # a rectangle already
        self.index = (sequence * self.longest + positions).to(device)  # places in that rectangle

    @property
    def ends(self) -> Tensor:
        """The row of each sequence's last token, [sequences]."""
        return self.starts + self.size.to(self.starts.device) - 1

    @property
    def prompt_lengths(self) -> Tensor:
        """For each token how long its sequence was when it was first seen, [N].

        That is whole, prefix and all.
        """
        whole = self.size + torch.tensor(self.before)
        return whole.repeat_interleave(self.size).to(self.starts.device)

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
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and flash_takes(q.size(-1)):
            return self._variable_length(layer, q, k, v, window)
        keys, values = self.with_prefixes(layer, k.float(), v.float())
        return self._one_by_one(q.float(), keys, values, window).to(q.dtype)

    def with_prefixes(self, layer: int, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Each sequence's keys, and values, its prefix's first: [tokens, kv heads, head_dim]."""

        def whole(parts: tuple[Tensor, ...]) -> list[Tensor]:
            return [
                x if p is None else torch.cat((parts[p], x)) for x, p in zip(parts, self.prefixes)
            ]

        return whole(k.split(self.lengths)), whole(v.split(self.lengths))

    def _one_by_one(
        self, q: Tensor, keys: list[Tensor], values: list[Tensor], window: int
    ) -> Tensor:
        """Sequence by sequence and in fp32.

        On the CPU that is quicker than a rectangle with padding, or bf16 (docs/performance.md).
        """
        outputs = []
        for part, k, v, before in zip(q.split(self.lengths), keys, values, self.before):
            # [tokens, heads, head_dim] → [1, heads, tokens, head_dim]
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (part, k, v))
            # The kernel's own causal mask does where queries and keys are the same tokens and the
            # window holds all of them.
            plain = not before and not 0 < window < k.size(2)
            mask = None if plain else band(range(before, k.size(2)), k.size(2), window, q.device)
            grouped = q.size(1) != k.size(1)
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain, enable_gqa=grouped)
            outputs.append(out[0].transpose(0, 1))  # → [tokens, heads, head_dim]
        return torch.cat(outputs)

    def _variable_length(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """PyTorch's own kernel for packed sequences.

        Queries stand at the end of their keys, prefix and all.
        """
        from torch.nn.attention.varlen import varlen_attn  # a second, which the CPU need not spend

        queries, keys = self.bounds
        if any(self.before):
            k, v = map(torch.cat, self.with_prefixes(layer, k, v))
        # keys to the left and to the right that a query sees; -1: all
        options: dict[str, Any] = {"window_size": (window - 1 if window else -1, 0)}
        # Query heads share a kv head. Older PyTorch has no flag for it, and its kernel takes them.
        if q.size(1) != k.size(1) and "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        out = varlen_attn(q, k, v, queries, keys, self.longest, self.context, **options)
        assert isinstance(out, Tensor)  # more comes only where it is asked for
        return out

    @functools.cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Where each sequence's queries and keys begin, and the last one's end, [sequences + 1].

        Made once for all layers: a copy from the host waits for the GPU.
        """
        queries = F.pad(self.size.cumsum(0), (1, 0)).int()
        whole = self.size + torch.tensor(self.before, dtype=torch.long)
        keys = F.pad(whole.cumsum(0), (1, 0)).int()
        return queries.to(self.starts.device), keys.to(self.starts.device)
