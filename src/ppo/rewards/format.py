"""A pattern in the response as a reward."""

import re

import torch
from torch import Tensor

from src.data.tokenizer import Tokenizer
from src.ppo.buffer import RolloutBuffer
from src.ppo.rewards import RewardInputs


class FormatReward:
    """1 where the response holds the pattern, else 0.

    pattern: a regular expression (`re.search`, `.` also a line's end).
    """

    name = "format"

    def __init__(self, pattern: str, tokenizer: Tokenizer) -> None:
        self.pattern, self.tokenizer = re.compile(pattern, re.DOTALL), tokenizer

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        texts = [self.tokenizer.decode(ids) for ids in buffer.responses()]
        matches = [self.pattern.search(text) is not None for text in texts]
        return torch.tensor(matches, dtype=torch.float32, device=buffer.tokens.device)


def make(inputs: RewardInputs) -> FormatReward:
    pattern = inputs.settings.rewards.format_pattern
    assert pattern is not None
    return FormatReward(pattern, inputs.tokenizer)
