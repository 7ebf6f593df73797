"""Choosing the next token from logits that are split across ranks, the same on every rank.

Sampling inverts the cumulative distribution at one uniform number per token, and that number is a hash of (seed, sample,
step): neither the batch's composition, the slot, nor the degree changes what is drawn.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_group, get_model_parallel_world_size
from torch import Tensor

from src.errors import UserError
from src.parallel.vocab import mp_all_reduce, vocab_range


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_new_tokens < 1:
            raise UserError(
                f"--temperature {self.temperature} --top_p {self.top_p} --top_k {self.top_k} --max_new_tokens "
                f"{self.max_new_tokens}: need temperature >= 0, 0 < top_p <= 1, top_k >= 0, max_new_tokens >= 1"
            )


_MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # 64-bit constants as signed integers


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical, on signed integers


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), on wrapping int64."""
    x = x + _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[1]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[2]
    return x ^ _shift_right(x, 31)


def uniforms(seed: int, samples: Tensor, steps: Tensor) -> Tensor:
    """A number in [0, 1) for each (sample, step), fp64: [n] and [n] → [n]."""
    mixed = _mix(_mix(_mix(torch.full_like(samples, seed)) ^ samples) ^ steps)
    return _shift_right(mixed, 11).double() * 2.0**-53


def choose(logits: Tensor, sampling: Sampling, samples: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability under the distribution that was sampled from.

    logits: this rank's columns, [n, vocabulary / ranks]; samples: ids that name each sequence, [n]; steps: how many
    tokens it has so far, [n]. Returns global token ids [n] and fp32 log-probabilities [n] (greedy: of the plain softmax).
    """
    z = logits.float() / (sampling.temperature or 1.0)
    if sampling.temperature == 0:
        tokens, best = _argmax(z)
        return tokens, best - _logsumexp(z)
    if sampling.top_k or sampling.top_p < 1:
        z = z.masked_fill(z < _threshold(z, sampling).unsqueeze(-1), -torch.inf)
    log_total = _logsumexp(z)
    mass = (z - log_total.unsqueeze(-1)).exp().double().cumsum(-1)
    bounds = torch.stack(_gather_ranks(mass[:, -1])).cumsum(0)  # the mass up to and with each rank
    rank, last = vocab_range(1)[0], bounds.size(0) - 1
    before = bounds[rank - 1] if rank else torch.zeros_like(bounds[0])
    target = uniforms(sampling.seed, samples, steps) * bounds[last]
    # Exactly one rank holds the first token at which the cumulated mass passes the target.
    here = (target >= before) & ((target < bounds[rank]) | (rank == last))
    local = torch.searchsorted(mass, (target - before).unsqueeze(-1), right=True).clamp_max(mass.size(-1) - 1)
    logprob = z.gather(-1, local).squeeze(-1) - log_total
    start, _ = vocab_range(z.size(-1))
    found = mp_all_reduce(torch.stack(((local.squeeze(-1) + start) * here, logprob.masked_fill(~here, 0).double())))
    return found[0].long(), found[1].float()


def _logsumexp(z: Tensor) -> Tensor:
    top = mp_all_reduce(z.amax(-1), dist.ReduceOp.MAX)
    return top + mp_all_reduce((z - top.unsqueeze(-1)).exp().sum(-1)).log()


def _argmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Global argmax, the lowest id among equals, and its value."""
    best, local = z.max(-1)
    top = mp_all_reduce(best.clone(), dist.ReduceOp.MAX)
    start, _ = vocab_range(z.size(-1))
    token = torch.where(best == top, local + start, torch.iinfo(torch.int64).max)
    return mp_all_reduce(token, dist.ReduceOp.MIN), top


def _gather_ranks(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(get_model_parallel_world_size())]
    if len(parts) == 1:
        return [x]
    dist.all_gather(parts, x.contiguous(), group=get_model_parallel_group())
    return parts


def _threshold(z: Tensor, sampling: Sampling) -> Tensor:
    """The smallest logit that top-k, then top-p, keep in each row, [n]."""
    whole = torch.cat(_gather_ranks(z), -1).sort(-1, descending=True).values
    if sampling.top_k:
        whole = whole[:, : sampling.top_k]
    # A token stays while the mass above it is below top_p (arXiv 1904.09751): the first always does.
    p = whole.softmax(-1)
    kept = (p.cumsum(-1) - p < sampling.top_p).sum(-1)
    return whole.gather(-1, (kept - 1).unsqueeze(-1)).squeeze(-1)
