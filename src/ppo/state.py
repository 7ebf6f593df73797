"""What changes from iteration to iteration beside the roles, and how a run goes on from it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from src.models.layout import TensorSpec, tensor_table
from src.parallel.setup import Parallel
from src.ppo.advantages import Moments
from src.ppo.kl import KLController
from src.ppo.pretraining import PretrainingMix
from src.ppo.roles import MovingReference, Role
from src.settings.ppo import PPOSettings

VALUE_DECAY = 0.95  # what earlier iterations' returns still weigh in value normalisation, each


class PPOState:
    """The KL controller, running moments of rewards and returns, a moving reference, the mix."""

    def __init__(
        self,
        kl: KLController,
        settings: PPOSettings,
        reference: Role | None = None,
        follower: MovingReference | None = None,
        mix: PretrainingMix | None = None,
    ) -> None:
        """follower: what moves the reference; mix: supervised rows beside the rewards."""
        self.kl, self.settings, self.reference = kl, settings, reference
        self.follower, self.mix = follower, mix
        self.reward_moments, self.value_moments = Moments(), Moments(VALUE_DECAY)

    def in_reward_units(self, values: Tensor) -> Tensor:
        """What the value model gives, in the units of the returns; any shape."""
        if not self.settings.advantages.value_norm:
            return values
        return values * self.value_moments.std + self.value_moments.mean

    # --- a step of the same run -------------------------------------------------------------------

    def parts(self) -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
        """How to get and set it, as numbers; `tensors` beside it."""
        parts: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
            "kl_coef": (lambda: self.kl.kl_coef, lambda x: setattr(self.kl, "kl_coef", x)),
            "reward_moments": self.reward_moments.part,
            "value_moments": self.value_moments.part,
        }
        follower = self.follower
        if follower is not None:
            parts["reference"] = (lambda: None, lambda _: follower.round())
        if self.mix is not None:
            parts["ptx"] = self.mix.batches.part
        return parts

    def tensors(self) -> dict[str, tuple[dict[str, Tensor], dict[str, TensorSpec], Parallel]]:
        """What changes beside what has an optimizer.

        Name → (this rank's tensors, their cuts, the division that they lie in).
        """
        if self.follower is None or self.reference is None:
            return {}
        table = tensor_table(self.reference.model.config)
        return {"reference": (self.follower.exact, table, self.reference.parallel)}

    # --- another run, from the models that this one leaves ----------------------------------------

    def take_up(self, policy: dict[str, Any], value: dict[str, Any]) -> None:
        """Go on from the moments that an earlier run left (`beside_weights`)."""
        self.reward_moments.sums = policy.get("reward_moments", self.reward_moments.sums)
        self.value_moments.sums = value.get("value_moments", self.value_moments.sums)

    def beside_weights(self) -> dict[str, dict[str, Any]]:
        """Of the policy and of the value model: what lies beside their weights."""
        rewards = self.settings.rewards
        policy = {"kl_coef": self.kl.kl_coef, **rewards.shaping()}
        if rewards.reward_norm:
            policy["reward_moments"] = self.reward_moments.sums
        value = {}
        if self.settings.advantages.value_norm:
            value["value_moments"] = self.value_moments.sums
        return {"policy": policy, "value": value}
