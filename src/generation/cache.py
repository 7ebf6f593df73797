"""The key-value cache: a row per slot, written by prefill, read and extended by decoding.

Both are layouts in the sense of `src/models/transformer.py`: they say where tokens lie and do the attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from src.models.attention import Packed
from src.models.transformer import Transformer


class Cache:
    """Keys and values of every layer: [slots, kv heads of this rank, length, head_dim] each."""

    def __init__(self, model: Transformer, slots: int, length: int) -> None:
        weight = model.norm.weight
        kv_heads = model.kv_heads
        shape = (slots, kv_heads, length, model.config.head_dim)
        # zeros: what the mask hides is still multiplied by 0, and 0 · NaN of uninitialised memory is NaN
        self.keys = [weight.new_zeros(shape) for _ in model.layers]
        self.values = [weight.new_zeros(shape) for _ in model.layers]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot's first `length` positions to another slot."""
        for store in (*self.keys, *self.values):
            store[target, :, :length] = store[source, :, :length]


class Prefill(Packed):
    """Whole prompts end to end, whose keys and values are also kept: the i-th prompt's in slot `first_slot + i`."""

    def __init__(self, lengths: list[int], cache: Cache, first_slot: int, device: torch.device) -> None:
        super().__init__(lengths, device)
        self.cache, self.first_slot = cache, first_slot

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        slots = slice(self.first_slot, self.first_slot + len(self.lengths))
        for store, x in ((self.cache.keys, k), (self.cache.values, v)):
            store[layer][slots, :, : self.longest] = self.pad(x).transpose(1, 2)
        return super().attend(layer, q, k, v, window)


class Decode:
    """One new token for each of the first n slots.

    lengths: tokens already in each slot, [n]; context: > their max; prompt_lengths: those of them that were the prompt.
    """

    def __init__(self, cache: Cache, lengths: Tensor, context: int, prompt_lengths: Tensor) -> None:
        self.cache, self.positions, self.context, self.prompt_lengths = cache, lengths, context, prompt_lengths
        self.slots = torch.arange(lengths.size(0), device=lengths.device)
        self._masks: dict[int, Tensor] = {}

    def mask(self, window: int) -> Tensor:
        """Which keys each slot's new token sees: [n, 1, 1, context]. Made once for each window."""
        if window not in self._masks:
            keys, lengths = torch.arange(self.context, device=self.positions.device), self.positions.unsqueeze(1)
            visible = keys <= lengths
            if window:
                visible &= keys > lengths - window
            self._masks[window] = visible[:, None, None]
        return self._masks[window]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slots, :, self.positions] = k
        values[self.slots, :, self.positions] = v
        n, kv_heads = q.size(0), k.size(1)
        # The heads that share a kv head stand in as its query positions: no key or value is repeated.
        q = q.unflatten(1, (kv_heads, -1))
        keys, values = keys[:n, :, : self.context], values[:n, :, : self.context]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask(window)).flatten(1, 2)
