"""The model's tensors as a table: full shape and how each is divided. Loading, splitting and merging all follow it."""

from dataclasses import dataclass

from src.errors import UserError
from src.models.config import ModelConfig


@dataclass(frozen=True)
class TensorSpec:
    """`shape` is the whole tensor's; `dim` the axis cut across ranks (None: every rank holds all of it).

    The cut falls between blocks of `unit` rows or columns (a head's), `what` names them in errors.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    unit: int = 1
    what: str = ""

    def local_range(self, rank: int, n: int) -> tuple[int, int]:
        """The [start, stop) of this rank along `dim`."""
        share = self.shape[self.dim] // n
        return rank * share, (rank + 1) * share

    def local_shape(self, n: int) -> tuple[int, ...]:
        return tuple(size // n if axis == self.dim else size for axis, size in enumerate(self.shape))


def tensor_table(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of the model by its (Meta's) name, in the order in which they run."""
    c = config
    # Meta cuts the embedding along its width; a tied one must be cut like the output layer it also is.
    vocabulary = TensorSpec((c.vocab_size, c.dim), 0, what="vocabulary entries")
    embedding = vocabulary if c.tie_word_embeddings else TensorSpec((c.vocab_size, c.dim), 1, what="embedding columns")
    layer = {
        "attention_norm.weight": TensorSpec((c.dim,)),
        "attention.wq.weight": TensorSpec((c.n_heads * c.head_dim, c.dim), 0, c.head_dim, "heads"),
        "attention.wk.weight": TensorSpec((c.n_kv_heads * c.head_dim, c.dim), 0, c.head_dim, "kv heads"),
        "attention.wv.weight": TensorSpec((c.n_kv_heads * c.head_dim, c.dim), 0, c.head_dim, "kv heads"),
        "attention.wo.weight": TensorSpec((c.dim, c.n_heads * c.head_dim), 1, c.head_dim, "heads"),
        "ffn_norm.weight": TensorSpec((c.dim,)),
        "feed_forward.w1.weight": TensorSpec((c.hidden_dim, c.dim), 0, what="ffn columns"),
        "feed_forward.w2.weight": TensorSpec((c.dim, c.hidden_dim), 1, what="ffn columns"),
        "feed_forward.w3.weight": TensorSpec((c.hidden_dim, c.dim), 0, what="ffn columns"),
    }
    table = {"tok_embeddings.weight": embedding}
    for i in range(c.n_layers):
        table |= {f"layers.{i}.{name}": spec for name, spec in layer.items()}
    table["norm.weight"] = TensorSpec((c.dim,))
    if c.head == "score":
        table["score.weight"] = TensorSpec((1, c.dim))
    elif not c.tie_word_embeddings:
        table["output.weight"] = vocabulary
    return table


def check_degree(config: ModelConfig, n: int, flag: str = "--model_parallel_size") -> None:
    """Raise UserError, naming every count that `n` ranks cannot share evenly, and the degrees that fit."""
    counts = {s.what: s.shape[s.dim] // s.unit for s in tensor_table(config).values() if s.dim is not None}
    bad = [f"{count} {what}" for what, count in counts.items() if count % n]
    if bad:
        fits = [d for d in range(1, min(counts.values()) + 1) if all(count % d == 0 for count in counts.values())]
        raise UserError(f"{flag} {n} does not divide this model's {', '.join(bad)}; degrees that fit: {fits}")
