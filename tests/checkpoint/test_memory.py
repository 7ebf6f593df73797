"""Nothing holds more than it must.

One shard and one tensor when splitting, a rank's own part when loading.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoint.tiny import write_tensors
from tests.launch import launch

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads the process's memory from Linux's /proc"
)


def write_large(folder: Path, form: str, **shape) -> list[int]:
    """A Llama of ones without a model being built; the sizes of its tensors."""
    config = AutoConfig.for_model("llama", **shape, tie_word_embeddings=False)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config).state_dict()
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    tensors = {name: torch.ones(tensor.shape) for name, tensor in empty.items()}
    write_tensors(folder, tensors, form)
    return [tensor.nbytes for tensor in tensors.values()]


@pytest.mark.parametrize("form", ("safetensors", "bin"))
def test_split_holds_one_shard_and_one_tensor_at_most(tmp_path, form):
    """310 MB in 8 shards of 39 MB; the largest tensor is 33 MB."""
    hf, shards = tmp_path / "hf", tmp_path / "shards"
    sizes = write_large(
        hf,
        form,
        hidden_size=1024,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=2816,
        vocab_size=8000,
        num_hidden_layers=5,
    )
    assert sum(sizes) > 300e6
    done = launch(1, "tests/checkpoint/memory_worker.py", "split", str(hf), str(shards), "8")
    written = sum(file.stat().st_size for file in shards.iterdir())
    shutil.rmtree(tmp_path)  # 620 MB are not kept for later
    assert int(done.stdout) <= sum(sizes) / 8 + max(sizes) + 25e6
    assert written < 1.02 * sum(sizes)


@pytest.mark.parametrize("form", ("sharded safetensors", "bin"))
def test_ranks_load_little_more_than_their_own_part(tmp_path, form):
    """72 MB in 20 layers, no tensor above 1 MB, from Hugging Face's folder on two ranks."""
    sizes = write_large(
        tmp_path / "hf",
        form,
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=960,
        vocab_size=1000,
        num_hidden_layers=20,
    )
    assert sum(sizes) > 70e6 > 60 * max(sizes)
    done = launch(2, "tests/checkpoint/memory_worker.py", "load", str(tmp_path / "hf"), "float32")
    shutil.rmtree(tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for peak, shard in (map(int, line.split()) for line in lines):
        assert shard > 0.49 * sum(sizes)
        assert 0.9 * shard < peak <= 1.2 * shard, f"{peak / shard:.2f}"
