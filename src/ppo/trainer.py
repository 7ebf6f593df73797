"""Proximal policy optimisation with four resident roles: policy, value, reference, reward.

One iteration reads top to bottom in `PPO.iteration`: rollouts, scores, log-probabilities and values, rewards,
advantages, then epochs of minibatches.
"""

import random
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator, Literal

import torch
import torch.distributed as dist

from src.errors import UserError
from src.generation.engine import Engine
from src.generation.relayout import RelaidEngine
from src.generation.sampling import Sampling
from src.models.batch import micro_batches, response_logprobs, response_loss, response_values, weighted_balance_loss
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.ppo.advantages import gae, token_rewards, whiten
from src.ppo.buffer import Prompt, RolloutBuffer
from src.ppo.loss import policy_loss, value_loss
from src.trainer.optimizer import Optimizer


@dataclass(frozen=True)
class PPOSettings:
    """The knobs of one run; ranges are checked on construction. Defaults: `docs/ppo.md`."""

    max_batch_size: int
    max_buffer_size: int
    mini_batches: int = 4
    ppo_epochs: int = 4
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    truncated: Literal["bootstrap", "zero", "penalty"] = "bootstrap"
    truncation_penalty: float = 1.0
    seed: int = 0
    max_tokens_per_batch: int | None = None

    def __post_init__(self) -> None:
        if min(self.max_batch_size, self.max_buffer_size, self.mini_batches, self.ppo_epochs) < 1:
            raise UserError(
                f"--max_batch_size {self.max_batch_size} --max_buffer_size {self.max_buffer_size} --mini_batches "
                f"{self.mini_batches} --ppo_epochs {self.ppo_epochs}: each must be 1 or more"
            )
        if self.mini_batches > self.max_buffer_size:
            raise UserError(
                f"--mini_batches {self.mini_batches} cannot be cut from --max_buffer_size {self.max_buffer_size} rollouts"
            )
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1 and self.cliprange > 0 and self.cliprange_value > 0):
            raise UserError(
                f"--gamma {self.gamma} --lam {self.lam} --cliprange {self.cliprange} --cliprange_value "
                f"{self.cliprange_value}: gamma and lam lie in [0, 1], the clip ranges above 0"
            )


class KLController:
    """kl_coef, fixed, or steered towards a target (arXiv 1909.08593, section 2.2): once per batch, by its mean KL."""

    def __init__(self, kl_coef: float, target: float | None = None, horizon: float = 10000.0) -> None:
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, mean_kl: float, samples: int) -> None:
        """mean_kl: nats per response, Σ_t (log π_old − log π_ref) averaged over the batch; samples: responses in it."""
        if self.target is not None:
            error = min(max(mean_kl / self.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * samples / self.horizon


class PPO:
    """The four roles and the loop over one batch of prompts."""

    def __init__(
        self,
        policy: Transformer,
        value: Transformer,
        reference: Transformer,
        rewards: list[tuple[float, object]],
        policy_optimizer: Optimizer,
        value_optimizer: Optimizer,
        engine: Engine | RelaidEngine,
        sampling: Sampling,
        stop_ids: set[int],
        kl: KLController,
        settings: PPOSettings,
        parallel: Parallel,
    ) -> None:
        """rewards: (weight, reward) pairs, summed; see `src/ppo/rewards.py`."""
        self.policy, self.value, self.reference, self.rewards = policy, value, reference, rewards
        self.policy_optimizer, self.value_optimizer = policy_optimizer, value_optimizer
        self.engine, self.sampling, self.stop_ids = engine, sampling, stop_ids
        self.kl, self.settings, self.parallel = kl, settings, parallel
        self.times: dict[str, float] = {}

    def iteration(self, number: int, prompts: list[Prompt], lr: float, value_lr: float, on_tokens=None) -> dict[str, float]:
        """One iteration over the whole batch of prompts (all ranks give the same list); returns what is to be logged."""
        self.times = {}
        mine = list(range(self.parallel.dp_rank, len(prompts), self.parallel.dp_size))
        with self._timed("generate"):  # a change of layout is part of it, and named by itself
            buffer = self._rollouts(number, [prompts[i] for i in mine], [number * len(prompts) + i for i in mine], on_tokens)
        responses = self._gathered(buffer.response_lengths, mine, len(prompts))
        plan = self._plan(number, 0, len(prompts), buffer)
        with self._timed("score"):
            self._score(buffer, plan, [prompts[i].gold for i in mine])
        self._advantages(buffer)
        with self._timed("update"):
            updates = self._update(number, buffer, responses, lr, value_lr)
        stats = {**self._rollout_stats(buffer), **updates}
        self.kl.update(stats["kl"], len(prompts))
        if isinstance(self.engine, RelaidEngine):
            self.times["relayout"] = self.engine.seconds
        tokens = sum(responses)
        stats |= {f"seconds/{phase}": seconds for phase, seconds in self.times.items()}
        stats |= {"tokens_per_s/generate": tokens / self.times["generate"]}
        stats |= {"tokens_per_s/update": tokens * self.settings.ppo_epochs / self.times["update"]}
        return stats

    # --- rollouts -----------------------------------------------------------------------------------------------

    def _rollouts(self, number: int, prompts: list[Prompt], samples: list[int], on_tokens) -> RolloutBuffer:
        completions = self.engine.generate([p.tokens for p in prompts], self.sampling, self.stop_ids, samples, on_tokens)
        device = self.parallel.device
        flat = [token for p, c in zip(prompts, completions) for token in (*p.tokens, *c.tokens)]
        return RolloutBuffer(
            tokens=torch.tensor(flat, device=device),
            lengths=[len(p.tokens) + len(c.tokens) for p, c in zip(prompts, completions)],
            prompt_lengths=[len(p.tokens) for p in prompts],
            truncated=torch.tensor([c.stop_reason == "length" for c in completions], device=device),
            rollout_logprobs=torch.tensor([x for c in completions for x in c.logprobs], device=device),
        )

    @torch.no_grad()
    def _score(self, buffer: RolloutBuffer, plan: list[list[list[int]]], golds: list[str]) -> None:
        """Scores, and old and reference log-probabilities and values, in the first epoch's own micro-batches.

        The same code on the same batches gives the same bits: the first update's ratio is exactly 1.
        """
        groups = [rows for minibatch in plan for rows in minibatch]
        buffer.components = {reward.name: reward(buffer, groups, golds) for _, reward in self.rewards}
        buffer.scores = sum(weight * buffer.components[reward.name] for weight, reward in self.rewards)
        for name in ("logprobs", "ref_logprobs", "entropy", "values"):
            setattr(buffer, name, torch.empty_like(buffer.rollout_logprobs))
        buffer.last_values = torch.empty_like(buffer.scores)
        for rows in groups:
            batch, index = buffer.select(rows)
            buffer.logprobs[index], buffer.entropy[index] = response_logprobs(self.policy, batch, self.temperature)
            buffer.ref_logprobs[index], _ = response_logprobs(self.reference, batch, self.temperature)
            buffer.values[index], buffer.last_values[rows] = response_values(self.value, batch)

    @property
    def temperature(self) -> float:
        """One temperature for sampling and for every log-probability."""
        return self.sampling.temperature

    def _advantages(self, buffer: RolloutBuffer) -> None:
        s, layout = self.settings, buffer.response_layout()
        mask = layout.pad(torch.ones_like(buffer.values)).bool()
        scores, bootstrap = buffer.scores, torch.zeros_like(buffer.last_values)
        if s.truncated == "bootstrap":
            bootstrap = torch.where(buffer.truncated, buffer.last_values, 0.0)  # after EOS there is nothing to come
        elif s.truncated == "penalty":
            scores = torch.where(buffer.truncated, scores - s.truncation_penalty, scores)
        kl = layout.pad(buffer.logprobs - buffer.ref_logprobs)
        rewards = token_rewards(scores, kl, mask, self.kl.kl_coef)
        advantages, returns = gae(rewards, layout.pad(buffer.values), mask, bootstrap, s.gamma, s.lam)
        buffer.rewards, buffer.returns = layout.unpad(rewards), layout.unpad(returns)
        buffer.advantages = whiten(layout.unpad(advantages), self.parallel.dp_group)

    # --- updates ------------------------------------------------------------------------------------------------

    def _plan(self, number: int, epoch: int, total: int, buffer: RolloutBuffer) -> list[list[list[int]]]:
        """This rank's rows of each minibatch of an epoch, in micro-batches.

        Minibatches are drawn from all `total` rollouts before the ranks pick out their own, so that they hold the same
        rollouts at any data-parallel degree.
        """
        order = list(range(total))
        random.Random(f"{self.settings.seed}/iteration {number}/epoch {epoch}").shuffle(order)
        n, plan = self.settings.mini_batches, []
        for k in range(n):
            chosen = order[total * k // n : total * (k + 1) // n]
            mine = sorted(i // self.parallel.dp_size for i in chosen if i % self.parallel.dp_size == self.parallel.dp_rank)
            lengths = [buffer.lengths[i] for i in mine]
            groups = micro_batches(lengths, self.settings.max_batch_size, self.settings.max_tokens_per_batch)
            plan.append([[mine[i] for i in group] for group in groups])
        return plan

    def _update(self, number: int, buffer: RolloutBuffer, responses: list[int], lr: float, value_lr: float) -> dict:
        s, steps, sums = self.settings, 0, {}
        for epoch in range(s.ppo_epochs):
            for minibatch in self._plan(number, epoch, len(responses), buffer):
                tokens = torch.tensor(
                    sum(buffer.response_lengths[i] for rows in minibatch for i in rows),
                    dtype=torch.float64,
                    device=self.parallel.device,
                )
                dist.all_reduce(tokens, group=self.parallel.dp_group)
                for rows in minibatch:
                    self._accumulate(*buffer.select(rows), buffer, float(tokens), sums, last=rows is minibatch[-1])
                self.policy_optimizer.backward_done()
                self.value_optimizer.backward_done()
                policy, value = self.policy_optimizer.step(lr), self.value_optimizer.step(value_lr)
                steps += 1
                for name, x in {
                    "policy_grad_norm": policy["grad_norm"],
                    "value_grad_norm": value["grad_norm"],
                    "skipped": policy["skipped"] + value["skipped"],
                }.items():
                    sums[name] = sums.get(name, 0.0) + x / self.parallel.dp_size
        names = sorted(sums)
        totals = torch.tensor([float(sums[name]) for name in names], dtype=torch.float64, device=self.parallel.device)
        dist.all_reduce(totals, group=self.parallel.dp_group)
        return {**{name: x / steps for name, x in zip(names, totals.tolist())}, "optimizer_steps": steps}

    def _accumulate(self, batch, index, buffer: RolloutBuffer, denominator: float, sums: dict, last: bool) -> None:
        """Both losses of one micro-batch, backward."""
        s = self.settings
        policy_stats: dict[str, torch.Tensor] = {}

        def loss_of(logprobs, _, rows):
            at = index[rows]
            part, stats = policy_loss(logprobs, buffer.logprobs[at], buffer.advantages[at], s.cliprange, 1.0)
            for name, x in stats.items():
                policy_stats[name] = policy_stats.get(name, 0.0) + x / denominator
            return part

        loss = response_loss(self.policy, batch, loss_of, self.temperature) / denominator
        balance = weighted_balance_loss(self.policy, batch, batch.responses, denominator)
        self.policy_optimizer.backward(loss + balance, last)
        values, _ = response_values(self.value, batch)
        v_loss, value_stats = value_loss(values, buffer.values[index], buffer.returns[index], s.cliprange_value, denominator)
        balance = weighted_balance_loss(self.value, batch, batch.responses, denominator)
        self.value_optimizer.backward(s.vf_coef * v_loss + balance, last)
        for name, x in {
            "policy_loss": loss.detach(),
            "value_loss": v_loss.detach(),
            **policy_stats,
            **value_stats,
        }.items():
            sums[name] = sums.get(name, 0.0) + x

    # --- what is logged -----------------------------------------------------------------------------------------

    def _rollout_stats(self, buffer: RolloutBuffer) -> dict[str, float]:
        """Means over all ranks' rollouts. KL: unclipped, per response (mean) and per token (max)."""
        group, layout = self.parallel.dp_group, buffer.response_layout()
        log_ratio = buffer.logprobs - buffer.ref_logprobs
        n, r = len(buffer), buffer.logprobs.numel()
        sums = {
            "reward": buffer.scores.sum(),
            **{f"reward/{name}": x.sum() for name, x in buffer.components.items()},
            "kl": layout.pad(log_ratio).sum(),
            "response_length": torch.tensor(float(r)),
            "truncated": buffer.truncated.float().sum(),
            "entropy": buffer.entropy.sum(),
            "values": buffer.values.sum(),
            "returns": buffer.returns.sum(),
            "returns²": buffer.returns.double().square().sum(),
            "residuals²": (buffer.returns - buffer.values).double().square().sum(),
            "residuals": (buffer.returns - buffer.values).sum(),
            "sequences": torch.tensor(float(n)),
        }
        totals = torch.stack([x.double().to(self.parallel.device) for x in sums.values()])
        dist.all_reduce(totals, group=group)
        total = dict(zip(sums, totals.tolist()))
        highs = torch.stack((log_ratio.max(), (buffer.logprobs - buffer.rollout_logprobs).abs().max()))
        dist.all_reduce(highs, op=dist.ReduceOp.MAX, group=group)
        sequences, tokens = total["sequences"], total["response_length"]
        per_sequence = ["reward", *(f"reward/{name}" for name in buffer.components), "kl", "response_length", "truncated"]
        variance = total["returns²"] / tokens - (total["returns"] / tokens) ** 2
        unexplained = total["residuals²"] / tokens - (total["residuals"] / tokens) ** 2
        return {
            **{name: total[name] / sequences for name in per_sequence},
            **{name: total[name] / tokens for name in ("entropy", "values", "returns")},
            "kl_max": float(highs[0]),
            "explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
            "logprob_drift": float(highs[1]),  # between decoding with the cache and one full forward
            "kl_coef": self.kl.kl_coef,
        }

    def _gathered(self, local: list[int], mine: list[int], total: int) -> list[int]:
        """Every rollout's number, by its place in the whole batch."""
        whole = torch.zeros(total, dtype=torch.long, device=self.parallel.device)
        whole[mine] = torch.tensor(local, device=self.parallel.device)
        dist.all_reduce(whole, group=self.parallel.dp_group)
        return whole.tolist()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize()
        self.times[phase] = time.perf_counter() - began
