"""What the stages share: the sizes, and how a result is said."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import config_of

from src.models.config import ModelConfig

Say = Callable[..., None]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    decoder: the model that generates, and that gets an adapter; trained: the one that is trained as
    a whole; context: tokens of a prompt in the decode steps; new_tokens: two lengths of response, a
    decode step is what the second costs beyond the first, per token; slots: sequences of the
    rollouts, new: the most tokens of one; rows, length: of a training step; start: flags of
    dataset/start.py for the model of the scripts; prompts, response: of an iteration.
    """

    decoder: ModelConfig
    trained: ModelConfig
    batches: tuple[int, ...]
    context: int
    new_tokens: tuple[int, int]
    rounds: int
    slots: int
    new: int
    rows: int
    length: int
    start: dict[str, int]
    prompts: int
    response: int


# 7B to generate, 1.3B to train, and 0.5B but for the vocabulary in the scripts.
FULL = Sizes(
    decoder=config_of(4096, 32, 128, 11008),
    trained=config_of(2048, 24, 128, 5504),
    batches=(1, 8, 64, 256),
    context=128,
    new_tokens=(16, 64),
    rounds=3,
    slots=256,
    new=128,
    rows=8,
    length=2048,
    start=dict(dim=896, n_layers=24, n_heads=14, n_kv_heads=2, hidden_dim=4864),
    prompts=128,
    response=256,
)
# Only to see that every stage works.
SMALL = Sizes(
    decoder=config_of(64, 2, 16, 96, 512),
    trained=config_of(64, 2, 16, 96, 512),
    batches=(1, 3),
    context=8,
    new_tokens=(2, 6),
    rounds=1,
    slots=4,
    new=8,
    rows=2,
    length=32,
    start=dict(dim=32, n_layers=1, n_heads=4, vocab_size=430),
    prompts=2,
    response=6,
)


def sayer(out: Path, stage: str) -> Say:
    """`say(**values)` writes a line of JSON at once: a stage that dies leaves its results."""

    def say(**values: Any) -> None:
        line = json.dumps({"stage": stage, **values})
        with open(out / "results.jsonl", "a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    return say


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def weight_bytes(model: torch.nn.Module) -> int:
    """What a decode step reads of the weights: of the embedding only a few rows."""
    parameters = model.named_parameters()
    return sum(p.nbytes for name, p in parameters if "tok_embeddings" not in name)


def cache_bytes(model) -> int:
    """Of one token in this rank's cache, all layers."""
    size = model.norm.weight.element_size()
    return 2 * model.config.n_layers * model.kv_heads * model.config.head_dim * size


def made_prompts(n: int, length: Callable[[int], int], vocab_size: int) -> list[list[int]]:
    """n different prompts; the i-th has `length(i)` tokens."""
    return [[1 + (7 * i + j) % (vocab_size - 1) for j in range(length(i))] for i in range(n)]
