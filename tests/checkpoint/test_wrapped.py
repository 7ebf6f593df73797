"""Files as trainers and wrappers leave them: other names, more or fewer tensors, several copies."""

import json
import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from src.checkpoint.files import save_tensors
from src.checkpoint.source import Checkpoint
from src.checkpoint.verify import model_report
from src.checkpoint.write import merge, split
from src.errors import UserError
from tests.checkpoint.test_formats import everything
from tests.checkpoint.tiny import (
    BASE,
    assert_same,
    meta_tensors,
    read_hf,
    write_hf,
    write_tensors,
)


def everywhere(key: str, wrapper: str) -> str:
    return re.sub(r"(layers\.\d+)\.", rf"\1.{wrapper}.", key)


WRAPPED = {
    "compiled": lambda key: "_orig_mod." + key,
    "data parallel": lambda key: "module." + key,
    "compiled in data parallel": lambda key: "module._orig_mod." + key,
    "data parallel in compiled": lambda key: "_orig_mod.module." + key,
    "peft": lambda key: "base_model.model." + key,
    "lightning": lambda key: "model." + key,
    "trl": lambda key: "pretrained_model." + key,
    "fsdp": lambda key: "_fsdp_wrapped_module." + everywhere(key, "_fsdp_wrapped_module"),
    "recomputed": lambda key: everywhere(key, "_checkpoint_wrapped_module"),
    "layers compiled": lambda key: everywhere(key, "_orig_mod"),
}


def rewritten(folder: Path, tensors: dict, form: str = "safetensors") -> Path:
    """The folder with other tensors."""
    for file in folder.glob("model*"):
        file.unlink()
    write_tensors(folder, {key: tensor.contiguous() for key, tensor in tensors.items()}, form)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoint.open(str(folder))
    return str(caught.value)


# --- names


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("name", ("llama", "qwen2-tied", "mixtral", "qwen"))
def test_what_wrappers_put_into_names_is_taken_off(tmp_path, name, wrapper):
    wanted = write_hf(tmp_path / "hf", name)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    rename = WRAPPED[wrapper]
    form = "sharded bin" if "parallel" in wrapper else "safetensors"
    rewritten(tmp_path / "hf", {rename(key): tensor for key, tensor in tensors.items()}, form)
    opened = Checkpoint.open(str(tmp_path / "hf"))
    assert_same(everything(opened), meta_tensors(wanted, stacked=True))
    if name == "llama":
        key = rename("model.layers.0.self_attn.k_proj.weight")
        report = model_report(tmp_path / "hf")
        assert not report.problems and " is read as model." in report.summary
        del tensors["model.layers.0.self_attn.k_proj.weight"]
        rewritten(tmp_path / "hf", {rename(key): tensor for key, tensor in tensors.items()})
        if "layers" not in wrapper and wrapper not in ("fsdp", "recomputed"):
            assert f"{key} is missing" in refusal(tmp_path / "hf")


@pytest.mark.parametrize("wrapper", ("module.", "_orig_mod."))
def test_wrapped_shards_of_our_own_names(tmp_path, wrapper):
    wanted = write_hf(tmp_path / "hf", "llama")
    split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "shards", 2)
    for file in (tmp_path / "shards").glob("*.pth"):
        torch.save({wrapper + key: x for key, x in torch.load(file).items()}, file)
    (tmp_path / "shards" / "manifest.json").unlink()
    opened = Checkpoint.open(str(tmp_path / "shards"))
    assert_same(everything(opened), meta_tensors(wanted))


def test_two_models_in_one_file_are_not_guessed_between(tmp_path):
    tensors = write_hf(tmp_path / "hf", "llama")
    both = {f"{who}.{key}": x.clone() for who in ("policy", "value") for key, x in tensors.items()}
    message = refusal(rewritten(tmp_path / "hf", both))
    assert "model.embed_tokens.weight is missing (nearest there: " in message
    assert "unknown tensor policy.lm_head.weight" in message
    both = {f"{who}{key}": x.clone() for who in ("", "module.") for key, x in tensors.items()}
    assert "unknown tensor module.lm_head.weight" in refusal(rewritten(tmp_path / "hf", both))


def test_a_misspelt_tensor_is_named_with_its_nearest(tmp_path):
    tensors = write_hf(tmp_path / "hf", "llama")
    tensors["model.layers.1.mlp.up_projection.weight"] = tensors.pop(
        "model.layers.1.mlp.up_proj.weight"
    )
    message = refusal(rewritten(tmp_path / "hf", tensors))
    near = "(nearest there: model.layers.1.mlp.up_projection.weight)"
    assert f"model.layers.1.mlp.up_proj.weight is missing {near}" in message
    assert "unknown tensor model.layers.1.mlp.up_projection.weight" in message


# --- a trunk alone


@pytest.mark.parametrize("name", ("llama", "qwen3-moe"))
def test_a_trunk_alone_is_what_a_verifier_starts_from(tmp_path, name):
    """As AutoModel saves it: no "model." in the names, and no output layer."""
    wanted = meta_tensors(write_hf(tmp_path / "whole", name), stacked=True)
    trunk = AutoModel.from_pretrained(tmp_path / "whole")
    trunk.save_pretrained(tmp_path / "hf")
    opened = Checkpoint.open(str(tmp_path / "hf"))
    assert opened.config.head == "none"
    del wanted["output.weight"]
    assert_same(everything(opened), wanted)
    # and again, from shards and from the folder that they are merged to
    split(opened, tmp_path / "shards", 2)
    merge(Checkpoint.open(str(tmp_path / "shards")), tmp_path / "back", {})
    again = AutoModel.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert type(again) is type(trunk)
    assert_same(again.state_dict(), trunk.state_dict())
    assert_same(everything(Checkpoint.open(str(tmp_path / "back"))), wanted)
    # what it lacks is told by the names that it has
    tensors = read_hf(tmp_path / "hf")
    tensors.pop("layers.0.input_layernorm.weight")
    message = refusal(rewritten(tmp_path / "hf", tensors))
    assert "layers.0.input_layernorm.weight is missing" in message
    assert "model.layers" not in message.replace("is read as model.layers", "")


def test_a_tied_trunk_alone_is_a_whole_model(tmp_path):
    wanted = write_hf(tmp_path / "hf", "qwen2-tied")
    bare = {key.removeprefix("model."): x for key, x in wanted.items()}
    opened = Checkpoint.open(str(rewritten(tmp_path / "hf", bare)))
    assert opened.config.head == "lm"
    assert_same(everything(opened), meta_tensors(wanted))


def test_a_tie_of_which_the_other_name_was_kept(tmp_path):
    wanted = write_hf(tmp_path / "hf", "qwen2-tied")
    tensors = dict(wanted)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    opened = Checkpoint.open(str(rewritten(tmp_path / "hf", tensors)))
    assert_same(everything(opened), meta_tensors(wanted))


# --- more than the weights


@pytest.mark.parametrize(
    "key",
    (
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.1.self_attn.masked_bias",
        "model.position_ids",
    ),
)
def test_what_is_computed_anyway_is_passed_over(tmp_path, key):
    wanted = write_hf(tmp_path / "hf", "llama")
    for more in ({key: torch.ones(6)}, {"module." + key: torch.ones(6, dtype=torch.int64)}):
        prefix = "module." if next(iter(more)).startswith("module.") else ""
        tensors = {prefix + name: x for name, x in wanted.items()} | more
        opened = Checkpoint.open(str(rewritten(tmp_path / "hf", tensors)))
        assert_same(everything(opened), meta_tensors(wanted))


@pytest.mark.parametrize(
    "key, who",
    (
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.SCB", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "fp8 or int8"),
        ("model.layers.0.mlp.up_proj.weight_packed", "compressed-tensors"),
    ),
)
def test_quantised_files_are_called_so(tmp_path, key, who):
    tensors = write_hf(tmp_path / "hf", "llama") | {key: torch.ones(4, dtype=torch.uint8)}
    del tensors["model.layers.0.mlp.up_proj.weight"]
    message = refusal(rewritten(tmp_path / "hf", tensors))
    assert message.startswith("model.safetensors: " + key) and f"are quantised ({who})" in message


def test_an_adapter_inside_a_whole_model_is_called_so(tmp_path):
    tensors = write_hf(tmp_path / "hf", "llama")
    tensors = {f"base_model.model.{key}": x for key, x in tensors.items()}
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors[f"{layer}.base_layer.weight"] = tensors.pop(f"{layer}.weight")
    message = refusal(rewritten(tmp_path / "hf", tensors))
    assert "an adapter lies among the weights; save the model with it added in" in message


@pytest.mark.parametrize("key", ("score.bias", "classifier.weight", "v_head.summary.weight"))
def test_a_head_that_would_be_lost_is_refused_by_name(tmp_path, key):
    tensors = write_hf(tmp_path / "hf", "llama", verifier=True)
    message = refusal(rewritten(tmp_path / "hf", tensors | {key: torch.ones(1)}))
    assert f"unknown tensor {key}" in message


def test_norms_in_fp32_stay_so_on_the_way_through(tmp_path):
    wanted = write_hf(tmp_path / "hf", "qwen3")
    wanted = {key: x if x.dim() == 1 else x.bfloat16() for key, x in wanted.items()}
    split(Checkpoint.open(str(rewritten(tmp_path / "hf", wanted))), tmp_path / "shards", 2)
    merge(Checkpoint.open(str(tmp_path / "shards")), tmp_path / "back", {})
    assert_same(read_hf(tmp_path / "back"), wanted)


@pytest.mark.parametrize("nested", ("state_dict", "model", "module", "model_state_dict"))
def test_a_trainers_file_with_the_weights_under_one_key(tmp_path, nested):
    wanted = write_hf(tmp_path / "hf", "llama")
    tensors = {"module." + key: x for key, x in wanted.items()}
    state = {"state": {0: {"exp_avg": torch.ones(2), "step": 3}}, "param_groups": [{"lr": 1e-5}]}
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save({nested: tensors, "optimizer": state, "step": 3}, tmp_path / "hf" / "last.pt")
    opened = Checkpoint.open(str(tmp_path / "hf" / "last.pt"))
    assert_same(everything(opened), meta_tensors(wanted))


# --- which of several files


def index_of(folder: Path, suffix: str, keys, file: str, **more) -> None:
    stem = {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, file), **more}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def drawn_again(tensors: dict) -> dict:
    """Other weights of the same shapes."""
    generator = torch.Generator().manual_seed(8)
    return {key: torch.randn(x.shape, generator=generator) for key, x in tensors.items()}


def read_by_transformers(folder: Path) -> dict:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("left_over", ("bin", "safetensors"))
@pytest.mark.parametrize("form", ("bin", "safetensors"))
def test_an_index_of_files_that_are_gone(tmp_path, left_over, form):
    wanted = write_hf(tmp_path / "hf", "llama", form)
    index_of(tmp_path / "hf", left_over, wanted, "gone-00001-of-00002." + left_over)
    assert_same(everything(Checkpoint.open(str(tmp_path / "hf"))), meta_tensors(wanted))


@pytest.mark.parametrize("first, second", (("safetensors", "bin"), ("sharded safetensors", "bin")))
def test_safetensors_are_read_before_torchs_files(tmp_path, first, second):
    wanted = write_hf(tmp_path / "hf", "llama", first)
    write_tensors(tmp_path / "hf", drawn_again(wanted), second)
    assert_same(everything(Checkpoint.open(str(tmp_path / "hf"))), meta_tensors(wanted))
    assert_same(read_by_transformers(tmp_path / "hf"), wanted)


def test_a_whole_file_and_an_index_must_agree(tmp_path):
    """transformers reads the whole file; whether that is what was meant nobody knows."""
    wanted = write_hf(tmp_path / "hf", "llama")
    write_tensors(tmp_path / "hf", wanted, "sharded safetensors")
    assert_same(everything(Checkpoint.open(str(tmp_path / "hf"))), meta_tensors(wanted))
    assert_same(read_by_transformers(tmp_path / "hf"), wanted)
    message = "model.safetensors and the files of model.safetensors.index.json hold different"
    changed = dict(wanted)
    changed["model.layers.1.self_attn.v_proj.weight"] = torch.zeros(72, BASE["hidden_size"])
    for other in (changed, {key: x for key, x in wanted.items() if "norm" in key}):
        write_tensors(tmp_path / "hf", other, "sharded safetensors")
        assert message in refusal(tmp_path / "hf")


def test_an_index_that_names_too_much_or_too_little(tmp_path):
    """Its list of files counts, as in transformers; what is in them is read."""
    wanted = write_hf(tmp_path / "hf", "llama")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "model-1.safetensors")
    for keys in (["model.norm.weight"], [*wanted, "model.rotary_emb.inv_freq", "no.such"]):
        index_of(tmp_path / "hf", "safetensors", keys, "model-1.safetensors", producer={"by": "x"})
        assert_same(everything(Checkpoint.open(str(tmp_path / "hf"))), meta_tensors(wanted))
        assert_same(read_by_transformers(tmp_path / "hf"), wanted)


def test_an_index_decides_between_files_that_hold_the_same_tensor(tmp_path):
    wanted = write_hf(tmp_path / "hf", "llama", "sharded safetensors")
    last = sorted((tmp_path / "hf").glob("*.safetensors"))[-1]
    save_file(load_file(last) | {"lm_head.weight": torch.ones(97, 66)}, last)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["lm_head.weight"] != last.name
    assert_same(everything(Checkpoint.open(str(tmp_path / "hf"))), meta_tensors(wanted))


# --- what is written


def test_files_have_ordinary_permissions(tmp_path):
    write_hf(tmp_path / "hf", "llama")
    split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "shards", 2)
    merge(Checkpoint.open(str(tmp_path / "shards")), tmp_path / "back", {})
    save_tensors({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "plain").touch()
    wanted = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    folders = [tmp_path / "shards", tmp_path / "back"]
    files = [file for folder in folders for file in folder.iterdir()]
    assert len(files) > 5
    for file in [*files, tmp_path / "x.safetensors"]:
        assert stat.S_IMODE(file.stat().st_mode) == wanted, file


def test_shards_in_another_dtype(tmp_path):
    wanted = write_hf(tmp_path / "hf", "llama")
    opened = Checkpoint.open(str(tmp_path / "hf"))
    split(opened, tmp_path / "shards", 2, torch.bfloat16)
    again = everything(Checkpoint.open(str(tmp_path / "shards")))
    assert_same(again, {key: x.bfloat16() for key, x in meta_tensors(wanted).items()})
    wanted["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    rewritten(tmp_path / "hf", wanted)
    with pytest.raises(UserError, match="layers.0.feed_forward.w3.weight holds 1e.06, above what"):
        split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "half", 2, torch.float16)
