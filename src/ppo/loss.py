"""PPO's losses (arXiv 1707.06347) token by token: pure functions, [R] → [R], fp32.

R are the response tokens of a micro-batch, flat. The caller weighs and adds them up, and divides by
numbers of the whole minibatch, so that micro-batches and data-parallel ranks give the same loss
however they are cut.
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp stays finite in fp32, and any such ratio is clipped anyway


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """−min(A · ratio, A · clip(ratio, 1 − cliprange, 1 + cliprange_high)), and what is logged.

    cliprange_high: the same as cliprange when not given (another: "clip-higher", arXiv 2503.14476);
    dual_clip: where A < 0 the loss is at most −dual_clip · A (arXiv 1912.09729). approxkl: (ratio −
    1) − log ratio, an unbiased, positive estimate (Schulman, "Approximating KL Divergence", k3);
    clipfrac: 1 where a clipped term is the active one.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    high = cliprange if cliprange_high is None else cliprange_high
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + high)
    loss = torch.maximum(plain, clipped)
    active = clipped > plain
    if dual_clip is not None:
        bound = -dual_clip * advantages
        active = active | ((advantages < 0) & (loss > bound))
        loss = torch.where(advantages < 0, torch.minimum(loss, bound), loss)
    return loss, {"approxkl": (ratio - 1 - log_ratio).detach(), "clipfrac": active.to(loss.dtype)}


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """An estimate of KL(π‖π_ref) whose gradient pulls towards the reference.

    (Schulman, "Approximating KL Divergence".) With x = log π_ref − log π: "k2": ½x²; "k3": eˣ − 1 −
    x.
    """
    x = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return 0.5 * x.square() if kind == "k2" else x.exp() - 1 - x


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """½ · max((v − R)², (v_old + clip(v − v_old, ± cliprange_value) − R)²), and what is logged."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    plain, limited = (values - returns).square(), (clipped - returns).square()
    clipfrac = (limited > plain).to(values.dtype)
    return 0.5 * torch.maximum(plain, limited), {"value_clipfrac": clipfrac}


def token_weights(
    level: str, lengths: list[int], tokens: int, sequences: int, max_new_tokens: int
) -> list[float]:
    """What a token of each response weighs: Σ weight · loss / tokens is the minibatch's loss.

    "token": the mean over all tokens; "sequence": the mean over responses of the means over their
    tokens; "constant": each response's sum over max_new_tokens, and the mean over responses (arXiv
    2503.20783). tokens, sequences: of the minibatch.
    """
    if level == "token":
        return [1.0] * len(lengths)
    return [
        tokens / (sequences * (length if level == "sequence" else max_new_tokens))
        for length in lengths
    ]
