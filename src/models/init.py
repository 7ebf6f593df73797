"""Random weights that do not depend on the degree.

Each tensor is drawn whole from a seed of its own, then cut.
"""

import hashlib

import torch
from torch import Tensor

from src.models.layout import TensorSpec


def generator_for(seed: int, name: str) -> torch.Generator:
    """An explicit generator for one named purpose, the same on every rank."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def random_tensor(name: str, spec: TensorSpec, std: float, seed: int) -> Tensor:
    """N(0, std²) for matrices, ones for norms, fp32 on the CPU, whole."""
    if len(spec.shape) == 1:
        return torch.ones(spec.shape)
    return torch.empty(spec.shape).normal_(0, std, generator=generator_for(seed, name))


def initial_std(name: str, spec: TensorSpec, n_layers: int, tied: bool = False) -> float:
    """Standard deviation for training from nothing.

    1/√fan-in, and 1/√(2 · layers) of that where blocks write to the trunk. The embedding's rows are
    looked up, not summed over: 0.3, so that the blocks' first outputs weigh about as much. Where
    they are tied to the output's, they are as that one's.
    """
    if name == "tok_embeddings.weight" and not tied:
        return 0.3
    std = spec.shape[-1] ** -0.5  # unused for norms, which start at one
    return std / (2 * n_layers) ** 0.5 if name.endswith(("wo.weight", "w2.weight")) else std
