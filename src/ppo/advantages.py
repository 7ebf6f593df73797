"""From scores to advantages: pure functions on padded tensors and their mask.

B sequences, T the longest response.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from src.parallel.setup import Parallel


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = −kl_coef · (log π_old − log π_ref)_t at every response token, [B, T].

    Plus the score at the last one. scores: [B]; kl: [B, T], log-ratio to the reference; mask: [B,
    T], true at response tokens, on the left of each row.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (arXiv 1506.02438, equation 16), [B, T] each.

    They are 0 where masked. values: [B, T], V before each response token; bootstrap: [B], V after
    the last one: 0 after EOS, the value of the state for a truncated response. With values of 0 and
    lam 1 both are the discounted rewards to go.
    """
    advantages = torch.zeros_like(rewards)
    carry, next_value = torch.zeros_like(bootstrap), bootstrap
    for t in reversed(range(rewards.size(1))):
        is_token = mask[:, t]  # [B]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carry = torch.where(is_token, delta + gamma * lam * carry, carry)
        next_value = torch.where(is_token, values[:, t], next_value)
        advantages[:, t] = torch.where(is_token, carry, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def group_advantages(
    rewards: Tensor, samples: int, kind: str, present: Tensor | None = None
) -> Tensor:
    """One advantage per response, out of the rewards of its prompt's samples, [B] → [B].

    Samples of one prompt stand one after the other; those that are not `present`, [B], count for
    nothing and get 0, as does one that is alone. "grpo": (r − mean) / std (arXiv 2402.03300,
    section 4.1.2; std over the samples, with 1e-6 added); "dr_grpo": r − mean (arXiv 2503.20783);
    "rloo": r − mean of the other samples (arXiv 2402.14740, equation 10).
    """
    groups = rewards.view(-1, samples)  # [prompts, samples]
    here = torch.ones_like(groups, dtype=torch.bool) if present is None else present.view_as(groups)
    n = here.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(here, groups, 0.0).sum(1, keepdim=True) / n
    centred = torch.where(here, groups - mean, 0.0)
    return GROUPED[kind](centred, n).flatten()


# kind → (rewards less their prompt's mean, [prompts, samples]; how many, [prompts, 1]) → advantages
GROUPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": lambda x, n: x / ((x.square().sum(1, keepdim=True) / n).sqrt() + 1e-6),
    "dr_grpo": lambda x, n: x,
    "rloo": lambda x, n: x * n / (n - 1).clamp(min=1),
}


def whiten(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """(x − mean) / std over the entries of all ranks of `group`, [R] → [R].

    One sample, or equal ones, give 0.
    """
    count = torch.tensor(float(x.numel()), device=x.device, dtype=torch.float64)
    total = x.double().sum()
    sums = torch.stack((count, total))
    if group is not None:
        dist.all_reduce(sums, group=group)
    centred = x.double() - sums[1] / sums[0]
    squares = centred.square().sum()
    if group is not None:
        dist.all_reduce(squares, group=group)
    return (centred / (squares / sums[0] + 1e-8).sqrt()).to(x.dtype)


class Moments:
    """Running mean and standard deviation of numbers that come in batches.

    Over all models of a division. decay: what the past still weighs when a batch comes; 1 counts
    all numbers alike. Both are sums over the sum of the weights, so that the first batches do not
    lean towards 0. Before the first batch: 0 and 1.
    """

    def __init__(self, decay: float = 1.0) -> None:
        self.decay, self.sums = decay, [0.0, 0.0, 0.0]  # of the weights, the numbers, their squares

    def update(self, x: Tensor, parallel: Parallel | None = None) -> None:
        """Take in a batch of any shape; all ranks of the run must, those of no model nothing."""
        x = x.double()
        count = torch.tensor(float(x.numel()), dtype=torch.float64, device=x.device)
        new = torch.stack((count, x.sum(), x.square().sum()))
        if parallel is not None:
            if not parallel.speaks:
                new.zero_()
            dist.all_reduce(new)
        self.sums = [self.decay * old + more for old, more in zip(self.sums, new.tolist())]

    @property
    def part(self) -> tuple[Callable[[], list[float]], Callable[[list[float]], None]]:
        """How to get and set what a saved run must keep of it."""
        return (lambda: self.sums), (lambda sums: setattr(self, "sums", sums))

    @property
    def mean(self) -> float:
        return self.sums[1] / self.sums[0] if self.sums[0] else 0.0

    @property
    def std(self) -> float:
        """At least 1e-4: equal numbers are centred, not blown up."""
        if not self.sums[0]:
            return 1.0
        return max(max(self.sums[2] / self.sums[0] - self.mean**2, 0.0) ** 0.5, 1e-4)
