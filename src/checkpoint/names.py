"""Tensor names and row orders: ours (Meta's) and Hugging Face's."""

import re

from torch import Tensor

from src.models.config import ModelConfig
from src.models.hf_config import family_written

_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)|(?<=\btransformer\.h\.)\d+(?=\.)")

# Meta rotates neighbouring dimensions as a pair, Hugging Face a head's first half against its
# second: these tensors' rows are reordered between the two.
_ROTARY = re.compile(r"attention\.(wq|wk|q_norm|k_norm)\.(weight|bias|lora_b)$")


def generalised(name: str) -> str:
    """`layers.7.ffn_norm.weight` → `layers.{}.ffn_norm.weight`."""
    return _LAYER.sub("{}", name, count=1)


def layer_of(name: str) -> int | None:
    """`layers.7.ffn_norm.weight` → 7; None outside the layers."""
    match = _LAYER.search(name)
    return int(match[0]) if match else None


def is_rotary(name: str) -> bool:
    """Whether this tensor's rows (by our name) are reordered between Meta and Hugging Face."""
    return _ROTARY.search(name) is not None


def to_interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Hugging Face's row order (halves of a head) → Meta's (interleaved pairs), head by head."""
    # [heads · head_dim, …] → [heads, 2, head_dim / 2, …] → [heads, head_dim / 2, 2, …] → flat again
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_interleaved`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def hf_tensors(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """A whole tensor of ours as it is written for Hugging Face: key → rows, experts one by one."""
    if is_rotary(name):
        tensor = to_halves(tensor, config.head_dim)
    key = family_written(config)[1].names[generalised(name)][0].key
    if "{expert}" in key:
        return {
            key.format(layer_of(name), expert=expert): matrix.contiguous()
            for expert, matrix in enumerate(tensor)
        }
    return {key.format(layer_of(name)): tensor.contiguous()}
