"""Rotary position embeddings (RoFormer, arXiv 2104.09864) in Meta's convention.

Interleaved pairs of a head's columns are complex numbers.
"""

import math

import torch
from torch import Tensor

from src.models.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair, [head_dim / 2], with the config's scaling."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    s = config.rope_scaling
    if s is None:
        return frequencies
    return {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[s.kind](frequencies, s, config)


def _linear(frequencies: Tensor, s: RopeScaling, config: ModelConfig) -> Tensor:
    return frequencies / s.factor


def _llama3(frequencies: Tensor, s: RopeScaling, config: ModelConfig) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept.

    Those between are blended, by how often they fit the old context.
    """
    turns = s.original_max_seq_len * frequencies / (2 * math.pi)
    kept = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / s.factor)


def _yarn(frequencies: Tensor, s: RopeScaling, config: ModelConfig) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2).

    The bounds of the ramp are rounded outwards to whole dimensions.
    """

    def dimension_of(turns: float) -> float:
        wavelengths = s.original_max_seq_len / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelengths) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension_of(s.beta_fast)), 0)
    high = min(math.ceil(dimension_of(s.beta_slow)), config.head_dim - 1)
    steps = torch.arange(config.head_dim // 2, device=frequencies.device).float()
    stretched = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (1 - stretched + stretched / s.factor)


def rotary_table(config: ModelConfig, length: int, device: torch.device) -> Tensor:
    """cos and sin of position × frequency, as complex numbers [length, head_dim / 2]."""
    angles = torch.outer(
        torch.arange(length, device=device).float(), inverse_frequencies(config, device)
    )
    scale = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    return torch.polar(torch.full_like(angles, scale), angles)


def ntk_rotary(config: ModelConfig, positions: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Qwen v1's dynamic NTK: each token's frequencies follow from its prompt's length L.

    α = max(1, 2^⌈log₂(L / seq_length) + 1⌉ − 1) and base · α^(d / (d − 2)); fixed at prefill.
    [N] and [N] → [N, head_dim / 2].
    """
    ratio = prompt_lengths.double() / config.max_seq_len
    alpha = (2 ** (ratio.log2() + 1).ceil() - 1).clamp_min(1)
    d = config.head_dim
    base = config.rope_theta * alpha ** (d / (d - 2))
    exponents = torch.arange(0, d, 2, device=positions.device).double() / d
    angles = positions.float().unsqueeze(1) * (1.0 / base.unsqueeze(1) ** exponents).float()
    return torch.polar(torch.ones_like(angles), angles)


def logn(config: ModelConfig, positions: Tensor) -> Tensor:
    """Qwen v1's scale of the queries: log_{seq_length}(position) past seq_length, 1 before.

    Positions count from 1. [N] → [N, 1].
    """
    return ((positions + 1).float().log() / math.log(config.max_seq_len)).clamp_min(1).unsqueeze(1)
