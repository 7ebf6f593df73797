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


LARGEST = {"n_layers": 10_000}  # what no model has, and would keep us building tables
_NO_DEFAULT = object()


def _number(raw: dict, key: str, where: str, default=_NO_DEFAULT, kind: type = int):
    """A positive number of a config; `default` when it is not there or null."""
    value = raw.get(key)
    if value is None:
        if default is _NO_DEFAULT:
            raise UserError(f"{where}: no {key!r}; it is needed to know the model's size")
        return default
    allowed = (int, float) if kind is float else int
    if not isinstance(value, allowed) or isinstance(value, bool) or not 0 < value < 1e12:
        raise UserError(f"{where}: {key} is {value!r}; a positive {'number' if kind is float else 'whole number'} is expected")
    return value


def _refuse(raw: dict, reasons: dict[str, str], where: str) -> None:
    for key, reason in reasons.items():
        if raw.get(key):
            raise UserError(f"{where}: {key} is set: {reason}, and this model would be wrong without it")


def config_from_params(raw: dict, where: str) -> ModelConfig:
    """Read Meta's `params.json`, with Mistral's explicit sizes where it has them.

    Meta's ffn width: 2/3 of 4·dim, times `ffn_dim_multiplier`, rounded up to `multiple_of`.
    `vocab_size` −1 ("ask the tokenizer") stays −1 here; the checkpoint's tensors settle it.
    """
    _refuse(raw, {"use_scaled_rope": "rope scaling is not supported", "moe": "experts are not supported"}, where)
    dim, n_heads = _number(raw, "dim", where), _number(raw, "n_heads", where)
    hidden_dim = _number(raw, "hidden_dim", where, None)
    if hidden_dim is None:
        multiple = _number(raw, "multiple_of", where)
        hidden_dim = int(_number(raw, "ffn_dim_multiplier", where, 1, float) * int(2 * 4 * dim / 3))
        hidden_dim = multiple * ((hidden_dim + multiple - 1) // multiple)
    return _checked(
        where,
        dim=dim,
        n_layers=_number(raw, "n_layers", where),
        n_heads=n_heads,
        n_kv_heads=_number(raw, "n_kv_heads", where, n_heads),
        head_dim=_number(raw, "head_dim", where, dim // n_heads),
        hidden_dim=hidden_dim,
        vocab_size=raw.get("vocab_size", -1),
        norm_eps=_number(raw, "norm_eps", where, kind=float),
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
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = raw.get(key) or {}
        if not isinstance(part, dict):
            raise UserError(f"{where}: {key} is {part!r}, a JSON object is expected")
        kind = part.get("rope_type", part.get("type", "default"))
        if kind != "default":
            raise UserError(f"{where}: {key} asks for rope scaling {kind!r}, which is not supported; only 'default'")
        rope |= part
    unsupported = "Llama 1 and 2 have no biases"
    quantised = "weights are quantised, which is not supported"
    _refuse(raw, {"attention_bias": unsupported, "mlp_bias": unsupported, "quantization_config": quantised}, where)
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported")
    dim, n_heads = _number(raw, "hidden_size", where), _number(raw, "num_attention_heads", where)
    architectures, labels = raw.get("architectures") or [], raw.get("id2label", raw.get("num_labels", 2))
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UserError(f"{where}: architectures is {architectures!r}, a list of names is expected")
    scored = any("SequenceClassification" in name for name in architectures)
    labels = len(labels) if isinstance(labels, (dict, list)) else labels
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"{where}: tie_word_embeddings is {tied!r}, true or false is expected")
    if scored and labels != 1:
        raise UserError(f"{where}: a verifier has one score per sequence, this classifier has {labels} labels")
    return _checked(
        where,
        dim=dim,
        n_layers=_number(raw, "num_hidden_layers", where),
        n_heads=n_heads,
        n_kv_heads=_number(raw, "num_key_value_heads", where, n_heads),
        head_dim=_number(raw, "head_dim", where, dim // n_heads),
        hidden_dim=_number(raw, "intermediate_size", where),
        vocab_size=_number(raw, "vocab_size", where),
        norm_eps=_number(raw, "rms_norm_eps", where, 1e-6, float),
        rope_theta=_number(rope | raw, "rope_theta", where, _number(rope, "rope_theta", where, 1e4, float), float),
        max_seq_len=_number(raw, "max_position_embeddings", where, 2048),
        tie_word_embeddings=tied and not scored,
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
        largest = LARGEST.get(field.name, 10**9)
        if not good or (kind is int and not smallest <= value <= largest) or (kind is float and not 0 < value < 1e12):
            raise UserError(f"{where}: {field.name} is {value!r}; a {kind.__name__} above 0 is expected")
    config = ModelConfig(**values)
    if config.head not in ("lm", "score") or config.family != "llama":
        raise UserError(f"{where}: unknown head {config.head!r} or family {config.family!r}")
    if config.n_heads % config.n_kv_heads:
        raise UserError(f"{where}: {config.n_heads} heads cannot share {config.n_kv_heads} kv heads evenly")
    if config.head_dim % 2:
        raise UserError(f"{where}: head_dim {config.head_dim} is odd; rotary embeddings need pairs")
    return config
