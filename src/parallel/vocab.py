"""Log-probabilities over a vocabulary that is split across ranks: the logits are never gathered."""

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)
from torch import Tensor

from src.parallel.shared_memory import all_reduce


def mp_all_reduce(x: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """All-reduce in place over the model-parallel ranks; returns `x`."""
    if get_model_parallel_world_size() > 1:
        all_reduce(x, get_model_parallel_group(), op)
    return x


def vocab_range(local_size: int) -> tuple[int, int]:
    """The token ids [start, stop) whose logits this rank holds."""
    start = get_model_parallel_rank() * local_size
    return start, start + local_size


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(z)[target] and the entropy of softmax(z), in fp32.

    With p = softmax(z):  d log p_t / d z_j = 1[j = t] − p_j   and   d H / d z_j = −p_j (log p_j + H).
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, temperature: float):
        ctx.set_materialize_grads(False)
        z = logits.float() / temperature  # a copy: the logits stay as they are
        z -= mp_all_reduce(z.amax(-1), dist.ReduceOp.MAX).unsqueeze(-1)
        start, stop = vocab_range(z.size(-1))
        here = (targets >= start) & (targets < stop)
        local_target = (targets - start).clamp(0, z.size(-1) - 1)
        z_target = z.gather(-1, local_target.unsqueeze(-1)).squeeze(-1) * here
        p = z.exp()
        sums = torch.stack((p.sum(-1), (p * z).sum(-1), z_target))
        total, weighted, z_target = mp_all_reduce(sums)
        p /= total.unsqueeze(-1)
        entropy = total.log() - weighted / total
        ctx.save_for_backward(p, local_target, here, entropy)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return z_target - total.log(), entropy

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, grad_entropy: Tensor):
        p, local_target, here, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad = torch.zeros_like(p)
        else:
            grad = p * -grad_logprobs.unsqueeze(-1)
            grad.scatter_add_(-1, local_target.unsqueeze(-1), (grad_logprobs * here).unsqueeze(-1))
        if grad_entropy is not None:
            log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()  # p = 0 contributes 0
            grad -= grad_entropy.unsqueeze(-1) * p * (log_p + entropy.unsqueeze(-1))
        return (grad / ctx.temperature).to(ctx.dtype), None, None


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under its row of logits, and the row's entropy, both fp32 in nats.

    logits: this rank's columns, [N, vocabulary / n]; targets: global token ids, [N]; returns ([N], [N]).
    """
    return _TokenLogprobs.apply(logits, targets, temperature)
