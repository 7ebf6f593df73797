"""Every released form of every family is read as the same tensors and sizes.

Ranks then compute what transformers does.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from src.checkpoint.names import to_halves, to_interleaved
from src.checkpoint.source import Checkpoint
from src.checkpoint.write import merge, split
from src.errors import UserError
from tests.checkpoint.tiny import (
    BASE,
    EXPERTS,
    FUSED,
    HEAD_DIM,
    LAYERS,
    MODELS,
    ROWS,
    VOCABULARY,
    assert_same,
    cut_of,
    logits_of,
    meta_tensors,
    read_hf,
    tiny,
    write_hf,
    write_meta,
)
from tests.launch import launch, once

FORMS = [
    (name, form, version)
    for name in MODELS
    for version in (4, 5)
    for form in ("safetensors", "sharded bin")
]
FORMS += [
    (name, form, 5)
    for name in ("llama", "mixtral", "qwen", "qwen3-moe")
    for form in ("sharded safetensors", "bin")
]
FORMS += [(name, "fused", 5) for name in FUSED]


def everything(checkpoint: Checkpoint) -> dict:
    return {name: checkpoint.read(name) for name in checkpoint.table}


@pytest.mark.parametrize("name, form, version", FORMS)
def test_every_form_of_hugging_face_folder(tmp_path, name, form, version):
    wanted = meta_tensors(write_hf(tmp_path / "hf", name, form, version), stacked=True)
    opened = Checkpoint.open(str(tmp_path / "hf"))
    assert_same(everything(opened), wanted)
    if (form, version) != ("safetensors", 5):
        write_hf(tmp_path / "plain", name)
        assert opened.config == Checkpoint.open(str(tmp_path / "plain")).config


@pytest.mark.parametrize("file", ("weights.safetensors", "weights.bin", "weights.pth"))
def test_a_single_file_with_its_config_beside_or_named(tmp_path, file):
    wanted = write_hf(tmp_path / "hf", "llama")
    file = tmp_path / "alone" / file
    file.parent.mkdir()
    (save_file if file.suffix == ".safetensors" else torch.save)(wanted, file)
    refused = "params.json and .*config.json: not there; give the model's sizes by --config_file"
    with pytest.raises(UserError, match=refused):
        Checkpoint.open(str(file))
    named = Checkpoint.open(str(file), str(tmp_path / "hf" / "config.json"))
    shutil.copy(tmp_path / "hf" / "config.json", file.parent)
    for checkpoint in (named, Checkpoint.open(str(file))):
        assert_same(everything(checkpoint), meta_tensors(wanted))


@pytest.mark.parametrize("name", ("llama", "qwen2-tied"))
def test_computed_tensors_and_a_tie_that_is_spelt_out_are_left_aside(tmp_path, name):
    wanted = write_hf(tmp_path / "hf", name)
    added = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    if "tied" in name:
        added["lm_head.weight"] = wanted["model.embed_tokens.weight"].clone()
    save_file(wanted | added, tmp_path / "hf" / "model.safetensors")
    assert_same(everything(Checkpoint.open(str(tmp_path / "hf"))), meta_tensors(wanted))


# --- Meta's and Mistral's own files, written by hand


def drawn(kv_heads: int, ffn: int) -> dict:
    """Weights in Meta's layout that never were in another: 8 heads of 8, 96 tokens."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=generator) + (len(shape) == 1)

    layer = {
        "attention_norm": (64,),
        "ffn_norm": (64,),
        "attention.wq": (64, 64),
        "attention.wo": (64, 64),
        "attention.wk": (kv_heads * 8, 64),
        "attention.wv": (kv_heads * 8, 64),
        "feed_forward.w1": (ffn, 64),
        "feed_forward.w3": (ffn, 64),
        "feed_forward.w2": (64, ffn),
    }
    weights = {
        "tok_embeddings.weight": draw(96, 64),
        "norm.weight": draw(64),
        "output.weight": draw(96, 64),
    }
    for i in range(LAYERS):
        weights |= {f"layers.{i}.{name}.weight": draw(*shape) for name, shape in layer.items()}
    return weights


def rotate_pairs(x, theta):
    """Meta's rotary: pairs (0, 1), (2, 3), … turn by position · theta^(−2i / head_dim).

    `x` and what is returned: [t, heads, head_dim].
    """
    t, _, d = x.shape
    angle = torch.arange(t)[:, None] * theta ** (-torch.arange(0, d, 2) / d)  # [t, d / 2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]  # [t, 1, d / 2]
    even, odd = x[..., 0::2], x[..., 1::2]  # [t, heads, d / 2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def meta_forward(w: dict, tokens: list[int], eps: float, theta: float):
    """Llama in Meta's convention in a few lines, on whole tensors: [t, vocabulary]."""

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    x = w["tok_embeddings.weight"][tokens]  # [t, 64]
    t = len(tokens)
    causal = torch.full((t, t), -torch.inf).triu(1)
    for i in range(LAYERS):

        def times(h, name, i=i):
            return h @ w[f"layers.{i}.{name}.weight"].T

        h = norm(x, w[f"layers.{i}.attention_norm.weight"])
        q, k, v = (times(h, f"attention.{name}").view(t, -1, 8) for name in ("wq", "wk", "wv"))
        q, k = rotate_pairs(q, theta), rotate_pairs(k, theta)  # [t, heads or kv_heads, 8]
        k, v = (y.repeat_interleave(8 // k.size(1), 1) for y in (k, v))  # [t, heads, 8]
        scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5 + causal  # [heads, t, t]
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)  # [t, 64]
        x = x + times(mixed, "attention.wo")
        h = norm(x, w[f"layers.{i}.ffn_norm.weight"])
        gate, up = times(h, "feed_forward.w1"), times(h, "feed_forward.w3")  # [t, ffn]
        x = x + times(gate * gate.sigmoid() * up, "feed_forward.w2")
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


LLAMA_70B = dict(multiple_of=16, ffn_dim_multiplier=1.3, n_kv_heads=4, norm_eps=1e-5)
META = {
    # params.json as Meta writes it, kv heads, and the ffn width that its formula gives:
    # 2/3 · 4 · 64 = 170 → · 1.3 = 221
    "llama-1": (dict(multiple_of=32, norm_eps=1e-6, vocab_size=-1), 8, 192),
    "70b-like": (dict(LLAMA_70B, vocab_size=-1), 4, 224),
    "llama-3": (dict(LLAMA_70B, vocab_size=96, rope_theta=500000.0), 4, 224),
}


def write_drawn(folder: Path, kind: str, n: int) -> dict:
    params, kv_heads, ffn = META[kind]
    weights = drawn(kv_heads, ffn)
    computed = ["rope.freqs"]
    if kind == "llama-1":
        computed += [f"layers.{i}.attention.inner_attention.rope.freqs" for i in range(LAYERS)]
    params = dict(dim=64, n_heads=8, n_layers=LAYERS) | params
    write_meta(folder, params, weights, n, kind == "llama-3", computed)
    return weights


def drawn_logits(kind: str) -> torch.Tensor:
    params, kv_heads, ffn = META[kind]
    eps, theta = params["norm_eps"], params.get("rope_theta", 1e4)
    rows = [[min(token, 95) for token in row] for row in ROWS]
    return torch.cat([meta_forward(drawn(kv_heads, ffn), row, eps, theta) for row in rows])


@pytest.mark.parametrize("n", (1, 2, 4))
@pytest.mark.parametrize("kind", META)
def test_metas_own_shards(tmp_path, kind, n):
    """Read, cut again for 2, and merged: transformers then computes what Meta's weights mean."""
    weights = write_drawn(tmp_path / "meta", kind, n)
    source = Checkpoint.open(str(tmp_path / "meta"))
    assert source.config.vocab_size == 96 and source.config.hidden_dim == META[kind][2]
    assert_same(everything(source), weights)
    split(source, tmp_path / "of-2", 2)
    for rank in range(2):
        shard = torch.load(tmp_path / "of-2" / f"consolidated.{rank:02d}.pth")
        assert_same(
            shard,
            {
                name: w if cut_of(name) is None else w.chunk(2, cut_of(name))[rank]
                for name, w in weights.items()
            },
        )
    if n == 4:
        merge(Checkpoint.open(str(tmp_path / "of-2")), tmp_path / "hf", {})
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
        rows = [torch.tensor([row]).clamp_max(95) for row in ROWS]  # each [1, t]
        with torch.no_grad():
            logits = torch.cat([model.eval()(row).logits[0] for row in rows])
        wanted = drawn_logits(kind)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def mistral_params(name: str) -> dict:
    kind, keys, rope = MODELS[name]
    keys = BASE | keys
    params = dict(
        dim=66,
        n_layers=LAYERS,
        head_dim=HEAD_DIM,
        hidden_dim=50,
        n_heads=6,
        n_kv_heads=keys["num_key_value_heads"],
        norm_eps=1e-5,
        vocab_size=VOCABULARY,
        rope_theta=rope["rope_theta"],
    )
    if name == "mixtral":
        return params | {"moe": {"num_experts": EXPERTS, "num_experts_per_tok": 2}}
    return params | {"sliding_window": keys["sliding_window"]}


@pytest.mark.parametrize("name", ("mistral", "mixtral"))
@pytest.mark.parametrize("file", ("consolidated.safetensors", "consolidated.00.pth"))
def test_mistrals_own_files(tmp_path, name, file):
    """Beside a Hugging Face download of the same model, as on the hub."""
    tensors = write_hf(tmp_path / "hf", name)
    reference = Checkpoint.open(str(tmp_path / "hf"))
    mistral = meta_tensors(tensors)
    if name == "mixtral":
        assert {
            "layers.1.feed_forward.experts.4.w2.weight",
            "layers.0.feed_forward.gate.weight",
        } < mistral.keys()
    folder = tmp_path / "mistral"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(mistral_params(name)))
    (save_file if file.endswith("safetensors") else torch.save)(mistral, folder / file)
    opened = Checkpoint.open(str(folder))
    assert_same(everything(opened), everything(reference))
    aux = reference.config.router_aux_loss_coef
    config = replace(opened.config, max_seq_len=64, router_aux_loss_coef=aux)
    assert config == reference.config
    merge(opened, tmp_path / "back", {})
    assert_same(read_hf(tmp_path / "back"), tensors)


@pytest.mark.parametrize("vocabulary_first", (False, True))
def test_llama_3_1_of_meta(tmp_path, vocabulary_first):
    """`use_scaled_rope` is Llama 3.1's scaling: 8 times over 8192 tokens."""
    tensors = write_hf(
        tmp_path / "hf",
        "llama-3",
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        intermediate_size=224,
        vocab_size=96,
    )
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["original_max_position_embeddings"] = 8192
    file.write_text(json.dumps(config))
    params = dict(
        dim=64,
        n_layers=LAYERS,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=96,
        multiple_of=16,
        ffn_dim_multiplier=1.3,
        norm_eps=1e-5,
        rope_theta=500000.0,
        use_scaled_rope=True,
    )
    write_meta(tmp_path / "meta", params, meta_tensors(tensors, head_dim=16), 2, vocabulary_first)
    opened, reference = (Checkpoint.open(str(tmp_path / name)) for name in ("meta", "hf"))
    assert_same(everything(opened), everything(reference))
    assert replace(opened.config, max_seq_len=64) == reference.config


def test_row_orders_are_each_others_inverse_and_the_documented_ones():
    rows = torch.arange(2 * HEAD_DIM * 3).view(2 * HEAD_DIM, 3)  # [2 heads · head_dim, dim]
    # models.md: view(heads, head_dim/2, 2, dim) → transpose(1, 2) → flatten
    halves = rows.view(2, HEAD_DIM // 2, 2, 3).transpose(1, 2).reshape(2 * HEAD_DIM, 3)
    assert torch.equal(to_halves(rows, HEAD_DIM), halves)
    assert torch.equal(to_interleaved(halves, HEAD_DIM), rows)


# --- loaded by ranks, run, and saved again


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """n → every form, loaded by n ranks in one launch: the folder of what they held and saved."""
    work = tmp_path_factory.mktemp("forms")
    named = {name: work / name for name in MODELS}
    for name in MODELS:
        write_hf(named[name], name, "fused" if name == "mixtral" else "safetensors", 4)
    for kind in META:
        named[f"meta-{kind}"] = work / f"meta-{kind}"
        write_drawn(named[f"meta-{kind}"], kind, 4)
    for cut in (1, 2, 4):
        named[f"of-{cut}"] = work / f"of-{cut}"
        split(Checkpoint.open(str(named["llama-3"])), named[f"of-{cut}"], cut)
    (work / "rows.json").write_text(json.dumps(ROWS))

    @once
    def run(n: int) -> Path:
        out = work / f"out-{n}"
        out.mkdir()
        forms = [f"{name}={folder}" for name, folder in named.items()]
        worker = "tests/checkpoint/checkpoint_worker.py"
        launch(n, worker, str(out), str(work / "rows.json"), *forms)
        return out

    return run


def held(out: Path, name: str, n: int) -> list[dict]:
    return [load_file(out / f"{name}.{rank}.safetensors") for rank in range(n)]


@pytest.mark.parametrize("n", (1, 3))
def test_ranks_compute_what_transformers_does(loaded, n):
    out = loaded(n)
    wanted = {name: logits_of(tiny(name)) for name in MODELS}
    wanted |= {f"meta-{kind}": drawn_logits(kind) for kind in META}
    for name, logits in wanted.items():
        size = logits.size(1)
        ours = torch.cat([rank["outputs"] for rank in held(out, name, n)], -1)
        assert (ours[:, size:] < -1e4).all(), name  # padding of the vocabulary
        atol = 1e-5 * logits.abs().max().item()
        torch.testing.assert_close(ours[:, :size], logits, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("n", (1, 3))
def test_shards_load_as_what_they_were_cut_from(loaded, n):
    direct = held(loaded(n), "llama-3", n)
    for cut in (1, 2, 4):
        for ours, wanted in zip(held(loaded(n), f"of-{cut}", n), direct):
            assert_same(ours, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_what_three_ranks_saved_merges_into_what_they_had_read(loaded, tmp_path, name):
    out = loaded(3)
    merge(Checkpoint.open(str(out / f"{name}-saved")), tmp_path / "back", {})
    assert_same(read_hf(tmp_path / "back"), write_hf(tmp_path / "hf", name))
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
