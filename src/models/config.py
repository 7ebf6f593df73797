"""Sizes of a model, and `params.json`, where Meta, Mistral and we write them.

For `config.json` see hf_config.py.
"""

from dataclasses import Field, asdict, dataclass, fields, replace

from src.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for longer contexts.

    kind: linear, llama3 or yarn, by transformers' names.
    """

    kind: str
    factor: float
    original_max_seq_len: int
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # yarn: cos and sin are scaled by it


@dataclass(frozen=True)
class ModelConfig:
    """Everything the network's code needs to know.

    head: "lm" (vocabulary logits), "score" (one scalar) or "none" (a trunk, to be given one).
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int  # width of the feed-forward layer, or of one expert's
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 2048  # the context it was made for
    tie_word_embeddings: bool = False
    head: str = "lm"
    family: str = "llama"
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query's and key's head before the rotation
    sliding_window: int = 0  # tokens a token attends to, itself among them; 0 is all
    first_window_layer: int = 0  # layers below attend to all
    n_experts: int = 0
    experts_per_token: int = 0
    norm_topk_prob: bool = True  # the chosen experts' weights sum to one
    router_aux_loss_coef: float = 0.0
    use_logn_attn: bool = False  # Qwen v1, past max_seq_len and outside training: rotary.py
    use_dynamic_ntk: bool = False
    # Of the vocabulary, the ranges [start, stop) that the tokenizer in use has no tokens for: their
    # probability is 0. No part of the model's description.
    ids_without_text: tuple[tuple[int, int], ...] = ()

    def with_head(self, head: str) -> "ModelConfig":
        return replace(self, head=head)


def described() -> list[Field]:
    """The fields that are in a checkpoint's files."""
    return [field for field in fields(ModelConfig) if field.name != "ids_without_text"]


SIZES = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps",
    "rope_theta", "sliding_window", "n_experts", "experts_per_token", "qkv_bias",
)  # fmt: skip

# No model has more, and more would keep us building tables.
LARGEST = {"n_layers": 10_000, "n_experts": 10_000}
MAY_BE_ZERO = (
    "sliding_window",
    "first_window_layer",
    "n_experts",
    "experts_per_token",
    "router_aux_loss_coef",
)
_NO_DEFAULT = object()


def number(raw: dict, key: str, where: str, default=_NO_DEFAULT, kind: type = int):
    """A positive number of a config; `default` when it is not there or null."""
    value = raw.get(key)
    if value is None:
        if default is _NO_DEFAULT:
            raise UserError(f"{where}: no {key!r}; it is needed to know the model's size")
        return default
    allowed = (int, float) if kind is float else int
    if not isinstance(value, allowed) or isinstance(value, bool) or not 0 < value < 1e12:
        words = "number" if kind is float else "whole number"
        raise UserError(f"{where}: {key} is {value!r}; a positive {words} is expected")
    return value


def config_from_params(raw: dict, where: str) -> ModelConfig:
    """Read a `params.json`: Meta's (ffn width by rule), Mistral's (explicit sizes, `moe`), or ours.

    Ours has every field. Meta's ffn width is 2/3 of 4·dim, times `ffn_dim_multiplier`, rounded up
    to `multiple_of`. `vocab_size` −1 ("ask the tokenizer") stays −1 here; the checkpoint's tensors
    settle it.
    """
    dim, n_heads = number(raw, "dim", where), number(raw, "n_heads", where)
    hidden_dim = number(raw, "hidden_dim", where, None)
    mistral = hidden_dim is not None  # Meta's files never spell it out
    if hidden_dim is None:
        multiple = number(raw, "multiple_of", where)
        hidden_dim = int(number(raw, "ffn_dim_multiplier", where, 1, float) * int(2 * 4 * dim / 3))
        hidden_dim = multiple * ((hidden_dim + multiple - 1) // multiple)
    moe = raw.get("moe") or {}
    if not isinstance(moe, dict):
        raise UserError(f"{where}: moe is {moe!r}, a JSON object is expected")
    known = {field.name: raw[field.name] for field in described() if field.name in raw}
    scaling = known.pop("rope_scaling", None)
    values = {
        "head_dim": dim // n_heads,
        "n_kv_heads": n_heads,
        "vocab_size": -1,
        "family": "mixtral" if moe else "mistral" if mistral else "llama",
        # Mistral's own code, where its file does not say
        "rope_theta": 1e6 if mistral and raw.get("sliding_window") is None else 1e4,
        "rope_scaling": _read_scaling(scaling, raw, where),
        **{name: value for name, value in known.items() if value is not None},
        "hidden_dim": hidden_dim,
        "norm_eps": number(raw, "norm_eps", where, kind=float),
    }
    if moe:
        values["n_experts"] = number(moe, "num_experts", where)
        values["experts_per_token"] = number(moe, "num_experts_per_tok", where)
    return checked(where, **values)


def _read_scaling(ours, raw: dict, where: str) -> RopeScaling | None:
    """Our own `rope_scaling`, or Meta's `use_scaled_rope`.

    The latter is Llama 3.1's: factor 8 over 8192 tokens.
    """
    if ours is not None:
        if not isinstance(ours, dict) or set(ours) - {field.name for field in fields(RopeScaling)}:
            names = [field.name for field in fields(RopeScaling)]
            raise UserError(f"{where}: rope_scaling is {ours!r}, its fields are {names}")
        return checked_scaling(where, **ours)
    if not raw.get("use_scaled_rope"):
        return None
    factor = number(raw, "rope_scaling_factor", where, 8.0, float)
    return checked_scaling(where, kind="llama3", factor=factor, original_max_seq_len=8192)


def params_of(config: ModelConfig) -> dict:
    """The `params.json` written beside our shards.

    Every field is spelt out, in Meta's and Mistral's names.
    """
    values = asdict(config)
    return {field.name: values[field.name] for field in described()}


def checked_scaling(where: str, **values) -> RopeScaling:
    """A RopeScaling whose values make sense, or UserError."""
    if values.get("kind") not in ("linear", "llama3", "yarn"):
        raise UserError(
            f"{where}: rope scaling {values.get('kind')!r} is not supported; "
            "linear, llama3 and yarn are"
        )
    for name in ("factor", "original_max_seq_len"):
        number(values, name, where, kind=float)
    for name in values.keys() - {"kind"}:
        if not 1e-6 < number(values, name, where, kind=float) < 1e9:
            raise UserError(
                f"{where}: rope scaling's {name} is {values[name]!r}; "
                "a number that a model could have is expected"
            )
    return RopeScaling(**values)


def checked(where: str, **values) -> ModelConfig:
    """Refuse what is no size at all, naming it: files come from anywhere."""
    for field in described():
        if field.name == "rope_scaling":
            continue
        value, kind = values.get(field.name, field.default), field.type
        assert isinstance(kind, type)  # all others are int, float, str or bool
        is_good = isinstance(value, (int, float) if kind is float else kind)
        if isinstance(value, bool) and kind is not bool:
            is_good = False
        least = {"vocab_size": -1}.get(field.name, 0 if field.name in MAY_BE_ZERO else 1)
        largest = LARGEST.get(field.name, 10**9)
        if is_good and kind is int:
            is_good = least <= value <= largest
        if is_good and kind is float:
            is_good = 0 < value < 1e12 or (value == 0 and least == 0)
        if not is_good:
            wanted = {
                int: "a whole number",
                float: "a number",
                str: "a name",
                bool: "true or false",
            }[kind]
            if kind not in (str, bool):
                wanted += f" {'from' if least == 0 else 'above'} 0"
            raise UserError(f"{where}: {field.name} is {value!r}; {wanted} is expected")
    config = ModelConfig(**values)
    if config.head not in ("lm", "score", "none"):
        raise UserError(f"{where}: unknown head {config.head!r}; lm, score or none is expected")
    if config.n_heads % config.n_kv_heads:
        raise UserError(
            f"{where}: {config.n_heads} heads cannot share {config.n_kv_heads} kv heads evenly"
        )
    if config.rope_scaling and config.rope_scaling.kind == "yarn" and config.rope_theta <= 1:
        raise UserError(f"{where}: rope_theta is {config.rope_theta}; yarn needs one above 1")
    if (config.use_logn_attn or config.use_dynamic_ntk) and (
        config.max_seq_len < 2 or config.head_dim < 4
    ):
        raise UserError(
            f"{where}: seq_length {config.max_seq_len} and head_dim {config.head_dim}: "
            "logn and NTK need 2 and 4 at least"
        )
    if config.head_dim % 2:
        raise UserError(f"{where}: head_dim {config.head_dim} is odd; rotary embeddings need pairs")
    if (
        bool(config.n_experts) != bool(config.experts_per_token)
        or config.experts_per_token > config.n_experts
    ):
        raise UserError(
            f"{where}: {config.experts_per_token} experts per token of {config.n_experts} experts "
            "cannot be chosen"
        )
    return config
