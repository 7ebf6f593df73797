"""Sizes read from `params.json` and `config.json`, with the defaults of those who wrote them.

Also what is refused.
"""

import json
from dataclasses import replace

import pytest
from transformers import AutoConfig

from src.checkpoint.source import check_model_type
from src.errors import UserError
from src.models.config import ModelConfig, RopeScaling, config_from_params, params_of
from src.models.hf_config import FAMILIES, PRESETS, config_from_hf, hf_config

# the sheet's rows: dim, layers, heads, kv heads, ffn, vocabulary, eps, θ, context
SHEET = {
    "llama-1-7b": (4096, 32, 32, 32, 11008, 32000, 1e-6, 1e4, 2048),
    "llama-1-13b": (5120, 40, 40, 40, 13824, 32000, 1e-6, 1e4, 2048),
    "llama-1-33b": (6656, 60, 52, 52, 17920, 32000, 1e-6, 1e4, 2048),
    "llama-2-7b": (4096, 32, 32, 32, 11008, 32000, 1e-5, 1e4, 4096),
    "llama-2-13b": (5120, 40, 40, 40, 13824, 32000, 1e-5, 1e4, 4096),
    "llama-2-70b": (8192, 80, 64, 8, 28672, 32000, 1e-5, 1e4, 4096),
    "mistral-7b-instruct-v0.2": (4096, 32, 32, 8, 14336, 32000, 1e-5, 1e6, 32768),
    "mixtral-8x7b-instruct-v0.1": (4096, 32, 32, 8, 14336, 32000, 1e-5, 1e6, 32768),
    "qwen-7b": (4096, 32, 32, 32, 11008, 151936, 1e-6, 1e4, 8192),
    "qwen-14b": (5120, 40, 40, 40, 13696, 152064, 1e-6, 1e4, 2048),
    "qwen-72b": (8192, 80, 64, 64, 24576, 152064, 1e-6, 1e6, 32768),
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936, 1e-6, 1e6, 32768),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, 1e-6, 1e6, 32768),
    "qwen3-8b": (4096, 36, 32, 8, 12288, 151936, 1e-6, 1e6, 40960),
}


FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size")
FIELDS += ("norm_eps", "rope_theta", "max_seq_len")


def test_presets_are_the_sheets():
    presets = {
        name: tuple(getattr(config, field) for field in FIELDS) for name, config in PRESETS.items()
    }
    assert presets == SHEET
    for name, config in PRESETS.items():
        assert config.head_dim == (64 if name == "qwen2.5-0.5b" else 128)
        assert config.family == name.split("-")[0].removesuffix(".5")
        assert config.tie_word_embeddings == (name == "qwen2.5-0.5b")
        assert config.qkv_bias == name.startswith(("qwen-", "qwen2"))
        assert config.qk_norm == name.startswith("qwen3") and config.sliding_window == 0
        experts = (8, 2) if "mixtral" in name else (0, 0)
        assert (config.n_experts, config.experts_per_token) == experts


@pytest.mark.parametrize("name", PRESETS)
def test_params_json_is_read_as_it_was_written(name):
    scaling = RopeScaling("yarn", 4.0, 1024, attention_factor=1.1)
    config = replace(PRESETS[name], rope_scaling=scaling)
    for written in (PRESETS[name], config, replace(config, head="score", sliding_window=7)):
        params = json.loads(json.dumps(params_of(written)))
        assert config_from_params(params, "params.json") == written


GROUPED = dict(n_kv_heads=8, ffn_dim_multiplier=1.3)


@pytest.mark.parametrize(
    "dim, heads, layers, multiple_of, more, ffn",
    (
        (4096, 32, 32, 256, {}, 11008),
        (5120, 40, 40, 256, {}, 13824),
        (6656, 52, 60, 256, {}, 17920),
        (8192, 64, 80, 4096, GROUPED, 28672),
        (4096, 32, 32, 1024, GROUPED, 14336),
    ),
)
def test_metas_params_json(dim, heads, layers, multiple_of, more, ffn):
    params = dict(dim=dim, n_heads=heads, n_layers=layers, multiple_of=multiple_of)
    params |= dict(norm_eps=1e-5, vocab_size=-1)
    read = config_from_params(params | more, "params.json")
    kv_heads = more.get("n_kv_heads", heads)
    assert read == ModelConfig(dim, layers, heads, kv_heads, 128, ffn, -1)


MISTRAL = dict(
    dim=4096,
    n_layers=32,
    head_dim=128,
    hidden_dim=14336,
    n_heads=32,
    n_kv_heads=8,
    norm_eps=1e-5,
    vocab_size=32000,
)
MOE = {"moe": {"num_experts_per_tok": 2, "num_experts": 8}}


@pytest.mark.parametrize(
    "more, wanted",
    (
        (dict(rope_theta=1e6), dict(family="mistral", rope_theta=1e6)),
        (
            dict(rope_theta=10000.0, sliding_window=4096),
            dict(family="mistral", rope_theta=1e4, sliding_window=4096),
        ),
        # without rope_theta: Mistral's own code takes 1e6, and 1e4 beside a sliding window
        (dict(sliding_window=4096), dict(family="mistral", rope_theta=1e4, sliding_window=4096)),
        (MOE, dict(family="mixtral", rope_theta=1e6, n_experts=8, experts_per_token=2)),
        ({}, dict(family="mistral", rope_theta=1e6)),
        (
            dict(rope_theta=1e6) | MOE,
            dict(family="mixtral", rope_theta=1e6, n_experts=8, experts_per_token=2),
        ),
    ),
    ids=str,
)
def test_mistrals_params_json(more, wanted):
    read = config_from_params(MISTRAL | more, "params.json")
    assert {field: getattr(read, field) for field in wanted} == wanted
    assert (read.hidden_dim, read.head_dim, read.n_kv_heads) == (14336, 128, 8)


def test_llama_3_1_of_meta():
    params = dict(
        dim=4096,
        n_heads=32,
        n_kv_heads=8,
        n_layers=32,
        multiple_of=1024,
        ffn_dim_multiplier=1.3,
        norm_eps=1e-5,
        vocab_size=128256,
        rope_theta=500000.0,
        use_scaled_rope=True,
    )
    read = config_from_params(params, "params.json")
    assert read.rope_scaling == RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    assert read.rope_theta == 5e5
    unscaled = config_from_params(params | dict(use_scaled_rope=False), "params.json")
    assert unscaled.rope_scaling is None


# --- config.json

SIZES = dict(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=32,
    intermediate_size=96,
    moe_intermediate_size=80,
    vocab_size=50,
)
KINDS = [kind for kind in FAMILIES if kind != "qwen"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "more",
    (
        {},
        dict(num_key_value_heads=2, head_dim=6, rms_norm_eps=3e-5),
        dict(sliding_window=9),
        dict(use_sliding_window=True, sliding_window=9),
        dict(use_sliding_window=True, max_window_layers=1),
    ),
    ids=str,
)
def test_keys_that_are_not_there_mean_what_transformers_takes(kind, more):
    minimal = SIZES | more | {"model_type": kind}
    theirs = AutoConfig.for_model(**minimal)
    ours = config_from_hf(minimal, "config.json")
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
    assert ours.n_kv_heads == theirs.num_key_value_heads
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    windows = [ours.sliding_window if layer >= ours.first_window_layer else 0 for layer in range(3)]
    window = getattr(theirs, "sliding_window", None) or 0
    layer_types = getattr(theirs, "layer_types", None)
    if layer_types is None:
        on = getattr(theirs, "use_sliding_window", True) and kind != "llama"
        layer_types = ["sliding_attention" if on else "full_attention"] * 3
    assert windows == [window if kind == "sliding_attention" else 0 for kind in layer_types]
    if "mixtral" in kind or "moe" in kind:
        assert ours.n_experts == theirs.num_local_experts
        assert ours.experts_per_token == theirs.num_experts_per_tok
        assert ours.router_aux_loss_coef == theirs.router_aux_loss_coef
        assert ours.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
        assert ours.hidden_dim == (80 if kind == "qwen3_moe" else 96)


BASE = ModelConfig(64, 3, 8, 2, 10, 96, 50, 3e-5, 2e4, 77)
YARN = RopeScaling("yarn", 4.0, 32, beta_fast=16.0, beta_slow=2.0, attention_factor=1.2)
CONFIGS = {
    "llama": BASE,
    "tied": replace(BASE, tie_word_embeddings=True),
    "verifier": replace(BASE, head="score"),
    "linear": replace(BASE, rope_scaling=RopeScaling("linear", 3.0, 77)),
    "llama 3": replace(BASE, rope_scaling=RopeScaling("llama3", 8.0, 32, 1.0, 4.0)),
    "yarn": replace(BASE, rope_scaling=YARN),
    "mistral": replace(BASE, family="mistral", sliding_window=5),
    "mistral v0.2": replace(BASE, family="mistral"),
    "mixtral": replace(
        BASE, family="mixtral", n_experts=4, experts_per_token=2, router_aux_loss_coef=0.02
    ),
    "qwen2": replace(BASE, family="qwen2", qkv_bias=True),
    "qwen2 window": replace(
        BASE, family="qwen2", qkv_bias=True, sliding_window=9, first_window_layer=1
    ),
    "qwen3": replace(BASE, family="qwen3", qk_norm=True),
    "qwen3 moe": replace(
        BASE,
        family="qwen3_moe",
        qk_norm=True,
        n_experts=4,
        experts_per_token=3,
        norm_topk_prob=False,
        router_aux_loss_coef=0.0,
    ),
}


@pytest.mark.parametrize("version", (4, 5))
@pytest.mark.parametrize("name", CONFIGS)
def test_config_json_is_read_as_it_was_written(name, version):
    """Even when either transformers' keys are taken away; and transformers reads the same."""
    config = CONFIGS[name]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    written = json.loads(json.dumps(hf_config(config, "bfloat16", ids)))
    theirs = AutoConfig.for_model(**written)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.head_dim == config.head_dim
    assert theirs.num_key_value_heads == config.n_kv_heads
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)
    if version == 4:
        del written["rope_parameters"], written["dtype"]
    else:
        for key in ("rope_theta", "rope_scaling", "torch_dtype"):
            written.pop(key, None)
    assert config_from_hf(written, "config.json") == config


def test_qwen_v1_is_written_as_qwen2():
    config = PRESETS["qwen-7b"]
    written = hf_config(config, "bfloat16", {})
    read = config_from_hf(written, "config.json")
    assert read == replace(config, family="qwen2", use_logn_attn=False, use_dynamic_ntk=False)
    released = dict(
        model_type="qwen",
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=22016,
        vocab_size=151936,
        layer_norm_epsilon=1e-6,
        rotary_emb_base=10000,
        seq_length=8192,
        kv_channels=128,
    )
    assert config_from_hf(released, "config.json") == config
    without = config_from_hf(released | dict(use_logn_attn=False), "config.json")
    assert not without.use_logn_attn


def test_yarn_fills_in_what_the_paper_says():
    """Qwen2.5's documented setting: no attention_factor, no betas."""
    raw = SIZES | dict(
        model_type="qwen2",
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
    )
    scaling = config_from_hf(raw, "config.json").rope_scaling
    factor = scaling.attention_factor
    betas = dict(beta_fast=32.0, beta_slow=1.0)
    assert scaling == RopeScaling("yarn", 4.0, 8192, **betas, attention_factor=factor)
    assert factor == pytest.approx(1.138629436)  # 0.1 · ln 4 + 1


def rope(kind, **more):
    return dict(rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **more})


@pytest.mark.parametrize(
    "kind, change, message",
    (
        ("gpt2", {}, "model_type is 'gpt2'"),
        (None, {}, "model_type is None"),
        (["llama"], {}, "model_type is"),
        ("llama", dict(attention_bias=True), "attention_bias is set"),
        ("qwen3", dict(attention_bias=True), "attention_bias is set"),
        ("llama", dict(mlp_bias=True), "mlp_bias is set"),
        ("qwen3_moe", dict(mlp_only_layers=[0]), "mlp_only_layers is set"),
        ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step is 2"),
        ("llama", dict(quantization_config={"bits": 4}), "quantization_config is set"),
        ("llama", dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        ("llama", rope("dynamic"), "rope scaling 'dynamic' is not supported"),
        ("llama", rope("longrope"), "'longrope' is not supported"),
        (
            "llama",
            dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
            "rope scaling 'dynamic' is not supported",
        ),
        ("llama", dict(rope_scaling={"type": "linear", "factor": -2.0}), "factor is -2.0"),
        ("llama", dict(rope_scaling={"type": "linear"}), "factor"),
        ("llama", dict(rope_scaling="linear"), "rope_scaling is 'linear'"),
        ("llama", rope("yarn", mscale=0.7), "mscale"),
        ("llama", rope("yarn", factor="4"), "factor is '4'"),
        ("llama", rope("llama3", low_freq_factor=0), "low_freq_factor is 0"),
        ("llama", dict(rope_parameters="x"), "rope_parameters is 'x'"),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor is not 1"),
        ("llama", dict(rope_theta=float("inf")), "rope_theta is inf"),
        ("llama", dict(architectures="LlamaForCausalLM"), "a list of names is expected"),
        ("llama", dict(architectures=5), "a list of names"),
        (
            "llama",
            dict(architectures=["LlamaForSequenceClassification"], id2label={"0": "a", "1": "b"}),
            "has 2 labels",
        ),
        ("llama", dict(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"),
        ("llama", dict(head_dim=0), "head_dim is 0"),
        ("llama", dict(head_dim=5), "head_dim 5 is odd"),
        ("llama", dict(hidden_size="32"), "hidden_size is '32'"),
        ("llama", dict(hidden_size=None), "no 'hidden_size'"),
        ("llama", dict(num_attention_heads=0), "num_attention_heads is 0"),
        ("llama", dict(num_key_value_heads=5), "32 heads cannot share 5 kv heads"),
        ("llama", dict(num_hidden_layers=10**9), "n_layers is 1000000000"),
        ("llama", dict(vocab_size=True), "vocab_size is True"),
        ("mixtral", dict(num_local_experts=1), "2 experts per token of 1 experts"),
        ("mixtral", dict(num_local_experts="8"), "'8'"),
        ("qwen3_moe", dict(norm_topk_prob="yes"), "norm_topk_prob is 'yes'"),
        ("qwen3_moe", dict(router_aux_loss_coef="x"), "router_aux_loss_coef is 'x'"),
        ("mistral", dict(sliding_window="9"), "sliding_window is '9'"),
        ("mistral", dict(sliding_window=-1), "sliding_window is -1"),
        ("qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers="1"), "'1'"),
        (
            "qwen2",
            dict(layer_types=["full_attention", "sliding_attention", "full_attention"]),
            "layer_types .* do not follow",
        ),
        ("qwen", dict(no_bias=False), "no_bias is False"),
        ("qwen", dict(intermediate_size=97), "97 is not 2 times"),
        ("qwen", dict(use_logn_attn="x"), "use_logn_attn is 'x'"),
        ("qwen", dict(seq_length=0), "seq_length is 0"),
    ),
    ids=str,
)
def test_config_json_that_is_refused(kind, change, message):
    raw = SIZES | dict(num_key_value_heads=4, num_experts_per_tok=2) | {"model_type": kind} | change
    with pytest.raises(UserError, match=f"^here/config.json: .*{message}"):
        config_from_hf(raw, "here/config.json")


@pytest.mark.parametrize(
    "change, message",
    (
        (dict(n_heads=0), "n_heads is 0"),
        (dict(dim="64"), "dim is '64'"),
        (dict(n_kv_heads=3), "32 heads cannot share 3 kv heads"),
        (dict(norm_eps=None), "no 'norm_eps'"),
        (dict(head="value"), "unknown head 'value'"),
        (dict(head_dim=0), "head_dim is 0"),
        (dict(hidden_dim=None, multiple_of="256"), "multiple_of is '256'"),
        (dict(hidden_dim=None), "no 'multiple_of'"),
        (dict(n_layers=10**9), "n_layers is 1000000000"),
        (dict(n_layers=None), "n_layers"),
        (dict(moe=[8]), r"moe is \[8\]"),
        (dict(moe={"num_experts": 8}), "no 'num_experts_per_tok'"),
        (dict(moe={"num_experts": 1, "num_experts_per_tok": 2}), "cannot be chosen"),
        (
            dict(rope_scaling={"kind": "dynamic", "factor": 2, "original_max_seq_len": 4}),
            "rope scaling 'dynamic' is not supported",
        ),
        (dict(rope_scaling={"turns": 2}), "rope_scaling is"),
        (dict(rope_scaling=7), "rope_scaling is 7"),
        (
            dict(rope_scaling={"kind": "linear", "factor": "x", "original_max_seq_len": 4}),
            "factor is 'x'",
        ),
        (dict(qkv_bias=1), "qkv_bias is 1"),
        (dict(n_experts=4, experts_per_token=0), "0 experts per token of 4"),
    ),
    ids=str,
)
def test_params_json_that_is_refused(change, message):
    with pytest.raises(UserError, match=f"^here/params.json: .*{message}"):
        config_from_params(MISTRAL | change, "here/params.json")


def test_model_type_that_disagrees():
    config = replace(PRESETS["llama-2-7b"], dim=64)
    with pytest.raises(UserError, match=r"dim 64 \(a llama-2-7b has 4096\)"):
        check_model_type(config, "llama-2-7b")
    with pytest.raises(UserError, match="llama-9: unknown; one of .*qwen-72b"):
        check_model_type(config, "llama-9")
    with pytest.raises(UserError, match=r"n_experts 0 \(a mixtral-8x7b-instruct-v0.1 has 8\)"):
        check_model_type(PRESETS["mistral-7b-instruct-v0.2"], "mixtral-8x7b-instruct-v0.1")
    with pytest.raises(UserError, match="qkv_bias"):
        check_model_type(replace(PRESETS["qwen-7b"], qkv_bias=False), "qwen-7b")
    for name, preset in PRESETS.items():
        check_model_type(replace(preset, max_seq_len=8), name)
    check_model_type(config, None)
