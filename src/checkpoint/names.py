"""Tensor names and row orders: ours (Meta's) and Hugging Face's."""

import re

from torch import Tensor

from src.models.config import ModelConfig
from src.models.hf_config import family_written

_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)|(?<=\btransformer\.h\.)\d+(?=\.)")

# Meta rotates interleaved pairs, Hugging Face halves: these tensors' rows are reordered between the two.
_ROTARY = re.compile(r"attention\.(wq|wk|q_norm|k_norm)\.(weight|bias|lora_b)$")


def generalised(name: str) -> str:
    """`layers.7.ffn_norm.weight` → `layers.{}.ffn_norm.weight`."""
    return _LAYER.sub("{}", name, count=1)


def layer_of(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[0]) if found else None


def is_rotary(name: str) -> bool:
    """Whether rows of this tensor (by our name) are reordered between Meta's and Hugging Face's convention."""
    return _ROTARY.search(name) is not None


def to_interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Hugging Face's row order of wq / wk (halves) → Meta's (interleaved pairs), head by head; [heads · head_dim, …]."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_interleaved`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def hf_tensors(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """A whole tensor of ours as it is written for Hugging Face: its keys and rows; a matrix per expert."""
    if is_rotary(name):
        tensor = to_halves(tensor, config.head_dim)
    key = family_written(config)[1].names[generalised(name)][0].key
    if "{expert}" in key:
        return {
            key.format(layer_of(name), expert=e): matrix.contiguous()
            for e, matrix in enumerate(tensor)
        }
    return {key.format(layer_of(name)): tensor.contiguous()}
