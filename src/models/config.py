"""Sizes of a model, and where they are written: `params.json` (Meta, Mistral) or `config.json` (Hugging Face)."""

from dataclasses import dataclass, fields, replace

from src.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Everything the network's code needs to know. `head` is "lm" (vocabulary logits) or "score" (one scalar)."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int  # width of the feed-forward layer
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 2048  # the context it was made for
    tie_word_embeddings: bool = False
    head: str = "lm"
    family: str = "llama"

    def with_head(self, head: str) -> "ModelConfig":
        return replace(self, head=head)


SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps", "rope_theta")


def _required(raw: dict, key: str, where: str):
    if key not in raw:
        raise UserError(f"{where}: no {key!r}; it is needed to know the model's size")
    return raw[key]


def config_from_params(raw: dict, where: str) -> ModelConfig:
    """Read Meta's `params.json`, with Mistral's explicit sizes where it has them.

    Meta's ffn width: 2/3 of 4·dim, times `ffn_dim_multiplier`, rounded up to `multiple_of`.
    `vocab_size` −1 ("ask the tokenizer") stays −1 here; the checkpoint's tensors settle it.
    """
    dim, n_heads = _required(raw, "dim", where), _required(raw, "n_heads", where)
    hidden_dim = raw.get("hidden_dim")
    if hidden_dim is None:
        multiple = _required(raw, "multiple_of", where)
        hidden_dim = int((raw.get("ffn_dim_multiplier") or 1) * int(2 * 4 * dim / 3))
        hidden_dim = multiple * ((hidden_dim + multiple - 1) // multiple)
    return _checked(
        where,
        dim=dim,
        n_layers=_required(raw, "n_layers", where),
        n_heads=n_heads,
        n_kv_heads=raw.get("n_kv_heads") or n_heads,
        head_dim=raw.get("head_dim") or dim // n_heads,
        hidden_dim=hidden_dim,
        vocab_size=raw.get("vocab_size", -1),
        norm_eps=_required(raw, "norm_eps", where),
        rope_theta=raw.get("rope_theta", 10000.0),
        max_seq_len=raw.get("max_seq_len", 2048),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        head=raw.get("head", "lm"),
        family=raw.get("family", "llama"),
    )


def params_of(config: ModelConfig) -> dict:
    """The `params.json` written beside our shards: every size spelt out, in Meta's and Mistral's names."""
    return {field.name: getattr(config, field.name) for field in fields(config)}


def config_from_hf(raw: dict, where: str) -> ModelConfig:
    """Read a Hugging Face `config.json` of transformers 4 or 5 (`rope_theta` moved under `rope_parameters`)."""
    family = raw.get("model_type")
    if family != "llama":
        raise UserError(f"{where}: model_type is {family!r}; supported here: 'llama'")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{where}: rope scaling {kind!r} is not supported; only 'default'")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise UserError(f"{where}: {key} is true; Llama 1 and 2 have no biases, and this model would be wrong")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported")
    dim, n_heads = _required(raw, "hidden_size", where), _required(raw, "num_attention_heads", where)
    scored = any("SequenceClassification" in name for name in raw.get("architectures") or ())
    labels = len(raw["id2label"]) if "id2label" in raw else raw.get("num_labels", 2)
    if scored and labels != 1:
        raise UserError(f"{where}: a verifier has one score per sequence, this classifier has {labels} labels")
    return _checked(
        where,
        dim=dim,
        n_layers=_required(raw, "num_hidden_layers", where),
        n_heads=n_heads,
        n_kv_heads=raw.get("num_key_value_heads") or n_heads,
        head_dim=raw.get("head_dim") or dim // n_heads,
        hidden_dim=_required(raw, "intermediate_size", where),
        vocab_size=_required(raw, "vocab_size", where),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=raw.get("rope_theta") or rope.get("rope_theta", 10000.0),
        max_seq_len=raw.get("max_position_embeddings", 2048),
        tie_word_embeddings=raw.get("tie_word_embeddings", False) and not scored,
        head="score" if scored else "lm",
    )


def _checked(where: str, **values) -> ModelConfig:
    """Refuse what is no size at all, naming it: files come from anywhere."""
    for field in fields(ModelConfig):
        value, kind = values.get(field.name, field.default), field.type
        good = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
        if isinstance(value, bool) and kind is not bool:
            good = False
        smallest = -1 if field.name == "vocab_size" else 1
        if not good or (kind is int and value < smallest) or (kind is float and not value > 0):
            raise UserError(f"{where}: {field.name} is {value!r}; a {kind.__name__} above 0 is expected")
    config = ModelConfig(**values)
    if config.head not in ("lm", "score") or config.family != "llama":
        raise UserError(f"{where}: unknown head {config.head!r} or family {config.family!r}")
    if config.n_heads % config.n_kv_heads:
        raise UserError(f"{where}: {config.n_heads} heads cannot share {config.n_kv_heads} kv heads evenly")
    if config.head_dim % 2:
        raise UserError(f"{where}: head_dim {config.head_dim} is odd; rotary embeddings need pairs")
    return config
