"""From scores to advantages: pure functions on padded tensors [sequences, longest response] and their mask."""

import torch
import torch.distributed as dist
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = −kl_coef · (log π_old − log π_ref)_t at every response token, plus the score at the last one.

    scores: [B]; kl: [B, T], log-ratio to the reference; mask: [B, T], true at response tokens, on the left of each row.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (arXiv 1506.02438, equation 16), [B, T] each, 0 where masked.

    values: [B, T], V before each response token; bootstrap: [B], V after the last one: 0 after EOS, the value of the
    state for a truncated response.
    """
    advantages = torch.zeros_like(rewards)
    carry, next_value = torch.zeros_like(bootstrap), bootstrap
    for t in reversed(range(rewards.size(1))):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carry = torch.where(here, delta + gamma * lam * carry, carry)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, carry, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """(x − mean) / std over the entries of all ranks of `group`; x: [R]. One sample, or equal ones, give 0."""
    count, total = torch.tensor(float(x.numel()), device=x.device, dtype=torch.float64), x.double().sum()
    sums = torch.stack((count, total))
    _all_reduce(sums, group)
    centred = x.double() - sums[1] / sums[0]
    squares = centred.square().sum()
    _all_reduce(squares, group)
    return (centred / (squares / sums[0] + 1e-8).sqrt()).to(x.dtype)


def _all_reduce(x: Tensor, group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.all_reduce(x, group=group)
