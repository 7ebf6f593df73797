"""A task's own grader as a reward."""

import torch
from torch import Tensor

from src.data.tokenizer import Tokenizer
from src.evaluation.task import Task
from src.generation.responses import cut_at
from src.ppo.buffer import RolloutBuffer
from src.ppo.rewards import RewardInputs


class RuleReward:
    """1 when the task's grader finds the answer right, else 0 (a reward of 0 is a reward)."""

    name = "rule"

    def __init__(self, task: Task, tokenizer: Tokenizer) -> None:
        self.task, self.tokenizer = task, tokenizer

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        task = self.task
        # As the evaluation reads them.
        texts = [cut_at(self.tokenizer.decode(ids), task.stop) for ids in buffer.responses()]
        right = [
            task.grade(text, prompt.gold)[task.metric]
            for text, prompt in zip(texts, buffer.prompts)
        ]
        return torch.tensor(right, dtype=torch.float32, device=buffer.tokens.device)


def make(inputs: RewardInputs) -> RuleReward:
    assert inputs.rule is not None
    return RuleReward(inputs.rule, inputs.tokenizer)
