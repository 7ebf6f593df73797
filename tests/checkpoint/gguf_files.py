"""Tiny models as GGUF files, written as llama.cpp's converter does, and what they then hold."""

import re
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, dequantize, quantize
from transformers import PreTrainedModel

from tests.checkpoint.tiny import tiny

SIZES = dict(
    hidden_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=256,
    vocab_size=320,
)
# where a K-quant's blocks hold their 16-bit scales, which random bytes must not be
SCALES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
ARCHITECTURES = {"mixtral": "llama", "mistral": "llama", "qwen3_moe": "qwen3moe"}
# transformers' names, as this converter's regular expressions, → GGUF's
NAMES = (
    (r"^model\.embed_tokens", "token_embd"),
    (r"^model\.norm", "output_norm"),
    (r"^lm_head", "output"),
    (r"^model\.layers\.", "blk."),
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"self_attn\.([qkv])_proj", r"attn_\1"),
    (r"self_attn\.([qk])_norm", r"attn_\1_norm"),
    (r"self_attn\.o_proj", "attn_output"),
    (r"mlp\.(gate|up|down)_proj", r"ffn_\1"),
    (r"mlp\.gate\.weight", "ffn_gate_inp.weight"),
)


def model(name: str, **more) -> PreTrainedModel:
    return tiny(name, **SIZES | more)


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to Llama's q and k: a head's halves become neighbours."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def unpermuted(weights: np.ndarray, heads: int) -> np.ndarray:
    pairs = weights.reshape(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def packed(weights: np.ndarray, kind: str, generator: np.random.Generator) -> np.ndarray:
    """A tensor's bytes: quantised, or for what the library cannot make, any valid ones."""
    quant = GGMLQuantizationType[kind]
    if kind not in SCALES_AT:
        return quantize(weights, quant)
    block, size = GGML_QUANT_SIZES[quant]
    shape = (*weights.shape[:-1], weights.shape[-1] // block, size)
    data = generator.integers(0, 256, shape, dtype=np.uint8)
    for at in SCALES_AT[kind]:
        scales = generator.uniform(0.0005, 0.002, shape[:-1]).astype(np.float16)
        data[..., at : at + 2] = scales[..., None].view(np.uint8)
    return data.reshape(*weights.shape[:-1], -1)


def metadata(writer: GGUFWriter, config, arch: str) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_feed_forward_length(config.intermediate_size)
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_string(f"{arch}.rope.scaling.type", rope["rope_type"])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def rope_divisors(model: PreTrainedModel) -> np.ndarray:
    """By what Llama 3's scaling divides each frequency, as transformers computes it."""
    config = model.config
    plain = config.rope_parameters["rope_theta"] ** -(
        torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    )
    return (plain / model.model.rotary_emb.inv_freq.double()).float().numpy()


def write_gguf(
    path: Path, model: PreTrainedModel, kind: str = "F32", old_experts=False, more=lambda w: None
) -> PreTrainedModel:
    """Write a model, its matrices packed as `kind`; returns it with what was then written.

    old_experts: a matrix each; more(writer): adds what else is to be in the metadata.
    """
    config, generator = model.config, np.random.default_rng(3)
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, arch)
    metadata(writer, config, arch)
    more(writer)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    state = model.state_dict()

    def add(name: str, weights: np.ndarray, as_is: bool = False) -> np.ndarray:
        quant = GGMLQuantizationType["F32" if as_is or weights.ndim == 1 else kind]
        data = packed(weights, quant.name, generator)
        writer.add_tensor(name, data, raw_dtype=quant)
        return dequantize(data, quant).reshape(weights.shape)

    for key, tensor in list(state.items()):
        if config.tie_word_embeddings and key == "lm_head.weight":
            continue
        name, weights = key, tensor.float().numpy()
        for theirs, gguf_name in NAMES:
            name = re.sub(theirs, gguf_name, name)
        match = re.search(r"attn_([qk])\.", name)
        if arch == "llama" and match:
            weights = unpermuted(add(name, permuted(weights, heads[match[1]])), heads[match[1]])
        elif "experts" in key:  # [experts, 2 · ffn, dim] or [experts, dim, ffn]
            block = name.split(".")[1]
            whole = key.endswith("down_proj")
            parts = {"down": weights} if whole else dict(zip(("gate", "up"), halves(weights)))
            weights = np.concatenate(
                [
                    np.stack([add(f"blk.{block}.ffn_{p}.{i}.weight", m) for i, m in enumerate(x)])
                    if old_experts
                    else add(f"blk.{block}.ffn_{p}_exps.weight", x)
                    for p, x in parts.items()
                ],
                axis=1,
            )
        else:
            weights = add(name, weights, as_is="ffn_gate_inp" in name)
        state[key].copy_(torch.from_numpy(np.array(weights)))
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_divisors(model))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def halves(weights: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(half) for half in np.split(weights, 2, axis=1)]
