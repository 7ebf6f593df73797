"""Tiny random models of every family, and their checkpoints in each form that is released.

No size divides evenly: 6 heads of 12 on a width of 66, a feed-forward layer of 50, 97 tokens.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

HEADS, HEAD_DIM, LAYERS, VOCABULARY, EXPERTS = 6, 12, 2, 97, 5
ROWS = [
    [1, 7, 30, 95, 4],
    [1, 50],
    [1, 9, 9, 12, 80, 44, 3, 96, 5, 17, 33],  # the vocabulary's last id; longer than a window
]
BASE = dict(
    hidden_size=66,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    intermediate_size=50,
    vocab_size=VOCABULARY,
    num_hidden_layers=LAYERS,
    rms_norm_eps=1e-5,
    initializer_range=0.2,
    max_position_embeddings=64,
)
OLD_CONTEXT = {"original_max_position_embeddings": 16}
LLAMA_3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, **OLD_CONTEXT)
WINDOW = dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)
MIXTRAL = dict(num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=None)
QWEN3_MOE = dict(
    num_experts=EXPERTS,
    num_experts_per_tok=3,
    moe_intermediate_size=30,
    norm_topk_prob=False,
    num_local_experts=EXPERTS,
)
MODELS = {  # name → model_type, what differs from BASE, the rope's parameters
    "llama": ("llama", dict(num_key_value_heads=HEADS), {}),
    "llama-3": ("llama", {}, dict(rope_type="llama3", rope_theta=5e5, factor=8.0, **LLAMA_3)),
    "yarn": ("llama", {}, dict(rope_type="yarn", factor=4.0, **OLD_CONTEXT)),
    "linear": ("llama", {}, dict(rope_type="linear", factor=3.0)),
    "mistral": ("mistral", dict(num_key_value_heads=3, sliding_window=5), dict(rope_theta=1e6)),
    "mixtral": ("mixtral", MIXTRAL, dict(rope_theta=1e6)),
    # the Qwen2 that computes what Qwen v1 does
    "qwen": ("qwen2", dict(num_key_value_heads=HEADS), {}),
    "qwen2": ("qwen2", dict(num_key_value_heads=3), dict(rope_theta=1e6)),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True, **WINDOW), {}),
    "qwen3": ("qwen3", dict(num_key_value_heads=1), dict(rope_theta=1e6)),
    "qwen3-moe": ("qwen3_moe", QWEN3_MOE, {}),
}
FUSED = ("mixtral", "qwen3-moe")  # whose experts transformers keeps in one tensor


def tiny(name: str, dtype=torch.float32, verifier=False, **more):
    """A transformers model in evaluation mode, the same at every call."""
    kind, keys, rope = MODELS[name]
    rope = {"rope_type": "default", "rope_theta": 1e4, **rope}
    if verifier:
        more |= dict(num_labels=1, pad_token_id=0)
    config = AutoConfig.for_model(kind, **BASE | keys | more, rope_parameters=rope)
    config.architectures = None
    experts = {"experts_implementation": "eager"} if name in FUSED else {}
    torch.manual_seed(len(name))
    made_by = AutoModelForSequenceClassification if verifier else AutoModelForCausalLM
    model = made_by.from_config(config, attn_implementation="eager", **experts).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


def logits_of(model) -> Tensor:
    """transformers' logits of `ROWS` one after another: [all tokens, vocabulary]."""
    rows = [torch.tensor([row]) for row in ROWS]  # each [1, t]
    with torch.no_grad():
        return torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])


# --- Hugging Face folders


def write_tensors(folder: Path, tensors: dict, form: str) -> None:
    """As one file or several with their index, in safetensors or torch's format.

    `form`: "safetensors", "sharded bin", …
    """
    suffix, stem = ("bin", "pytorch_model") if form.endswith("bin") else ("safetensors", "model")
    save = torch.save if suffix == "bin" else save_file
    if not form.startswith("sharded"):
        return save(tensors, folder / f"{stem}.{suffix}")
    # tensors of a layer, and thirds of a fused one, fall into different files
    keys = sorted(tensors)
    files = {f"{stem}-0000{i + 1}-of-00003.{suffix}": keys[i::3] for i in range(3)}
    for file, names in files.items():
        save({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def of_transformers_4(config: dict) -> dict:
    """A `config.json` as transformers 4 wrote it.

    The base of the rotation on top, a scaling beside it, `torch_dtype`.
    """
    config = {key: value for key, value in config.items() if key != "layer_types"}
    rope = dict(config.pop("rope_parameters"))
    config |= {
        "torch_dtype": config.pop("dtype"),
        "rope_theta": rope.pop("rope_theta"),
        "transformers_version": "4.31.0",
    }
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    if "num_local_experts" in config and config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    return config


def write_hf(folder: Path, name: str, form: str = "safetensors", version: int = 5, **how) -> dict:
    """A model's folder: its tensors in one of the forms, and the tokenizer's file.

    "fused" as a form: the experts as one tensor. Returns the tensors as they are merged: a matrix
    per expert, and Qwen v1's by Qwen2's names.
    """
    model = tiny(name, **how)
    model.save_pretrained(folder)
    wanted = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    tensors = dict(model.state_dict()) if form == "fused" else wanted
    if name == "qwen":
        tensors, config = qwen_v1(wanted), qwen_v1_config(config)
    elif version == 4:
        config = of_transformers_4(config)
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder, tensors, form)
    return wanted


def qwen_v1(tensors: dict) -> dict:
    """A Qwen2 model's tensors by the names of Qwen v1."""
    renamed = {
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "model.layers": "transformer.h",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.down_proj": "mlp.c_proj",
        "mlp.gate_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w1",
    }
    out = {}
    for key, tensor in tensors.items():
        if re.search(r"[kv]_proj", key):
            continue
        if "q_proj" in key:
            parts = ("q_proj", "k_proj", "v_proj")
            tensor = torch.cat([tensors[key.replace("q_proj", part)] for part in parts])
            key = key.replace("self_attn.q_proj", "attn.c_attn")
        for theirs, first in renamed.items():
            key = key.replace(theirs, first)
        out[key] = tensor.contiguous()
    return out


def qwen_v1_config(config: dict) -> dict:
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "kv_channels": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "intermediate_size": 2 * config["intermediate_size"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "seq_length": 64,
        "no_bias": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "use_flash_attn": "auto",
        "bf16": False,
        "fp32": True,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "max_position_embeddings": 8192,
    }


def read_hf(folder: Path) -> dict:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same(ours: dict, wanted: dict) -> None:
    assert ours.keys() == wanted.keys()
    for key, value in wanted.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key


# --- Meta's and Mistral's layout

META_NAMES = {
    "model.": "",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "attention",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "block_sparse_moe": "feed_forward",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}
# what the released shards are cut along (None: replicated)
CUTS = (
    dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0)
    | dict.fromkeys(("wo", "w2", "tok_embeddings"), 1)
    | dict.fromkeys(("attention_norm", "ffn_norm", "norm", "gate"), None)
)


def meta_tensors(tensors: dict, head_dim: int = HEAD_DIM, stacked: bool = False) -> dict:
    """Hugging Face's tensors by Meta's names in Meta's row order (models.md).

    The experts as a matrix each, or all `stacked`.
    """
    out = {}
    for key, tensor in tensors.items():
        for theirs, meta in META_NAMES.items():
            key = key.replace(theirs, meta)
        if re.search(r"wq|wk|[qk]_norm", key):
            # a row of the second half goes behind its partner of the first
            half = head_dim // 2
            heads = tensor.view(-1, head_dim, *tensor.shape[1:])  # [heads, head_dim, …]
            order = [row for pair in range(half) for row in (pair, half + pair)]
            tensor = heads[:, order].reshape(tensor.shape)
        out[key] = tensor
    if stacked:
        for key in [key for key in out if ".experts.0." in key]:
            names = [key.replace(".experts.0.", f".experts.{i}.") for i in range(EXPERTS)]
            matrices = [out.pop(name) for name in names]
            out[key.replace(".experts.0.", ".experts.")] = torch.stack(matrices)
    return out


def cut_of(name: str, vocabulary_first: bool = False) -> int | None:
    if vocabulary_first and name == "tok_embeddings.weight":
        return 0
    return CUTS[name.removesuffix(".weight").rsplit(".", 1)[-1]]


def write_meta(
    folder: Path,
    params: dict,
    weights: dict,
    n: int,
    vocabulary_first=False,
    computed=("rope.freqs",),
) -> None:
    """`n` shards as Meta releases them.

    vocabulary_first: the embedding cut as Llama 3's is; computed: what is no weight.
    """
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    cuts = {name: cut_of(name, vocabulary_first) for name in weights}
    for rank in range(n):
        shard = {
            name: (w if cuts[name] is None else w.chunk(n, cuts[name])[rank]).clone()
            for name, w in weights.items()
        }
        torch.save(
            shard | {name: torch.ones(4) for name in computed},
            folder / f"consolidated.{rank:02d}.pth",
        )
