"""What is wrong with a checkpoint is said in one message, with file, tensor and shapes.

And nothing is half written.
"""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.checkpoint import write
from src.checkpoint.source import Checkpoint
from src.checkpoint.write import merge, split
from src.errors import UserError
from tests.checkpoint.tiny import BASE, VOCABULARY, write_hf
from tests.launch import start

DIM, FFN = BASE["hidden_size"], BASE["intermediate_size"]


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoint.open(str(folder))
    return str(caught.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A fresh copy of a model's folder, or of its shards: made(target, name, n)."""
    work = tmp_path_factory.mktemp("made")

    def copy(target: Path, name: str = "llama", n: int = 0) -> Path:
        folder, shards = work / name, work / f"{name}-{n}"
        if not folder.exists():
            write_hf(folder, name)
        if n and not shards.exists():
            split(Checkpoint.open(str(folder)), shards, n)
        shutil.copytree(shards if n else folder, target)
        return target

    return copy


@pytest.fixture
def hf(made, tmp_path) -> Path:
    return made(tmp_path / "hf")


def changed(path: Path, **change) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


# --- tensors


SHARD_1 = "consolidated.01.pth: "


@pytest.mark.parametrize(
    "name, change, texts",
    (  # the second shard's tensors that are given a shape or taken out; {} are their names in turn
        ("llama", {"layers.1.attention.wo.weight": None}, ["shard 1 of 2: {} is missing"]),
        ("llama", {"layers.0.attention.wq.bias": [4]}, [SHARD_1 + "unknown tensor {}"]),
        (
            "llama",
            {"layers.0.feed_forward.w2.weight": [DIM, 5]},
            [SHARD_1 + "{} has shape [66, 5], expected [66, 25]"],
        ),
        ("llama", {"output.weight": [48, DIM]}, ["{} has shape [48, 66], expected [49, 66]"]),
        (
            "llama",
            {"norm.weight": None, "output.weight": None, "lora": [1]},
            ["{} is missing", "{} is missing", "unknown tensor {}"],
        ),
        ("qwen2", {"layers.0.attention.wk.bias": None}, ["shard 1 of 2: {} is missing"]),
        ("qwen2", {"layers.0.attention.wk.bias": [12]}, ["{} has shape [12], expected [24]"]),
        # the tie spelt out, but not the embedding's shape
        ("qwen2-tied", {"output.weight": [49, 5]}, ["{}"]),
        ("qwen3", {"layers.1.attention.q_norm.weight": [6]}, ["{} has shape [6], expected [12]"]),
        (
            "mixtral",
            {"layers.0.feed_forward.experts.w1.weight": [4, 25, DIM]},
            ["{} has shape [4, 25, 66], expected [5, 25, 66]"],
        ),
        ("mixtral", {"layers.1.feed_forward.gate.weight": None}, ["{} is missing"]),
    ),
    ids=str,
)
def test_one_shard_is_wrong(tmp_path, made, name, change, texts):
    folder = made(tmp_path / "shards", name, 2)
    file = folder / "consolidated.01.pth"
    shard = torch.load(file) | {key: torch.zeros(shape) for key, shape in change.items() if shape}
    torch.save({key: tensor for key, tensor in shard.items() if change.get(key, 1)}, file)
    message = refusal(folder)
    assert str(folder) in message, message
    for key, text in zip(change, texts, strict=True):
        assert text.format(key) in message, message


def test_a_hugging_face_folder_is_wrong(hf):
    tensors = load_file(hf / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(72)
    tensors["lm_head.weight"] = torch.zeros(VOCABULARY + 1, DIM)
    save_file(tensors, hf / "model.safetensors")
    message = refusal(hf)
    for text in (
        str(hf),
        "model.layers.1.mlp.up_proj.weight is missing",
        "unknown tensor model.layers.0.self_attn.q_proj.bias",
        f"model.safetensors: lm_head.weight has shape [98, {DIM}], expected [97, {DIM}]",
    ):
        assert text in message


def test_an_output_layer_that_is_not_there_may_be_the_embedding(hf):
    """Some savers leave it out, and the config does not say so: it is not made up."""
    tensors = load_file(hf / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, hf / "model.safetensors")
    advice = "; if that is the embedding, set tie_word_embeddings to true"
    assert refusal(hf).endswith(f"lm_head.weight is missing{advice}")
    config = json.loads((hf / "config.json").read_text()) | {"tie_word_embeddings": True}
    (hf / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(str(hf)).config.tie_word_embeddings


@pytest.mark.parametrize(
    "name, key, shape",
    (
        ("qwen", "transformer.h.1.attn.c_attn.weight", [72, DIM]),
        ("qwen", "transformer.h.0.attn.c_attn.bias", [72]),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight", [FFN, DIM]),
        ("qwen3-moe", "model.layers.1.mlp.experts.4.up_proj.weight", [31, DIM]),
    ),
)
@pytest.mark.parametrize("missing", (False, True))
def test_fused_tensors_and_experts_are_named_as_they_lie_in_the_file(
    tmp_path, made, name, key, shape, missing
):
    folder = made(tmp_path / "hf", name)
    tensors = load_file(folder / "model.safetensors")
    full = list(tensors.pop(key).shape)
    if not missing:
        tensors[key] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors")
    text = f"model.safetensors: {key} has shape {shape}, expected {full}"
    assert (f"{key} is missing" if missing else text) in refusal(folder)


def test_one_expert_too_many(tmp_path, made):
    folder = made(tmp_path / "hf", "mixtral")
    changed(folder / "config.json", num_local_experts=4)
    message = refusal(folder)
    assert f"block_sparse_moe.gate.weight has shape [5, {DIM}], expected [4, {DIM}]" in message
    assert re.search(r"unknown tensor model.layers.\d.block_sparse_moe.experts.4.w", message)


@pytest.mark.parametrize("dtype", (torch.int8, torch.float64, torch.float8_e4m3fn), ids=str)
def test_tensors_of_another_kind(hf, dtype):
    key = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(hf / "model.safetensors")
    save_file(tensors | {key: tensors[key].to(dtype)}, hf / "model.safetensors")
    name = {torch.int8: "I8", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
    assert f"{key} is {name}, no fp32, bf16 or fp16" in refusal(hf)


def test_shards_of_different_kinds(tmp_path, made):
    folder = made(tmp_path / "shards", "llama", 2)
    file = folder / "consolidated.01.pth"
    torch.save({key: tensor.half() for key, tensor in torch.load(file).items()}, file)
    text = "layers.0.attention.wq.weight is torch.float16, expected torch.float32"
    assert text in refusal(folder)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize(
    "action",
    (lambda c, out: split(c, out, 2), lambda c, out: merge(c, out, {})),
    ids=("split", "merge"),
)
def test_weights_that_are_not_finite(tmp_path, hf, action, value):
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][49, 65] = value
    save_file(tensors, hf / "model.safetensors")
    where = "hf: NaN or infinite weights in layers.1.feed_forward.w3.weight"
    with pytest.raises(UserError, match=f"{where}; the checkpoint is damaged"):
        action(Checkpoint.open(str(hf)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_ranks_refuse_weights_that_are_not_finite(tmp_path, hf):
    """NaN in the last rank's part alone: no rank waits for another, and each says so."""
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][49, 65] = float("nan")
    save_file(tensors, hf / "model.safetensors")
    (tmp_path / "rows.json").write_text("[[1, 2]]")
    arguments = [str(tmp_path), str(tmp_path / "rows.json"), f"nan={hf}"]
    done = start(2, "tests/checkpoint/checkpoint_worker.py", *arguments, timeout=60)
    assert done.returncode != 0
    text = f"{hf}: NaN or infinite weights in layers.1.feed_forward.w3.weight"
    assert f"UserError: {text}" in done.stderr
    said = [(tmp_path / f"nan.{rank}.refused").read_text() for rank in range(2)]
    assert all(text in of_rank for of_rank in said)


# --- files


def test_a_hole_in_the_row_of_shards(tmp_path, made):
    folder = made(tmp_path / "shards", "llama", 4)
    (folder / "consolidated.01.pth").unlink()
    assert "consolidated.01.pth missing; 3 of 4 shards are there" in refusal(folder)


def test_the_last_shard_missing(tmp_path, made):
    folder = made(tmp_path / "shards", "llama", 4)
    (folder / "consolidated.03.pth").unlink()
    text = r"consolidated.00.pth: tok_embeddings.weight has shape \[97, 17\], expected \[97, 22\]"
    assert re.search(text, refusal(folder))


def test_one_shard_twice(tmp_path, made):
    folder = made(tmp_path / "shards", "llama", 2)
    save_file(torch.load(folder / "consolidated.01.pth"), folder / "consolidated.01.safetensors")
    assert "are both shard 1; remove one" in refusal(folder)


@pytest.mark.parametrize("name", ("model.safetensors", "pytorch_model.bin", "consolidated.00.pth"))
@pytest.mark.parametrize("kept", (0.0, 0.00005, 0.3, 0.97))
def test_truncated_file(tmp_path, made, name, kept):
    folder = made(tmp_path / "folder", "llama", 1 if name.startswith("consolidated") else 0)
    if name.endswith("bin"):
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * kept)])
    assert f"{name}: cannot be read" in refusal(folder)


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("how", ("torch", "plain pickle"))
def test_malicious_pickle_is_refused(tmp_path, hf, how):
    target = tmp_path / "it-ran"
    content = dict(load_file(hf / "model.safetensors"), evil=Malicious(target))
    (hf / "model.safetensors").unlink()
    if how == "torch":
        torch.save(content, hf / "pytorch_model.bin")
    else:
        (hf / "pytorch_model.bin").write_bytes(pickle.dumps({"evil": Malicious(target)}))
    assert "pytorch_model.bin" in refusal(hf)
    assert not target.exists()


@pytest.mark.parametrize(
    "more, message",
    (
        ({"ema": {}}, "holds no plain dictionary of tensors, but 'step', no tensor, among its 2"),
        ({"model": 1, "module": 1}, "weights under each of model, module among its 3 keys"),
    ),
)
def test_a_pickle_of_something_else(hf, more, message):
    weights = load_file(hf / "model.safetensors")
    more = {key: weights if value == 1 else value for key, value in more.items()}
    torch.save({"step": 3, **more}, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    assert f"pytorch_model.bin: {message}" in refusal(hf) or message in refusal(hf)


def test_a_pickle_of_a_list(hf):
    torch.save(list(load_file(hf / "model.safetensors").values()), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    assert "pytorch_model.bin: holds a list, no dictionary of tensors" in refusal(hf)


@pytest.mark.parametrize(
    "name", ("../hf/model.safetensors", "/etc/passwd", "sub/model.safetensors", 7)
)
def test_index_that_points_outside(hf, name):
    index = {"weight_map": {"model.norm.weight": name}}
    (hf / "model.safetensors").rename(hf / "other.safetensors")
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    text = "index.json: model.norm.weight lies in .* which is outside the folder"
    assert re.search(text, refusal(hf))


@pytest.mark.parametrize(
    "index, message",
    (
        (
            '{"weight_map": {"model.norm.weight": "gone.safetensors"}}',
            "no checkpoint in it; the files of model.safetensors.index.json are missing from it",
        ),
        (
            '{"weight_map": {"lm_head.weight": "other.safetensors", "a": "gone.safetensors"}}',
            "index.json: a lies in gone.safetensors, which is missing",
        ),
        ('{"weight_map": {}}', "no weight_map"),
        ("[1]", "holds a list"),
        ("{", "cannot be read as JSON"),
    ),
)
def test_index_that_is_wrong(hf, index, message):
    (hf / "model.safetensors").rename(hf / "other.safetensors")
    (hf / "model.safetensors.index.json").write_text(index)
    assert message in refusal(hf)


@pytest.mark.parametrize("form", ("sharded safetensors", "sharded bin"))
def test_a_file_of_the_index_is_gone_or_cut_short(tmp_path, form):
    write_hf(tmp_path / "hf", "llama", form)
    file = sorted((tmp_path / "hf").glob("*-00002-of-00003.*"))[0]
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    assert f"{file.name}: cannot be read" in refusal(tmp_path / "hf")
    file.unlink()
    assert f"lies in {file.name}, which is missing" in refusal(tmp_path / "hf")


def test_nothing_to_open(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "gone")
    assert "no checkpoint in it; expected consolidated.00.pth" in refusal(tmp_path)
    unknown = tmp_path / "weights.gguf"
    unknown.write_text("")
    assert "a GGUF file is unpacked first" in refusal(unknown)
    unknown = unknown.rename(tmp_path / "weights.ckpt")
    assert "unknown kind of file; expected a folder or one of .safetensors" in refusal(unknown)


# --- configs that contradict the tensors


@pytest.mark.parametrize(
    "change, message",
    (
        (dict(n_layers=3), "layers.2.attention_norm.weight is missing"),
        (dict(n_layers=1), "unknown tensor layers.1"),
        (dict(dim=132), r"tok_embeddings.weight has shape \[97, 33\], expected \[97, 66\]"),
        (dict(n_kv_heads=3), r"wk.weight has shape \[36, 66\], expected \[24, 66\]"),
        (dict(hidden_dim=96), r"w1.weight has shape \[25, 66\], expected \[48, 66\]"),
        (dict(vocab_size=100), r"expected \[100, 33\]"),
        (dict(qkv_bias=True), "a model of family llama has no attention.wq.bias"),
        (dict(qk_norm=True), "a model of family llama has no attention.q_norm.weight"),
        (
            dict(n_experts=4, experts_per_token=2),
            "a model of family llama has no feed_forward.gate.weight",
        ),
        (dict(sliding_window=8), "a model of family llama has no sliding_window 8"),
        (dict(family="qwen2"), "a model of family qwen2 has no qkv_bias False"),
        (dict(head="score"), "score.weight is missing"),
        (dict(head_dim=24), r"wq.weight has shape \[36, 66\], expected \[72, 66\]"),
        (dict(family="gpt2"), "unknown family 'gpt2'"),
        (dict(n_heads=0), "n_heads is 0"),
    ),
    ids=str,
)
def test_params_that_contradict_the_tensors(tmp_path, made, change, message):
    folder = made(tmp_path / "shards", "llama", 2)
    changed(folder / "params.json", **change)
    text = refusal(folder)
    assert str(folder) in text and re.search(message, text), text


@pytest.mark.parametrize(
    "name, change, message",
    (
        ("llama", dict(num_hidden_layers=3), "model.layers.2.input_layernorm.weight is missing"),
        ("llama", dict(model_type="qwen2"), "model.layers.0.self_attn.q_proj.bias is missing"),
        ("llama", dict(model_type="gpt2"), "model_type is 'gpt2'; supported: llama, mistral"),
        ("llama", dict(attention_bias=True), "attention_bias is set"),
        ("llama", dict(quantization_config={"bits": 4}), "quantization_config is set"),
        (
            "llama",
            dict(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}),
            "rope scaling 'longrope' is not supported",
        ),
        ("qwen2", dict(model_type="llama"), "unknown tensor model.layers.0.self_attn"),
        ("qwen3", dict(model_type="llama"), "unknown tensor model.layers.0.self_attn"),
        (
            "qwen",
            dict(intermediate_size=50),
            r"transformer.h.0.mlp.w2.weight has shape \[50, 66\], expected \[25, 66\]",
        ),
        (
            "mixtral",
            dict(num_local_experts=6),
            r"block_sparse_moe.gate.weight has shape \[5, 66\], expected \[6, 66\]",
        ),
        ("mixtral", dict(model_type="mistral"), "model.layers.0.mlp.gate_proj.weight is missing"),
        ("qwen3-moe", dict(mlp_only_layers=[1]), "mlp_only_layers is set"),
        ("qwen2-tied", dict(tie_word_embeddings=False), "lm_head.weight is missing"),
        (
            "llama",
            dict(architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"}),
            "score.weight is missing",
        ),
    ),
    ids=str,
)
def test_config_json_that_contradicts_the_tensors(tmp_path, made, name, change, message):
    folder = made(tmp_path / "hf", name)
    changed(folder / "config.json", **change)
    text = refusal(folder)
    assert str(folder) in text and re.search(message, text), text


@pytest.mark.parametrize(
    "name, n, key", (("llama", 0, "lm_head.weight"), ("llama", 2, "output.weight"))
)
def test_a_tie_between_matrices_that_differ(tmp_path, made, name, n, key):
    """Where a config says tied and the file holds another output layer, both must be kept.

    transformers keeps both: leaving it out is wrong.
    """
    folder = made(tmp_path / "folder", name, n)
    changed(folder / ("params.json" if n else "config.json"), tie_word_embeddings=True)
    with pytest.raises(UserError, match=key):
        split(Checkpoint.open(str(folder)), tmp_path / "out", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "text, message",
    (
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list"),
        (None, "not there; give the model's sizes"),
    ),
)
def test_a_config_that_is_none(hf, text, message):
    (hf / "config.json").unlink()
    if text:
        (hf / "config.json").write_text(text)
    assert "config.json" in refusal(hf) and message in refusal(hf)


# --- nothing half written


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def fail_at(step: str, monkeypatch) -> None:
    """Let the disk run full at the named step of writing."""
    saves = {
        "last shard": (torch, "save", "consolidated.03.pth"),
        "last file": (write, "save_tensors", "model-00004-of-"),
    }
    if step not in saves:
        return monkeypatch.setattr(write, step, full_disk)
    module, name, last = saves[step]
    save = getattr(module, name)

    def run_full(tensors, path, **more):
        save(tensors, path, **more)
        if path.name.startswith(last):
            full_disk()

    monkeypatch.setattr(module, name, run_full)
    monkeypatch.setattr(write, "MAX_FILE_BYTES", 60_000)


@pytest.mark.parametrize(
    "action, step",
    (
        ("split", "last shard"),
        ("split", "write_params"),
        ("split", "copy_side_files"),
        ("merge", "last file"),
        ("merge", "hf_config"),
    ),
)
@pytest.mark.parametrize("there_before", (False, True))
def test_what_fails_midway_leaves_nothing_and_keeps_what_was_there(
    tmp_path, hf, monkeypatch, action, step, there_before
):
    target = tmp_path / "target"
    checkpoint = Checkpoint.open(str(hf))
    run = {
        "split": lambda n: split(checkpoint, target, n),
        "merge": lambda n: merge(checkpoint, target, {}),
    }[action]
    if there_before:
        run(2)
    before = {file.name: file.read_bytes() for file in target.iterdir()} if there_before else None
    fail_at(step, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        run(4)
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["hf", "target"] if there_before else ["hf"]
    )
    if there_before:
        assert {file.name: file.read_bytes() for file in target.iterdir()} == before


@pytest.mark.parametrize("action", ("split", "merge"))
def test_no_room(tmp_path, hf, monkeypatch, action):
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    checkpoint = Checkpoint.open(str(hf))
    with pytest.raises(UserError, match=r"target: 0\.\d{3} GB are needed and 0\.000 GB are free"):
        if action == "split":
            split(checkpoint, tmp_path / "target", 2)
        else:
            merge(checkpoint, tmp_path / "target", {})
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_new_split_replaces_the_old_as_a_whole(tmp_path, hf):
    for n in (8, 2):
        split(Checkpoint.open(str(hf)), tmp_path / "shards", n)
    assert len(list((tmp_path / "shards").glob("consolidated*"))) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "shards"]
