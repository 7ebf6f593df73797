"""Split at any degree and merged, every family comes back bit for bit.

transformers computes the same from it.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from src.checkpoint import write
from src.checkpoint.source import Checkpoint
from src.checkpoint.write import merge, split
from tests.checkpoint.tiny import (
    EXPERTS,
    FUSED,
    MODELS,
    ROWS,
    assert_same,
    logits_of,
    meta_tensors,
    read_hf,
    tiny,
    write_hf,
    write_tensors,
)
from tests.launch import launch, once

IDS = {"bos_token_id": 1, "eos_token_id": [2, 7]}


def transformed(folder: Path, name: str, made_by=AutoModelForCausalLM):
    experts = {"experts_implementation": "eager"} if name in FUSED else {}
    how = dict(dtype="auto", attn_implementation="eager", **experts)
    return made_by.from_pretrained(folder, **how).eval()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", MODELS)
def test_split_and_merged_is_bit_for_bit(tmp_path, name, dtype):
    wanted = write_hf(tmp_path / "hf", name, dtype=dtype)
    source = Checkpoint.open(str(tmp_path / "hf"))
    for n in (1, 2, 3, 4, 8):
        split(source, tmp_path / f"of-{n}", n)
        assert len(list((tmp_path / f"of-{n}").glob("consolidated.*.pth"))) == n
        shards = Checkpoint.open(str(tmp_path / f"of-{n}"))
        assert shards.config == source.config and shards.dtype == dtype
        merge(shards, tmp_path / f"back-{n}", IDS)
        assert_same(read_hf(tmp_path / f"back-{n}"), wanted)
        assert (tmp_path / f"back-{n}" / "tokenizer.json").read_text() == "{}"
    written = {(tmp_path / f"back-{n}" / "config.json").read_text() for n in (1, 2, 3, 4, 8)}
    assert len(written) == 1
    model, original = transformed(tmp_path / "back-3", name), tiny(name, dtype)
    assert type(model) is type(original)
    assert_same(model.state_dict(), original.state_dict())
    if dtype == torch.float32:
        assert torch.equal(logits_of(model), logits_of(original))
    again = Checkpoint.open(str(tmp_path / "back-1")).config
    if name == "qwen":  # a Qwen2 model now
        again = replace(again, family="qwen", use_logn_attn=True, use_dynamic_ntk=True)
    assert again == source.config


@pytest.mark.parametrize("name", ("llama", "qwen2-tied", "qwen3", "mixtral"))
def test_shards_cut_for_any_degree_are_read_at_any_other(tmp_path, name):
    """2 to 4, 3 to 1 and all others: each rank's part is that of a split of the original."""
    write_hf(tmp_path / "hf", name)
    degrees = (1, 2, 3, 4, 8)
    cut = {}
    for n in degrees:
        folder = tmp_path / f"of-{n}"
        split(Checkpoint.open(str(tmp_path / "hf")), folder, n)
        cut[n] = [torch.load(folder / f"consolidated.{rank:02d}.pth") for rank in range(n)]
    for have in degrees:
        shards = Checkpoint.open(str(tmp_path / f"of-{have}"))
        for n in degrees:
            for rank in range(n):
                part = {key: shards.local(key, rank, n).clone() for key in shards.table}
                assert_same(part, cut[n][rank])
    split(Checkpoint.open(str(tmp_path / "of-3")), tmp_path / "again", 4)
    for rank, shard in enumerate(cut[4]):
        assert_same(torch.load(tmp_path / "again" / f"consolidated.{rank:02d}.pth"), shard)


def test_shards_hold_their_part_alone(tmp_path):
    """A shard's file is as large as its tensors: no slice drags the whole it was cut from along."""
    write_hf(tmp_path / "hf", "mixtral", "bin", vocab_size=5000)
    split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "shards", 4)
    for file in (tmp_path / "shards").glob("consolidated.*"):
        size = sum(tensor.nbytes for tensor in torch.load(file).values())
        assert file.stat().st_size < 1.1 * size + 20_000


@pytest.mark.parametrize("name", ("llama", "mixtral", "qwen3-moe"))
def test_many_output_files(tmp_path, name, monkeypatch):
    monkeypatch.setattr(write, "MAX_FILE_BYTES", 60_000)
    wanted = write_hf(tmp_path / "hf", name)
    merge(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "back", IDS)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert files == sorted(file.name for file in (tmp_path / "back").glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
    assert index["weight_map"].keys() == wanted.keys()
    assert_same(read_hf(tmp_path / "back"), wanted)
    assert_same(transformed(tmp_path / "back", name).state_dict(), tiny(name).state_dict())
    merge(Checkpoint.open(str(tmp_path / "back")), tmp_path / "once more", IDS)
    assert_same(read_hf(tmp_path / "once more"), wanted)


def test_merging_in_another_dtype(tmp_path):
    wanted = write_hf(tmp_path / "hf", "qwen2")
    split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "shards", 2)
    merge(Checkpoint.open(str(tmp_path / "shards")), tmp_path / "back", IDS, torch.bfloat16)
    wanted = {key: tensor.bfloat16() for key, tensor in wanted.items()}
    assert_same(read_hf(tmp_path / "back"), wanted)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"


def test_tensors_of_different_dtypes_keep_them(tmp_path):
    wanted = write_hf(tmp_path / "hf", "mixtral")
    wanted = {
        key: t if "gate" in key else t.bfloat16() if t.dim() == 1 else t.half()
        for key, t in wanted.items()
    }
    write_tensors(tmp_path / "hf", wanted, "safetensors")
    split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "shards", 3)
    merge(Checkpoint.open(str(tmp_path / "shards")), tmp_path / "back", IDS)
    assert_same(read_hf(tmp_path / "back"), wanted)


SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "name, keys",
    (
        (
            "llama",
            dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=97)
            | dict(num_key_value_heads=6, head_dim=12, hidden_size=66, intermediate_size=50)
            | dict(attention_bias=False, mlp_bias=False, rms_norm_eps=1e-5, rope_theta=1e4),
        ),
        ("llama-3", dict(rope_parameters=SCALED, rope_scaling=SCALED, rope_theta=5e5)),
        ("yarn", dict(max_position_embeddings=64)),
        (
            "mistral",
            dict(model_type="mistral", architectures=["MistralForCausalLM"])
            | dict(sliding_window=5, num_key_value_heads=3),
        ),
        (
            "mixtral",
            dict(architectures=["MixtralForCausalLM"], sliding_window=None)
            | dict(num_local_experts=EXPERTS, num_experts_per_tok=2),
        ),
        (
            "qwen",
            dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], use_sliding_window=False)
            | dict(num_key_value_heads=6, intermediate_size=50)
            | dict(rms_norm_eps=1e-5, tie_word_embeddings=False),
        ),
        (
            "qwen2-tied",
            dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)
            | dict(tie_word_embeddings=True),
        ),
        (
            "qwen3",
            dict(architectures=["Qwen3ForCausalLM"], attention_bias=False)
            | dict(num_key_value_heads=1, head_dim=12),
        ),
        (
            "qwen3-moe",
            dict(architectures=["Qwen3MoeForCausalLM"], mlp_only_layers=[], decoder_sparse_step=1)
            | dict(num_experts=EXPERTS, num_experts_per_tok=3)
            | dict(norm_topk_prob=False, moe_intermediate_size=30),
        ),
    ),
)
def test_the_config_says_what_the_family_needs(tmp_path, name, keys):
    write_hf(tmp_path / "hf", name, dtype=torch.bfloat16)
    merge(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "back", IDS)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    dtypes = dict(dtype="bfloat16", torch_dtype="bfloat16")
    keys = dict(hidden_act="silu", num_hidden_layers=2) | dtypes | IDS | keys
    assert {key: config.get(key, "not there") for key in keys} == keys
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == IDS
    read = transformed(tmp_path / "back", name)
    assert read.config.eos_token_id == [2, 7] and read.generation_config.eos_token_id == [2, 7]


def test_a_generation_config_that_lies_there_goes_along(tmp_path):
    write_hf(tmp_path / "hf", "qwen2")
    lying = {"eos_token_id": [3, 4], "top_p": 0.8}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(lying))
    split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "shards", 2)
    merge(Checkpoint.open(str(tmp_path / "shards")), tmp_path / "back", IDS)
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == lying


# --- verifiers

VERIFIERS = ("llama", "mistral", "mixtral", "qwen2-tied", "qwen3", "qwen3-moe")


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory):
    work = tmp_path_factory.mktemp("verifiers")
    for name in VERIFIERS:
        write_hf(work / name, name, verifier=True)
    (work / "rows.json").write_text(json.dumps(ROWS))
    (work / "out").mkdir()

    @once
    def run(n: int) -> Path:
        folders = [f"{name}={work / name}" for name in VERIFIERS]
        worker = "tests/checkpoint/checkpoint_worker.py"
        launch(n, worker, str(work / "out"), str(work / "rows.json"), *folders)
        return work / "out"

    return run


@pytest.mark.parametrize("name", VERIFIERS)
def test_a_verifiers_scores_survive_the_way_to_transformers(tmp_path, verifiers, name):
    """Loaded and saved by two ranks, merged, and a padded batch scored by transformers.

    The padding id is one not in use.
    """
    out = verifiers(2)
    merge(
        Checkpoint.open(str(out / f"{name}-saved")), tmp_path / "back", IDS | {"pad_token_id": 90}
    )
    original = tiny(name, verifier=True)
    model = transformed(tmp_path / "back", name, AutoModelForSequenceClassification)
    assert type(model) is type(original) and model.config.pad_token_id == 90
    assert_same(model.state_dict(), original.state_dict())
    longest = max(map(len, ROWS))
    ids = torch.tensor([row + [90] * (longest - len(row)) for row in ROWS])  # [rows, longest]
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS])
    with torch.no_grad():
        batched = model(ids, attention_mask=mask).logits[:, 0]  # [rows]
    for rank in range(2):
        ours = load_file(out / f"{name}.{rank}.safetensors")["outputs"]
        torch.testing.assert_close(ours, batched, rtol=0, atol=1e-5 * batched.abs().max().item())
    split(Checkpoint.open(str(tmp_path / "back")), tmp_path / "of-3", 3)
    shards = [torch.load(tmp_path / "of-3" / f"consolidated.{rank:02d}.pth") for rank in range(3)]
    for shard in shards:
        assert torch.equal(shard["score.weight"], original.score.weight)
        assert "output.weight" not in shard
    whole = meta_tensors(read_hf(tmp_path / "back"), stacked=True)
    assert_same({key: Checkpoint.open(str(tmp_path / "of-3")).read(key) for key in whole}, whole)
