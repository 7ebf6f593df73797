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
from src.generation.relayout import RelaidEngine, Relayout
from src.generation.sampling import Sampling
from src.models.batch import (
    Batch,
    micro_batches,
    response_logprobs,
    response_loss,
    response_values,
    weighted_balance_loss,
)
from src.parallel.layout import Layout
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
from src.trainer.passes import from_last_stage, passes_of

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
        values_in: Layout | None = None,
    ) -> None:
        """stage: with the roles "policy", "value" and "reference".

        There is a value model if the advantages need one, and a reference if there is a KL penalty.
        rewards: (weight, reward) pairs, summed; parallel: the policy's division, whose models have
        the rollouts; mix: supervised rows beside them; values_in: a layout that values are computed
        in, where it is not the one that the value model learns in.
        """
        self.stage, self.settings, self.parallel, self.sampling = (
            stage,
            settings,
            parallel,
            sampling,
        )
        self.policy = stage.roles["policy"]
        self.value, self.reference = stage.roles.get("value"), stage.roles.get("reference")
        self.value_again: Relayout | None = None
        if self.value is not None and values_in is not None:
            division = parallel.laid_out(values_in)
            self.value_again = Relayout(self.value.model, self.value.parallel, division)
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
        if self._scores_side_by_side:
            self.rollouts.beside = self._begin_reference
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
            self._score(number, buffer)

            # What each token was worth, beside what was expected of it.
            self._advantages(buffer)

            # Epochs of minibatches: the policy moves, the value model learns.
            updates = self._update(number, buffer, lr, value_lr)
            if self.state.follower is not None:
                with self.stage.at_work("policy", "reference"):
                    self.state.follower.follow(self.policy)

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
    def _score(self, number: int, buffer: RolloutBuffer) -> None:
        """Old and reference log-probabilities and values.

        In the first epoch's own micro-batches: the same code on the same batches gives the same
        bits, and the first update's ratio is exactly 1.
        """
        with self.stage.at_work("policy"), self.timer("logprobs"):
            groups = self._groups(number, buffer)
            buffer.logprobs, buffer.entropy = self._logprobs(self.policy, buffer, groups)
        if self.reference is not None and buffer.ref_logprobs is None:
            with self.stage.at_work("reference"), self.timer("ref_logprobs"):
                view = self._reference_logprobs(buffer, self._groups(number, buffer))
                buffer.bring(view, self.parallel, "ref_logprobs")
        if self.value is not None:
            with self.stage.at_work("value"), self.timer("values"):
                self._values(number, buffer)

    def _groups(self, number: int, buffer: RolloutBuffer) -> list[list[int]]:
        """The first epoch's micro-batches."""
        return [rows for minibatch in self._plan(number, 0, buffer) for rows in minibatch.rows]

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

        with role.parallel.active():
            role.passes.score(self._in_step(role, groups), buffer.batch, read)
        of_all = (from_last_stage(x, role.parallel) for x in (logprobs, entropy))
        return next(of_all), next(of_all)

    @torch.no_grad()
    def _reference_logprobs(
        self, buffer: RolloutBuffer, groups: list[list[int]] | None = None
    ) -> RolloutBuffer:
        """The rollouts where the reference is, with its log-probabilities.

        groups: the policy's micro-batches, which it takes where it is on the policy's ranks.
        """
        assert self.reference is not None
        view = buffer.on(self.reference.parallel)
        if groups is None or view is not buffer:
            groups = micro_batches(view.lengths, *self.settings.batches.limits)
        view.ref_logprobs, _ = self._logprobs(self.reference, view, groups)
        return view

    def _begin_reference(self, buffer: RolloutBuffer) -> Callable[[], None]:
        """The reference's log-probabilities, while other ranks do other work; returns their end."""
        # Rollouts go to where they are scored before any rank has work that others would wait for.
        for name in ("reference", "reward"):
            buffer.on(self.stage.roles[name].parallel)
        view = self._reference_logprobs(buffer)
        return lambda: buffer.bring(view, self.parallel, "ref_logprobs")

    @property
    def _scores_side_by_side(self) -> bool:
        """Whether the reference and the reward model have ranks of their own to score on."""
        roles, rollouts = self.stage.roles, self.settings.rollouts
        if self.reference is None or "reward" not in roles or self.stage.host is not None:
            return False
        layouts = [role.parallel.layout for role in (self.reference, roles["reward"])]
        return not layouts[0].overlaps(layouts[1]) and not rollouts.filter_rounds

    def _values(self, number: int, buffer: RolloutBuffer) -> None:
        """Before each response token, [R], and after the last one, [B]."""
        assert self.value is not None
        role = self.value
        model, division, passes = role.model, role.parallel, role.passes
        if self.value_again is not None:
            model, division = self.value_again(), self.value_again.division
            passes = passes_of(model, division)
        view = buffer.on(division)
        view.old_values, view.last_values = (
            torch.zeros_like(x, dtype=torch.float32)
            for x in (view.rollout_logprobs, view.truncated)
        )

        def read(rows: list[int]) -> None:
            batch, index = view.select(rows)
            view.old_values[index], view.last_values[rows] = response_values(model, batch)

        groups: list[list[int] | None] = [*self._groups(number, view)]
        with division.active():
            if self.value_again is None:
                groups = self._in_step(role, self._groups(number, view))
            passes.score(groups, view.batch, read)
        for x in (view.old_values, view.last_values):
            from_last_stage(x, division)
        buffer.bring(view, self.parallel, "old_values", "last_values")
        buffer.values = self.state.in_reward_units(buffer.old_values)
        buffer.last_values = self.state.in_reward_units(buffer.last_values)

    # --- advantages -------------------------------------------------------------------------------

    def _shape(self, buffer: RolloutBuffer) -> None:
        """What is learned from, [B]: the scores normalised, scaled, shifted, clipped.

        And less a penalty for being cut, if that is asked for.
        """
        s, scores = self.settings.rewards, buffer.scores
        if s.reward_norm:
            moments = self.state.reward_moments
            moments.update(scores, self.parallel)
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
            moments.update(buffer.returns, self.parallel)
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
        values: dict[str, dict[str, list[float]]] = {}  # of each role's steps
        buffers = {"policy": buffer}
        if self.value is not None:
            buffers["value"] = buffer.on(self.value.parallel)
            buffers["value"].bring(buffer, self.parallel, "old_values", "value_targets")
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
                    own = {id(b): b for b in (buffers[role.name] for role, *_ in trained)}
                    plans = {key: self._plan(number, epoch, b) for key, b in own.items()}
                    for k in range(max(map(len, plans.values()), default=0)):
                        for entry in list(trained):
                            role, loss_of, rate = entry
                            rollouts = buffers[role.name]
                            minibatch = plans[id(rollouts)][k]
                            with self.timer(f"update_{role.name}"), role.parallel.active():
                                step = self._step(role, loss_of, rate, minibatch, rollouts)
                            of_role = values.setdefault(role.name, {})
                            for name, x in step.items():
                                of_role.setdefault(name, []).append(x)
                            if role is self.policy and self._is_far(step["approxkl"]):
                                trained.remove(entry)
        stats: Stats = {}
        for name, columns in values.items():
            means = {column: sum(x) / len(x) for column, x in columns.items()}
            means[f"{name}_steps"] = len(next(iter(columns.values())))
            stats |= self.stage.roles[name].parallel.known_to_all(means)
        return stats

    def _is_far(self, approxkl: float) -> bool:
        """Whether the policy has moved enough in this iteration; all ranks come here."""
        target = self.settings.updates.target_kl
        if target is None:
            return False
        return self.policy.parallel.known_to_all(approxkl) > target

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

        turns = self._in_step(role, minibatch.rows)
        role.passes.train(turns, buffer.batch, micro_batch_loss)
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
        engine, again = self.rollouts.engine, self.value_again
        relaid = {
            "relayout": engine.relayout if isinstance(engine, RelaidEngine) else None,
            "value_relayout": again,
        }
        sent = {name: each.exchange.sent for name, each in relaid.items() if each is not None}
        self.timer.seconds |= {name: each.seconds for name, each in relaid.items() if each}
        tokens, epochs = sum(buffer.lengths_of_all), self.settings.updates.ppo_epochs
        return costs(self.timer, tokens, epochs, self.stage, self.parallel, sent)
