"""Log-probabilities over a vocabulary that is split across ranks: the logits are never gathered."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)
from torch import Tensor

from src.parallel.shared_memory import all_reduce

IMPOSSIBLE = (
    -30000.0
)  # the logit of a padded vocabulary entry: a probability of exactly 0, and finite in every dtype
LOGITS_AT_ONCE, LOGITS_AT_ONCE_CUDA = 2**25, 2**27  # numbers in a chunk: 128 MiB in fp32, 512 MiB


def mp_all_reduce(x: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """All-reduce in place over the model-parallel ranks; returns `x`."""
    if get_model_parallel_world_size() > 1:
        all_reduce(x, get_model_parallel_group(), op)
    return x


def vocab_range(local_size: int) -> tuple[int, int]:
    """The token ids [start, stop) whose logits this rank holds."""
    start = get_model_parallel_rank() * local_size
    return start, start + local_size


def pack_bits(mask: Tensor) -> Tensor:
    """[n, m] of bool → [n, ⌈m / 8⌉] of bytes, the first in the lowest bit."""
    bits = F.pad(mask, (0, -mask.size(-1) % 8)).unflatten(-1, (-1, 8))
    return (bits * (1 << torch.arange(8, device=mask.device))).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, m: int) -> Tensor:
    """The inverse of `pack_bits`."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1
    return bits.flatten(-2)[..., :m].bool()


def keep_only(z: Tensor, kept: Tensor | None) -> Tensor:
    """z, in place, with a probability of 0 for what is not kept. z: [N, vocabulary / n]; kept: bits, [N, bytes], or None: all."""
    return z if kept is None else z.masked_fill_(~unpack_bits(kept, z.size(-1)), IMPOSSIBLE)


class _Where(NamedTuple):
    """What the gradient needs beside the exponentials, [N] each: their sums, and this rank's column of the target, if it has it."""

    total: Tensor
    column: Tensor
    here: Tensor


def _softmax(z: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None, _Where]:
    """log softmax(z)[target] and the entropy, [N] each; z itself, fp32, becomes softmax(z) · total."""
    z -= mp_all_reduce(z.amax(-1), dist.ReduceOp.MAX).unsqueeze(-1)
    start, stop = vocab_range(z.size(-1))
    here = (targets >= start) & (targets < stop)
    column = (targets - start).clamp(0, z.size(-1) - 1)
    of_target = z.gather(-1, column.unsqueeze(-1)).squeeze(-1) * here
    if entropy:
        p = z.exp()
        sums = [p.sum(-1), of_target, (p * z).sum(-1)]
        z.copy_(p)
    else:
        # A third row for nothing: in which order ranks are summed may depend on the size, and with it the last bit.
        sums = [z.exp_().sum(-1), of_target, torch.zeros_like(of_target)]
    total, of_target, weighted = mp_all_reduce(torch.stack(sums))
    log_total = total.log()
    return (
        of_target - log_total,
        log_total - weighted / total if entropy else None,
        _Where(total, column, here),
    )


def _softmax_gradient(
    exp: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
    at: _Where,
    scale: float,
) -> Tensor:
    """scale × the gradient for z, in the exponentials' place.

    With p = softmax(z):  d log p_t / d z_j = 1[j = t] − p_j   and   d H / d z_j = −p_j (log p_j + H).
    """
    grad = torch.zeros_like(at.total) if grad is None else grad * scale
    more = None
    if grad_entropy is not None:
        p = exp / at.total.unsqueeze(-1)
        log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log_()  # p = 0 contributes 0
        more = log_p.add_(entropy.unsqueeze(-1)).mul_(p).mul_((grad_entropy * scale).unsqueeze(-1))
    exp *= (-grad / at.total).unsqueeze(-1)
    exp.scatter_add_(-1, at.column.unsqueeze(-1), (grad * at.here).unsqueeze(-1))
    return exp if more is None else exp.sub_(more)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, temperature: float, kept: Tensor | None):
        ctx.set_materialize_grads(False)
        exp = keep_only(logits.float() / temperature, kept)  # a copy: the logits stay as they are
        logprobs, entropy, at = _softmax(exp, targets, entropy=True)
        ctx.save_for_backward(exp, entropy, *at)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, grad_entropy: Tensor):
        exp, entropy, *at = ctx.saved_tensors
        grad = _softmax_gradient(
            exp.clone(), grad_logprobs, grad_entropy, entropy, _Where(*at), 1 / ctx.temperature
        )
        return grad.to(ctx.dtype), None, None, None


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under its row of logits, and the row's entropy, both fp32 in nats.

    logits: this rank's columns, [N, vocabulary / n]; targets: global token ids, [N]; kept: this rank's tokens that have a
    probability at all, as bits, [N, bytes]; returns ([N], [N]).
    """
    return _TokenLogprobs.apply(logits, targets, temperature, kept)


def rows_at_once(n: int, weight: Tensor) -> int:
    """Of n rows, how many have their logits computed at a time: chunks of one size. weight: this rank's rows of the output layer."""
    most = max(1, (LOGITS_AT_ONCE_CUDA if weight.is_cuda else LOGITS_AT_ONCE) // weight.size(0))
    chunks = max(1, -(-n // most))
    return max(1, -(-n // chunks))


LossOf = Callable[[Tensor, Tensor | None, slice], Tensor]


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        real: int,
        targets: Tensor,
        loss_of: LossOf,
        options: tuple,
    ):
        temperature, entropy, kept = options
        ctx.scale = (
            1024.0 if weight.dtype == torch.float16 else 1.0
        )  # fp16 would lose what is smaller than 6e-8
        wanted, n = ctx.needs_input_grad, targets.size(0)
        at_once = rows_at_once(n, weight)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight, loss = None, torch.zeros((), device=hidden.device)
        for start in range(0, n, at_once):
            rows = slice(start, start + at_once)
            z = F.linear(hidden[rows], weight)
            z[:, real:] = IMPOSSIBLE
            z = z.float()
            if temperature != 1:
                z /= temperature
            keep_only(z, None if kept is None else kept[rows])
            logprobs, h, at = _softmax(z, targets[rows], entropy)
            with torch.enable_grad():
                inputs = [x.requires_grad_() for x in (logprobs, h) if x is not None]
                part = loss_of(logprobs, h, rows)
                grads = torch.autograd.grad(part, inputs, allow_unused=True)
            loss += part.detach()
            grad = _softmax_gradient(
                z, grads[0], grads[1] if entropy else None, h, at, ctx.scale / temperature
            ).to(weight.dtype)
            if wanted[0]:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if wanted[1] and grad_weight is None:
                grad_weight = torch.mm(grad.t(), hidden[rows]).float()
            elif wanted[1]:
                grad_weight = _add_product(grad_weight, grad.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        # in place, once: what is saved is this function's own
        hidden, weight = (
            None if x is None else x.mul_(grad / ctx.scale) for x in ctx.saved_tensors
        )
        return hidden, weight, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in place; total is fp32."""
    return total.addmm_(a, b) if a.dtype == total.dtype else total.add_(torch.mm(a, b))


def target_loss(
    hidden: Tensor,
    weight: Tensor,
    real: int,
    targets: Tensor,
    loss_of: LossOf,
    temperature: float = 1.0,
    entropy: bool = False,
    kept: Tensor | None = None,
) -> Tensor:
    """Σ over chunks of rows of loss_of(log-probabilities, entropies or None, rows): a loss that each row has for itself.

    The logits live a chunk at a time, and the gradient of the chunk's loss is taken while they are there, so that nothing as large
    as [N, vocabulary] is kept or computed twice. Backward may be called once. What the sum is divided by is better divided outside:
    half-precision gradients keep more digits when they are about 1.

    hidden: [N, dim]; weight: this rank's rows of the output layer, [vocabulary / n, dim], `real` of them without padding;
    targets: global token ids, [N]; kept: see `token_logprobs`.
    """
    return _TargetLoss.apply(hidden, weight, real, targets, loss_of, (temperature, entropy, kept))
