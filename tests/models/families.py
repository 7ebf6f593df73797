"""Small models of every family by transformers, with random weights, and their folders."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

EVEN = dict(  # two and four ranks divide all of it
    hidden_size=64,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    intermediate_size=172,
    vocab_size=96,
    num_hidden_layers=2,
    rms_norm_eps=1e-5,
)
ODD = dict(  # four ranks divide none of it
    hidden_size=66,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=50,
    vocab_size=97,
    num_hidden_layers=2,
    rms_norm_eps=1e-6,
)
EXPERTS = dict(num_experts_per_tok=2, router_aux_loss_coef=0.02)


LLAMA_3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
TIED = dict(tie_word_embeddings=True)


def rope(theta: float = 1e4, kind: str = "default", **scaling) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


CASES = {  # name: (model_type, its config)
    "llama": ("llama", EVEN | dict(num_hidden_layers=3) | rope()),
    "llama-tied": (
        "llama",
        EVEN
        | dict(num_attention_heads=4, head_dim=16, intermediate_size=128, vocab_size=100)
        | dict(rms_norm_eps=1e-6, **TIED, **rope(1e6)),
    ),
    "llama-wide-heads": (
        "llama",
        EVEN
        | dict(hidden_size=48, num_attention_heads=4, head_dim=20, vocab_size=128)
        | dict(rms_norm_eps=1e-6, **rope(5e5)),
    ),
    "llama-grouped-tied": (
        "llama",
        EVEN
        | dict(hidden_size=32, head_dim=4, intermediate_size=52, vocab_size=64)
        | dict(TIED, **rope(100.0)),
    ),
    "llama-six-heads": ("llama", ODD | dict(num_key_value_heads=6) | rope()),
    "llama3": ("llama", ODD | rope(1e4, "llama3", factor=8.0, **LLAMA_3)),
    "llama-yarn": (
        "llama",
        ODD
        | dict(num_key_value_heads=3, max_position_embeddings=256)
        | rope(1e4, "yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-linear": ("llama", ODD | dict(num_key_value_heads=1) | rope(1e4, "linear", factor=3.0)),
    "mistral": ("mistral", EVEN | dict(sliding_window=5) | rope()),
    "mistral-odd": ("mistral", ODD | dict(sliding_window=4) | rope()),
    "mixtral": (
        "mixtral",
        EVEN | EXPERTS | dict(num_local_experts=4, sliding_window=None) | rope(),
    ),
    "mixtral-odd": (
        "mixtral",
        ODD | EXPERTS | dict(num_key_value_heads=1, num_local_experts=5, sliding_window=7) | rope(),
    ),
    # v1, saved under its own names
    "qwen": ("qwen2", ODD | dict(num_key_value_heads=6) | rope()),
    "qwen2": ("qwen2", EVEN | rope()),
    "qwen2-odd": (
        "qwen2",
        ODD | TIED | dict(use_sliding_window=True, sliding_window=6, max_window_layers=1) | rope(),
    ),
    "qwen3": ("qwen3", EVEN | rope()),
    "qwen3-odd": ("qwen3", ODD | dict(num_key_value_heads=1) | TIED | rope()),
    "qwen3-moe": (
        "qwen3_moe",
        EVEN
        | EXPERTS
        | dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=28)
        | dict(norm_topk_prob=True, **rope()),
    ),
    "qwen3-moe-odd": (
        "qwen3_moe",
        ODD
        | EXPERTS
        | dict(num_experts=5, num_experts_per_tok=3, moe_intermediate_size=30)
        | dict(norm_topk_prob=False, **rope()),
    ),
}
MOE = [name for name, (kind, _) in CASES.items() if kind in ("mixtral", "qwen3_moe")]


def implementations(name: str) -> dict:
    """transformers' plainest code."""
    experts = {"experts_implementation": "eager"} if name in MOE else {}
    return {"attn_implementation": "eager", **experts}


def build(name: str, scored: bool = False, **changes):
    """A case's model, as a language model or with a scalar head; changes: to its config."""
    kind, sizes = CASES[name]
    sizes = sizes | changes
    more = dict(initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if scored:
        more["num_labels"] = 1
    config = AutoConfig.for_model(kind, **sizes, **more)
    torch.manual_seed(sum(name.encode()))
    auto = AutoModelForSequenceClassification if scored else AutoModelForCausalLM
    model = auto.from_config(config, **implementations(name))
    # norms and biases away from where they start, so that they matter
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def save(name: str, model, folder: Path, **qwen_config) -> None:
    if name == "qwen":
        save_as_qwen_v1(model, folder, **qwen_config)
    else:
        model.save_pretrained(folder)


def save_gradients(name: str, model, folder: Path) -> None:
    """A checkpoint of the same kind that holds the gradients in place of the weights."""
    weights = {key: p.data for key, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    save(name, model, folder)
    for key, parameter in model.named_parameters():
        parameter.data, parameter.grad = weights[key], None


def save_as_qwen_v1(model, folder: Path, **config) -> None:
    """A Qwen2 model in Qwen v1's names: q, k, v stacked in c_attn, the gate called w2."""
    qwen2, c = model.state_dict(), model.config
    tensors = {
        "transformer.wte.weight": qwen2["model.embed_tokens.weight"],
        "lm_head.weight": qwen2["lm_head.weight"],
        "transformer.ln_f.weight": qwen2["model.norm.weight"],
    }
    names = {
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.w1": "mlp.up_proj",
        "mlp.w2": "mlp.gate_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    for i in range(c.num_hidden_layers):
        v1_layer, v2_layer = f"transformer.h.{i}", f"model.layers.{i}"
        for kind in ("weight", "bias"):
            stacked = [qwen2[f"{v2_layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            tensors[f"{v1_layer}.attn.c_attn.{kind}"] = torch.cat(stacked)
        for v1_name, v2_name in names.items():
            tensors[f"{v1_layer}.{v1_name}.weight"] = qwen2[f"{v2_layer}.{v2_name}.weight"]
    folder.mkdir(parents=True)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    sizes = dict(
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        kv_channels=c.head_dim,
        intermediate_size=2 * c.intermediate_size,
        vocab_size=c.vocab_size,
        layer_norm_epsilon=c.rms_norm_eps,
        rotary_emb_base=c.rope_parameters["rope_theta"],
        seq_length=2048,
        no_bias=True,
        tie_word_embeddings=False,
        architectures=["QWenLMHeadModel"],
        model_type="qwen",
    )
    (folder / "config.json").write_text(json.dumps(sizes | config))
