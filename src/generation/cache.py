"""The key-value cache: a row per slot, written by prefill, read and extended by decoding.

Both are layouts in the sense of `src/models/transformer.py`: they say where tokens lie and do the
attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from src.models.attention import Packed
from src.models.transformer import Transformer


class Cache:
    """Keys and values of every layer: [slots, kv heads of this rank, length, head_dim] each.

    They are allocated once.
    """

    def __init__(self, model: Transformer, slots: int, length: int) -> None:
        shape = (slots, model.kv_heads, length, model.config.head_dim)
        # zeros: what the mask hides is still multiplied by 0, and uninitialised memory may hold NaN
        self.keys = [model.norm.weight.new_zeros(shape) for _ in model.layers]
        self.values = [model.norm.weight.new_zeros(shape) for _ in model.layers]
        self.kv_heads, self.length = model.kv_heads, length

    def copy(self, sources: Tensor | int, targets: Tensor | int, length: int) -> None:
        """The first `length` positions of some slots to other slots."""
        for store in (*self.keys, *self.values):
            store[targets, :, :length] = store[sources, :, :length]


class Prefill(Packed):
    """Whole prompts end to end, whose keys and values are also kept.

    The i-th prompt's are in slot `first_slot + i`.
    """

    def __init__(
        self, lengths: list[int], cache: Cache, first_slot: int, device: torch.device
    ) -> None:
        super().__init__(lengths, device)
        self.cache, self.first_slot = cache, first_slot

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        slots = slice(self.first_slot, self.first_slot + len(self.lengths))
        for store, x in ((self.cache.keys, k), (self.cache.values, v)):
            # [N, kv heads, head_dim] → [slots, kv heads, longest, head_dim]
            store[layer][slots, :, : self.longest] = self.pad(x).transpose(1, 2)
        return super().attend(layer, q, k, v, window)


class Decode:
    """One new token for each of the first n slots.

    lengths: tokens already in each slot, [n]; prompt_lengths: those of them that were the prompt;
    contexts: neighbouring slots read as much of the cache as the longest of them needs:
    (first slot, slot after the last, positions > their lengths).
    """

    def __init__(
        self,
        cache: Cache,
        lengths: Tensor,
        prompt_lengths: Tensor,
        contexts: list[tuple[int, int, int]],
    ) -> None:
        self.cache, self.contexts = cache, contexts
        self.positions, self.prompt_lengths = lengths, prompt_lengths
        self.context = max(context for _, _, context in contexts)
        # Where each new key lies in the flattened cache, [slots · kv heads · length, head_dim].
        n_heads = lengths.size(0) * cache.kv_heads
        heads = torch.arange(n_heads, device=lengths.device).view(-1, cache.kv_heads)
        self.rows = (heads * cache.length + lengths.unsqueeze(1)).flatten()
        # by window: the same for all layers that have it
        self._masks: dict[int, list[Tensor]] = {}

    def masks(self, window: int, dtype: torch.dtype) -> list[Tensor]:
        """What is added to each slot's scores, per context: [slots, 1, 1, positions].

        0 for the keys that its new token sees, else minus infinity.
        """
        if window not in self._masks:
            keys = torch.arange(self.context, device=self.positions.device)
            lengths = self.positions.unsqueeze(1)
            hidden = keys > lengths  # [slots, positions]
            if window:
                hidden |= keys <= lengths - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
            self._masks[window] = [
                mask[first:end, ..., :context] for first, end, context in self.contexts
            ]
        return self._masks[window]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        for store, x in ((keys, k), (values, v)):
            store.view(-1, store.size(-1)).index_copy_(0, self.rows, x.flatten(0, 1))
        # The heads that share a kv head stand in as its query positions: no key or value is
        # repeated. [slots, heads, head_dim] → [slots, kv heads, queries, head_dim]
        q = q.unflatten(1, (k.size(1), -1))
        parts = []
        for (first, end, context), mask in zip(self.contexts, self.masks(window, q.dtype)):
            seen_keys = keys[first:end, :, :context]
            seen_values = values[first:end, :, :context]
            parts.append(attention(q[first:end], seen_keys, seen_values, mask))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q kᵀ / √head_dim + mask) v.

    q: [n, kv heads, queries, head_dim]; k, v: [n, kv heads, positions, head_dim]. On the CPU in
    fp32 a decode step is faster by two plain products than by PyTorch's fused kernel
    (docs/performance.md).
    """
    if q.device.type == "cpu" and q.dtype == torch.float32:
        scores = torch.matmul(q * q.size(-1) ** -0.5, k.transpose(-1, -2)).add_(mask)
        return torch.matmul(scores.softmax(-1), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
