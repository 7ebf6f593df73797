"""What a response earns: each reward gives one number per rollout, and PPO adds them by weight.

The reward called NAME is what `make` in NAME.py of this folder returns; its name stands in
`REWARDS` of src/settings/rewards.py.
"""

import importlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.evaluation.task import Task
from src.parallel.setup import Parallel
from src.ppo.buffer import RolloutBuffer
from src.ppo.roles import Stage
from src.settings.generation import SamplingSettings
from src.settings.model import BatchSettings
from src.settings.rewards import RewardSettings


class Reward(Protocol):
    """Gives each rollout of a buffer a number."""

    name: str

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        """→ [B], fp32; NaN: no opinion. All ranks of a model get the same."""
        ...


class RewardedSettings(Protocol):
    """The settings of a script whose samples earn something."""

    @property
    def rewards(self) -> RewardSettings: ...

    @property
    def generation(self) -> SamplingSettings: ...

    @property
    def batches(self) -> BatchSettings: ...


class RewardFailed(UserError):
    """What gives the reward failed, on all ranks, before anything was learned from it."""


@dataclass(frozen=True)
class RewardInputs:
    """What a reward may need.

    stage: with the role "reward" where there is a verifier; tokenizer: the policy's;
    verifier_tokenizer: the verifier's, None when it is the policy's; moments: mean and standard
    deviation of the verifier's scores, if they are stored with it; rule: whose rule is applied.
    """

    settings: RewardedSettings
    parallel: Parallel
    stage: Stage
    tokenizer: Tokenizer
    verifier_tokenizer: Tokenizer | None = None
    moments: tuple[float, float] | None = None
    rule: Task | None = None


def earned(
    rewards: list[tuple[float, Reward]], buffer: RolloutBuffer
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The components of the reward, their weighted sum, and whether there is any, [B] each.

    A component without an opinion (NaN) adds nothing to the sum.
    """
    components = {reward.name: reward(buffer) for _, reward in rewards}
    known = {name: ~x.isnan() for name, x in components.items()}
    terms = [
        weight * torch.where(known[reward.name], components[reward.name], 0.0)
        for weight, reward in rewards
    ]
    return components, sum(terms, start=torch.zeros(())), torch.stack([*known.values()]).any(0)


def make_rewards(inputs: RewardInputs) -> list[tuple[float, Reward]]:
    """(weight, reward) of each of --reward."""
    rewards = inputs.settings.rewards
    modules = [importlib.import_module(f"src.ppo.rewards.{name}") for name in rewards.names]
    return [(weight, module.make(inputs)) for weight, module in zip(rewards.weights, modules)]
