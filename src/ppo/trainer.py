"""Policy optimisation from rewards: classic PPO with a value model, and the group baselines, which need none.

One iteration reads top to bottom in `PPO.iteration`: rollouts and rewards, log-probabilities and values, advantages, then
epochs of minibatches.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from src.generation.engine import Engine
from src.generation.relayout import RelaidEngine
from src.generation.sampling import Sampling
from src.models.batch import (
    Sequence,
    micro_batches,
    response_logprobs,
    response_loss,
    response_values,
    weighted_balance_loss,
)
from src.models.layout import TensorSpec, tensor_table
from src.parallel.setup import Parallel
from src.ppo.advantages import Moments, gae, group_advantages, token_rewards, whiten
from src.ppo.buffer import Prompt, RolloutBuffer
from src.ppo.loss import kl_loss, policy_loss, token_weights, value_loss
from src.ppo.rewards import Reward
from src.ppo.roles import MovingReference, Role, Stage
from src.ppo.settings import PPOSettings
from src.trainer.fit import EndlessBatches, peak_memory, share_of, summed
from src.trainer.solver import SolverObjective

VALUE_DECAY = (
    0.95  # what earlier iterations' returns still weigh in value normalisation, per iteration
)


class KLController:
    """kl_coef, fixed, or steered towards a target (arXiv 1909.08593, section 2.2): once per batch, by its mean KL."""

    def __init__(
        self, kl_coef: float, target: float | None = None, horizon: float = 10000.0
    ) -> None:
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, mean_kl: float, samples: int) -> None:
        """mean_kl: nats per response, Σ_t (log π_old − log π_ref) averaged over the batch; samples: responses in it."""
        if self.target is not None:
            error = min(max(mean_kl / self.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * samples / self.horizon


class PretrainingMix:
    """Rows of plain supervised training, some beside each of the policy's steps (arXiv 2203.02155, equation 2)."""

    def __init__(
        self,
        sequences: list[Sequence],
        batch_size: int,
        settings: PPOSettings,
        device: torch.device,
    ) -> None:
        """batch_size: rows per optimizer step, over all ranks."""
        self.objective, self.settings = SolverObjective(sequences, device), settings
        self.batches = EndlessBatches(len(sequences), batch_size, f"{settings.seed}/ptx")

    def backward(self, role: Role) -> dict[str, Tensor]:
        """Add the gradient of ptx_coef × the mean −log p of the next rows' output tokens; returns this rank's part of the loss."""
        s, objective, batch = self.settings, self.objective, next(self.batches)
        tokens, total = (
            sum(objective.weights[i] for i in batch),
            torch.zeros((), device=objective.device),
        )
        for rows in share_of(
            batch, objective.lengths, role.parallel, s.max_batch_size, s.max_tokens_per_batch
        ):
            loss, _ = objective.loss(role.model, rows, tokens)
            role.optimizer.backward(s.ptx_coef * loss)
            total += loss.detach()
        return {"ptx_loss": total}


@dataclass(frozen=True)
class Minibatch:
    """What one optimizer step learns from: this rank's rows of the buffer, in micro-batches; and the sizes over all ranks."""

    rows: list[list[int]]
    tokens: int
    sequences: int


class PPO:
    """The roles and the loop over one batch of prompts."""

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
        ptx: PretrainingMix | None = None,
    ) -> None:
        """stage: with the roles "policy", "value" (if the advantages need it), "reference" (if there is a KL penalty);

        rewards: (weight, reward) pairs, summed; see `src/ppo/rewards.py`.
        """
        self.stage, self.rewards = stage, rewards
        self.policy, self.value, self.reference = (
            stage.roles.get(name) for name in ("policy", "value", "reference")
        )
        self.engine, self.sampling, self.stop_ids = engine, sampling, stop_ids
        self.kl, self.settings, self.parallel, self.ptx = kl, settings, parallel, ptx
        self.follower = None
        if settings.ref_ema is not None:
            with stage.at_work("reference"):
                self.follower = MovingReference(self.reference, settings.ref_ema)
        self.reward_moments, self.value_moments = Moments(), Moments(VALUE_DECAY)
        self.times: dict[str, float] = {}
        self.seen: dict[
            str, float
        ] = {}  # sums over all rollouts of the iteration, those that were left out included
        self.responses: list[int] = []  # length of every rank's responses, by their places
        self.watch: list[
            Callable[[int, RolloutBuffer], None]
        ] = []  # shown every iteration's buffer at its end

    def iteration(
        self,
        number: int,
        prompts: list[Prompt],
        lr: float,
        value_lr: float,
        more: Callable[[], list[Prompt]] | None = None,
        on_tokens=None,
    ) -> dict[str, float]:
        """One iteration over the whole batch of prompts, samples of one prompt side by side; returns what is to be logged.

        All ranks give the same list. more: the next batch of prompts, for groups that are left out (settings.filter_rounds).
        """
        began, self.times, self.seen = time.perf_counter(), {}, {}
        buffer = self._rollouts(number, prompts, more or (lambda: prompts), on_tokens)
        stats = {}
        if self.responses:
            plan = self._plan(number, 0, buffer)
            self._score(buffer, [rows for minibatch in plan for rows in minibatch.rows])
            self._advantages(buffer)
            updates = self._update(number, buffer, lr, value_lr)
            if self.follower:
                with self.stage.at_work("policy", "reference"):
                    self.follower.follow(self.policy.model)
            stats = {**self._rollout_stats(buffer), **updates}
            if self.reference is not None:
                self.kl.update(stats["kl"], len(self.responses))
        for watch in self.watch:
            watch(number, buffer)
        return {**self._reward_stats(), **stats, **self._costs(time.perf_counter() - began)}

    # --- rollouts -----------------------------------------------------------------------------------------------

    def _rollouts(
        self, number: int, prompts: list[Prompt], more: Callable, on_tokens
    ) -> RolloutBuffer:
        """The buffer to learn from, with its scores; groups whose rewards are all equal are replaced, if that is asked for."""
        s, size = self.settings, len(prompts)
        rounds, parts, count = max(1, s.filter_rounds), [], 0
        for turn in range(rounds):
            buffer = self._generated(prompts, (number * rounds + turn) * size, on_tokens)
            self._reward(buffer)
            kept = self._worth_learning(buffer, size)[: size - count]
            parts.append(buffer if len(kept) == size else self._only(buffer, kept, count))
            count += len(kept)
            if count == size or turn + 1 == rounds:
                break
            prompts = more()
        buffer = parts[0] if len(parts) == 1 else RolloutBuffer.joined(parts)
        self.responses = [int(n) for n in self._by_place(buffer.response_lengths, buffer, count)]
        return buffer

    def _generated(self, prompts: list[Prompt], first_sample: int, on_tokens) -> RolloutBuffer:
        """This rank's rollouts: samples of one prompt stay together, where there are prompts for all ranks."""
        k, ranks, device = (
            self.settings.samples_per_prompt,
            self.parallel.dp_size,
            self.parallel.device,
        )
        unit = k if len(prompts) // k >= ranks else 1
        mine = [i for i in range(len(prompts)) if i // unit % ranks == self.parallel.dp_rank]
        chosen, masks = (
            [prompts[i] for i in mine],
            {"keep_masks": True} if self.settings.replay_mask else {},
        )
        with (
            self.stage.at_work("policy"),
            self._timed("generate"),
        ):  # a change of layout is part of it, and named by itself
            completions = self.engine.generate(
                [p.tokens for p in chosen],
                self.sampling,
                self.stop_ids,
                [first_sample + i for i in mine],
                on_tokens,
                **masks,
            )
        flat = [token for p, c in zip(chosen, completions) for token in (*p.tokens, *c.tokens)]
        return RolloutBuffer(
            prompts=chosen,
            places=mine,
            tokens=torch.tensor(flat, device=device),
            lengths=[len(p.tokens) + len(c.tokens) for p, c in zip(chosen, completions)],
            truncated=torch.tensor([c.stop_reason == "length" for c in completions], device=device),
            rollout_logprobs=torch.tensor(
                [x for c in completions for x in c.logprobs], device=device
            ),
            kept=torch.cat([c.kept for c in completions])
            if masks and self.sampling.leaves_out
            else None,
        )

    @torch.no_grad()
    def _reward(self, buffer: RolloutBuffer) -> None:
        """The components of the reward, and their sum."""
        with self.stage.at_work("reward"), self._timed("reward"):
            buffer.components = {reward.name: reward(buffer) for _, reward in self.rewards}
            buffer.scores = sum(
                weight * buffer.components[reward.name] for weight, reward in self.rewards
            )
        sums = {
            "reward": buffer.scores,
            **{f"reward/{name}": x for name, x in buffer.components.items()},
        }
        for name, x in {**sums, "rollouts": torch.ones_like(buffer.scores)}.items():
            self.seen[name] = self.seen.get(name, 0.0) + float(x.sum())

    def _worth_learning(self, buffer: RolloutBuffer, size: int) -> list[int]:
        """The places of the rollouts that are kept, of `size`: all, or those in groups whose rewards differ."""
        if not self.settings.filter_rounds:
            return list(range(size))
        k = self.settings.samples_per_prompt
        groups = self._by_place(buffer.scores, buffer, size).view(-1, k)
        differ = groups.amax(1) > groups.amin(1)
        return [place for place in range(size) if differ[place // k]]

    def _only(self, buffer: RolloutBuffer, kept: list[int], count: int) -> RolloutBuffer:
        """The rollouts at the kept places, which become count, count + 1, …"""
        new = {place: count + i for i, place in enumerate(kept)}
        rows = [row for row, place in enumerate(buffer.places) if place in new]
        return buffer.take(rows, [new[buffer.places[row]] for row in rows])

    @torch.no_grad()
    def _score(self, buffer: RolloutBuffer, groups: list[list[int]]) -> None:
        """Old and reference log-probabilities and values, in the first epoch's own micro-batches.

        The same code on the same batches gives the same bits: the first update's ratio is exactly 1.
        """
        buffer.logprobs, buffer.entropy = (
            torch.empty_like(buffer.rollout_logprobs) for _ in range(2)
        )
        with self.stage.at_work("policy"), self._timed("logprobs"):
            for rows in groups:
                batch, at = buffer.select(rows)
                buffer.logprobs[at], buffer.entropy[at] = self._logprobs(
                    self.policy, batch, at, buffer
                )
        if self.reference is not None:
            buffer.ref_logprobs = torch.empty_like(buffer.logprobs)
            with self.stage.at_work("reference"), self._timed("ref_logprobs"):
                for rows in groups:
                    batch, at = buffer.select(rows)
                    buffer.ref_logprobs[at], _ = self._logprobs(self.reference, batch, at, buffer)
        if self.value is not None:
            with self.stage.at_work("value"), self._timed("values"):
                self._values(buffer, groups)

    def _logprobs(
        self, role: Role, batch, at: Tensor, buffer: RolloutBuffer
    ) -> tuple[Tensor, Tensor]:
        return response_logprobs(
            role.model, batch, self.temperature, None if buffer.kept is None else buffer.kept[at]
        )

    def _values(self, buffer: RolloutBuffer, groups: list[list[int]]) -> None:
        role, whole = self.value, self.parallel
        values, last_values = torch.zeros_like(buffer.logprobs), torch.zeros_like(buffer.scores)
        with role.parallel.active():
            for rows in role.share(groups, whole):
                batch, at = buffer.select(rows)
                values[at], last_values[rows] = response_values(role.model, batch)
        buffer.old_values = role.collect(values, whole)
        buffer.values = self._in_reward_units(buffer.old_values)
        buffer.last_values = self._in_reward_units(role.collect(last_values, whole))

    def _in_reward_units(self, x: Tensor) -> Tensor:
        return (
            x * self.value_moments.std + self.value_moments.mean if self.settings.value_norm else x
        )

    @property
    def temperature(self) -> float:
        """One temperature for sampling and for every log-probability."""
        return self.sampling.temperature

    # --- advantages ---------------------------------------------------------------------------------------------

    def _shape(self, buffer: RolloutBuffer) -> None:
        """What is learned from: the scores normalised, scaled, shifted and clipped, and less a penalty for being cut."""
        s, x = self.settings, buffer.scores
        if s.reward_norm:
            self.reward_moments.update(x, self.parallel.dp_group)
            x = (x - self.reward_moments.mean) / self.reward_moments.std
        x = x * s.reward_scale + s.reward_bias
        if s.reward_clip is not None:
            x = x.clamp(-s.reward_clip, s.reward_clip)
        buffer.shaped = (
            torch.where(buffer.truncated, x - s.truncation_penalty, x)
            if s.truncated == "penalty"
            else x
        )

    def _advantages(self, buffer: RolloutBuffer) -> None:
        s, layout, group = self.settings, buffer.response_layout(), self.parallel.dp_group
        self._shape(buffer)
        mask = layout.pad(torch.ones_like(buffer.logprobs)).bool()
        penalised = self.reference is not None and s.kl_kind == "k1"
        kl = (
            layout.pad(buffer.logprobs - buffer.ref_logprobs)
            if penalised
            else torch.zeros_like(mask, dtype=torch.float32)
        )
        rewards = token_rewards(buffer.shaped, kl, mask, self.kl.kl_coef)
        if s.is_grouped:
            totals = self._by_place(rewards.sum(1), buffer, len(self.responses))
            advantages = group_advantages(totals, s.samples_per_prompt, s.advantage)[
                buffer.places
            ].to(rewards)
            advantages = advantages.unsqueeze(1) * mask
        elif s.has_value:
            values, bootstrap = layout.pad(buffer.values), torch.zeros_like(buffer.last_values)
            if s.truncated == "bootstrap":
                bootstrap = torch.where(
                    buffer.truncated, buffer.last_values, 0.0
                )  # after EOS there is nothing to come
            advantages, returns = gae(rewards, values, mask, bootstrap, s.gamma, s.lam)
            if s.lam_critic not in (None, s.lam):
                _, returns = gae(rewards, values, mask, bootstrap, s.gamma, s.lam_critic)
            buffer.returns = buffer.value_targets = layout.unpad(returns)
            if s.value_norm:
                self.value_moments.update(buffer.returns, group)
                buffer.value_targets = (
                    buffer.returns - self.value_moments.mean
                ) / self.value_moments.std
        else:  # rewards to go
            nothing = torch.zeros_like(buffer.shaped)
            advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, nothing, s.gamma, 1.0)
        buffer.rewards, flat = layout.unpad(rewards), layout.unpad(advantages)
        buffer.advantages = whiten(flat, group) if s.whitens else flat

    # --- updates ------------------------------------------------------------------------------------------------

    def _plan(self, number: int, epoch: int, buffer: RolloutBuffer) -> list[Minibatch]:
        """An epoch's minibatches. They are drawn from all ranks' rollouts before the ranks pick out their own, so that they hold

        the same rollouts at any data-parallel degree.
        """
        s, total = self.settings, len(self.responses)
        order = list(range(total))
        random.Random(f"{s.seed}/iteration {number}/epoch {epoch}").shuffle(order)
        row_at, plan = {place: row for row, place in enumerate(buffer.places)}, []
        for k in range(s.mini_batches):
            chosen = order[total * k // s.mini_batches : total * (k + 1) // s.mini_batches]
            if not chosen:
                continue  # groups were left out, and fewer rollouts than minibatches remain
            mine = [row_at[place] for place in sorted(chosen) if place in row_at]
            groups = micro_batches(
                [buffer.lengths[i] for i in mine], s.max_batch_size, s.max_tokens_per_batch
            )
            tokens = sum(self.responses[place] for place in chosen)
            plan.append(
                Minibatch([[mine[i] for i in group] for group in groups], tokens, len(chosen))
            )
        return plan

    def _update(
        self, number: int, buffer: RolloutBuffer, lr: float, value_lr: float
    ) -> dict[str, float]:
        """All epochs; returns the means over each role's steps."""
        s, sums = self.settings, {}
        steps: dict[str, int] = {}
        policy = [] if number < s.critic_warmup else [(self.policy, self._policy_loss, lr)]
        value = [(self.value, self._value_loss, value_lr)] if self.value is not None else []
        for trained in [policy + value] if s.update == "together" else [policy, value]:
            with self.stage.at_work(*(role.name for role, *_ in trained), training=True):
                for minibatch in (
                    m for epoch in range(s.ppo_epochs) for m in self._plan(number, epoch, buffer)
                ):
                    for one in list(trained):
                        role, loss, rate = one
                        with self._timed(f"update_{role.name}"), role.parallel.active():
                            stats = self._step(role, loss, rate, minibatch, buffer)
                        steps[role.name] = steps.get(role.name, 0) + 1
                        for name, x in stats.items():
                            sums.setdefault(name, []).append(x)
                        if (
                            role is self.policy
                            and s.target_kl is not None
                            and stats["approxkl"] > s.target_kl
                        ):
                            trained.remove(one)
        means = {name: sum(values) / len(values) for name, values in sums.items()}
        return {**means, **{f"{name}_steps": n for name, n in steps.items()}}

    def _step(
        self, role: Role, loss_of: Callable, lr: float, minibatch: Minibatch, buffer: RolloutBuffer
    ) -> dict[str, float]:
        """One optimizer step of one role; returns the loss and what else is logged, over all ranks."""
        sums: dict[str, Tensor] = {}
        if role is self.policy and self.ptx is not None:
            sums = self.ptx.backward(role)
        share = role.share(minibatch.rows, self.parallel)
        for rows in share:
            batch, at = buffer.select(rows)
            loss, stats = loss_of(batch, at, buffer, minibatch)
            balance = weighted_balance_loss(role.model, batch, batch.responses, minibatch.tokens)
            role.optimizer.backward(loss + balance, last=rows is share[-1])
            for name, x in {f"{role.name}_loss": loss.detach(), **stats}.items():
                sums[name] = sums.get(name, 0.0) + x
        done = role.optimizer.step(lr)
        extra = ("ptx_loss",) if self.ptx is not None else ()
        names = (
            self._policy_stats() + extra
            if role is self.policy
            else ("value_loss", "value_clipfrac")
        )
        return {
            **summed(sums, names, role.parallel),
            f"{role.name}_grad_norm": done["grad_norm"],
            f"{role.name}_skipped": done["skipped"],
        }

    def _policy_stats(self) -> tuple[str, ...]:
        return ("policy_loss", "approxkl", "clipfrac") + (("kl_loss",) if self._has_kl_loss else ())

    @property
    def _has_kl_loss(self) -> bool:
        return self.reference is not None and self.settings.kl_kind != "k1"

    def _policy_loss(
        self, batch, index: Tensor, buffer: RolloutBuffer, minibatch: Minibatch
    ) -> tuple[Tensor, dict]:
        """The clipped surrogate of one micro-batch, with the KL penalty and the entropy bonus where these are losses."""
        s, tokens, stats = self.settings, minibatch.tokens, {}
        weights = token_weights(
            s.level, batch.responses, tokens, minibatch.sequences, self.sampling.max_new_tokens
        )
        responses = torch.tensor(batch.responses, device=index.device)
        weights = torch.tensor(weights, device=index.device).repeat_interleave(responses)

        def loss_of(logprobs: Tensor, entropy: Tensor | None, rows: slice) -> Tensor:
            at = index[rows]
            loss, logged = policy_loss(
                logprobs,
                buffer.logprobs[at],
                buffer.advantages[at],
                s.cliprange,
                s.cliprange_high,
                s.dual_clip,
            )
            if self._has_kl_loss:
                penalty = kl_loss(logprobs, buffer.ref_logprobs[at], s.kl_kind)
                loss, logged["kl_loss"] = loss + self.kl.kl_coef * penalty, penalty.detach()
            if s.entropy_coef:
                loss = loss - s.entropy_coef * entropy
            for name, x in logged.items():
                stats[name] = stats.get(name, 0.0) + x.sum() / tokens
            return (weights[rows] * loss).sum()

        kept = None if buffer.kept is None else buffer.kept[index]
        loss = response_loss(
            self.policy.model, batch, loss_of, self.temperature, bool(s.entropy_coef), kept
        )
        return loss / tokens, stats

    def _value_loss(
        self, batch, index: Tensor, buffer: RolloutBuffer, minibatch: Minibatch
    ) -> tuple[Tensor, dict]:
        """vf_coef times the clipped value loss of one micro-batch; what is logged is without it."""
        s, tokens = self.settings, minibatch.tokens
        values, _ = response_values(self.value.model, batch)
        loss, logged = value_loss(
            values, buffer.old_values[index], buffer.value_targets[index], s.cliprange_value
        )
        loss = loss.sum() / tokens
        return s.vf_coef * loss, {
            "value_loss": loss.detach(),
            "value_clipfrac": logged["value_clipfrac"].sum() / tokens,
        }

    # --- what is logged -----------------------------------------------------------------------------------------

    def _reward_stats(self) -> dict[str, float]:
        """Means over all that was generated, what was left out included."""
        names = sorted(self.seen)
        totals = torch.tensor(
            [self.seen[name] for name in names], dtype=torch.float64, device=self.parallel.device
        )
        dist.all_reduce(totals, group=self.parallel.dp_group)
        sums = dict(zip(names, totals.tolist()))
        count = sums.pop("rollouts")
        kept = {"kept": len(self.responses) / count} if self.settings.filter_rounds else {}
        return {**{name: x / count for name, x in sums.items()}, **kept}

    def _rollout_stats(self, buffer: RolloutBuffer) -> dict[str, float]:
        """Means over all ranks' rollouts. KL: unclipped, per response (mean) and per token (max)."""
        group = self.parallel.dp_group
        sums = {
            "truncated": buffer.truncated,
            "shaped_reward": buffer.shaped,
            "entropy": buffer.entropy,
        }
        highs = {}
        if self._comparable:
            highs["logprob_drift"] = (buffer.logprobs - buffer.rollout_logprobs).abs()
        if self.reference is not None:
            sums["kl"] = highs["kl_max"] = buffer.logprobs - buffer.ref_logprobs
        if self.value is not None:
            residuals = (buffer.returns - buffer.values).double()
            sums |= {
                "values": buffer.values,
                "returns": buffer.returns,
                "returns²": buffer.returns.double().square(),
            }
            sums |= {"residuals": residuals, "residuals²": residuals.square()}
        total = summed(
            {name: x.double().sum() for name, x in sums.items()}, tuple(sums), self.parallel
        )
        most = torch.tensor(
            [float(x.max()) if len(x) else -torch.inf for x in highs.values()],
            device=self.parallel.device,
        )
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        sequences, tokens = len(self.responses), sum(self.responses)
        stats = {
            **{
                name: total[name] / sequences
                for name in ("shaped_reward", "truncated", "kl")
                if name in total
            },
            **{
                name: total[name] / tokens
                for name in ("entropy", "values", "returns")
                if name in total
            },
            **dict(zip(highs, most.tolist())),
            "response_length": tokens / sequences,
        }
        if self.value is not None:
            variance = total["returns²"] / tokens - (total["returns"] / tokens) ** 2
            unexplained = total["residuals²"] / tokens - (total["residuals"] / tokens) ** 2
            stats["explained_variance"] = 1 - unexplained / variance if variance > 0 else 0.0
        return stats | ({"kl_coef": self.kl.kl_coef} if self.reference is not None else {})

    @property
    def _comparable(self) -> bool:
        """Whether sampling and scoring have the same distribution, so that decoding's drift shows by itself."""
        return self.settings.replay_mask or not self.sampling.leaves_out

    def _costs(self, seconds: float) -> dict[str, float]:
        """Seconds and tokens/s of each phase, and memory."""
        if isinstance(self.engine, RelaidEngine):
            self.times["relayout"] = self.engine.seconds
        tokens = sum(self.responses)
        rates = {"generate": ("generate",), "update": ("update_policy", "update_value")}
        spent = {
            name: sum(self.times.get(phase, 0.0) for phase in phases)
            for name, phases in rates.items()
        }
        passes = {"generate": 1, "update": self.settings.ppo_epochs}
        return {
            "seconds": seconds,
            **{f"seconds/{phase}": took for phase, took in self.times.items()},
            **{
                f"tokens_per_s/{name}": tokens * passes[name] / took
                for name, took in spent.items()
                if took
            },
            **{f"memory_gb/{name}": size / 1e9 for name, size in self.stage.peak.items()},
            "memory_gb": peak_memory(self.parallel.device) / 1e9,
        }

    # --- over all ranks -----------------------------------------------------------------------------------------

    def _by_place(self, local: list[int] | Tensor, buffer: RolloutBuffer, total: int) -> Tensor:
        """Every rank's numbers, one per rollout, by the rollouts' places; fp64, [total], the same on all ranks."""
        whole = torch.zeros(total, dtype=torch.float64, device=self.parallel.device)
        whole[buffer.places] = torch.as_tensor(
            local, dtype=torch.float64, device=self.parallel.device
        )
        dist.all_reduce(whole, group=self.parallel.dp_group)
        return whole

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize()
        self.times[phase] = self.times.get(phase, 0.0) + time.perf_counter() - began

    # --- what a later run goes on from ----------------------------------------------------------------------------

    def parts(self) -> dict[str, tuple[Callable, Callable]]:
        """How to get and set what changes from iteration to iteration beside the roles and `tensors`, as numbers."""
        parts = {
            "kl_coef": (lambda: self.kl.kl_coef, lambda x: setattr(self.kl, "kl_coef", x)),
            "reward_moments": (
                lambda: self.reward_moments.sums,
                lambda x: setattr(self.reward_moments, "sums", x),
            ),
            "value_moments": (
                lambda: self.value_moments.sums,
                lambda x: setattr(self.value_moments, "sums", x),
            ),
        }
        if self.follower:
            parts["reference"] = (lambda: None, lambda _: self.follower.round())
        return parts | ({"ptx": self.ptx.batches.part} if self.ptx else {})

    def tensors(self) -> dict[str, tuple[dict[str, Tensor], dict[str, TensorSpec]]]:
        """What changes beside what has an optimizer: name → (this rank's tensors, how they are cut)."""
        if self.follower is None:
            return {}
        return {"reference": (self.follower.exact, tensor_table(self.reference.model.config))}

    def restore(self, policy: dict, value: dict) -> None:
        """Take up the running moments that an earlier run left (`state`); kl_coef is the controller's."""
        self.reward_moments.sums = policy.get("reward_moments", self.reward_moments.sums)
        self.value_moments.sums = value.get("value_moments", self.value_moments.sums)

    def state(self) -> dict[str, dict]:
        """Of the policy and of the value model: what lies beside their weights."""
        s = self.settings
        policy = {"kl_coef": self.kl.kl_coef, **s.shaping()}
        return {
            "policy": policy
            | ({"reward_moments": self.reward_moments.sums} if s.reward_norm else {}),
            "value": {"value_moments": self.value_moments.sums} if s.value_norm else {},
        }
