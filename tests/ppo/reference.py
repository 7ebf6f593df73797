"""What one PPO iteration comes to, by transformers' models and the papers' formulas.

Nothing of `src/ppo` is used.
"""

import math
from types import SimpleNamespace

import torch

from tests.ppo import worker
from tests.ppo.worker import KL_COEF, LR, MAX_GRAD_NORM, NUMBER, VALUE_LR, WEIGHTS, Run
from tests.trainer.tiny import padded, theirs

KNOBS = dict(
    advantage="gae",
    gamma=1.0,
    lam=0.95,
    lam_critic=None,
    whiten=None,
    cliprange=0.2,
    cliprange_high=None,
    dual_clip=None,
    cliprange_value=0.2,
    vf_coef=0.1,
    entropy_coef=0.0,
    loss_level=None,
    kl=None,
    target_kl=None,
    critic_warmup=0,
    value_norm=False,
    reward_norm=False,
    reward_scale=1.0,
    reward_bias=0.0,
    reward_clip=None,
    truncated="bootstrap",
    truncation_penalty=1.0,
    replay_mask=False,
    ref_ema=None,
    ptx_coef=0.0,
    samples_per_prompt=1,
)
BY_ADVANTAGE = {  # (k of the KL, level of the loss, whitened) where the settings leave it open
    "gae": ("k1", "token", True),
    "reinforce++": ("k1", "token", True),
    "rloo": ("k1", "token", False),
    "grpo": ("k3", "sequence", False),
    "dr_grpo": ("k3", "constant", False),
}
VALUE_DECAY = 0.95


def moments(sums: list[float]) -> tuple[float, float]:
    """Mean and standard deviation out of the sums of weights, numbers and squares."""
    return sums[1] / sums[0], math.sqrt(sums[2] / sums[0] - (sums[1] / sums[0]) ** 2)


class Reference:
    """The update by given rollouts, on padded batches, with torch's AdamW and clipping."""

    def __init__(
        self,
        folder,
        run: Run,
        rollouts: list[dict],
        minibatches: list[list[int]],
        mix=(),
        worth=None,
        groups=None,
        **change,
    ):
        """worth: the scores, where they are written beside the prompts.

        Groups: which rollouts are of one prompt, where some were left out; mix: rows of the
        pretraining mix for each step.
        """
        self.groups = groups
        self.knobs = SimpleNamespace(
            **KNOBS | {k: v for k, v in (run.settings | change).items() if k in KNOBS}
        )
        s, self.run, self.rows, everyone = self.knobs, run, rollouts, range(len(rollouts))
        kl, level, whiten = BY_ADVANTAGE[s.advantage]
        self.kl, self.level, self.whitens = (
            s.kl or kl,
            s.loss_level or level,
            whiten if s.whiten is None else s.whiten,
        )
        self.ids, self.mask = padded([r["prompt"] + r["response"] for r in rollouts])
        self.policy, self.value, self.reference = (
            theirs(folder / name) for name in ("policy", "value", "reference")
        )
        self.allowed = None
        with torch.no_grad():
            if s.replay_mask:
                self.allowed = self.kept_by_sampling()
            self.old, self.entropy = self.logprobs(self.policy, everyone)
            self.ref, _ = self.logprobs(self.reference, everyone)
        self.score(folder, worth)
        self.shape()
        self.returns = self.targets = self.old_values = self.values = None
        if s.advantage == "gae":
            with torch.no_grad():
                self.old_values, self.after = self.values_of(everyone)
        self.advantages = self.estimate()
        self.optimise(minibatches, iter(mix))

    # --- what is known before the update

    def response(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """x[t] predicts token t + 1: the entries before each response token."""
        start = len(self.rows[i]["prompt"])
        return x[start - 1 : start + len(self.rows[i]["response"]) - 1]

    def kept_by_sampling(self) -> list[torch.Tensor]:
        """Of each response token, which tokens it was chosen among.

        From the policy's logits as they were then.
        """
        s, found = self.run.sampling, []
        logits = self.policy(input_ids=self.ids, attention_mask=self.mask).logits.double()
        for i in range(len(self.rows)):
            z = self.response(i, logits[i])
            kept = torch.ones_like(z, dtype=torch.bool)
            for t, row in enumerate(z):
                if t < s.min_new_tokens:
                    kept[t, sorted(self.run.stops)] = False
                if s.top_k:
                    kept[t] &= row >= row[kept[t]].sort(descending=True).values[s.top_k - 1]
                if s.top_p < 1:
                    p = torch.where(kept[t], row / s.temperature, -torch.inf).softmax(-1)
                    above = torch.stack([p[p > x].sum() for x in p])  # the mass of what is likelier
                    kept[t] &= above < s.top_p
            found.append(kept)
        return found

    def logprobs(self, model, rows):
        rows, found = list(rows), []
        logits = (
            model(input_ids=self.ids[rows], attention_mask=self.mask[rows]).logits
            / self.run.sampling.temperature
        )
        for i, z in zip(rows, logits):
            z = self.response(i, z)
            if self.allowed is not None:
                z = torch.where(self.allowed[i], z, -torch.inf)
            logp = z.log_softmax(-1)
            summand = logp.exp() * torch.where(logp > -torch.inf, logp, 0.0)
            chosen = torch.tensor(self.rows[i]["response"]).unsqueeze(1)
            found.append((logp.gather(1, chosen).squeeze(1), -summand.sum(-1)))
        return [logprob for logprob, _ in found], [entropy for _, entropy in found]

    def values_of(self, rows):
        """Before each response token; and at the last token, for what comes after it."""
        rows = list(rows)
        hidden = self.value.model(
            input_ids=self.ids[rows], attention_mask=self.mask[rows]
        ).last_hidden_state
        scores = self.value.score(hidden).squeeze(-1)
        ends = [len(self.rows[i]["prompt"]) + len(self.rows[i]["response"]) - 1 for i in rows]
        return [self.response(i, s) for i, s in zip(rows, scores)], [
            float(s[end].detach()) for s, end in zip(scores, ends)
        ]

    def score(self, folder, worth) -> None:
        if worth is not None:
            self.components = {"worth": list(map(float, worth))}
            self.scores = self.components["worth"]
            return
        with torch.no_grad():
            scores = theirs(folder / "verifier")(
                input_ids=self.ids, attention_mask=self.mask
            ).logits.squeeze(-1)
        rule = [
            float(sum(r["response"]) % 2 == int(p.gold))
            for r, p in zip(self.rows, worker.prompts())
        ]
        self.components = {"verifier": scores.tolist(), "rule": rule}
        self.scores = [
            WEIGHTS["verifier"] * v + WEIGHTS["rule"] * r for v, r in zip(scores.tolist(), rule)
        ]

    def cut(self, i: int) -> bool:
        """Line 9: it did not end on a stop token."""
        return self.rows[i]["response"][-1] not in self.run.stops

    def shape(self) -> None:
        s, x = self.knobs, list(self.scores)
        if s.reward_norm:
            before = self.run.state[0].get("reward_moments", [0.0] * 3)
            self.reward_moments = [
                a + b for a, b in zip(before, (len(x), sum(x), sum(v * v for v in x)))
            ]
            mean, std = moments(self.reward_moments)
            x = [(v - mean) / std for v in x]
        x = [v * s.reward_scale + s.reward_bias for v in x]
        if s.reward_clip is not None:
            x = [min(max(v, -s.reward_clip), s.reward_clip) for v in x]
        if s.truncated == "penalty":
            x = [v - s.truncation_penalty if self.cut(i) else v for i, v in enumerate(x)]
        self.shaped = x

    def estimate(self) -> list[torch.Tensor]:
        s, self.rewards = self.knobs, []
        for i in range(len(self.rows)):
            reward = [
                -KL_COEF * float(o - r) if self.kl == "k1" else 0.0
                for o, r in zip(self.old[i], self.ref[i])
            ]
            reward[-1] += self.shaped[i]
            self.rewards.append(reward)
        if s.advantage == "gae":
            raw = self.generalised()
        elif s.advantage == "reinforce++":
            raw = [
                [sum(s.gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))]
                for r in self.rewards
            ]
        else:
            raw = self.compared()
        if self.whitens:
            flat = [a for row in raw for a in row]
            mean = sum(flat) / len(flat)
            std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
            raw = [[(a - mean) / std for a in row] for row in raw]
        return [torch.tensor(row) for row in raw]

    def compared(self) -> list[list[float]]:
        """One advantage per response, from all samples of its prompt."""
        kind, found = self.knobs.advantage, []
        totals = [sum(reward) for reward in self.rewards]
        groups = self.groups or [i // self.knobs.samples_per_prompt for i in range(len(totals))]
        for total, mine in zip(totals, groups):
            group = [other for other, theirs in zip(totals, groups) if theirs == mine]
            if len(group) == 1:  # there is nothing to compare it with
                group, total = [0.0, 0.0], 0.0
            k = len(group)
            mean = sum(group) / k
            a = total - (sum(group) - total) / (k - 1) if kind == "rloo" else total - mean
            if kind == "grpo":
                a /= math.sqrt(sum((x - mean) ** 2 for x in group) / k) + 1e-6
            found.append([a] * len(self.rewards[len(found)]))
        return found

    def generalised(self) -> list[list[float]]:
        s, raw, returns = self.knobs, [], []
        self.value_moments = self.run.state[1].get("value_moments")
        mean, std = moments(self.value_moments) if s.value_norm else (0.0, 1.0)
        self.values = [v * std + mean for v in self.old_values]
        for i, reward in enumerate(self.rewards):
            n = len(reward)
            following = (
                self.after[i] * std + mean if self.cut(i) and s.truncated == "bootstrap" else 0.0
            )  # lines 10 and 11
            v = [*self.values[i].tolist(), following]
            delta = [reward[t] + s.gamma * v[t + 1] - v[t] for t in range(n)]
            both = []
            for lam in (s.lam, s.lam if s.lam_critic is None else s.lam_critic):
                both.append(
                    [
                        sum((s.gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
                        for t in range(n)
                    ]
                )
            raw.append(both[0])
            returns.append(torch.tensor([both[1][t] + v[t] for t in range(n)]))
        self.returns = self.targets = returns
        if s.value_norm:
            flat = torch.cat(returns).double()
            new = (len(flat), float(flat.sum()), float((flat * flat).sum()))
            self.value_moments = [VALUE_DECAY * a + b for a, b in zip(self.value_moments, new)]
            mean, std = moments(self.value_moments)
            self.targets = [(r - mean) / std for r in returns]
        return raw

    # --- the update

    def optimise(self, minibatches: list[list[int]], mix) -> None:
        s, self.logged = self.knobs, {}
        start = [
            {k: p.detach().clone() for k, p in m.state_dict().items()}
            for m in (self.policy, self.value)
        ]
        policy_adam, value_adam = (
            torch.optim.AdamW(m.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0)
            for m, lr in ((self.policy, LR), (self.value, VALUE_LR))
        )
        self.policy_steps = self.value_steps = 0
        moving = s.critic_warmup <= NUMBER
        for rows in minibatches:
            if moving:
                approxkl = self.policy_step(rows, policy_adam, next(mix, ()))
                moving = s.target_kl is None or approxkl <= s.target_kl
            if s.advantage == "gae":
                self.value_step(rows, value_adam)
        self.means = {name: sum(values) / len(values) for name, values in self.logged.items()}
        if s.ref_ema is not None:
            weights = self.reference.state_dict()
            for name, p in self.policy.state_dict().items():
                weights[name].copy_(s.ref_ema * weights[name] + (1 - s.ref_ema) * p)
        self.moved = {
            role: min(
                float((p - old[k]).norm() / old[k].norm())
                for k, p in getattr(self, role).state_dict().items()
            )
            for role, old in zip(("policy", "value"), start)
        }

    def log(self, **numbers) -> None:
        for name, x in numbers.items():
            self.logged.setdefault(name, []).append(float(torch.as_tensor(x).detach()))

    def step(self, loss, model, adam) -> float:
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        adam.step()
        return float(norm)

    def policy_step(self, rows: list[int], adam, mixed: list[int]) -> float:
        s, tokens, per_row, logged = (
            self.knobs,
            sum(len(self.rows[i]["response"]) for i in rows),
            [],
            [],
        )
        high = s.cliprange if s.cliprange_high is None else s.cliprange_high
        for i, new, entropy in zip(rows, *self.logprobs(self.policy, rows)):
            ratio, a = torch.exp(new - self.old[i]), self.advantages[i]
            plain, clipped = a * ratio, a * ratio.clip(1 - s.cliprange, 1 + high)
            objective, active, bounded = (
                torch.minimum(plain, clipped),
                clipped < plain,
                torch.zeros_like(a).bool(),
            )
            if s.dual_clip is not None:
                bounded = (a < 0) & (s.dual_clip * a > objective)
                objective = torch.where(bounded, s.dual_clip * a, objective)
            loss, x = -objective, self.ref[i] - new
            penalty = {"k1": torch.zeros_like(x), "k2": x * x / 2, "k3": torch.exp(x) - x - 1}[
                self.kl
            ]
            loss = loss + KL_COEF * penalty - s.entropy_coef * entropy
            per_row.append(loss)
            raised = (a > 0) & (ratio > 1 + s.cliprange) & ~active
            logged.append(
                [ratio - 1 - (new - self.old[i]), active | bounded, penalty, bounded, raised]
            )
        loss = {
            "token": torch.cat(per_row).sum() / tokens,
            "sequence": sum(x.mean() for x in per_row) / len(rows),
            "constant": sum(x.sum() for x in per_row)
            / self.run.sampling.max_new_tokens
            / len(rows),
        }[self.level]
        sums = [sum(float(x.detach().sum()) for x in column) / tokens for column in zip(*logged)]
        total = loss
        if s.ptx_coef:
            nll = self.pretraining_loss(mixed)
            total = loss + s.ptx_coef * nll
            self.log(ptx_loss=nll)
        norm = self.step(total, self.policy, adam)
        names = ("approxkl", "clipfrac", "kl_loss", "bounded", "raised")
        self.log(policy_loss=loss, policy_grad_norm=norm, **dict(zip(names, sums)))
        self.policy_steps += 1
        return sums[0]

    def pretraining_loss(self, rows: list[int]) -> torch.Tensor:
        """Mean −log p over the output tokens."""
        sequences = [worker.ptx_rows()[i] for i in rows]
        ids, mask = padded([s.tokens for s in sequences])
        logp = self.policy(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        at = [
            (i, t, s.tokens[t])
            for i, s in enumerate(sequences)
            for t in range(s.prompt_length, len(s.tokens))
        ]
        return torch.stack([-logp[i, t - 1, token] for i, t, token in at]).mean()

    def value_step(self, rows: list[int], adam) -> None:
        s, v = self.knobs, torch.cat(self.values_of(rows)[0])
        v_old, targets = (torch.cat([x[i] for i in rows]) for x in (self.old_values, self.targets))
        bounded = v_old + (v - v_old).clip(-s.cliprange_value, s.cliprange_value)
        loss = 0.5 * torch.maximum((v - targets) ** 2, (bounded - targets) ** 2).mean()
        worse = ((bounded - targets) ** 2 > (v - targets) ** 2).float().mean()
        norm = self.step(s.vf_coef * loss, self.value, adam)
        self.log(value_loss=loss, value_grad_norm=norm, value_clipfrac=worse)
        self.value_steps += 1
