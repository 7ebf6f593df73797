"""Policy optimisation from rewards: classic PPO with a value model, and group baselines without.

One iteration reads top to bottom in `PPO.iteration`: rollouts and rewards, log-probabilities and
values, advantages, then epochs of minibatches. What is computed of a token or a response is a pure
function in `advantages.py` and `loss.py`; which prompts come and when to stop is `fit.py`'s.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src.data.encoding import Prompt
from src.generation.engine import Engine, OnTokens
from src.generation.relayout import RelaidEngine
from src.generation.sampling import Sampling
from src.models.batch import (
    Batch,
    micro_batches,
    response_logprobs,
    response_loss,
    response_values,
    weighted_balance_loss,
)
from src.parallel.setup import Parallel
from src.ppo.advantages import gae, group_advantages, token_rewards, whiten
from src.ppo.buffer import RolloutBuffer, by_place
from src.ppo.kl import KLController
from src.ppo.loss import kl_loss, policy_loss, token_weights, value_loss
from src.ppo.pretraining import PretrainingMix
from src.ppo.rewards import Reward
from src.ppo.roles import MovingReference, Role, Stage
from src.ppo.rollouts import Draw, Rollouts
from src.ppo.state import PPOState
from src.ppo.statistics import Timer, costs, reward_statistics, rollout_statistics
from src.settings.ppo import PPOSettings
from src.trainer.fit import summed
from src.trainer.optimizer import most_of

Stats = dict[str, float]


@dataclass(frozen=True)
class Minibatch:
    """What one optimizer step learns from.

    rows: this rank's rows of the buffer, in micro-batches; tokens, sequences: over all ranks.
    """

    rows: list[list[int]]
    tokens: int
    sequences: int


# (batch, where its response tokens lie in the buffer, buffer, minibatch) → loss, logged sums
MicroBatchLoss = Callable[
    [Batch, Tensor, RolloutBuffer, Minibatch], tuple[Tensor, dict[str, Tensor]]
]


class PPO:
    """The roles, and what is done with one batch of prompts."""

    def __init__(
        self,
        stage: Stage,
        rewards: list[tuple[float, Reward]],
        engine: Engine | RelaidEngine,
        sampling: Sampling,
        stop_ids: set[int],
        kl: KLController,
        settings: PPOSettings,
        parallel: Parallel,
        mix: PretrainingMix | None = None,
    ) -> None:
        """stage: with the roles "policy", "value" and "reference".

        There is a value model if the advantages need one, and a reference if there is a KL penalty.
        rewards: (weight, reward) pairs, summed; mix: supervised rows beside them.
        """
        self.stage, self.settings, self.parallel, self.sampling = (
            stage,
            settings,
            parallel,
            sampling,
        )
        self.policy = stage.roles["policy"]
        self.value, self.reference = stage.roles.get("value"), stage.roles.get("reference")
        follower = None
        if settings.penalty.ref_ema is not None:
            assert self.reference is not None
            with stage.at_work("reference"):
                follower = MovingReference(self.reference, settings.penalty.ref_ema)
        self.state = PPOState(kl, settings, self.reference, follower, mix)
        self.timer = Timer(parallel.device)
        self.rollouts = Rollouts(
            stage, engine, sampling, stop_ids, rewards, settings.rollouts, parallel, self.timer
        )
        # Shown every iteration's buffer at its end.
        self.watch: list[Callable[[int, RolloutBuffer], None]] = []

    def iteration(
        self,
        number: int,
        prompts: list[Prompt],
        lr: float,
        value_lr: float,
        more: Draw | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Stats:
        """One iteration over the whole batch of prompts; returns what is to be logged.

        number: from 0; with the seed it fixes what is sampled and how minibatches are drawn.
        prompts: the samples of one prompt side by side; all ranks give the same list. more: the
        next batch of prompts, for groups that are left out (--filter_rounds).
        """
        self.timer.restart()

        # Rollouts of the policy as it is, and what they earn.
        buffer = self.rollouts.make(number, prompts, more, on_tokens)
        stats: Stats = {}
        if buffer.lengths_of_all:  # else every group was left out
            # Old and reference log-probabilities and values, in the first epoch's micro-batches.
            first_epoch = self._plan(number, 0, buffer)
            self._score(buffer, [rows for minibatch in first_epoch for rows in minibatch.rows])

            # What each token was worth, beside what was expected of it.
            self._advantages(buffer)

            # Epochs of minibatches: the policy moves, the value model learns.
            updates = self._update(number, buffer, lr, value_lr)
            if self.state.follower is not None:
                with self.stage.at_work("policy", "reference"):
                    self.state.follower.follow(self.policy.model)

            # The KL coefficient of the next iteration.
            stats = {**rollout_statistics(buffer, self.parallel, self._is_comparable), **updates}
            if self.reference is not None:
                stats["kl_coef"] = self.state.kl.kl_coef
                self.state.kl.update(stats["kl"], len(buffer.lengths_of_all))
        for watch in self.watch:
            watch(number, buffer)
        return {**self._reward_statistics(buffer), **stats, **self._costs(buffer)}

    # --- log-probabilities and values -------------------------------------------------------------

    @torch.no_grad()
    def _score(self, buffer: RolloutBuffer, groups: list[list[int]]) -> None:
        """Old and reference log-probabilities and values.

        groups: the first epoch's own micro-batches. The same code on the same batches gives the
        same bits: the first update's ratio is exactly 1.
        """
        with self.stage.at_work("policy"), self.timer("logprobs"):
            buffer.logprobs, buffer.entropy = self._logprobs(self.policy, buffer, groups)
        if self.reference is not None:
            with self.stage.at_work("reference"), self.timer("ref_logprobs"):
                buffer.ref_logprobs, _ = self._logprobs(self.reference, buffer, groups)
        if self.value is not None:
            with self.stage.at_work("value"), self.timer("values"):
                self._values(self.value, buffer, groups)

    def _in_step(self, role: Role, groups: list[list[int]]) -> list[list[int] | None]:
        """The groups, and then, while other data-parallel ranks have more, None.

        Ranks that share the role's weights compute together: one that has no more takes part.
        """
        parallel, idle = role.parallel, 0
        if role.optimizer is not None and role.optimizer.shares_weights:
            idle = most_of(len(groups), parallel.dp_group, parallel.device) - len(groups)
        return [*groups, *[None] * idle]

    def _logprobs(
        self, role: Role, buffer: RolloutBuffer, groups: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every response token, [R] each."""
        logprobs, entropy = (torch.zeros_like(buffer.rollout_logprobs) for _ in range(2))

        def read(rows: list[int]) -> None:
            batch, index = buffer.select(rows)
            kept = None if buffer.kept is None else buffer.kept[index]
            logprobs[index], entropy[index] = response_logprobs(
                role.model, batch, self.sampling.temperature, kept
            )

        role.passes.score(self._in_step(role, groups), buffer.batch, read)
        return role.collect(logprobs, self.parallel), role.collect(entropy, self.parallel)

    def _values(self, role: Role, buffer: RolloutBuffer, groups: list[list[int]]) -> None:
        """Before each response token, [R], and after the last one, [B].

        A value model of a smaller degree than the policy's is there several times: each computes
        its share of the groups, and they are put together.
        """
        values, last_values = torch.zeros_like(buffer.logprobs), torch.zeros_like(buffer.scores)

        def read(rows: list[int]) -> None:
            batch, index = buffer.select(rows)
            values[index], last_values[rows] = response_values(role.model, batch)

        with role.parallel.active():
            share = self._in_step(role, role.share(groups, self.parallel))
            role.passes.score(share, buffer.batch, read)
        buffer.old_values = role.collect(values, self.parallel)
        buffer.values = self.state.in_reward_units(buffer.old_values)
        buffer.last_values = self.state.in_reward_units(role.collect(last_values, self.parallel))

    # --- advantages -------------------------------------------------------------------------------

    def _shape(self, buffer: RolloutBuffer) -> None:
        """What is learned from, [B]: the scores normalised, scaled, shifted, clipped.

        And less a penalty for being cut, if that is asked for.
        """
        s, scores = self.settings.rewards, buffer.scores
        if s.reward_norm:
            moments = self.state.reward_moments
            moments.update(scores, self.parallel.dp_group)
            scores = (scores - moments.mean) / moments.std
        scores = scores * s.reward_scale + s.reward_bias
        if s.reward_clip is not None:
            scores = scores.clamp(-s.reward_clip, s.reward_clip)
        if s.truncated == "penalty":
            scores = torch.where(buffer.truncated, scores - s.truncation_penalty, scores)
        buffer.shaped = scores

    def _advantages(self, buffer: RolloutBuffer) -> None:
        """Rewards, advantages and returns of every response token, [R] each."""
        s, group = self.settings.advantages, self.parallel.dp_group
        self._shape(buffer)

        # Token rewards in a rectangle [B, T]: the KL penalty everywhere, the score at the end.
        layout = buffer.response_layout()
        mask = layout.pad(torch.ones_like(buffer.logprobs)).bool()
        if self.reference is not None and self.settings.kl_kind == "k1":
            kl = layout.pad(buffer.logprobs - buffer.ref_logprobs)
        else:  # no penalty, or one in the loss
            kl = torch.zeros_like(mask, dtype=torch.float32)
        rewards = token_rewards(buffer.shaped, kl, mask, self.state.kl.kl_coef)

        if s.is_grouped:
            # One number per response, beside the other samples of its prompt, on whatever rank.
            by_response = self._grouped(buffer, rewards.sum(1)).to(rewards)
            advantages = by_response.unsqueeze(1) * mask  # [B] → [B, T]
        elif s.has_value:
            advantages = self._estimated(buffer, rewards, mask)
        else:  # rewards to go
            nothing = torch.zeros_like(buffer.shaped)
            advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, nothing, s.gamma, 1.0)

        # Flat again, [B, T] → [R], and on one scale over the whole batch.
        buffer.rewards, flat = layout.unpad(rewards), layout.unpad(advantages)
        buffer.advantages = whiten(flat, group) if s.whitens else flat

    def _grouped(self, buffer: RolloutBuffer, sums: Tensor) -> Tensor:
        """Advantages beside the prompt's other samples that were kept. sums: of rewards; [B]."""
        samples = self.settings.rollouts.samples_per_prompt
        kind = self.settings.advantages.advantage
        slots = buffer.slots or list(range(len(buffer.lengths_of_all)))
        local_slots = [slots[place] for place in buffer.places]
        groups = max(slots) // samples + 1
        rewards = by_place(sums, local_slots, groups * samples, self.parallel)
        present = torch.zeros_like(rewards, dtype=torch.bool)
        present[slots] = True
        return group_advantages(rewards, samples, kind, present)[local_slots]

    def _estimated(self, buffer: RolloutBuffer, rewards: Tensor, mask: Tensor) -> Tensor:
        """Advantages by the value model, [B, T]; and the returns that it is to learn."""
        s, layout = self.settings.advantages, buffer.response_layout()
        values = layout.pad(buffer.values)
        # After EOS there is nothing to come; after a cut, what the value model expects.
        bootstrap = torch.zeros_like(buffer.last_values)
        if self.settings.rewards.truncated == "bootstrap":
            bootstrap = torch.where(buffer.truncated, buffer.last_values, 0.0)
        advantages, returns = gae(rewards, values, mask, bootstrap, s.gamma, s.lam)
        if s.lam_critic is not None and s.lam_critic != s.lam:
            _, returns = gae(rewards, values, mask, bootstrap, s.gamma, s.lam_critic)
        buffer.returns = buffer.value_targets = layout.unpad(returns)
        if s.value_norm:
            moments = self.state.value_moments
            moments.update(buffer.returns, self.parallel.dp_group)
            buffer.value_targets = (buffer.returns - moments.mean) / moments.std
        return advantages

    # --- updates ----------------------------------------------------------------------------------

    def _plan(self, number: int, epoch: int, buffer: RolloutBuffer) -> list[Minibatch]:
        """An epoch's minibatches: a function of seed, iteration and epoch alone.

        That scoring and the first epoch plan the same is what makes the first ratio 1. They are
        drawn from all ranks' rollouts before the ranks pick out their own, so that they hold the
        same rollouts at any data-parallel degree.
        """
        limits, n = self.settings.batches, self.settings.updates.mini_batches
        total = len(buffer.lengths_of_all)
        order = list(range(total))
        random.Random(f"{self.settings.run.seed}/iteration {number}/epoch {epoch}").shuffle(order)
        row_at = {place: row for row, place in enumerate(buffer.places)}
        plan = []
        for k in range(n):
            chosen = order[total * k // n : total * (k + 1) // n]
            if not chosen:
                continue  # groups were left out, and fewer rollouts than minibatches remain
            local_rows = [row_at[place] for place in sorted(chosen) if place in row_at]
            groups = micro_batches(
                [buffer.lengths[i] for i in local_rows],
                limits.max_batch_size,
                limits.max_tokens_per_batch,
            )
            rows = [[local_rows[i] for i in group] for group in groups]
            tokens = sum(buffer.lengths_of_all[place] for place in chosen)
            plan.append(Minibatch(rows, tokens, len(chosen)))
        return plan

    def _update(self, number: int, buffer: RolloutBuffer, lr: float, value_lr: float) -> Stats:
        """All epochs; returns the means over each role's steps."""
        s = self.settings.updates
        values: dict[str, list[float]] = {}
        steps: dict[str, int] = {}
        policy: list[tuple[Role, MicroBatchLoss, float]] = [(self.policy, self._policy_loss, lr)]
        value: list[tuple[Role, MicroBatchLoss, float]] = []
        if number < s.critic_warmup:  # the value model learns alone
            policy = []
        if self.value is not None:
            value = [(self.value, self._value_loss, value_lr)]
        # Step by step, or one role after the other: with --offload, one is on the device at a time.
        for trained in [policy + value] if s.update == "together" else [policy, value]:
            with self.stage.at_work(*(role.name for role, *_ in trained), training=True):
                for epoch in range(s.ppo_epochs):
                    for minibatch in self._plan(number, epoch, buffer):
                        for entry in list(trained):
                            role, loss_of, rate = entry
                            with self.timer(f"update_{role.name}"), role.parallel.active():
                                stats = self._step(role, loss_of, rate, minibatch, buffer)
                            steps[role.name] = steps.get(role.name, 0) + 1
                            for name, x in stats.items():
                                values.setdefault(name, []).append(x)
                            if role is self.policy and self._is_far(stats["approxkl"]):
                                trained.remove(entry)
        means = {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
        return {**means, **{f"{name}_steps": n for name, n in steps.items()}}

    def _is_far(self, approxkl: float) -> bool:
        """Whether the policy has moved enough in this iteration."""
        target = self.settings.updates.target_kl
        return target is not None and approxkl > target

    def _step(
        self,
        role: Role,
        loss_of: MicroBatchLoss,
        lr: float,
        minibatch: Minibatch,
        buffer: RolloutBuffer,
    ) -> Stats:
        """One optimizer step of one role; returns the loss and what is logged, of all ranks."""
        assert role.optimizer is not None
        is_policy, mix = role is self.policy, self.state.mix
        sums: dict[str, Tensor] = {}
        if is_policy and mix is not None:
            sums = mix.backward(role)

        # A micro-batch's loss is divided by the whole minibatch's counts: gradients add up.
        def micro_batch_loss(rows: list[int]) -> Tensor:
            batch, index = buffer.select(rows)
            loss, stats = loss_of(batch, index, buffer, minibatch)
            balance = weighted_balance_loss(role.model, batch, batch.responses, minibatch.tokens)
            for name, x in {f"{role.name}_loss": loss.detach(), **stats}.items():
                sums[name] = sums[name] + x if name in sums else x
            return loss + balance

        share = self._in_step(role, role.share(minibatch.rows, self.parallel))
        role.passes.train(share, buffer.batch, micro_batch_loss)
        done = role.optimizer.step(lr)
        names: tuple[str, ...] = ("value_loss", "value_clipfrac")
        if is_policy:
            names = ("policy_loss", "approxkl", "clipfrac")
            names += ("kl_loss",) if self._has_kl_loss else ()
            names += ("ptx_loss",) if mix is not None else ()
        return {
            **summed(sums, names, role.parallel),
            f"{role.name}_grad_norm": done["grad_norm"],
            f"{role.name}_skipped": done["skipped"],
        }

    @property
    def _has_kl_loss(self) -> bool:
        return self.reference is not None and self.settings.kl_kind != "k1"

    def _policy_loss(
        self, batch: Batch, index: Tensor, buffer: RolloutBuffer, minibatch: Minibatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate of a micro-batch, with KL penalty and entropy where in the loss."""
        s, tokens = self.settings.updates, minibatch.tokens
        stats: dict[str, Tensor] = {}
        by_response = token_weights(
            self.settings.level,
            batch.responses,
            tokens,
            minibatch.sequences,
            self.sampling.max_new_tokens,
        )
        responses = torch.tensor(batch.responses, device=index.device)
        weights = torch.tensor(by_response, device=index.device).repeat_interleave(responses)  # [r]

        # Called for a chunk of the micro-batch's tokens at a time: logits never exist as a whole.
        def chunk_loss(logprobs: Tensor, entropy: Tensor | None, rows: slice) -> Tensor:
            chunk = index[rows]
            loss, logged = policy_loss(
                logprobs,
                buffer.logprobs[chunk],
                buffer.advantages[chunk],
                s.cliprange,
                s.cliprange_high,
                s.dual_clip,
            )
            if self._has_kl_loss:
                penalty = kl_loss(logprobs, buffer.ref_logprobs[chunk], self.settings.kl_kind)
                loss = loss + self.state.kl.kl_coef * penalty
                logged["kl_loss"] = penalty.detach()
            if entropy is not None:
                loss = loss - s.entropy_coef * entropy
            for name, x in logged.items():
                part = x.sum() / tokens
                stats[name] = stats[name] + part if name in stats else part
            return (weights[rows] * loss).sum()

        kept = None if buffer.kept is None else buffer.kept[index]
        wants_entropy = s.entropy_coef > 0
        temperature = self.sampling.temperature
        loss = response_loss(self.policy.model, batch, chunk_loss, temperature, wants_entropy, kept)
        return loss / tokens, stats

    def _value_loss(
        self, batch: Batch, index: Tensor, buffer: RolloutBuffer, minibatch: Minibatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """vf_coef times the clipped value loss of one micro-batch; what is logged is without it."""
        assert self.value is not None
        s, tokens = self.settings.updates, minibatch.tokens
        values, _ = response_values(self.value.model, batch)  # [r]
        old, targets = buffer.old_values[index], buffer.value_targets[index]
        losses, logged = value_loss(values, old, targets, s.cliprange_value)
        loss = losses.sum() / tokens
        clipped = logged["value_clipfrac"].sum() / tokens
        return s.vf_coef * loss, {"value_loss": loss.detach(), "value_clipfrac": clipped}

    # --- what is logged ---------------------------------------------------------------------------

    @property
    def _is_comparable(self) -> bool:
        """Whether sampling and scoring have the same distribution."""
        return self.settings.rollouts.replay_mask or not self.sampling.leaves_out

    def _reward_statistics(self, buffer: RolloutBuffer) -> Stats:
        kept = len(buffer.lengths_of_all) if self.settings.rollouts.filter_rounds else None
        return reward_statistics(self.rollouts.sums, kept, self.parallel)

    def _costs(self, buffer: RolloutBuffer) -> Stats:
        if isinstance(self.rollouts.engine, RelaidEngine):
            self.timer.seconds["relayout"] = self.rollouts.engine.seconds
        tokens, epochs = sum(buffer.lengths_of_all), self.settings.updates.ppo_epochs
        return costs(self.timer, tokens, epochs, self.stage, self.parallel.device)
