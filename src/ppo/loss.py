"""PPO's two losses (arXiv 1707.06347): pure functions on flat tensors [R] of response tokens, fp32.

Each returns a sum over the given tokens divided by `denominator`, the number of response tokens in the whole minibatch,
so that micro-batches and data-parallel ranks add up to the same loss however they are cut.
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp stays finite in fp32, and any such ratio is clipped anyway


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """−min(A · ratio, A · clip(ratio, 1 ± cliprange)), and sums over the tokens to be logged.

    approxkl: ((ratio − 1) − log ratio), an unbiased, positive estimate (Schulman, "Approximating KL Divergence", k3);
    clipfrac: the share of tokens whose clipped term is the active one.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    with torch.no_grad():
        stats = {
            "approxkl": (ratio - 1 - log_ratio).sum() / denominator,
            "clipfrac": (clipped > plain).sum() / denominator,
        }
    return torch.maximum(plain, clipped).sum() / denominator, stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """½ · max((v − R)², (v_old + clip(v − v_old, ± cliprange_value) − R)²), and sums to be logged."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    plain, limited = (values - returns).square(), (clipped - returns).square()
    with torch.no_grad():
        stats = {"value_clipfrac": (limited > plain).sum() / denominator}
    return 0.5 * torch.maximum(plain, limited).sum() / denominator, stats
