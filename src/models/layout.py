"""The model's tensors as a table: full shape and how each is divided.

Loading, splitting and merging all follow it. Any degree fits: an axis that does not divide is
padded with zeros at its end, kv heads are repeated when there are more ranks than heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from src.models.config import ModelConfig


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's whole `shape`, and `dim`, the axis cut across ranks (None: each holds all of it).

    The cut falls between blocks of `unit` rows or columns (a head's). Query heads stay with their
    kv head: `kv_heads` is their number where blocks belong to one, and `repeated` marks the kv
    heads themselves, which several ranks hold when there are more ranks than kv heads.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    unit: int = 1
    kv_heads: int = 0
    repeated: bool = False

    def _blocks(self) -> int:
        """Blocks of the whole along the cut."""
        assert self.dim is not None
        return self.shape[self.dim] // self.unit

    def _share(self, n: int) -> int:
        """Blocks of one rank of `n`, padding included."""
        count = self._blocks()
        if n > self.kv_heads > 0:  # `ranks` share one kv head and divide its query heads
            ranks = n // self.kv_heads
            return 1 if self.repeated else -(-(count // self.kv_heads) // ranks)
        groups = self.kv_heads or count
        return -(-groups // n) * (count // groups)

    def local_range(self, rank: int, n: int) -> tuple[int, int]:
        """The [start, stop) of the whole along `dim` that this rank holds.

        It stands at the start of the rank's part; the rest of that is zeros.
        """
        share, last = self._share(n), self._blocks()
        first = rank * share
        if n > self.kv_heads > 0:
            # `ranks` neighbours share the kv head `head`; this one has their `turn`-th share of it
            ranks = n // self.kv_heads
            head, turn = divmod(rank, ranks)
            of_head = last // self.kv_heads
            first = head * of_head + (0 if self.repeated else turn * share)
            last = min(head + 1, self.kv_heads) * of_head
        first = min(first, last)
        return first * self.unit, min(first + share, last) * self.unit

    def local_shape(self, n: int) -> tuple[int, ...]:
        """Shape of each rank's part, the same for all."""
        return tuple(
            self._share(n) * self.unit if axis == self.dim else size
            for axis, size in enumerate(self.shape)
        )

    def copies(self, n: int) -> int:
        """How many ranks hold the same values: all of them, one, or those that share a kv head."""
        if self.dim is None:
            return n
        return n // self.kv_heads if self.repeated and n > self.kv_heads else 1

    def cut(self, whole: Tensor, rank: int, n: int) -> Tensor:
        """This rank's part of a whole tensor."""
        if self.dim is None:
            return whole
        start, stop = self.local_range(rank, n)
        return self.padded(whole.narrow(self.dim, start, stop - start), n)

    def padded(self, part: Tensor, n: int) -> Tensor:
        """A `local_range` with its zeros behind it."""
        shape = self.local_shape(n)
        if tuple(part.shape) == shape:
            return part
        assert self.dim is not None
        out = part.new_zeros(shape)
        out.narrow(self.dim, 0, part.size(self.dim)).copy_(part)
        return out

    def owners(self, n: int) -> list[tuple[int, int, int]]:
        """(rank, start, stop) of the parts that make up the whole, each row once, in order."""
        parts, done = [], 0
        for rank in range(n):
            start, stop = self.local_range(rank, n)
            if start == done and stop > start:  # not a copy, and not padding alone
                parts.append((rank, start, stop))
                done = stop
        return parts

    def join(self, parts: list[Tensor]) -> Tensor:
        """The whole tensor from every rank's part: the inverse of `cut`."""
        if self.dim is None:
            return parts[0]
        owners = self.owners(len(parts))
        return torch.cat(
            [parts[rank].narrow(self.dim, 0, stop - start) for rank, start, stop in owners],
            self.dim,
        )


def fill_padding(x: Tensor, real: int, dim: int, value: float = 0.0) -> Tensor:
    """x with `value` behind the first `real` entries along `dim`: a copy, if there is anything."""
    padding = x.size(dim) - real
    if not padding:
        return x
    behind = x.dim() - 1 - dim % x.dim()  # axes after `dim`, which F.pad counts from the last
    return F.pad(x.narrow(dim, 0, real), (0, 0) * behind + (0, padding), value=value)


def layer_table(config: ModelConfig) -> dict[str, TensorSpec]:
    """The tensors of one layer, by their (Meta's) names inside it."""
    c = config
    q_size, kv_size = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim

    def of_heads(shape: tuple[int, ...], dim: int, repeated: bool = False) -> TensorSpec:
        return TensorSpec(shape, dim, c.head_dim, c.n_kv_heads, repeated)

    table = {
        "attention_norm.weight": TensorSpec((c.dim,)),
        "attention.wq.weight": of_heads((q_size, c.dim), 0),
        "attention.wk.weight": of_heads((kv_size, c.dim), 0, repeated=True),
        "attention.wv.weight": of_heads((kv_size, c.dim), 0, repeated=True),
        "attention.wo.weight": of_heads((c.dim, q_size), 1),
    }
    if c.qkv_bias:
        table["attention.wq.bias"] = of_heads((q_size,), 0)
        table["attention.wk.bias"] = of_heads((kv_size,), 0, repeated=True)
        table["attention.wv.bias"] = of_heads((kv_size,), 0, repeated=True)
    if c.qk_norm:
        table["attention.q_norm.weight"] = TensorSpec((c.head_dim,))
        table["attention.k_norm.weight"] = TensorSpec((c.head_dim,))
    table["ffn_norm.weight"] = TensorSpec((c.dim,))
    if c.n_experts:  # experts are cut inside, each rank holds a part of every one
        table["feed_forward.gate.weight"] = TensorSpec((c.n_experts, c.dim))
        table["feed_forward.experts.w1.weight"] = TensorSpec((c.n_experts, c.hidden_dim, c.dim), 1)
        table["feed_forward.experts.w2.weight"] = TensorSpec((c.n_experts, c.dim, c.hidden_dim), 2)
        table["feed_forward.experts.w3.weight"] = TensorSpec((c.n_experts, c.hidden_dim, c.dim), 1)
    else:
        table["feed_forward.w1.weight"] = TensorSpec((c.hidden_dim, c.dim), 0)
        table["feed_forward.w2.weight"] = TensorSpec((c.dim, c.hidden_dim), 1)
        table["feed_forward.w3.weight"] = TensorSpec((c.hidden_dim, c.dim), 0)
    return table


def tensor_table(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of the model by its (Meta's) name, in the order in which they run."""
    c = config
    vocabulary = TensorSpec((c.vocab_size, c.dim), 0)
    # Meta cuts the embedding along its width; a tied one must be cut like the output layer it also
    # is.
    width = TensorSpec((c.vocab_size, c.dim), 1)
    table = {"tok_embeddings.weight": vocabulary if c.tie_word_embeddings else width}
    layer = layer_table(c)
    for i in range(c.n_layers):
        table |= {f"layers.{i}.{name}": spec for name, spec in layer.items()}
    table["norm.weight"] = TensorSpec((c.dim,))
    if c.head == "score":
        table["score.weight"] = TensorSpec((1, c.dim))
    elif c.head == "lm" and not c.tie_word_embeddings:
        table["output.weight"] = vocabulary
    return table
