"""Adapters as PEFT writes them, of every shape: merged here, the logits are PEFT's."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from src.checkpoint.adapter import Adapter
from src.checkpoint.source import Checkpoint
from src.checkpoint.write import merge, split
from src.errors import UserError
from src.inputs import lora_of
from src.models.lora import lora_table
from src.settings.training import LoRASettings
from tests.checkpoint.tiny import logits_of, tiny, write_hf

PATTERNS = dict(
    rank_pattern={"q_proj": 5, r"layers\.1\.mlp\.\w+": 2, "model.layers.0.self_attn.v_proj": 1},
    alpha_pattern={"k_proj": 3, "o_proj": 1.5, r"^model\.layers\.1\.self_attn\.q_proj": 40},
)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYTHING = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "plain": dict(target_modules=ATTENTION),
    "patterns": dict(target_modules=EVERYTHING, **PATTERNS),
    "patterns, scaled by the root": dict(target_modules=EVERYTHING, use_rslora=True, **PATTERNS),
    "ranks alone": dict(target_modules=ATTENTION, rank_pattern={"v_proj": 1}),
    "same scale": dict(
        target_modules=ATTENTION, rank_pattern={"v_proj": 6}, alpha_pattern={"v_proj": 16}
    ),
    "a pattern of layers": dict(target_modules=r".*\.layers\.1\.self_attn\.(q|v)_proj"),
    "all linear": dict(target_modules="all-linear", rank_pattern={"down_proj": 7}),
    "one layer": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    "but some": dict(target_modules=EVERYTHING, exclude_modules=r".*layers\.0\.mlp.*"),
    "head and embedding": dict(
        target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
    ),
    "norms": dict(target_modules=["q_proj"], modules_to_save=["norm", "input_layernorm"]),
    "a whole layer": dict(target_modules=["v_proj", "k_proj"], modules_to_save=["k_proj"]),
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[3, 96]),
    "tokens of both": dict(
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [3, 96], "lm_head": [4, 50, 96]},
    ),
}
TIED = {
    "the embedding alone": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "the head alone": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "both": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "together": dict(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[3, 96]),
}
CASES = [("llama", kind, how) for kind, how in ADAPTERS.items()]
CASES += [("qwen2-tied", f"tied: {kind}", how) for kind, how in TIED.items()]


def trained(folder: Path, name: str, how: dict, more_tokens: int = 0):
    """PEFT's model with random weights in all that it trains, saved to `folder`."""
    model = tiny(name)
    if more_tokens:
        model.resize_token_embeddings(97 + more_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 8} | how))
        generator = torch.Generator().manual_seed(4)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.2 * noise
        peft.save_pretrained(folder)
    return peft.eval()


def merged_logits(base: Path, adapter: Path, out: Path) -> torch.Tensor:
    """transformers' logits of base and adapter merged by us, by way of three shards."""
    split(Checkpoint.open(str(base), adapter_dir=str(adapter)), out / "shards", 3)
    merge(Checkpoint.open(str(out / "shards")), out / "hf", {})
    return logits_of(AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32).eval())


@pytest.mark.parametrize("name, kind, how", CASES, ids=[f"{kind}" for _, kind, _ in CASES])
def test_merged_it_is_what_peft_computes(tmp_path, name, kind, how):
    write_hf(tmp_path / "base", name)
    peft = trained(tmp_path / "adapter", name, how)
    wanted = logits_of(peft)
    base = logits_of(tiny(name))
    assert (wanted - base).abs().max() > 0.1 * base.abs().max()  # it does something
    # what PEFT itself reads again is what was saved
    again = PeftModel.from_pretrained(tiny(name), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(again), wanted, rtol=0, atol=1e-6)
    ours = merged_logits(tmp_path / "base", tmp_path / "adapter", tmp_path)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(
    "kind", ("patterns", "a pattern of layers", "patterns, scaled by the root")
)
def test_beside_the_weights_it_adds_the_same(tmp_path, kind):
    """The factors that stay an adapter, as on quantised weights: one rank and scale for all."""
    write_hf(tmp_path / "base", "llama")
    peft = trained(tmp_path / "adapter", "llama", ADAPTERS[kind])
    opened = Checkpoint.open(str(tmp_path / "base"), adapter_dir=str(tmp_path / "adapter"))
    adapter = opened.adapter
    table = lora_table(opened.config, adapter.lora)
    assert {name: tuple(x.shape) for name, x in adapter.tensors.items()} == {
        name: spec.shape for name, spec in table.items()
    }
    for module, ours in (
        ("model.layers.1.self_attn.v_proj", "layers.1.attention.wv"),
        ("model.layers.0.self_attn.v_proj", "layers.0.attention.wv"),
    ):
        layer = peft.base_model.model.get_submodule(module)
        delta = torch.zeros(layer.weight.shape)
        if hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight("default").detach()
        a, b = adapter.tensors[f"{ours}.lora_a"], adapter.tensors[f"{ours}.lora_b"]
        torch.testing.assert_close(adapter.lora.scale * (b @ a), delta, rtol=0, atol=1e-6)


def test_added_tokens_come_with_their_rows(tmp_path):
    """Two more tokens than the base has: their rows are in the adapter alone."""
    write_hf(tmp_path / "base", "llama")
    how = ADAPTERS["head and embedding"]
    wanted = logits_of(trained(tmp_path / "adapter", "llama", how, more_tokens=2))
    ours = merged_logits(tmp_path / "base", tmp_path / "adapter", tmp_path)
    assert ours.size(1) == 99
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())


def test_added_tokens_without_an_output_layer_for_them(tmp_path):
    write_hf(tmp_path / "base", "llama")
    trained(tmp_path / "adapter", "llama", ADAPTERS["head and embedding"], more_tokens=2)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, file)
    message = "embed_tokens.weight has 99 rows, the base 97, and there is no lm_head.weight"
    with pytest.raises(UserError, match=message):
        Checkpoint.open(str(tmp_path / "base"), adapter_dir=str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    "rename",
    (
        lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda key: "module." + key,
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    ),
)
def test_keys_that_went_another_way_than_pefts_saving(tmp_path, rename):
    write_hf(tmp_path / "base", "llama")
    trained(tmp_path / "adapter", "llama", ADAPTERS["plain"])
    config = Checkpoint.open(str(tmp_path / "base")).config
    wanted = Adapter.open(str(tmp_path / "adapter"), config).tensors
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({rename(key): tensor for key, tensor in load_file(file).items()}, file)
    ours = Adapter.open(str(tmp_path / "adapter"), config).tensors
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "kind, message",
    (
        ("patterns", "its layers' scales differ"),
        ("head and embedding", r"it holds more than its factors \(tok_embeddings.weight\)"),
        ("same scale", None),
        ("one layer", None),
    ),
)
def test_training_one_on(tmp_path, kind, message):
    write_hf(tmp_path / "base", "llama")
    trained(tmp_path / "adapter", "llama", ADAPTERS[kind])
    opened = Checkpoint.open(str(tmp_path / "base"), adapter_dir=str(tmp_path / "adapter"))
    settings = LoRASettings(lora_rank=opened.adapter.lora.rank)
    if message is None:
        assert lora_of(settings, opened) == opened.adapter.lora
        return
    with pytest.raises(UserError, match=f"cannot be trained on: {message}"):
        lora_of(settings, opened)


@pytest.mark.parametrize(
    "settings, keys, message",
    (
        ({}, ["layers.1.self_attn.q_proj.lora_A"], "layers.1.self_attn.q_proj.lora_A.weight is mi"),
        ({}, ["layers.1.self_attn.q_proj"], "has nothing for model.layers.1.self_attn.q_proj, whi"),
        ({"r": 2}, [], r"lora_A.weight has shape \[3, 66\] .*expected \[2, 66\]"),
        ({"rank_pattern": {"q_proj": 2}}, [], r"has shape \[3, 66\] .*expected \[2, 66\]"),
        ({"rank_pattern": {"q_proj": "2"}}, [], "rank_pattern is {'q_proj': '2'}"),
        ({"alpha_pattern": [1]}, [], r"alpha_pattern is \[1\]"),
        ({"rank_pattern": {"(": 2}}, [], r"rank_pattern has .*, no pattern"),
        ({"target_modules": "("}, [], "target_modules has .*, no pattern"),
        ({"use_dora": True}, [], "use_dora is set to True, which is not supported"),
    ),
)
def test_what_does_not_fit_is_said(tmp_path, settings, keys, message):
    write_hf(tmp_path / "base", "llama")
    trained(tmp_path / "adapter", "llama", ADAPTERS["plain"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {k: x for k, x in load_file(file).items() if not any(part in k for part in keys)}
    save_file(tensors, file)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(UserError, match=message):
        Checkpoint.open(str(tmp_path / "base"), adapter_dir=str(tmp_path / "adapter"))


def test_two_adapters_in_one_file(tmp_path):
    write_hf(tmp_path / "base", "llama")
    trained(tmp_path / "adapter", "llama", ADAPTERS["plain"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    other = tensors[key].clone()
    save_file(tensors | {key.replace("lora_A.", "lora_A.default."): other}, file)
    with pytest.raises(UserError, match="lora_A.*weight are one tensor's names: two adapters"):
        Checkpoint.open(str(tmp_path / "base"), adapter_dir=str(tmp_path / "adapter"))


def test_an_adapter_on_the_output_layer_is_refused_by_name(tmp_path):
    write_hf(tmp_path / "base", "llama")
    trained(tmp_path / "adapter", "llama", dict(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UserError, match="lm_head.* fits no layer of this model that can have"):
        Checkpoint.open(str(tmp_path / "base"), adapter_dir=str(tmp_path / "adapter"))
