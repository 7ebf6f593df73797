"""In what dtype a trained model is saved: its checkpoint's own, unless another was asked for."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from src.checkpoint.load import load_model
from src.checkpoint.save import check_save, save_model
from src.checkpoint.source import Checkpoint
from src.checkpoint.write import merge, split
from src.errors import UserError
from src.models.lora import LoRAConfig
from src.parallel.setup import start, stop
from tests.checkpoint.tiny import assert_same, read_hf, write_hf, write_tensors

MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture
def parallel():
    yield start(1)
    stop()


def folder_in(tmp_path, dtype: torch.dtype, norms: torch.dtype) -> dict:
    wanted = write_hf(tmp_path / "hf", "llama")
    wanted = {key: x.to(norms if x.dim() == 1 else dtype) for key, x in wanted.items()}
    write_tensors(tmp_path / "hf", wanted, "safetensors")
    return wanted


@pytest.mark.parametrize("norms", (None, "fp32"))
@pytest.mark.parametrize("dtype", MIXED)
def test_computed_in_fp32_and_saved_in_its_own(tmp_path, parallel, dtype, norms):
    """And in fp32 where `--dtype fp32` was given: nothing is rounded then."""
    wanted = folder_in(tmp_path, MIXED[dtype], MIXED[norms or dtype])
    base = Checkpoint.open(str(tmp_path / "hf"))
    model = load_model(base, parallel, torch.float32)
    with torch.no_grad():
        model.layers[0].attention.wq.weight += 1e-7  # a step that bf16 does not see
    for own in (True, False):
        save_model(model, parallel, str(tmp_path / "saved"), base, own_dtype=own)
        merge(Checkpoint.open(str(tmp_path / "saved")), tmp_path / "back", {})
        saved = read_hf(tmp_path / "back")
        if own and dtype == "bf16":
            assert_same(saved, wanted)
        assert {key: x.dtype for key, x in saved.items()} == {
            key: x.dtype if own else torch.float32 for key, x in wanted.items()
        }
        if not own:
            key = "model.layers.0.self_attn.q_proj.weight"
            assert not torch.equal(saved[key], wanted[key].float())


def test_what_is_wider_than_what_was_computed_is_not_made_up(tmp_path, parallel):
    folder_in(tmp_path, torch.float32, torch.float32)
    base = Checkpoint.open(str(tmp_path / "hf"))
    save_model(load_model(base, parallel, torch.bfloat16), parallel, str(tmp_path / "saved"), base)
    assert Checkpoint.open(str(tmp_path / "saved")).dtype == torch.bfloat16


def test_an_adapter_keeps_what_it_was_trained_in(tmp_path, parallel):
    folder_in(tmp_path, torch.bfloat16, torch.bfloat16)
    base = Checkpoint.open(str(tmp_path / "hf"))
    model = load_model(base, parallel, torch.float32, lora=LoRAConfig(2))
    save_model(model, parallel, str(tmp_path / "saved"), base)
    adapter = load_file(tmp_path / "saved" / "adapter" / "adapter_model.safetensors")
    assert {x.dtype for x in adapter.values()} == {torch.float32}
    assert Checkpoint.open(str(tmp_path / "saved")).dtype == torch.bfloat16


def test_a_new_head_is_of_the_models_dtype(tmp_path, parallel):
    folder_in(tmp_path, torch.bfloat16, torch.bfloat16)
    base = Checkpoint.open(str(tmp_path / "hf"))
    save_model(
        load_model(base, parallel, torch.float32, "score"), parallel, str(tmp_path / "saved"), base
    )
    assert Checkpoint.open(str(tmp_path / "saved")).dtype_of("score.weight") == torch.bfloat16


def test_what_fp16_cannot_hold_is_said(tmp_path, parallel):
    folder_in(tmp_path, torch.float16, torch.float16)
    base = Checkpoint.open(str(tmp_path / "hf"))
    model = load_model(base, parallel, torch.float32)
    with torch.no_grad():
        model.norm.weight[0] = 1e5
    with pytest.raises(UserError, match=r"norm.weight holds 100000, above what fp16 can; give"):
        save_model(model, parallel, str(tmp_path / "saved"), base)
    assert not (tmp_path / "saved").exists()


def test_the_room_that_is_needed_is_that_of_what_is_saved(tmp_path, monkeypatch):
    wanted = folder_in(tmp_path, torch.bfloat16, torch.bfloat16)
    base = Checkpoint.open(str(tmp_path / "hf"))
    size = sum(x.nbytes for x in wanted.values())
    needed = []
    monkeypatch.setattr("src.checkpoint.save.check_space", lambda _, bytes: needed.append(bytes))
    check_save(str(tmp_path / "new"), base, torch.float32)
    check_save(str(tmp_path / "new"), base, torch.float32, own_dtype=False, folders=2)
    assert needed == [size, 4 * size]


# --- what an export's config.json says, in which transformers 5 loads it


KEYS = {"norms": "norm", "last norm": "model.norm", "head": "lm_head", "one matrix": "1.mlp.up"}
HELD = {  # (most tensors', some tensors', which) → what holds all matrices
    ("fp32", "bf16", "norms"): "float32",
    ("fp32", "fp16", "norms"): "float32",
    ("fp32", "bf16", "last norm"): "float32",
    ("bf16", "fp32", "norms"): "bfloat16",
    ("bf16", "fp32", "last norm"): "bfloat16",
    ("fp16", "fp32", "norms"): "float16",
    ("bf16", "fp16", "norms"): "bfloat16",
    ("bf16", "fp32", "head"): "float32",
    ("fp32", "bf16", "head"): "float32",
    ("bf16", "fp32", "one matrix"): "float32",
    ("bf16", "fp16", "one matrix"): "float32",
    ("bf16", "bf16", "norms"): "bfloat16",
}


@pytest.mark.parametrize("most, some, which", HELD)
def test_the_config_names_what_holds_all_matrices(tmp_path, most, some, which):
    wanted = write_hf(tmp_path / "hf", "llama")
    wanted = {k: x.to(MIXED[some if KEYS[which] in k else most]) for k, x in wanted.items()}
    write_tensors(tmp_path / "hf", wanted, "safetensors")
    split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "shards", 2)
    for name in ("hf", "shards"):
        merge(Checkpoint.open(str(tmp_path / name)), tmp_path / "back", {})
        config = json.loads((tmp_path / "back" / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == HELD[most, some, which]
        assert_same(read_hf(tmp_path / "back"), wanted)
    # as transformers loads it, no matrix has lost anything
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    for key, x in wanted.items():
        if x.dim() > 1:
            assert torch.equal(loaded[key].float(), x.float()), key


def test_a_new_head_is_of_the_matrices_dtype(tmp_path, parallel):
    folder_in(tmp_path, torch.float32, torch.bfloat16)
    base = Checkpoint.open(str(tmp_path / "hf"))
    model = load_model(base, parallel, torch.float32, "score")
    save_model(model, parallel, str(tmp_path / "saved"), base)
    saved = Checkpoint.open(str(tmp_path / "saved"))
    assert saved.dtype_of("score.weight") == saved.dtype == torch.float32
