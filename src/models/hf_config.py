"""Hugging Face's `config.json`, read into a ModelConfig and written from one.

And the families, by its `model_type`.
"""

import math
from collections.abc import Mapping

from src.errors import UserError
from src.models.config import ModelConfig, RopeScaling, checked, checked_scaling, number
from src.models.family import Family
from src.models.llama import LLAMA
from src.models.mistral import MISTRAL
from src.models.mixtral import MIXTRAL
from src.models.qwen import QWEN, QWEN2, QWEN3, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen": QWEN,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}
PRESETS = {name: config for family in FAMILIES.values() for name, config in family.presets.items()}

KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_seq_len": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
    "sliding_window": "sliding_window",
    "first_window_layer": "max_window_layers",
    "n_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "norm_topk_prob": "norm_topk_prob",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "use_logn_attn": "use_logn_attn",
    "use_dynamic_ntk": "use_dynamic_ntk",
}
REFUSED = {
    "attention_bias": "these models have no bias on the attention's output",
    "mlp_bias": "these models have no bias in the feed-forward layers",
    "quantization_config": "quantised files are not supported: load the original weights, "
    "with --quantize if need be",
    "mlp_only_layers": "a mixture of dense and expert layers is not supported",
}
# our RopeScaling's field → Hugging Face's key
SCALING_KEYS = {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
# how transformers' classes end, by our head
_ENDINGS = {"lm": "ForCausalLM", "score": "ForSequenceClassification", "none": "Model"}


def family_written(config: ModelConfig) -> tuple[str, Family]:
    """Name and family that a Hugging Face folder of this model is written as.

    They are its own but for Qwen v1.
    """
    name = FAMILIES[config.family].written_as or config.family
    return name, FAMILIES[name]


def config_from_hf(raw: dict, where: str) -> ModelConfig:
    """Read a `config.json` of transformers 4 or 5. Raises UserError.

    In 5 `rope_theta` moved under `rope_parameters`.
    """
    name = raw.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise UserError(f"{where}: model_type is {name!r}; supported: {', '.join(FAMILIES)}")
    for key, reason in REFUSED.items():
        if raw.get(key):
            raise UserError(
                f"{where}: {key} is set: {reason}, and this model would be wrong without it"
            )
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported")
    if raw.get("decoder_sparse_step", 1) != 1:
        raise UserError(
            f"{where}: decoder_sparse_step is {raw['decoder_sparse_step']!r}; "
            "only 1 (experts everywhere) is supported"
        )
    rope = _rope(raw, where)
    raw = raw | {key: value for key, value in rope.items() if raw.get(key) is None}
    # transformers 4 and 5 have different names for it
    raw.setdefault("num_experts", raw.get("num_local_experts"))
    raw.setdefault("num_local_experts", raw.get("num_experts"))

    def read(field: str, default=None, kind: type = int):
        key = family.keys.get(field, KEYS[field])
        return number(raw, key, where, family.defaults.get(field, default), kind)

    sizes = {
        field: read(field) for field in ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size")
    }
    for field, value in sizes.items():
        if value is None:
            number(raw, family.keys.get(field, KEYS[field]), where)  # says that it is needed
    if sizes["hidden_dim"] % family.ffn_factor:
        raise UserError(
            f"{where}: intermediate_size {sizes['hidden_dim']} is not {family.ffn_factor} times "
            "a whole width"
        )
    sizes["hidden_dim"] //= family.ffn_factor
    max_seq_len = read("max_seq_len", 2048)
    values = {
        **sizes,
        "n_kv_heads": read("n_kv_heads", sizes["n_heads"]),
        "head_dim": read("head_dim", sizes["dim"] // sizes["n_heads"]),
        "norm_eps": read("norm_eps", 1e-6, float),
        "rope_theta": read("rope_theta", 1e4, float),
        "max_seq_len": max_seq_len,
        "family": name,
        "rope_scaling": _scaling(rope, max_seq_len, where),
        **_head(raw, where),
        **_window(raw, family, sizes["n_layers"], where),
        **family.has,
    }
    if "n_experts" in family.keys:
        values["n_experts"] = read("n_experts")
        values["experts_per_token"] = read("experts_per_token")
        coefficient = raw.get("router_aux_loss_coef")
        values["router_aux_loss_coef"] = (
            family.defaults["router_aux_loss_coef"] if coefficient is None else coefficient
        )
        values["norm_topk_prob"] = raw.get(
            "norm_topk_prob", family.defaults.get("norm_topk_prob", True)
        )
    if name == "qwen":
        if raw.get("no_bias", True) is not True:
            raise UserError(
                f"{where}: no_bias is {raw['no_bias']!r}; "
                "only Qwen with a bias on c_attn alone is supported"
            )
        values |= {field: raw.get(field, True) for field in ("use_logn_attn", "use_dynamic_ntk")}
    return checked(where, **values)


def _rope(raw: dict, where: str) -> dict:
    rope: dict = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = raw.get(key) or {}
        if not isinstance(part, dict):
            raise UserError(f"{where}: {key} is {part!r}, a JSON object is expected")
        rope |= part
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) not in (None, 1):
        raise UserError(
            f"{where}: partial_rotary_factor is not 1; only whole heads are rotated here"
        )
    # transformers 5 takes it from beside them, too
    key = "original_max_position_embeddings"
    if rope.get(key) and raw.get(key) and rope[key] != raw[key]:
        raise UserError(
            f"{where}: {key} is {raw[key]!r}, and {rope[key]!r} in the rope parameters; take the "
            "wrong one out"
        )
    rope[key] = rope.get(key) or raw.get(key)
    return rope


def _scaling(rope: dict, max_seq_len: int, where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    values = {
        ours: rope[theirs] for ours, theirs in SCALING_KEYS.items() if rope.get(theirs) is not None
    }
    if rope.get("mscale") or rope.get("mscale_all_dim") or rope.get("truncate") is False:
        raise UserError(
            f"{where}: rope scaling by mscale, mscale_all_dim or truncate is not supported"
        )
    values["original_max_seq_len"] = rope.get("original_max_position_embeddings") or max_seq_len
    if kind == "yarn":
        factor = number(rope, "factor", where, kind=float)
        values["attention_factor"] = (
            rope.get("attention_factor") or 0.1 * math.log(max(factor, 1.0)) + 1.0
        )
    return checked_scaling(where, kind=kind, factor=rope.get("factor"), **values)


def _head(raw: dict, where: str) -> dict:
    architectures = raw.get("architectures") or []
    labels = raw.get("id2label", raw.get("num_labels", 2))
    if not isinstance(architectures, list) or not all(
        isinstance(name, str) for name in architectures
    ):
        raise UserError(f"{where}: architectures is {architectures!r}, a list of names is expected")
    scored = any("SequenceClassification" in name for name in architectures)
    labels = len(labels) if isinstance(labels, (dict, list)) else labels
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"{where}: tie_word_embeddings is {tied!r}, true or false is expected")
    if scored and labels != 1:
        raise UserError(
            f"{where}: a verifier has one score per sequence (num_labels 1), this classifier has "
            f"{labels} labels"
        )
    is_trunk = not tied and any(name.endswith(_ENDINGS["none"]) for name in architectures)
    head = "score" if scored else "none" if is_trunk else "lm"
    return {"head": head, "tie_word_embeddings": tied and not scored}


def _window(raw: dict, family: Family, n_layers: int, where: str) -> dict:
    """The sliding window and the layer at which it begins.

    `layer_types` may spell out the same, nothing else.
    """
    window, first = raw.get("sliding_window", family.defaults.get("sliding_window")), 0
    if (
        family.windows == "never"
        or (family.windows == "flagged" and not raw.get("use_sliding_window"))
        or window is None
    ):
        window = 0
    elif "first_window_layer" in family.defaults:
        first = raw.get("max_window_layers", family.defaults["first_window_layer"])
    for key, value in (("sliding_window", window), ("max_window_layers", first)):
        if type(value) is not int or not 0 <= value < 10**9:
            raise UserError(f"{where}: {key} is {value!r}; a whole number from 0 is expected")
    types = raw.get("layer_types")
    if types is not None and not isinstance(types, list):
        raise UserError(f"{where}: layer_types is {types!r}, a list is expected")
    if types is not None and (
        len(types) != n_layers or types != layer_types(window, first, n_layers)
    ):
        raise UserError(
            f"{where}: layer_types {types} do not follow from sliding_window {window} "
            f"from layer {first} on"
        )
    return {"sliding_window": window, "first_window_layer": first}


def layer_types(window: int, first: int, n_layers: int) -> list[str]:
    return [
        "sliding_attention" if window and layer >= first else "full_attention"
        for layer in range(n_layers)
    ]


def hf_config(
    config: ModelConfig, dtype: str, special_ids: Mapping[str, int | list[int] | None]
) -> dict:
    """`config.json` with the keys of transformers 4 and 5 both, so that either reads it.

    special_ids: "bos_token_id", "eos_token_id" and "pad_token_id", which for a classifier is an id
    that ends no text: transformers scores the last token that is not padding.
    """
    c, (name, family) = config, family_written(config)
    scored = c.head == "score"
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling:
        s = c.rope_scaling
        rope |= {
            "rope_type": s.kind,
            "factor": s.factor,
            "original_max_position_embeddings": int(s.original_max_seq_len),
        }
        if s.kind == "llama3":
            rope |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
        if s.kind == "yarn":
            rope |= {
                "beta_fast": s.beta_fast,
                "beta_slow": s.beta_slow,
                "attention_factor": s.attention_factor,
            }
    written = {
        "architectures": [family.architecture + _ENDINGS[c.head]],
        "model_type": name,
        "hidden_act": "silu",
        "rope_parameters": rope,
        "attention_bias": False,
        "torch_dtype": dtype,
        "dtype": dtype,
        **special_ids,
    }
    fields = [
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "hidden_dim",
        "vocab_size",
        "norm_eps",
        "rope_theta",
        "max_seq_len",
    ]
    if c.n_experts:
        fields += ["n_experts", "experts_per_token", "norm_topk_prob", "router_aux_loss_coef"]
        written |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False}
        written |= {"num_experts": c.n_experts, "num_local_experts": c.n_experts}
    for field in fields:
        written[family.keys.get(field, KEYS[field])] = getattr(c, field)
    written["tie_word_embeddings"] = c.tie_word_embeddings and not scored
    if name == "llama":
        written["mlp_bias"] = False
    if c.rope_scaling:
        written["rope_scaling"] = rope
    if family.windows != "never":
        written["sliding_window"] = c.sliding_window or None
    if family.windows == "flagged":
        written |= {
            "use_sliding_window": bool(c.sliding_window),
            "max_window_layers": c.first_window_layer if c.sliding_window else c.n_layers,
        }
    if scored:
        written |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    return written
