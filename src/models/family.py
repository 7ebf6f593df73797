"""What sets a family of models apart, as data.

That is names in its files, keys in its config, and what all its models have.
"""

from dataclasses import dataclass, field
from typing import Literal

from src.models.config import ModelConfig


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a file: under `key`.

    In a key {} is the layer, {expert} the expert: then there is one matrix per key. With `parts`
    > 1 the tensor is the `index`-th of that many equal parts of the file's along `dim`.
    """

    key: str
    index: int = 0
    parts: int = 1
    dim: int = 0


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face's `config.json`."""

    architecture: str  # of the class names in transformers: LlamaForCausalLM
    names: dict[str, tuple[Stored, ...]]  # ours (Meta's) → where it may lie; written as the first
    # our field → config.json's key, where it isn't Llama's
    keys: dict[str, str] = field(default_factory=dict)
    # what transformers takes for keys that are not there
    defaults: dict = field(default_factory=dict)
    has: dict = field(default_factory=dict)  # fields that are so in every model of the family
    # whether sliding_window counts; flagged: with use_sliding_window
    windows: Literal["never", "always", "flagged"] = "never"
    ffn_factor: int = 1  # config.json's intermediate_size is this many times the real width
    written_as: str | None = None  # the family whose Hugging Face folder computes the same function
    presets: dict[str, ModelConfig] = field(default_factory=dict)


def stored(names: dict[str, str]) -> dict[str, tuple[Stored, ...]]:
    """Names that need no more than a key."""
    return {ours: (Stored(theirs),) for ours, theirs in names.items()}
