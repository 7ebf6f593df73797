"""Random weights that do not depend on the degree: each tensor is drawn whole from its own seed, then cut."""

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
