"""A task's own grader as a reward."""

import torch
import torch.distributed as dist
from torch import Tensor

from src.data.tokenizer import Tokenizer
from src.evaluation.task import Task
from src.parallel.setup import Parallel, agreed
from src.ppo.buffer import RolloutBuffer
from src.ppo.rewards import RewardInputs


class RuleReward:
    """1 when the task's grader finds the answer right, else 0 (a reward of 0 is a reward).

    The ranks of a model share the work, so that none can differ from another.
    """

    name = "rule"

    def __init__(self, task: Task, tokenizer: Tokenizer, parallel: Parallel | None = None) -> None:
        self.task, self.tokenizer, self.parallel = task, tokenizer, parallel

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        device, parallel = buffer.tokens.device, self.parallel
        if parallel is None:
            return torch.tensor(self._right(buffer, 0, 1), device=device)
        share = parallel.model_rank, parallel.model_size
        scores = torch.tensor(agreed(lambda: self._right(buffer, *share)), device=device)  # [B]
        dist.all_reduce(scores, group=parallel.model_group)
        return scores

    def _right(self, buffer: RolloutBuffer, first: int, step: int) -> list[float]:
        """The rewards of every step-th rollout from `first`, and 0 for the others."""
        rewards, responses = [0.0] * len(buffer), buffer.responses()
        for i in range(first, len(buffer), step):
            # As the evaluation reads it.
            text = self.task.read(self.tokenizer.decode(responses[i]))
            rewards[i] = float(self.task.is_right(text, buffer.prompts[i].gold))
        return rewards


def make(inputs: RewardInputs) -> RuleReward:
    assert inputs.rule is not None
    return RuleReward(inputs.rule, inputs.tokenizer, inputs.parallel)
