"""Choosing the next token from logits that are split across ranks, the same on every rank.

Sampling inverts the cumulative distribution at one uniform number per token, and that number is a
hash of (seed, sample, step): neither the batch's composition, the slot, nor the degree changes what
is drawn. The logits are never gathered: the ranks exchange sums, and for top-k and top-p their
largest few logits.
"""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_group,
    get_model_parallel_world_size,
)
from torch import Tensor

from src.kernels import cpu, runtime
from src.kernels.threshold import log_fp32, plain_threshold, threshold
from src.parallel.deterministic import known_order
from src.parallel.shared_memory import gathered
from src.parallel.vocab import mp_all_reduce, vocab_range
from src.settings.declaration import check
from src.settings.generation import RepetitionPenalty, SamplingSettings
from src.settings.run import Seed

CANDIDATES = 256  # of each rank, that top-p looks at first


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingSettings):
    """How to choose tokens: a script's settings, and the seed.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep the whole vocabulary. The repetition
    penalty is arXiv 1909.05858's. Raises UserError for values out of bounds.
    """

    repetition_penalty: RepetitionPenalty = 1.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        check(self)


# 64-bit constants as signed integers
_MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift, on signed integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


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


def constrained(
    logits: Tensor, sampling: Sampling, steps: Tensor, stops: Tensor, seen: Tensor | None
) -> Tensor:
    """Logits after the repetition penalty, without stop tokens that come too early; fp32.

    logits: [n, vocabulary / ranks], used up; steps: tokens so far, [n]; stops: this rank's columns
    of the stop tokens; seen: which tokens of this rank's part each sequence holds,
    [n, vocabulary / ranks].
    """
    z, penalty = logits.float(), sampling.repetition_penalty
    if seen is not None:
        z = torch.where(seen, torch.where(z > 0, z / penalty, z * penalty), z)
    if sampling.min_new_tokens and stops.numel():
        early = (steps < sampling.min_new_tokens).unsqueeze(-1)
        z[:, stops] = z[:, stops].masked_fill(early, -torch.inf)
    return z


def choose(
    z: Tensor, sampling: Sampling, samples: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The next token of each row, and its log-probability where it was drawn.

    z: this rank's columns of the (constrained) logits, [n, vocabulary / ranks], fp32, used up;
    samples: ids that name each sequence, [n]; steps: how many tokens it has so far, [n]. Returns
    global token ids [n], fp32 log-probabilities [n] under the distribution that was sampled from
    (greedy: the plain softmax), and which of this rank's tokens were kept, [n, vocabulary / ranks],
    if some were not.
    """
    if sampling.temperature not in (0, 1):
        z /= sampling.temperature
    if sampling.temperature == 0:
        tokens, top = _argmax(z)
        z -= top.unsqueeze(-1)
        return tokens, -mp_all_reduce(z.exp_().sum(-1)).log(), None
    top = mp_all_reduce(z.amax(-1), dist.ReduceOp.MAX)
    # What is left out has no mass: stop tokens that come too early, and what top-k, top-p, min-p
    # cut off.
    kept = z > -torch.inf if sampling.leaves_out else None
    if kept is not None and sampling.truncates:
        kept &= z >= _threshold(z, sampling, top).unsqueeze(-1)
        z.masked_fill_(~kept, -torch.inf)
    if get_model_parallel_world_size() == 1 and cpu.takes(z):
        return *cpu.draw(z, top, sampling.seed, samples, steps), kept
    z -= top.unsqueeze(-1)
    # The cumulated mass in fp64: in fp32 the last of 100,000 tokens would be lost in rounding.
    # First up to and with each block, and each rank; then inside one block.
    p, width = z.exp_(), _block_width(z.size(-1))
    blocks = p.unflatten(-1, (-1, width)).sum(-1, dtype=torch.float64)
    with known_order():
        blocks = blocks.cumsum(-1)  # [n, blocks]
        bounds = torch.stack(gather_ranks(blocks[:, -1])).cumsum(0)  # [ranks, n]
    rank, last = vocab_range(1)[0], bounds.size(0) - 1
    before = bounds[rank - 1] if rank else torch.zeros_like(bounds[0])
    # Exactly one rank holds the first token at which the cumulated mass passes the target.
    target = uniforms(sampling.seed, samples, steps) * bounds[last]
    is_local = (target >= before) & ((target < bounds[rank]) | (rank == last))
    # The block that holds it, and what is left of the target there; then the token in the block.
    rest = (target - before).unsqueeze(-1)
    block = torch.searchsorted(blocks, rest, right=True).clamp_max(blocks.size(-1) - 1)
    rest -= blocks.gather(-1, (block - 1).clamp_min(0)) * (block > 0)
    columns = block * width + torch.arange(width, device=p.device)
    with known_order():
        inside = p.gather(-1, columns).cumsum(-1, dtype=torch.float64)
    local = block * width + torch.searchsorted(inside, rest, right=True).clamp_max(width - 1)
    logprob = p.gather(-1, local).squeeze(-1).log() - bounds[last].log()
    if last == 0:
        return local.squeeze(-1), logprob.float(), kept
    # The rank that holds it tells the others.
    start, _ = vocab_range(z.size(-1))
    token = (local.squeeze(-1) + start) * is_local
    chosen = mp_all_reduce(torch.stack((token, logprob.masked_fill(~is_local, 0).double())))
    return chosen[0].long(), chosen[1].float(), kept


@functools.cache
def _block_width(size: int) -> int:
    """A divisor of the vocabulary's part, about its root.

    Cumulating so many sums, and then so many numbers, is little work.
    """
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: d + size // d)


def _argmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Global argmax, the lowest id among equals, and its value."""
    best, local = z.max(-1)
    if get_model_parallel_world_size() == 1:
        return local, best
    top = mp_all_reduce(best.clone(), dist.ReduceOp.MAX)
    start, _ = vocab_range(z.size(-1))
    token = torch.where(best == top, local + start, torch.iinfo(torch.int64).max)
    return mp_all_reduce(token, dist.ReduceOp.MIN), top


def logsumexp(z: Tensor) -> Tensor:
    """Over the whole vocabulary, [n, vocabulary / ranks] → [n]."""
    top = mp_all_reduce(z.amax(-1), dist.ReduceOp.MAX)
    return top + mp_all_reduce((z - top.unsqueeze(-1)).exp().sum(-1)).log()


def gather_ranks(x: Tensor) -> list[Tensor]:
    """Every rank's tensor of the same shape."""
    if get_model_parallel_world_size() == 1:
        return [x]
    return list(gathered(x, get_model_parallel_group()))


def _largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each row's k largest logits of every rank, in falling order; and how far they are complete.

    [n, ≤ k · ranks] and [n]. Whatever is not among them is at most the second: the largest of the
    ranks' k-th (minus infinity once all are there).
    """
    width = min(k, z.size(-1))
    parts = gather_ranks(z.topk(width).values)
    complete = torch.stack([part[:, -1] for part in parts]).amax(0)
    if width == z.size(-1):
        complete = torch.full_like(complete, -torch.inf)
    return torch.cat(parts, -1).sort(-1, descending=True).values, complete


def _threshold(z: Tensor, sampling: Sampling, top: Tensor) -> Tensor:
    """The smallest logit that top-k, then top-p, then min-p, keep in each row, [n].

    A token stays while the mass above it is below top_p (arXiv 1904.09751): the first always does.
    On a GPU that is found by bisection, which never waits for the host. On the CPU top-p looks at
    ever more of the largest logits until the threshold lies among those that are surely complete.
    top: each row's largest.
    """
    if runtime.takes(z):
        cuts = sampling.top_k, sampling.top_p, sampling.min_p
        if get_model_parallel_world_size() == 1:
            return threshold(z, top, *cuts)
        return plain_threshold(z, top, *cuts, summed=mp_all_reduce)
    smallest_kept = torch.full_like(top, -torch.inf)
    if sampling.min_p:
        smallest_kept = top + log_fp32(sampling.min_p)
    if sampling.top_k:
        best, _ = _largest(z, sampling.top_k)
        best = best[:, : sampling.top_k]
        total = (best - top.unsqueeze(-1)).exp().double().sum(-1)
        return torch.maximum(smallest_kept, _nucleus(best, total, top, sampling.top_p)[0])
    if sampling.top_p == 1:
        return smallest_kept
    total = mp_all_reduce((z - top.unsqueeze(-1)).exp().sum(-1, dtype=torch.float64))
    width = CANDIDATES
    while True:
        best, complete = _largest(z, width)
        smallest, reached = _nucleus(best, total, top, sampling.top_p)
        if width >= z.size(-1) or bool((reached & (smallest >= complete)).all()):
            return torch.maximum(smallest_kept, smallest)
        width *= 4


def _nucleus(best: Tensor, total: Tensor, top: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The smallest logit that top_p keeps of `best` (falling), [n].

    And whether the mass of `best` gets that far, [n].
    """
    p = (best - top.unsqueeze(-1)).exp().double() / total.unsqueeze(-1)
    kept = (p.cumsum(-1) - p < top_p).sum(-1)
    return best.gather(-1, (kept - 1).unsqueeze(-1)).squeeze(-1), p.sum(-1) >= top_p
