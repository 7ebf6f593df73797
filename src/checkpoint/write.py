"""Checkpoints out: Meta's consolidated shards, and Hugging Face folders. Nothing is ever held whole but one output file."""

import json
from pathlib import Path
from typing import Iterator

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from src.checkpoint.folder import check_space, copy_side_files, whole_folder
from src.checkpoint.source import Checkpoint, generalised, to_halves, to_hf_name
from src.models.config import ModelConfig, params_of
from src.models.layout import check_degree
from src.models.llama import ROTARY

MAX_FILE_BYTES = 5 * 10**9
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def shard_name(rank: int) -> str:
    return f"consolidated.{rank:02d}.pth"


def write_params(config: ModelConfig, folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(params_of(config), indent=1) + "\n")


def split(checkpoint: Checkpoint, save_path: Path, n: int) -> None:
    """Write `n` consolidated shards with `params.json` and the tokenizer's files. Peak memory: one shard."""
    check_degree(checkpoint.config, n, "--n")
    check_space(save_path, sum(_bytes(checkpoint, name) for name in checkpoint.table))
    with whole_folder(save_path) as folder:
        for rank in range(n):
            names = tqdm(checkpoint.table, desc=f"shard {rank + 1} of {n}", unit="tensor")
            # clone: a slice of a mapped file would drag its whole storage into torch.save
            shard = {
                name: checkpoint.check_finite(name, checkpoint.local(name, rank, n)).clone(memory_format=torch.contiguous_format)
                for name in names
            }
            torch.save(shard, folder / shard_name(rank))
            del shard
        write_params(checkpoint.config, folder)
        copy_side_files(checkpoint.folder, folder)


def merge(checkpoint: Checkpoint, save_dir: Path, pad_id: int = 0) -> None:
    """Write a Hugging Face folder that `transformers` loads, every tensor bit for bit. Peak memory: one output file."""
    files = list(_by_file(checkpoint))
    check_space(save_dir, sum(_bytes(checkpoint, name) for name in checkpoint.table))
    with whole_folder(save_dir) as folder:
        weight_map, progress = {}, tqdm(total=len(checkpoint.table), desc="merging", unit="tensor")
        for number, names in enumerate(files, 1):
            name_out = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {}
            for name in names:
                tensor = checkpoint.read(name)
                if generalised(name) in ROTARY:
                    tensor = to_halves(tensor, checkpoint.config.head_dim)
                tensors[to_hf_name(name)] = tensor.contiguous()
                progress.update()
            save_file(tensors, folder / name_out, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name_out)
        progress.close()
        if len(files) > 1:
            total = sum(_bytes(checkpoint, name) for name in checkpoint.table)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        copy_side_files(checkpoint.folder, folder)
        (folder / "config.json").write_text(json.dumps(hf_config(checkpoint.config, DTYPE_NAMES[checkpoint.dtype], pad_id), indent=1) + "\n")
        if not (folder / "generation_config.json").exists() and checkpoint.config.head == "lm":
            (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}, indent=1) + "\n")


def _bytes(checkpoint: Checkpoint, name: str) -> int:
    return torch.Size(checkpoint.table[name].shape).numel() * checkpoint.dtype.itemsize


def _by_file(checkpoint: Checkpoint) -> Iterator[list[str]]:
    """Names of the tensors of each output file, none above 5 GB (but a larger single tensor)."""
    names, size = [], 0
    for name in checkpoint.table:
        if names and size + _bytes(checkpoint, name) > MAX_FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(checkpoint, name)
    yield names


def hf_config(c: ModelConfig, dtype: str, pad_id: int = 0) -> dict:
    """`config.json` with the keys of transformers 4 and 5 both, so that either reads it."""
    scored = c.head == "score"
    config = {
        "architectures": ["LlamaForSequenceClassification" if scored else "LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "max_position_embeddings": c.max_seq_len,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": c.tie_word_embeddings and not scored,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if scored:
        # transformers scores the last token that is not padding: the pad id must be one that no text holds.
        config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}, "pad_token_id": pad_id}
    return config
