"""Checkpoints: what goes in comes out bit for bit, in Meta's layout; what is wrong is named; nothing is half written."""
import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers import LlamaForSequenceClassification

from src.checkpoint import write
from src.checkpoint.folder import check_replaceable
from src.checkpoint.source import Checkpoint, check_model_type, to_halves, to_interleaved
from src.checkpoint.write import merge, split
from src.errors import UserError
from src.models.llama import PRESETS
from tests.launch import launch, start

DIM, HEADS, FFN, VOCABULARY, LAYERS, HEAD_DIM = 64, 8, 88, 96, 2, 8
ROWS = [[1, 7, 30, 95, 4], [1, 50], [1, 9, 9, 12, 80, 44, 3, 95]]  # one ends in the vocabulary's last id


def hf_model(dtype=torch.float32, tied=False, verifier=False, kv_heads=HEADS, **more):
    config = LlamaConfig(hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=kv_heads, intermediate_size=FFN,
                         vocab_size=VOCABULARY, num_hidden_layers=LAYERS, tie_word_embeddings=tied, initializer_range=0.2,
                         rms_norm_eps=1e-5, **({"num_labels": 1, "pad_token_id": 0} if verifier else {}), **more)
    torch.manual_seed(1)
    model = (LlamaForSequenceClassification if verifier else LlamaForCausalLM)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


def write_hf(folder: Path, kind: str = "one", **how) -> dict:
    """An HF folder in one of the released forms; returns its tensors."""
    model = hf_model(**how)
    model.save_pretrained(folder, max_shard_size="40KB" if kind == "sharded" else "1GB")
    tensors = {key: value.clone() for key, value in model.state_dict().items() if not (how.get("tied") and key == "lm_head.weight")}
    if kind in ("bin", "tied bin"):
        (folder / "model.safetensors").unlink()
        spelt_out = {"lm_head.weight": tensors["model.embed_tokens.weight"]} if kind == "tied bin" else {}
        torch.save(tensors | spelt_out, folder / "pytorch_model.bin")
    (folder / "tokenizer.json").write_text("{}")
    return tensors


def read_hf(folder: Path) -> dict:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def assert_same(ours: dict, wanted: dict) -> None:
    assert ours.keys() == wanted.keys()
    for key, value in wanted.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "hf"
    write_hf(folder)
    return folder


@pytest.mark.parametrize("n", (1, 2, 4, 8))
@pytest.mark.parametrize("how", (dict(), dict(dtype=torch.bfloat16), dict(tied=True), dict(dtype=torch.bfloat16, tied=True)), ids=str)
def test_split_and_merge_is_bit_for_bit(tmp_path, how, n):
    wanted = write_hf(tmp_path / "hf", **how)
    split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "shards", n)
    assert len(list((tmp_path / "shards").glob("consolidated.*.pth"))) == n
    merge(Checkpoint.open(str(tmp_path / "shards")), tmp_path / "back")
    assert_same(read_hf(tmp_path / "back"), wanted)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    before, after = (Checkpoint.open(str(tmp_path / name)).config for name in ("hf", "back"))
    assert before == after
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").state_dict(), hf_model(**how).state_dict())


@pytest.mark.parametrize("kind, how", (("sharded", {}), ("bin", {}), ("bin", dict(dtype=torch.bfloat16)), ("tied bin", dict(tied=True))), ids=str)
def test_every_form_of_hugging_face_folder(tmp_path, kind, how):
    wanted = write_hf(tmp_path / "hf", kind, **how)
    if kind == "sharded":
        assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "shards", 2)
    merge(Checkpoint.open(str(tmp_path / "shards")), tmp_path / "back")
    assert_same(read_hf(tmp_path / "back"), wanted)


@pytest.mark.parametrize("name", ("weights.safetensors", "weights.bin", "weights.pth"))
def test_a_single_file_with_its_config_beside_or_named(tmp_path, name):
    wanted = write_hf(tmp_path / "hf")
    file = tmp_path / "alone" / name
    file.parent.mkdir()
    (save_file if name.endswith("safetensors") else torch.save)(wanted, file)
    with pytest.raises(UserError, match="params.json and .*config.json: not there; give the model's sizes by --config_file"):
        Checkpoint.open(str(file))
    named = Checkpoint.open(str(file), str(tmp_path / "hf" / "config.json"))
    shutil.copy(tmp_path / "hf" / "config.json", file.parent)
    for number, checkpoint in enumerate((named, Checkpoint.open(str(file)))):
        merge(checkpoint, tmp_path / f"back-{number}")
        assert_same(read_hf(tmp_path / f"back-{number}"), wanted)


def test_many_output_files(tmp_path, hf, monkeypatch):
    monkeypatch.setattr(write, "MAX_FILE_BYTES", 40_000)
    merge(Checkpoint.open(str(hf)), tmp_path / "back")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_hf(hf).values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert_same(model.state_dict(), hf_model().state_dict())


def test_shards_cut_for_any_degree_are_read_at_any_other(tmp_path, hf):
    source = Checkpoint.open(str(hf))
    for cut in (1, 2, 4, 8):
        split(source, tmp_path / f"of-{cut}", cut)
    for cut in (1, 2, 4, 8):
        shards = Checkpoint.open(str(tmp_path / f"of-{cut}"))
        for n in (1, 2, 4, 8):
            for rank in range(n):
                mine = {name: shards.local(name, rank, n).clone() for name in shards.table}
                whole = torch.load(tmp_path / f"of-{n}" / f"consolidated.{rank:02d}.pth")
                assert_same(mine, whole)


# --- Meta's own layout, written by hand


def rotate_pairs(x, theta=10000.0):
    """Meta's rotary: pairs (0, 1), (2, 3), … of each head turn by position · theta^(−2i / head_dim). x: [t, heads, head_dim]"""
    t, _, d = x.shape
    angle = torch.arange(t)[:, None] * theta ** (-torch.arange(0, d, 2) / d)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def meta_forward(w: dict, tokens: list[int], eps: float, kv_heads: int):
    """Llama in Meta's convention in a few lines, on whole tensors: [t, vocabulary]."""
    norm = lambda x, weight: x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
    x = w["tok_embeddings.weight"][tokens]
    t = len(tokens)
    for i in range(LAYERS):
        layer = lambda name: w[f"layers.{i}.{name}.weight"]
        h = norm(x, layer("attention_norm"))
        q, k, v = ((h @ layer(f"attention.{name}").T).view(t, -1, HEAD_DIM) for name in ("wq", "wk", "wv"))
        q, k = rotate_pairs(q), rotate_pairs(k)
        k, v = (y.repeat_interleave(HEADS // kv_heads, 1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5 + torch.full((t, t), -torch.inf).triu(1)
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ layer("attention.wo").T
        h = norm(x, layer("ffn_norm"))
        gate = h @ layer("feed_forward.w1").T
        x = x + (gate * gate.sigmoid() * (h @ layer("feed_forward.w3").T)) @ layer("feed_forward.w2").T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


# what the released shards are cut along (None: replicated)
CUTS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": 1,
        "attention_norm": None, "ffn_norm": None, "norm": None}


def cut_of(name: str):
    return CUTS[name.removesuffix(".weight").rsplit(".", 1)[-1]]


def meta_weights(kv_heads: int, ffn: int) -> dict:
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: 0.2 * torch.randn(*shape, generator=generator) + (len(shape) == 1)
    weights = {"tok_embeddings.weight": draw(VOCABULARY, DIM), "norm.weight": draw(DIM), "output.weight": draw(VOCABULARY, DIM)}
    for i in range(LAYERS):
        weights |= {f"layers.{i}.{name}.weight": draw(*shape) for name, shape in {
            "attention_norm": (DIM,), "ffn_norm": (DIM,), "attention.wq": (DIM, DIM), "attention.wo": (DIM, DIM),
            "attention.wk": (kv_heads * HEAD_DIM, DIM), "attention.wv": (kv_heads * HEAD_DIM, DIM),
            "feed_forward.w1": (ffn, DIM), "feed_forward.w3": (ffn, DIM), "feed_forward.w2": (DIM, ffn)}.items()}
    return weights


META = {
    # params.json as Meta writes it, and the ffn width that its formula gives: 2/3 · 4 · 64 = 170 → · 1.3 = 221
    "llama-1": (dict(dim=DIM, multiple_of=32, n_heads=HEADS, n_layers=LAYERS, norm_eps=1e-6, vocab_size=-1), HEADS, 192),
    "70b-like": (dict(dim=DIM, multiple_of=16, ffn_dim_multiplier=1.3, n_heads=HEADS, n_kv_heads=4, n_layers=LAYERS,
                      norm_eps=1e-5, vocab_size=-1), 4, 224),
}


def write_meta(folder: Path, kind: str, n: int) -> dict:
    params, kv_heads, ffn = META[kind]
    weights = meta_weights(kv_heads, ffn)
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(n):
        shard = {name: (w if cut_of(name) is None else w.chunk(n, cut_of(name))[rank]).clone() for name, w in weights.items()}
        shard["rope.freqs"] = torch.ones(HEAD_DIM // 2)
        if kind == "llama-1":
            shard |= {f"layers.{i}.attention.inner_attention.rope.freqs": torch.ones(HEAD_DIM // 2) for i in range(LAYERS)}
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    return weights


@pytest.mark.parametrize("kind", META)
def test_metas_own_shards(tmp_path, kind):
    """Read, cut again for 2, and merged: transformers then computes what Meta's weights mean."""
    weights = write_meta(tmp_path / "meta", kind, 4)
    source = Checkpoint.open(str(tmp_path / "meta"))
    assert source.config.vocab_size == VOCABULARY and source.config.hidden_dim == META[kind][2]
    assert_same({name: source.read(name) for name in source.table}, weights)
    split(source, tmp_path / "of-2", 2)
    for rank in range(2):
        shard = torch.load(tmp_path / "of-2" / f"consolidated.{rank:02d}.pth")
        assert_same(shard, {name: w if cut_of(name) is None else w.chunk(2, cut_of(name))[rank] for name, w in weights.items()})
    merge(Checkpoint.open(str(tmp_path / "of-2")), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    for row in ROWS:
        wanted = meta_forward(weights, row, META[kind][0]["norm_eps"], META[kind][1])
        with torch.no_grad():
            found = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_row_orders_are_each_others_inverse_and_the_documented_ones():
    rows = torch.arange(2 * HEAD_DIM * 3).view(2 * HEAD_DIM, 3)
    # models.md: view(heads, head_dim/2, 2, dim) → transpose(1, 2) → flatten
    halves = rows.view(2, HEAD_DIM // 2, 2, 3).transpose(1, 2).reshape(2 * HEAD_DIM, 3)
    assert torch.equal(to_halves(rows, HEAD_DIM), halves)
    assert torch.equal(to_interleaved(halves, HEAD_DIM), rows)


# the widths of the released shards, as models.md lists them
SHEET = {
    "llama-1-13b": (2, dict(tok_embeddings=[32000, 2560], wq=[2560, 5120], wk=[2560, 5120], wv=[2560, 5120], wo=[5120, 2560],
                            w1=[6912, 5120], w3=[6912, 5120], w2=[5120, 6912], output=[16000, 5120])),
    "llama-2-70b": (8, dict(tok_embeddings=[32000, 1024], wq=[1024, 8192], wk=[128, 8192], wv=[128, 8192], wo=[8192, 1024],
                            w1=[3584, 8192], w3=[3584, 8192], w2=[8192, 3584], output=[4000, 8192])),
}


@pytest.mark.parametrize("preset", SHEET)
def test_released_shards_shapes(preset):
    from src.models.layout import tensor_table

    n, shapes = SHEET[preset]
    for name, spec in tensor_table(PRESETS[preset]).items():
        short = name.removesuffix(".weight").rsplit(".", 1)[-1]
        assert list(spec.local_shape(n)) == shapes.get(short, [PRESETS[preset].dim]), name


# --- ranks and scripts


@pytest.mark.parametrize("n", (1, 2))
def test_models_loaded_by_ranks(tmp_path, n):
    """A Hugging Face folder read directly, and shards for 1, 2 and 4, load as the same models, which compute the same."""
    write_hf(tmp_path / "hf", kv_heads=4)
    write_hf(tmp_path / "verifier", verifier=True)
    sources = {"hf": tmp_path / "hf", "verifier": tmp_path / "verifier", "meta": tmp_path / "meta"}
    for cut in (1, 2, 4):
        sources[f"of-{cut}"] = tmp_path / f"of-{cut}"
        split(Checkpoint.open(str(tmp_path / "hf")), sources[f"of-{cut}"], cut)
    weights = write_meta(tmp_path / "meta", "70b-like", 4)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "out").mkdir()
    launch(n, "tests/checkpoint/checkpoint_worker.py", str(tmp_path / "out"), str(tmp_path / "rows.json"),
           *(f"{name}={folder}" for name, folder in sources.items()))
    held = {name: [load_file(tmp_path / "out" / f"{name}.{rank}.safetensors") for rank in range(n)] for name in sources}
    for name in ("of-1", "of-2", "of-4"):
        for ours, direct in zip(held[name], held["hf"]):
            assert_same(ours, direct)

    model = hf_model(kv_heads=4)
    with torch.no_grad():
        wanted = torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])
    found = torch.cat([rank["outputs"] for rank in held["hf"]], -1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    wanted = torch.cat([meta_forward(weights, row, 1e-5, 4) for row in ROWS])
    found = torch.cat([rank["outputs"] for rank in held["meta"]], -1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())

    # what the ranks saved merges into what they had read; the verifier's scores survive the way to transformers
    merge(Checkpoint.open(str(tmp_path / "out" / "of-4-saved")), tmp_path / "back")
    assert_same(read_hf(tmp_path / "back"), read_hf(tmp_path / "hf"))
    merge(Checkpoint.open(str(tmp_path / "out" / "verifier-saved")), tmp_path / "verifier-back")
    verifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "verifier-back").eval()
    assert type(verifier) is LlamaForSequenceClassification
    assert_same(verifier.state_dict(), hf_model(verifier=True).state_dict())
    longest = max(map(len, ROWS))
    ids = torch.tensor([row + [verifier.config.pad_token_id] * (longest - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS])
    with torch.no_grad():
        batched = verifier(ids, attention_mask=mask).logits[:, 0]
    for rank in held["verifier"]:
        torch.testing.assert_close(rank["outputs"], batched, rtol=0, atol=1e-5 * batched.abs().max().item())


@pytest.mark.parametrize("ranks", (1, 2))
def test_scripts(tmp_path, hf, ranks):
    """Started by plain Python, or by torchrun with more ranks than there is work for."""
    # torchrun's own parser takes `--n` for an abbreviation of its options, wherever it stands: only plain Python can give it
    n = ["--n", "4"] if ranks == 1 else []
    launch(ranks, "checkpoint_split.py", "--ckpt_file", str(hf), "--save_path", str(tmp_path / "shards"), *n)
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == [
        *(f"consolidated.0{i}.pth" for i in range(4 if n else 8)), "generation_config.json", "params.json", "tokenizer.json"]
    launch(ranks, "checkpoint_merge.py", "--ckpt_dir", str(tmp_path / "shards"), "--save_dir", str(tmp_path / "back"))
    assert_same(read_hf(tmp_path / "back"), read_hf(hf))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "shards"]


def test_script_refuses_with_one_line_and_code_2(tmp_path, hf):
    done = start(1, "checkpoint_split.py", "--ckpt_file", str(hf), "--save_path", str(tmp_path / "new"), "--n", "3")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--n 3 does not divide this model's" in done.stderr and "degrees that fit: [1, 2, 4, 8]" in done.stderr
    assert not any(tmp_path.iterdir())


# --- what is wrong


def broken(tmp_path, change, n=2, **how) -> str:
    """Shards of which one, the last, was changed; the message of the refusal."""
    write_hf(tmp_path / "hf", **how)
    split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "shards", n)
    file = tmp_path / "shards" / f"consolidated.{n - 1:02d}.pth"
    shard = torch.load(file)
    change(shard)
    torch.save(shard, file)
    with pytest.raises(UserError) as caught:
        Checkpoint.open(str(tmp_path / "shards"))
    return str(caught.value)


def test_missing_tensor(tmp_path):
    message = broken(tmp_path, lambda shard: shard.pop("layers.1.attention.wo.weight"))
    assert "layers.1.attention.wo.weight is missing" in message and "shard 1 of 2" in message and str(tmp_path / "shards") in message


def test_unknown_tensor(tmp_path):
    message = broken(tmp_path, lambda shard: shard.update({"layers.0.attention.wq.bias": torch.zeros(4)}))
    assert "consolidated.01.pth: unknown tensor layers.0.attention.wq.bias" in message


def test_misshapen_tensor(tmp_path):
    message = broken(tmp_path, lambda shard: shard.update({"layers.0.feed_forward.w2.weight": torch.zeros(DIM, 5)}))
    assert "consolidated.01.pth: layers.0.feed_forward.w2.weight has shape [64, 5], expected [64, 44]" in message


def test_all_problems_at_once(tmp_path):
    def change(shard):
        del shard["norm.weight"], shard["output.weight"]
        shard["lora"] = torch.zeros(1)

    message = broken(tmp_path, change)
    assert all(text in message for text in ("norm.weight is missing", "output.weight is missing", "unknown tensor lora"))


def test_missing_tensor_in_a_hugging_face_folder(tmp_path):
    tensors = write_hf(tmp_path / "hf")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(DIM)
    tensors["lm_head.weight"] = torch.zeros(VOCABULARY + 1, DIM)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError) as caught:
        Checkpoint.open(str(tmp_path / "hf"))
    for text in ("model.layers.1.mlp.up_proj.weight is missing", "unknown tensor model.layers.0.self_attn.q_proj.bias",
                 "model.safetensors: lm_head.weight has shape [97, 64], expected [96, 64]"):
        assert text in str(caught.value)


def test_a_hole_in_the_row_of_shards(tmp_path, hf):
    split(Checkpoint.open(str(hf)), tmp_path / "shards", 4)
    (tmp_path / "shards" / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match=r"consolidated\.01\.pth missing; shards up to consolidated\.03 are there"):
        Checkpoint.open(str(tmp_path / "shards"))


def test_the_last_shard_missing(tmp_path, hf):
    split(Checkpoint.open(str(hf)), tmp_path / "shards", 4)
    (tmp_path / "shards" / "consolidated.03.pth").unlink()
    with pytest.raises(UserError, match=r"tok_embeddings.weight has shape \[96, 16\], expected \[96, 21\]"):
        Checkpoint.open(str(tmp_path / "shards"))


@pytest.mark.parametrize("name", ("model.safetensors", "pytorch_model.bin", "consolidated.00.pth"))
@pytest.mark.parametrize("kept", (0.0, 0.00005, 0.3, 0.97))
def test_truncated_file(tmp_path, name, kept):
    write_hf(tmp_path / "hf", "bin" if name.endswith("bin") else "one")
    if name.startswith("consolidated"):
        split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "shards", 1)
        file = tmp_path / "shards" / name
    else:
        file = tmp_path / "hf" / name
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match=f"{name}: cannot be read"):
        Checkpoint.open(str(file.parent))


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("how", ("torch", "plain pickle"))
def test_malicious_pickle_is_refused(tmp_path, hf, how):
    folder, target = tmp_path / "bad", tmp_path / "it-ran"
    shutil.copytree(hf, folder)
    (folder / "model.safetensors").unlink()
    content = dict(load_file(hf / "model.safetensors"), evil=Malicious(target))
    if how == "torch":
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"evil": Malicious(target)}))
    with pytest.raises(UserError, match="pytorch_model.bin"):
        Checkpoint.open(str(folder))
    assert not target.exists()


def test_a_pickle_of_something_else(tmp_path, hf):
    shutil.copytree(hf, tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").unlink()
    torch.save({"model": load_file(hf / "model.safetensors"), "step": 3}, tmp_path / "bad" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: holds no plain dictionary of tensors"):
        Checkpoint.open(str(tmp_path / "bad"))


@pytest.mark.parametrize("name", ("../hf/model.safetensors", "/etc/passwd", "sub/model.safetensors", 7))
def test_index_that_points_outside(tmp_path, hf, name):
    shutil.copytree(hf, tmp_path / "hf")
    folder = tmp_path / "indexed"
    shutil.copytree(hf, folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match="index.json: model.norm.weight lies in .* which is outside the folder"):
        Checkpoint.open(str(folder))


@pytest.mark.parametrize("index, message", (
    ('{"weight_map": {"model.norm.weight": "gone.safetensors"}}', "lies in gone.safetensors, which is missing"),
    ('{"weight_map": {"no.such": "model.safetensors"}}', "no.such is said to lie in model.safetensors, which does not hold it"),
    ('{"weight_map": {}}', "no weight_map"), ("[1]", "holds a list"), ("{", "cannot be read as JSON")))
def test_index_that_is_wrong(tmp_path, hf, index, message):
    shutil.copytree(hf, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        Checkpoint.open(str(tmp_path / "hf"))


@pytest.mark.parametrize("change, message", (
    (dict(n_layers=3), "layers.2.attention_norm.weight is missing"),
    (dict(n_layers=1), "unknown tensor layers.1"),
    (dict(dim=128, head_dim=16), r"tok_embeddings.weight has shape \[96, 32\], expected \[96, 64\]"),
    (dict(n_kv_heads=4), r"wk.weight has shape \[32, 64\], expected \[16, 64\]"),
    (dict(hidden_dim=96), r"w1.weight has shape \[44, 64\], expected \[48, 64\]"),
    (dict(vocab_size=100), r"expected \[100, 32\]"),
    (dict(tie_word_embeddings=True), "unknown tensor output.weight"),
    (dict(n_heads=0), "n_heads is 0"), (dict(dim="64"), "dim is '64'"), (dict(n_kv_heads=3), "8 heads cannot share 3 kv heads"),
    (dict(norm_eps=None), "no 'norm_eps'"), (dict(head="value"), "unknown head 'value'"),
    (dict(use_scaled_rope=True), "use_scaled_rope is set"), (dict(moe={"num_experts": 8}), "moe is set"),
    (dict(hidden_dim=None, multiple_of="256"), "multiple_of is '256'"), (dict(head_dim=0), "head_dim is 0"),
    (dict(n_layers=10**9), "n_layers is 1000000000")), ids=str)
def test_params_that_contradict_the_tensors(tmp_path, hf, change, message):
    split(Checkpoint.open(str(hf)), tmp_path / "shards", 2)
    file = tmp_path / "shards" / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        Checkpoint.open(str(tmp_path / "shards"))


@pytest.mark.parametrize("change, message", (
    (dict(model_type="gpt2"), "model_type is 'gpt2'"), (dict(attention_bias=True), "attention_bias is set"),
    (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "rope scaling 'llama3', which is not supported"),
    (dict(rope_scaling={"type": "linear", "factor": 2}), "rope scaling 'linear', which is not supported"),
    (dict(rope_parameters="x"), "rope_parameters is 'x'"), (dict(quantization_config={"bits": 4}), "quantization_config is set"),
    (dict(architectures="LlamaForCausalLM"), "a list of names is expected"), (dict(architectures=5), "a list of names is expected"),
    (dict(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"), (dict(head_dim=0), "head_dim is 0"),
    (dict(hidden_size="32", head_dim=None), "hidden_size is '32'"), (dict(num_attention_heads=0), "num_attention_heads is 0"),
    (dict(rope_theta=float("inf")), "rope_theta is inf"), (dict(num_hidden_layers=10**9), "n_layers is 1000000000"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(architectures=["LlamaForSequenceClassification"], id2label={"0": "a", "1": "b"}), "has 2 labels")), ids=str)
def test_hugging_face_models_that_are_not_this_one(tmp_path, hf, change, message):
    shutil.copytree(hf, tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        Checkpoint.open(str(tmp_path / "hf"))


@pytest.mark.parametrize("keys", (dict(rope_theta=5e5, rope_parameters=None), dict(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 5e5})), ids=("transformers 4", "transformers 5"))
def test_rope_theta_of_either_transformers(tmp_path, hf, keys):
    shutil.copytree(hf, tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "shards", 2)
    merge(Checkpoint.open(str(tmp_path / "shards")), tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5


def test_model_type_that_disagrees(hf):
    config = Checkpoint.open(str(hf)).config
    with pytest.raises(UserError, match=r"dim 64 \(a llama-2-7b has 4096\)"):
        check_model_type(config, "llama-2-7b")
    with pytest.raises(UserError, match="llama-3: unknown"):
        check_model_type(config, "llama-3")
    check_model_type(replace(PRESETS["llama-1-7b"], max_seq_len=8), "llama-1-7b")


def test_n_that_does_not_divide(tmp_path, hf):
    with pytest.raises(UserError, match=r"--n 16 does not divide this model's 8 heads, 8 kv heads.*degrees that fit: \[1, 2, 4, 8\]"):
        split(Checkpoint.open(str(hf)), tmp_path / "shards", 16)
    assert not any(tmp_path.iterdir())


def test_folders_with_foreign_files_are_never_replaced(tmp_path, hf):
    target = tmp_path / "mine"
    shutil.copytree(hf, target)
    assert check_replaceable(str(target)) == target
    (target / "thesis.tex").write_text("ten years")
    with pytest.raises(UserError, match="thesis.tex, which is no part of a checkpoint"):
        check_replaceable(str(target))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, a folder is needed"):
        check_replaceable(str(tmp_path / "file"))
    done = start(1, "checkpoint_split.py", "--ckpt_file", str(hf), "--save_path", str(target), "--n", "2")
    assert done.returncode == 2 and "thesis.tex" in done.stderr
    assert (target / "thesis.tex").read_text() == "ten years" and not list(target.glob("consolidated*"))


@pytest.mark.parametrize("step", ("last shard", "params"))
@pytest.mark.parametrize("there_before", (False, True))
def test_a_failed_split_leaves_nothing_and_keeps_what_was_there(tmp_path, hf, monkeypatch, step, there_before):
    target = tmp_path / "shards"
    if there_before:
        split(Checkpoint.open(str(hf)), target, 2)
    before = {file.name: file.read_bytes() for file in target.iterdir()} if there_before else None
    save = torch.save

    def full_disk(shard, path):
        save(shard, path)
        if path.name == "consolidated.03.pth":
            raise OSError(28, "No space left on device")

    if step == "last shard":
        monkeypatch.setattr(torch, "save", full_disk)
    else:
        monkeypatch.setattr(write, "write_params", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        split(Checkpoint.open(str(hf)), target, 4)
    assert [path.name for path in tmp_path.iterdir()] == (["shards"] if there_before else [])
    if there_before:
        assert {file.name: file.read_bytes() for file in target.iterdir()} == before


def test_a_new_split_replaces_the_old_as_a_whole(tmp_path, hf):
    for n in (8, 2):
        split(Checkpoint.open(str(hf)), tmp_path / "shards", n)
    assert len(list((tmp_path / "shards").glob("consolidated*"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory from Linux's /proc")
@pytest.mark.parametrize("kind", ("safetensors", "bin"))
def test_split_holds_one_shard_and_one_tensor_at_most(tmp_path, kind):
    """310 MB in 8 shards of 39 MB; the largest tensor is 33 MB."""
    shape = dict(hidden_size=1024, num_attention_heads=8, num_key_value_heads=8, intermediate_size=2816, vocab_size=8000)
    config = LlamaConfig(**shape, num_hidden_layers=5, tie_word_embeddings=False)
    with torch.device("meta"):
        names = {key: value.shape for key, value in LlamaForCausalLM(config).state_dict().items()}
    tensors = {name: torch.ones(size) for name, size in names.items()}
    (tmp_path / "hf").mkdir()
    config.architectures = ["LlamaForCausalLM"]
    (tmp_path / "hf" / "config.json").write_text(config.to_json_string(use_diff=False))
    if kind == "bin":
        torch.save(tensors, tmp_path / "hf" / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    total, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    assert total > 300e6
    done = launch(1, "tests/checkpoint/memory_worker.py", str(tmp_path / "hf"), str(tmp_path / "shards"), "8")
    written = sum(file.stat().st_size for file in (tmp_path / "shards").iterdir())
    shutil.rmtree(tmp_path)  # 620 MB are not kept for later
    assert int(done.stdout) <= total / 8 + largest + 25e6
    assert written < 1.02 * total
