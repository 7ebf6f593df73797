"""Qwen: v1 with its own names, Qwen1.5/2/2.5 (q, k, v biases), Qwen3 (q, k norms) and Qwen3-MoE."""

from typing import Any

from src.models.config import ModelConfig
from src.models.family import Family, Stored, stored
from src.models.llama import ATTENTION, NAMES
from src.models.mixtral import experts


def _qwen(
    dim: int,
    n_layers: int,
    n_heads: int,
    hidden_dim: int,
    vocab_size: int,
    rope_theta: float,
    context: int,
) -> ModelConfig:
    return ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=128,
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        norm_eps=1e-6,
        rope_theta=rope_theta,
        max_seq_len=context,
        family="qwen",
        qkv_bias=True,
        use_logn_attn=True,
        use_dynamic_ntk=True,
    )


_BIASES = {
    f"layers.{{}}.attention.{ours}.bias": f"model.layers.{{}}.self_attn.{theirs}.bias"
    for ours, theirs in (("wq", "q_proj"), ("wk", "k_proj"), ("wv", "v_proj"))
}
_NORMS = {
    f"layers.{{}}.attention.{norm}.weight": f"model.layers.{{}}.self_attn.{norm}.weight"
    for norm in ("q_norm", "k_norm")
}
_C_ATTN = {  # [Q; K; V] stacked
    f"layers.{{}}.attention.{ours}.{kind}": (
        Stored(f"transformer.h.{{}}.attn.c_attn.{kind}", third, 3),
    )
    for third, ours in enumerate(("wq", "wk", "wv"))
    for kind in ("weight", "bias")
}

QWEN = Family(
    "QWen",
    _C_ATTN
    | stored(
        {
            "tok_embeddings.weight": "transformer.wte.weight",
            "layers.{}.attention.wo.weight": "transformer.h.{}.attn.c_proj.weight",
            "layers.{}.feed_forward.w1.weight": "transformer.h.{}.mlp.w2.weight",  # the gate
            "layers.{}.feed_forward.w2.weight": "transformer.h.{}.mlp.c_proj.weight",
            "layers.{}.feed_forward.w3.weight": "transformer.h.{}.mlp.w1.weight",
            "layers.{}.attention_norm.weight": "transformer.h.{}.ln_1.weight",
            "layers.{}.ffn_norm.weight": "transformer.h.{}.ln_2.weight",
            "norm.weight": "transformer.ln_f.weight",
            "output.weight": "lm_head.weight",
            "score.weight": "score.weight",
        }
    ),
    keys={
        "norm_eps": "layer_norm_epsilon",
        "rope_theta": "rotary_emb_base",
        "max_seq_len": "seq_length",
        "head_dim": "kv_channels",
    },
    has={"qkv_bias": True},
    ffn_factor=2,
    written_as="qwen2",
    presets={
        "qwen-7b": _qwen(4096, 32, 32, 11008, 151936, 1e4, 8192),
        "qwen-14b": _qwen(5120, 40, 40, 13696, 152064, 1e4, 2048),
        "qwen-72b": _qwen(8192, 80, 64, 24576, 152064, 1e6, 32768),
    },
)

_QWEN2_5: dict[str, Any] = {
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_seq_len": 32768,
    "family": "qwen2",
    "qkv_bias": True,
}
_DEFAULTS = {"n_kv_heads": 32, "sliding_window": 4096}

QWEN2 = Family(
    "Qwen2",
    NAMES | stored(_BIASES),
    defaults={**_DEFAULTS, "first_window_layer": 28},
    has={"qkv_bias": True},
    windows="flagged",
    presets={
        "qwen2.5-0.5b": ModelConfig(
            dim=896,
            n_layers=24,
            n_heads=14,
            n_kv_heads=2,
            head_dim=64,
            hidden_dim=4864,
            vocab_size=151936,
            tie_word_embeddings=True,
            **_QWEN2_5,
        ),
        "qwen2.5-7b": ModelConfig(
            dim=3584,
            n_layers=28,
            n_heads=28,
            n_kv_heads=4,
            head_dim=128,
            hidden_dim=18944,
            vocab_size=152064,
            **_QWEN2_5,
        ),
    },
)

QWEN3 = Family(
    "Qwen3",
    NAMES | stored(_NORMS),
    defaults={**_DEFAULTS, "first_window_layer": 28, "head_dim": 128},
    has={"qk_norm": True},
    windows="flagged",
    presets={
        "qwen3-8b": ModelConfig(
            dim=4096,
            n_layers=36,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            hidden_dim=12288,
            vocab_size=151936,
            norm_eps=1e-6,
            rope_theta=1e6,
            max_seq_len=40960,
            family="qwen3",
            qk_norm=True,
        )
    },
)

QWEN3_MOE = Family(
    "Qwen3Moe",
    {
        **ATTENTION,
        **stored(
            {**_NORMS, "layers.{}.feed_forward.gate.weight": "model.layers.{}.mlp.gate.weight"}
        ),
        **experts("model.layers.{}.mlp", "gate_proj", "down_proj", "up_proj"),
    },
    keys={"n_experts": "num_experts", "hidden_dim": "moe_intermediate_size"},
    defaults={
        **_DEFAULTS,
        "n_kv_heads": 4,
        "n_experts": 128,
        "experts_per_token": 8,
        "router_aux_loss_coef": 0.001,
        "norm_topk_prob": False,
    },
    has={"qk_norm": True},
    windows="flagged",
)
