"""Llama 1, 2 and 3.x: the released sizes, and what Hugging Face calls each tensor."""

from src.models.config import ModelConfig
from src.models.family import Family, stored


def _llama(
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    hidden_dim: int,
    norm_eps: float,
    context: int,
) -> ModelConfig:
    return ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=dim // n_heads,
        hidden_dim=hidden_dim,
        vocab_size=32000,
        norm_eps=norm_eps,
        max_seq_len=context,
    )


# ours (Meta's) → Hugging Face's; {} is the layer
ATTENTION = stored(
    {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
        "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
        "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
        "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
        "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
        "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "score.weight": "score.weight",
    }
)
FEED_FORWARD = stored(
    {
        "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
        "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
        "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    }
)
NAMES = ATTENTION | FEED_FORWARD

LLAMA = Family(
    "Llama",
    NAMES,
    presets={
        "llama-1-7b": _llama(4096, 32, 32, 32, 11008, 1e-6, 2048),
        "llama-1-13b": _llama(5120, 40, 40, 40, 13824, 1e-6, 2048),
        "llama-1-33b": _llama(6656, 60, 52, 52, 17920, 1e-6, 2048),
        "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 1e-5, 4096),
        "llama-2-13b": _llama(5120, 40, 40, 40, 13824, 1e-5, 4096),
        "llama-2-70b": _llama(8192, 80, 64, 8, 28672, 1e-5, 4096),
    },
)
