"""The response's length as a reward; with a negative weight, a price of length."""

import torch
from torch import Tensor

from src.ppo.buffer import RolloutBuffer
from src.ppo.rewards import RewardInputs


class LengthReward:
    """The response's length as a share of max_new_tokens."""

    name = "length"

    def __init__(self, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        lengths = torch.tensor(buffer.response_lengths, device=buffer.tokens.device)
        return lengths / self.max_new_tokens


def make(inputs: RewardInputs) -> LengthReward:
    return LengthReward(inputs.settings.generation.max_new_tokens)
