"""The key-value cache: pages of a few tokens each, which sequences take as they grow.

A table says which pages are a sequence's; sequences that begin alike share what they have in
common. `Chunk` and `Decode` are layouts in the sense of `src/models/transformer.py`: they say where
tokens lie, write their keys and values, and do the attention.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from src.kernels import cpu, runtime
from src.kernels.attention import paged_attention, plain_paged_attention
from src.kernels.rotation import rotate_and_write
from src.models.attention import Packed
from src.models.elementwise import HeadNorm
from src.models.transformer import Transformer

PAGE = 16  # tokens


def pages_for(tokens: int) -> int:
    """How many pages so many tokens take."""
    return -(-tokens // PAGE)


class Cache:
    """Keys and values of every layer: [pages, kv heads of this rank, PAGE, head_dim] each.

    They are allocated once; on the CPU the system gives memory to what is used. Page 0 is nobody's:
    rows that only fill up a step write there.
    """

    def __init__(self, model: Transformer, pages: int) -> None:
        shape = (pages, model.kv_heads, PAGE, model.config.head_dim)
        self.keys = [model.norm.weight.new_empty(shape) for _ in model.layers]
        self.values = [model.norm.weight.new_empty(shape) for _ in model.layers]
        self.kv_heads = model.kv_heads

    @staticmethod
    def page_bytes(model: Transformer) -> int:
        """What one page takes on this rank, in all layers."""
        numbers = 2 * len(model.layers) * model.kv_heads * PAGE * model.config.head_dim
        return numbers * model.dtype.itemsize

    def rows(self, pages: Tensor, positions: Tensor) -> Tensor:
        """Where tokens lie in a layer's store seen as [pages · kv heads · PAGE, head_dim].

        pages: the page of each token, [N]; positions: in its sequence, [N] → [N · kv heads].
        """
        heads = torch.arange(self.kv_heads, device=pages.device)
        heads = pages.unsqueeze(1) * self.kv_heads + heads  # [N, kv heads]
        return (heads * PAGE + (positions % PAGE).unsqueeze(1)).flatten()

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v: [N, kv heads, head_dim]; rows: of `Cache.rows`."""
        for store, x in ((self.keys[layer], k), (self.values[layer], v)):
            store.view(-1, store.size(-1)).index_copy_(0, rows, x.flatten(0, 1))

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Whole pages to other pages."""
        for store in (*self.keys, *self.values):
            store.index_copy_(0, targets, store.index_select(0, sources))


class Chunk(Packed):
    """The next tokens of some sequences, end to end; what came before is in their pages.

    The new keys and values go to the pages first, so that a sequence may go on from what another
    one of the same chunk writes.
    """

    is_whole = False

    def __init__(
        self,
        cache: Cache,
        lengths: list[int],
        before: list[int],
        pages: list[list[int]],
        prompts: list[int],
        device: torch.device,
    ) -> None:
        """lengths: new tokens of each sequence; before: tokens in its pages already.

        pages: its pages, for all of these; prompts: how long it was when it was first seen.
        """
        super().__init__(lengths, device, before=before)
        self.cache, self.prompts = cache, torch.tensor(prompts)
        self.context = max(self.context, *prompts)
        # The pages of those that go on from something, and of each new token.
        wholes = [pages_for(b + n) if b else 0 for b, n in zip(before, lengths)]
        flat = [page for row, n in zip(pages, wholes) for page in row[:n]]
        self.pages = torch.tensor(flat, dtype=torch.long).to(device).split(wholes)
        of_token = [
            torch.tensor(row)[torch.arange(start, start + n) // PAGE]
            for row, start, n in zip(pages, before, lengths)
        ]
        self.rows = cache.rows(torch.cat(of_token).to(device), self.positions)

    @property
    def prompt_lengths(self) -> Tensor:
        return self.prompts.repeat_interleave(self.size).to(self.starts.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        self.cache.write(layer, self.rows, k, v)
        return super().attend(layer, q, k, v, window)

    def with_prefixes(self, layer: int, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        def whole(store: Tensor, new: Tensor) -> list[Tensor]:
            by_head = store.transpose(0, 1)  # [kv heads, pages, PAGE, head_dim]
            return [
                # What is new has been written as well: [tokens, kv heads, head_dim], one copy.
                by_head[:, pages].flatten(1, 2)[:, : n + len(x)].transpose(0, 1).to(x.dtype)
                if n
                else x
                for pages, n, x in zip(self.pages, self.before, new.split(self.lengths))
            ]

        return whole(self.cache.keys[layer], k), whole(self.cache.values[layer], v)


class Decode:
    """One new token for each of n sequences.

    table: the pages of each, [n, pages]; lengths: tokens already in them, [n]; prompt_lengths:
    those of them that were the prompt; context: more than any of the lengths.
    """

    is_whole = False

    def __init__(
        self, cache: Cache, table: Tensor, lengths: Tensor, prompt_lengths: Tensor, context: int
    ) -> None:
        self.cache, self.table, self.context = cache, table, context
        lengths = lengths.contiguous()  # which may be a column of a larger state
        self.positions, self.prompt_lengths = lengths, prompt_lengths
        self.lengths = lengths + 1  # with the new token
        store = cache.keys[0]
        self.kernels: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None
        if runtime.takes(store):
            self.kernels = rotate_and_write, paged_attention
        elif cpu.takes(store) and table.size(0):
            self.kernels = cpu.rotate_and_write, cpu.paged_attention
        self.fuses = self.kernels is not None
        if self.fuses:
            return  # the kernels find the places by themselves
        page = table.gather(1, (lengths // PAGE).unsqueeze(1)).squeeze(1).long()
        self.rows = cache.rows(page, lengths)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        self.cache.write(layer, self.rows, k, v)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return plain_paged_attention(q, keys, values, self.table, self.lengths, window)

    def attend_joined(
        self,
        layer: int,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        norms: tuple[HeadNorm | None, HeadNorm | None],
        window: int = 0,
    ) -> Tensor:
        """What `attend` does, and what comes before it, in two kernels; see `rotate_and_write`.

        qkv: [n, (heads + 2 kv heads) · head_dim]; norms: of the queries' and of the keys' heads.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        assert self.kernels is not None
        write, attention = self.kernels
        q_norm, k_norm = norms
        q = write(
            qkv,
            rotary,
            keys,
            values,
            self.table,
            self.positions,
            qkv.size(1) // keys.size(-1) - 2 * self.cache.kv_heads,
            self.cache.kv_heads,
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            q_norm.eps if q_norm else 0.0,
        )
        return attention(q, keys, values, self.table, self.lengths, window)
