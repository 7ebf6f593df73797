"""A soft punishment of overlong responses."""

import torch
from torch import Tensor

from src.ppo.buffer import RolloutBuffer
from src.ppo.rewards import RewardInputs


class OverlongReward:
    """0 up to max_new_tokens − margin, then falling in a line to −1 at max_new_tokens.

    (arXiv 2503.14476, equation 13.)
    """

    name = "overlong"

    def __init__(self, max_new_tokens: int, margin: int) -> None:
        self.max_new_tokens, self.margin = max_new_tokens, margin

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        lengths = torch.tensor(buffer.response_lengths, device=buffer.tokens.device)
        return ((self.max_new_tokens - self.margin - lengths) / self.margin).clamp(-1.0, 0.0)


def make(inputs: RewardInputs) -> OverlongReward:
    margin = inputs.settings.rewards.overlong_margin
    assert margin is not None
    return OverlongReward(inputs.settings.generation.max_new_tokens, margin)
