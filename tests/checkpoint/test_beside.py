"""A folder that holds a model twice: alike, or refused, since tools read different ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from src.checkpoint import source
from src.checkpoint.source import Checkpoint
from src.checkpoint.verify import reports_of
from src.checkpoint.write import split
from src.errors import UserError
from tests.checkpoint.test_adapter import ADAPTERS, merged_logits
from tests.checkpoint.test_adapter import trained as trained_adapter
from tests.checkpoint.test_formats import everything, mistral_params
from tests.checkpoint.tiny import (
    LAYERS,
    assert_same,
    logits_of,
    meta_tensors,
    tiny,
    write_hf,
    write_meta,
    write_tensors,
)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoint.open(str(folder))
    return str(caught.value)


def both(folder: Path, name: str = "mistral", file: str = "consolidated.safetensors") -> dict:
    """A folder as Mistral releases it; returns Hugging Face's tensors, a matrix per expert."""
    tensors = write_hf(folder, name)
    (folder / "params.json").write_text(json.dumps(mistral_params(name)))
    meta = {key: tensor.contiguous() for key, tensor in meta_tensors(tensors).items()}
    (save_file if file.endswith("safetensors") else torch.save)(meta, folder / file)
    return tensors


def trained(folder: Path, tensors: dict, form: str = "safetensors") -> None:
    """Other tensors in Hugging Face's files."""
    for file in folder.glob("model*"):
        file.unlink()
    write_tensors(folder, tensors, form)


def changed(path: Path, **change) -> None:
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "left out"}))


# --- shards of Meta's layout, and Hugging Face's files


@pytest.mark.parametrize("name", ("mistral", "mixtral"))
@pytest.mark.parametrize("file", ("consolidated.safetensors", "consolidated.00.pth"))
@pytest.mark.parametrize("form", ("safetensors", "sharded safetensors", "bin", "fused"))
def test_one_model_in_both_layouts_goes_on(tmp_path, name, file, form):
    wanted = both(tmp_path, name, file)
    tensors = dict(tiny(name).state_dict()) if form == "fused" else wanted
    trained(tmp_path, tensors, "safetensors" if form == "fused" else form)
    opened = Checkpoint.open(str(tmp_path))
    assert_same(everything(opened), meta_tensors(wanted, stacked=True))
    named = Checkpoint.open(str(tmp_path), str(tmp_path / "config.json"))
    assert_same(everything(named), everything(opened))


@pytest.mark.parametrize("vocabulary_first", (False, True))
def test_metas_shards_beside_hugging_faces_files_go_on(tmp_path, vocabulary_first):
    tensors = write_hf(tmp_path / "hf", "llama", vocab_size=96, intermediate_size=96)
    params = dict(dim=66, n_layers=LAYERS, n_heads=6, multiple_of=96, norm_eps=1e-5, vocab_size=-1)
    params |= dict(head_dim=12, ffn_dim_multiplier=0.5)
    write_meta(tmp_path / "meta", params, meta_tensors(tensors), 2, vocabulary_first)
    shutil.copytree(tmp_path / "hf", tmp_path / "meta", dirs_exist_ok=True)
    assert_same(everything(Checkpoint.open(str(tmp_path / "meta"))), meta_tensors(tensors))
    tensors["model.layers.1.self_attn.o_proj.weight"][65, 71] += 1
    trained(tmp_path / "meta", tensors)
    assert "layers.1.attention.wo.weight, rows 0 to 65" in refusal(tmp_path / "meta")


@pytest.mark.parametrize("form", ("safetensors", "sharded safetensors", "bin"))
def test_what_was_trained_beside_its_bases_shards(tmp_path, form):
    """transformers reads the trained one; we would have read the base."""
    tensors = {key: x + 0.5 for key, x in both(tmp_path).items()}
    trained(tmp_path, tensors, form)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert_same(read, tensors)
    message = refusal(tmp_path)
    assert "consolidated.safetensors and " in message and "hold different weights" in message
    assert "remove what is not meant" in message
    (tmp_path / "consolidated.safetensors").unlink()
    opened = Checkpoint.open(str(tmp_path))
    assert_same(everything(opened), meta_tensors(tensors))


def one_changed() -> list[tuple[str, str]]:
    """A model and a tensor of it: of all kinds of tensors one."""
    return [
        (name, key)
        for name in ("mistral", "mixtral")
        for key in tiny(name).state_dict()
        if "layers.0" not in key and "rotary" not in key
    ]


@pytest.mark.parametrize("name, key", one_changed())
def test_a_single_number_that_differs(tmp_path, name, key):
    """The last number of any tensor."""
    both(tmp_path, name)
    tensors = dict(tiny(name).state_dict())
    tensors[key].view(-1)[-1] += 0.01
    trained(tmp_path, tensors)
    assert "hold different weights" in refusal(tmp_path)


@pytest.mark.parametrize("row", (0, 48, 91, 96))
@pytest.mark.parametrize("key", ("model.embed_tokens.weight", "lm_head.weight"))
def test_every_row_of_the_vocabulary_counts(tmp_path, monkeypatch, key, row):
    monkeypatch.setattr(source, "_SMALL", 0)
    monkeypatch.setattr(source, "_AT_ONCE", 5 * 66 * 4)
    tensors = both(tmp_path)
    tensors[key][row, 7] += 0.01
    trained(tmp_path, tensors)
    start = row // 5 * 5
    assert f"rows {start} to {min(start + 4, 96)})" in refusal(tmp_path)


def test_of_large_tensors_some_rows_are_read(tmp_path, monkeypatch):
    """The first and the last of each matrix among them, of every head of what is rotated."""
    monkeypatch.setattr(source, "_SMALL", 0)
    tensors = both(tmp_path, "mixtral")
    assert_same(everything(Checkpoint.open(str(tmp_path))), meta_tensors(tensors, stacked=True))
    for row in (0, -1):
        for key, tensor in tensors.items():
            if "layers.1" in key or "norm" in key:
                other = tensors | {key: tensor.clone()}
                other[key][row] += 0.01
                trained(tmp_path, other)
                assert "hold different weights" in refusal(tmp_path), key
    ranges = list(source._compared("layers.0.feed_forward.w1.weight", 14336, 8192))
    assert ranges[0] == (0, 1) and ranges[-1] == (14335, 14336) and len(ranges) == 16
    ranges = list(source._compared("layers.0.attention.wq.weight", 4096, 8192, 128))
    assert ranges == [(0, 128), (1920, 2048), (3968, 4096)]


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_a_copy_in_another_dtype_is_the_same_model(tmp_path, dtype):
    """Meta released bf16, and Hugging Face's copy of it is in fp16."""
    tensors = {key: x.bfloat16() for key, x in both(tmp_path).items()}
    save_file(
        {key: x.contiguous() for key, x in meta_tensors(tensors).items()},
        tmp_path / "consolidated.safetensors",
    )
    other = {key: x.to(dtype) for key, x in tensors.items()}
    trained(tmp_path, other)
    assert_same(everything(Checkpoint.open(str(tmp_path))), meta_tensors(tensors))
    other["model.norm.weight"][3] *= 1.01
    trained(tmp_path, other)
    assert "(norm.weight, rows 0 to 65)" in refusal(tmp_path)


def test_files_of_another_kind_beside_the_shards(tmp_path):
    tensors = both(tmp_path)
    verifier = {key: x for key, x in tensors.items() if key != "lm_head.weight"}
    for other, said in (
        (tensors | {"model.layers.2.input_layernorm.weight": torch.ones(66)}, "unknown tensor"),
        (verifier, "lm_head.weight"),
        (verifier | {"score.weight": torch.ones(1, 66)}, "score.weight"),
        (tensors | {"model.layers.1.mlp.up_proj.weight": torch.ones(60, 66)}, "has shape [60, 66]"),
    ):
        trained(tmp_path, other)
        message = refusal(tmp_path)
        assert "hold different weights" in message and said in message
    trained(tmp_path, verifier | {"score.weight": torch.ones(1, 66)})
    config = dict(architectures=["MistralForSequenceClassification"], id2label={"0": "score"})
    changed(tmp_path / "config.json", **config)
    assert "only one of them has output.weight" in refusal(tmp_path)


def test_an_index_whose_files_are_gone_is_passed_over_beside_shards(tmp_path):
    tensors = both(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00003.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(everything(Checkpoint.open(str(tmp_path))), meta_tensors(tensors))


def test_a_tie_is_the_same_in_both_layouts(tmp_path):
    """Meta spells out the output layer of a tied model, Hugging Face does not."""
    tensors = write_hf(tmp_path, "llama", tie_word_embeddings=True, num_key_value_heads=2)
    assert "lm_head.weight" not in tensors
    meta = meta_tensors(tensors)
    params = mistral_params("mistral") | dict(family="llama", n_kv_heads=2, rope_theta=1e4)
    (tmp_path / "params.json").write_text(json.dumps(params | dict(sliding_window=0)))
    for change, alike in ((0, True), (1, False)):
        output = meta["tok_embeddings.weight"].clone()
        output[95] += change
        save_file(
            {key: x.contiguous() for key, x in (meta | {"output.weight": output}).items()},
            tmp_path / "consolidated.safetensors",
        )
        if alike:
            Checkpoint.open(str(tmp_path))
        else:
            assert "(output.weight, rows 0 to 96)" in refusal(tmp_path)


# --- a whole file and an index's


@pytest.mark.parametrize("small", (True, False))
@pytest.mark.parametrize("form", ("safetensors", "bin"))
def test_a_whole_file_and_an_index_are_compared_in_every_tensor(tmp_path, monkeypatch, form, small):
    if not small:  # as little is read as of large tensors
        monkeypatch.setattr(source, "_SMALL", 0)
    tensors = write_hf(tmp_path, "llama", f"sharded {form}")
    write_tensors(tmp_path, tensors, form)
    assert_same(everything(Checkpoint.open(str(tmp_path))), meta_tensors(tensors))
    for key in tensors:
        if "layers.0" not in key:
            for row in (0, -1):
                other = tensors | {key: tensors[key].clone()}
                other[key][row] += 1
                write_tensors(tmp_path, other, form)
                assert f"hold different weights ({key})" in refusal(tmp_path)


@pytest.mark.parametrize("rows", ([90, 92], [95], [1], [33, 47]), ids=str)
@pytest.mark.parametrize("key", ("model.embed_tokens.weight", "lm_head.weight"))
def test_a_whole_file_and_an_index_that_differ_in_some_tokens(tmp_path, monkeypatch, key, rows):
    monkeypatch.setattr(source, "_SMALL", 0)
    monkeypatch.setattr(source, "_AT_ONCE", 4 * 66 * 4)
    tensors = write_hf(tmp_path, "llama", "sharded safetensors")
    tensors[key][rows] += 2
    write_tensors(tmp_path, tensors, "safetensors")
    assert f"hold different weights ({key})" in refusal(tmp_path)


def test_experts_in_one_tensor_in_a_whole_file_and_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_SMALL", 0)
    write_hf(tmp_path, "mixtral")
    tensors = dict(tiny("mixtral").state_dict())
    write_tensors(tmp_path, tensors, "sharded safetensors")
    write_tensors(tmp_path, tensors, "safetensors")
    Checkpoint.open(str(tmp_path))
    key = next(key for key, x in tensors.items() if x.dim() == 3)
    tensors[key][2, -1] += 1
    write_tensors(tmp_path, tensors, "safetensors")
    assert f"hold different weights ({key})" in refusal(tmp_path)


# --- a tie, and an output layer of its own


@pytest.mark.parametrize("rows", ([91, 92, 95], [96], [0], [7], [50]), ids=str)
@pytest.mark.parametrize("at_once", (2**24, 5 * 66 * 4))
def test_an_output_layer_that_differs_in_some_rows_is_not_dropped(
    tmp_path, monkeypatch, rows, at_once
):
    """transformers keeps it, whatever tie_word_embeddings says."""
    monkeypatch.setattr(source, "_AT_ONCE", at_once)
    tensors = write_hf(tmp_path, "qwen2-tied")
    output = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": output}, tmp_path / "model.safetensors")
    Checkpoint.open(str(tmp_path))
    output[rows, 3] += 0.01
    meta = {"format": "pt"}
    save_file(tensors | {"lm_head.weight": output}, tmp_path / "model.safetensors", meta)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(theirs.lm_head.weight, output)
    message = refusal(tmp_path)
    assert f"lm_head.weight is not the embedding (row {rows[0]} differs)" in message
    changed(tmp_path / "config.json", tie_word_embeddings=False)
    opened = Checkpoint.open(str(tmp_path))
    assert torch.equal(opened.read("output.weight"), output)


@pytest.mark.parametrize("n", (2, 3))
@pytest.mark.parametrize("row", (0, 48, 49, 96))
def test_an_output_layer_of_its_own_in_shards(tmp_path, n, row):
    write_hf(tmp_path / "hf", "llama")
    split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "shards", n)
    files = sorted((tmp_path / "shards").glob("*.pth"))
    shards = [torch.load(file) for file in files]
    embedding = Checkpoint.open(str(tmp_path / "shards")).read("tok_embeddings.weight").clone()
    height = shards[0]["output.weight"].shape[0]
    changed(tmp_path / "shards" / "params.json", tie_word_embeddings=True)
    for change in (0, 1):
        embedding[row, 5] += change  # of the output layer alone
        padded = torch.cat([embedding, torch.zeros(height * n - 97, 66)])
        for file, shard, output in zip(files, shards, padded.chunk(n)):
            torch.save(shard | {"output.weight": output.clone()}, file)
        if change == 0:
            Checkpoint.open(str(tmp_path / "shards"))
        else:
            assert f"output.weight is not the embedding (row {row}" in refusal(tmp_path / "shards")


def test_an_output_layer_in_another_dtype_is_compared_as_it_is(tmp_path):
    tensors = {key: x.bfloat16() for key, x in write_hf(tmp_path, "qwen2-tied").items()}
    output = tensors["model.embed_tokens.weight"].float()
    save_file(tensors | {"lm_head.weight": output}, tmp_path / "model.safetensors")
    Checkpoint.open(str(tmp_path))
    output[40] *= 1 + 2**-12  # less than bf16 sees
    save_file(tensors | {"lm_head.weight": output}, tmp_path / "model.safetensors")
    assert "is not the embedding (row 40 differs)" in refusal(tmp_path)


# --- params.json and config.json


FIELDS = {  # what a params.json says otherwise, of which field
    "rope_theta": dict(rope_theta=1e4),
    "rope_theta unsaid": dict(rope_theta="left out"),
    "sliding_window": dict(sliding_window=None),
    "norm_eps": dict(norm_eps=1e-6),
    "n_kv_heads": dict(n_kv_heads=6),
    "vocab_size": dict(vocab_size=98),
    "n_layers": dict(n_layers=3),
    "rope_scaling": dict(use_scaled_rope=True),
    "tie_word_embeddings": dict(tie_word_embeddings=True),
    "family": dict(family="mixtral"),
}


@pytest.mark.parametrize("weights", ("both", "consolidated", "hf"))
@pytest.mark.parametrize("field", FIELDS)
def test_descriptions_that_disagree(tmp_path, field, weights):
    both(tmp_path)
    gone = {"consolidated": "model.safetensors", "hf": "consolidated.safetensors"}
    if weights in gone:
        (tmp_path / gone[weights]).unlink()
    changed(tmp_path / "params.json", **FIELDS[field])
    message = refusal(tmp_path)
    if field != "family":  # which has no such tensors
        name = field.split()[0]
        assert f"params.json and {tmp_path}/config.json describe different models" in message
        assert f": {name} is " in message and "--config_file" in message
    named = Checkpoint.open(str(tmp_path), str(tmp_path / "config.json"))
    assert (named.config.rope_theta, named.config.sliding_window) == (1e6, 5)


def test_a_named_file_of_weights_is_described_by_one_model_too(tmp_path):
    both(tmp_path)
    Checkpoint.open(str(tmp_path / "model.safetensors"))
    changed(tmp_path / "params.json", rope_theta=1e4)
    with pytest.raises(UserError, match="rope_theta is 10000.0 in the one and 1000000.0 in the"):
        Checkpoint.open(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("change", (dict(max_seq_len=32), dict(vocab_size=-1)), ids=str)
def test_what_a_description_leaves_open_does_not_disagree(tmp_path, change):
    """Mistral's files say nothing of the context's length, or another one than Hugging Face's."""
    tensors = both(tmp_path)
    changed(tmp_path / "params.json", **change)
    assert_same(everything(Checkpoint.open(str(tmp_path))), meta_tensors(tensors))


# --- a model's folder that also holds an adapter


def with_an_adapter(folder: Path) -> Path:
    """As PeftModel.save_pretrained into the base's own folder leaves it."""
    write_hf(folder, "llama")
    trained_adapter(folder, "llama", ADAPTERS["plain"])
    assert {"adapter_config.json", "model.safetensors"} <= {p.name for p in folder.iterdir()}
    return folder


def test_an_adapter_in_the_models_folder_is_not_left_out_in_silence(tmp_path):
    """transformers loads it with the weights; given as --adapter_dir, so do we."""
    folder = with_an_adapter(tmp_path / "base")
    message = f"{folder}: also holds an adapter (adapter_config.json), which transformers would add"
    assert message in refusal(folder) and f"give --adapter_dir {folder} to" in refusal(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert any("lora_A" in name for name, _ in theirs.named_parameters())
    ours = merged_logits(folder, folder, tmp_path)
    atol = 2e-5 * ours.abs().max().item()
    torch.testing.assert_close(ours, logits_of(theirs.eval()), rtol=0, atol=atol)


@pytest.mark.parametrize("form", ("sharded safetensors", "bin", "shards"))
def test_whatever_the_weights_files_are(tmp_path, form):
    folder = with_an_adapter(tmp_path / "base")
    if form == "shards":
        split(Checkpoint.open(str(folder), adapter_dir=str(folder)), tmp_path / "shards", 2)
        for file in folder.glob("adapter_*"):
            shutil.copy(file, tmp_path / "shards")
        folder = tmp_path / "shards"
    else:
        trained(folder, load_file(folder / "model.safetensors"), form)
    assert "also holds an adapter" in refusal(folder)


def test_what_tells_the_weights_alone_apart_goes_on(tmp_path):
    """A named file, another adapter, and an adapter/ folder as our trainers write it."""
    folder = with_an_adapter(tmp_path / "base")
    wanted = everything(Checkpoint.open(str(folder / "model.safetensors")))
    trained_adapter(tmp_path / "other", "llama", ADAPTERS["one layer"])
    opened = Checkpoint.open(str(folder), adapter_dir=str(tmp_path / "other"))
    assert opened.adapter_folder == tmp_path / "other"
    (folder / "adapter").mkdir()
    for file in list(folder.glob("adapter_*")):
        file.rename(folder / "adapter" / file.name)
    assert_same(everything(Checkpoint.open(str(folder))), wanted)


def test_an_adapter_alone_is_called_so(tmp_path):
    trained_adapter(tmp_path, "llama", ADAPTERS["plain"])
    changed(tmp_path / "adapter_config.json", base_model_name_or_path="meta/llama")
    message = refusal(tmp_path)
    assert "no checkpoint in it, but an adapter; give the model that it was trained on" in message
    assert "(meta/llama)" in message and f"--adapter_dir {tmp_path}" in message


def test_both_are_verified(tmp_path):
    folder = with_an_adapter(tmp_path / "base")
    reports = reports_of(folder, None, str(folder))
    assert not any(report.problems for report in reports)
    assert [report.summary.split(":")[1].split(",")[0] for report in reports] == [
        " 21 tensors",
        " an adapter of rank 3",
    ]
    assert "--base_dir" in reports_of(folder, None, None)[0].problems[0]
