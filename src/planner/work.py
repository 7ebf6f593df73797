"""What a rank has to do in a pass of a model: operations, bytes, exchanges; counted from sizes.

One micro-batch through some of a model's layers, at a tensor-parallel degree; seconds are made of
it by `cost.py`, and a machine's rates by `calibrate.py`.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache

from src.models.config import ModelConfig
from src.models.layout import layer_table, tensor_table
from src.planner.hardware import Rates
from src.trainer.activations import FP32


@dataclass(frozen=True)
class Work:
    """products, attention: operations; elements, weights: bytes; layers: that are begun; calls."""

    products: float = 0.0
    attention: float = 0.0
    elements: float = 0.0
    weights: float = 0.0
    layers: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.elements + other.elements,
            self.weights + other.weights,
            self.layers + other.layers,
            self.calls + other.calls,
        )

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * x for x in self.numbers))

    @property
    def numbers(self) -> tuple[float, ...]:
        """In the order of `Rates`."""
        names = self.products, self.attention, self.elements, self.weights
        return *names, self.layers, self.calls

    def seconds(self, rates: Rates) -> float:
        return (
            self.products / rates.products
            + self.attention / rates.attention
            + self.elements / rates.elements
            + self.weights / rates.weights
            + self.layers * rates.layer
            + self.calls * rates.call
        )


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of the rows that a model computes at a time.

    pairs: of a query and a key that it sees; needed: rows that the head computes, for a loss, a
    log-probability or a score; copied: tokens whose keys and values are put behind a shared
    prompt's; masked: those of the pairs that are of these sequences, seen or not.
    """

    tokens: float
    pairs: float
    needed: float
    copied: float = 0.0
    masked: float = 0.0

    def __truediv__(self, n: int) -> "MicroBatch":
        """Each rank's part, where n divide the tokens."""
        return MicroBatch(*(getattr(self, field.name) / n for field in fields(self)))

    @classmethod
    def of_rows(cls, rows: float, length: int, needed: float, window: int = 0) -> "MicroBatch":
        """So many rows of a length, each with some needed tokens."""
        seen = min(length, window) if window else length
        pairs = seen * (seen + 1) / 2 + (length - seen) * seen
        return cls(rows * length, rows * pairs, rows * needed)


@dataclass(frozen=True)
class Sizes:
    """A rank's part of a model at a tensor-parallel degree, in numbers.

    layer: weights of a layer that a token meets; qkv: those of them before attention; stored: all
    that are kept, `experts` of them in experts, of which a token meets the share `met`; q, k, f:
    widths of its queries, its keys, its feed-forward layer; head, embedding: whole tables' parts.
    """

    dim: int
    layer: float
    qkv: float
    experts: int
    met: float
    stored: int
    q: int
    k: int
    f: float
    head: int
    vocabulary: int
    embedding: int


@lru_cache(2**12)
def sizes_of(config: ModelConfig, tp: int) -> Sizes:
    table = layer_table(config)
    share = config.experts_per_token / config.n_experts if config.n_experts else 1.0
    met, stored, experts = 0.0, 0, 0
    for spec in table.values():
        numbers = math.prod(spec.local_shape(tp))
        stored += numbers
        experts += numbers * (len(spec.shape) == 3)
        met += (share if len(spec.shape) == 3 else 1.0) * numbers * (len(spec.shape) > 1)
    q, k = (table[f"attention.{name}.weight"].local_shape(tp)[0] for name in ("wq", "wk"))
    if config.n_experts:
        f = config.experts_per_token * table["feed_forward.experts.w1.weight"].local_shape(tp)[1]
    else:
        f = table["feed_forward.w1.weight"].local_shape(tp)[0]
    ends = tensor_table(config)
    embedding = math.prod(ends["tok_embeddings.weight"].local_shape(tp))
    head = config.dim if config.head == "score" else embedding
    vocabulary = -(-config.vocab_size // tp) if config.head == "lm" else 1
    qkv = config.dim * (q + 2 * k)
    layer = met, qkv, experts, share, stored, q, k, f
    return Sizes(config.dim, *layer, head, vocabulary, embedding)


def layers_forward(
    config: ModelConfig,
    sizes: Sizes,
    batch: MicroBatch,
    size: int,
    layers: int | None = None,
    has_last: bool = True,
    split: int = 1,
) -> Work:
    """So many layers on one micro-batch, or all. size: bytes of a number.

    has_last: whether the last one is among them, which past its attention has the needed rows
    alone; split: ranks that share its tokens.
    """
    layers = config.n_layers if layers is None else layers
    ends = has_last and not config.n_experts
    work = _layer(sizes, batch, batch.tokens, size, split) * (layers - ends)
    if ends:
        work = work + _layer(sizes, batch, min(batch.needed, batch.tokens), size, split)
    return work


def _layer(sizes: Sizes, batch: MicroBatch, rows: float, size: int, split: int) -> Work:
    """One layer. rows: tokens past its attention."""
    d, tokens = sizes.dim, batch.tokens
    # Norms read the sum and what is added to it, and write both; queries and keys are rotated; the
    # gate is multiplied.
    before = tokens * (4 * d / split + 2 * (sizes.q + sizes.k)) + batch.copied * 2 * sizes.k
    past = rows * (4 * d / split + 3 * sizes.f)
    return Work(
        2 * (sizes.qkv * tokens + (sizes.layer - sizes.qkv) * rows),
        4 * sizes.q * batch.pairs,
        size * (before + past),
        read_weights(sizes, rows) * size,
        1,
    )


def read_weights(sizes: Sizes, tokens: float) -> float:
    """Weights of a layer that so many tokens read: of experts those that one of them meets."""
    hit = 1 - (1 - sizes.met) ** max(tokens, 1) if sizes.experts else 1.0
    return sizes.stored - sizes.experts + sizes.experts * hit


def backward_of(forward: Work, sizes: Sizes) -> Work:
    """Layers' gradients: twice the products, attention once more, gradients summed in fp32."""
    return Work(
        2 * forward.products,
        2.5 * forward.attention,
        2 * forward.elements,
        2 * forward.weights + 2 * FP32 * sizes.stored * forward.layers,
        2 * forward.layers,
    )


def head_forward(sizes: Sizes, batch: MicroBatch, size: int) -> Work:
    """Logits of the needed rows, in fp32 a chunk at a time, and what is read off them."""
    rows = batch.needed
    logits = sizes.vocabulary > 1
    return Work(
        2 * sizes.head * rows,
        elements=logits * rows * sizes.vocabulary * (2 * size + 4 * FP32),
        weights=sizes.head * size,
        calls=1,
    )


def head_training(sizes: Sizes, batch: MicroBatch, size: int) -> Work:
    """Logits, and the gradients that are made of them while they are there."""
    forward = head_forward(sizes, batch, size)
    return Work(
        3 * forward.products,
        elements=2 * forward.elements,
        weights=3 * forward.weights + 2 * FP32 * sizes.head,
        calls=1,
    )


def decode_layer(sizes: Sizes, rows: float, context: float, size: int) -> Work:
    """One layer, a token for each of some sequences. context: tokens before it, on average."""
    d = sizes.dim
    cache = 2 * sizes.k * context * rows * size
    elements = rows * size * (8 * d + 2 * (sizes.q + sizes.k) + 3 * sizes.f) + cache
    return Work(
        2 * sizes.layer * rows,
        4 * sizes.q * context * rows,
        elements,
        read_weights(sizes, rows) * size,
        1,
    )


def decode_head(sizes: Sizes, rows: float, size: int) -> Work:
    """Logits of each sequence, and a token drawn from them."""
    return Work(
        2 * sizes.head * rows,
        elements=rows * sizes.vocabulary * (size + 4 * FP32),
        weights=sizes.head * size,
        calls=1,
    )
