"""How far a student's next tokens are from a teacher's, over a vocabulary split across ranks.

As in `vocab.py` no model's logits exist as a whole: a chunk of tokens at a time, this rank's part
of the vocabulary alone, and the gradient is taken while they are there.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_rank,
    get_model_parallel_world_size,
)
from torch import Tensor

from src.parallel.deterministic import linear
from src.parallel.vocab import (
    IMPOSSIBLE,
    ProductGradients,
    chunks_of,
    mp_all_reduce,
    row_sums,
    vocab_range,
)

# Rows → the teacher's logits of them for this rank's part of the student's vocabulary, fp32.
LogitsOf = Callable[[slice], Tensor]


def log_softmax(z: Tensor) -> Tensor:
    """log softmax over all ranks' columns, in place: [N, vocabulary / n]."""
    z -= mp_all_reduce(z.amax(-1), dist.ReduceOp.MAX).unsqueeze(-1)
    return z.sub_(mp_all_reduce(row_sums(z.exp())).log_().unsqueeze(-1))


def divergence(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The generalised Jensen–Shannon divergence of rows, [N], and its gradient for p's logits.

    (GKD, arXiv 2306.13649, equation 1.) p is the student's, q the teacher's; with m = β q + (1 − β)
    p it is β KL(q‖m) + (1 − β) KL(p‖m); at β = 0 the forward KL(q‖p), at 1 the reverse KL(p‖q), to
    which it tends when divided by β, or 1 − β. log_p, log_q: [N, vocabulary / n]; the gradient
    takes log_p's place.
    """
    if beta == 0:  # d / d z = p − q
        q = log_q.exp()
        total = mp_all_reduce(row_sums(q * (log_q - log_p)))
        return total, log_p.exp_().sub_(q)
    p = log_p.exp()
    # The derivative for p, up to what is the same for all of a row.
    if beta == 1:
        slope = log_p.sub_(log_q)
        total = mp_all_reduce(row_sums(p * slope))
        mean = total
    else:
        to_p, to_q = torch.tensor([1 - beta, beta], dtype=torch.float64).log().tolist()
        log_m = torch.logaddexp(log_p + to_p, log_q + to_q)
        of_teacher = row_sums(log_q.exp() * (log_q - log_m))
        slope = log_p.sub_(log_m).mul_(1 - beta)
        sums = torch.stack((row_sums(p * slope), beta * of_teacher))
        mean, rest = mp_all_reduce(sums)
        total = mean + rest
    # d / d z_j = p_j (slope_j − Σ p slope)
    return total, slope.sub_(mean.unsqueeze(-1)).mul_(p)


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, real: int, teacher: LogitsOf, options: tuple):
        beta, temperature, holes = options
        grads_of, loss = (
            ProductGradients(ctx, hidden, weight),
            torch.zeros((), device=hidden.device),
        )
        # Two models' logits at a time: half as many rows of each.
        for (rows,) in chunks_of(hidden.size(0), weight, copies=2):
            # Both models' log-probabilities: [rows, vocabulary / n], fp32.
            logs: list[Tensor] = []
            for z in (linear(hidden[rows], weight).float(), teacher(rows)):
                z[:, real:] = IMPOSSIBLE
                for first, last in holes:
                    z[:, first:last] = IMPOSSIBLE
                logs.append(log_softmax(z if temperature == 1 else z.div_(temperature)))
            apart, grad = divergence(logs[0], logs[1], beta)
            loss += apart.sum()
            # From the logits' gradient to what they are a product of.
            grads_of.add(rows, grad.mul_(ctx.scale / temperature))
        grads_of.save()
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *ProductGradients.scaled(ctx, grad), None, None, None


def distilled(
    hidden: Tensor,
    weight: Tensor,
    real: int,
    teacher: LogitsOf,
    beta: float,
    temperature: float = 1.0,
    holes: Sequence[tuple[int, int]] = (),
) -> Tensor:
    """Σ over rows of `divergence` between a student's next tokens and a teacher's.

    hidden: [N, dim], weight, real, holes: the student's, as in `target_loss`; temperature: both
    models' logits are divided by it. Backward may be called once.
    """
    return _Distilled.apply(hidden, weight, real, teacher, (beta, temperature, holes))


def head_logits(hidden: Tensor, weight: Tensor) -> LogitsOf:
    """A teacher's logits by its output layer.

    hidden: [N, dim]; weight: the rows of it that are this rank's part of the student's vocabulary.
    """
    return lambda rows: linear(hidden[rows], weight).float()


def coarse_divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """`divergence` between distributions of which k probabilities are known, and the rest's sum.

    log_p, log_q: [N, k], of the same k tokens → [N]. Differentiable. It is at most that of the
    whole distributions, since tokens that are taken together can only look more alike.
    """

    def whole(x: Tensor) -> Tensor:
        """With the rest's logarithm: [N, k + 1]."""
        rest = (1 - x.exp().sum(-1, keepdim=True)).clamp_min(1e-6)
        return torch.cat((x, rest.log()), -1)

    log_p, log_q = whole(log_p), whole(log_q)
    if beta == 0:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if beta == 1:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    to_p, to_q = torch.tensor([1 - beta, beta], dtype=torch.float64).log().tolist()
    log_m = torch.logaddexp(log_p + to_p, log_q + to_q)
    of_teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * of_teacher + (1 - beta) * (log_p.exp() * (log_p - log_m)).sum(-1)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row and their log-probabilities, likeliest first: [N, k] each.

    logits: this rank's columns, [N, vocabulary / n]; the same on every rank. Of equal ones the one
    with the lower id comes first.
    """
    log_p = log_softmax(logits.float())
    n, width = log_p.size(0), min(k, log_p.size(-1))
    values, ids = log_p.sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, :width], ids[:, :width] + vocab_range(log_p.size(-1))[0]
    # Every rank's candidates side by side, in the order of their ids.
    size, rank = get_model_parallel_world_size(), get_model_parallel_rank()
    all_values = values.new_zeros(n, size, width)
    all_ids = ids.new_zeros(n, size, width)
    all_values[:, rank], all_ids[:, rank] = values, ids
    all_values, all_ids = mp_all_reduce(all_values).flatten(1), mp_all_reduce(all_ids).flatten(1)
    best, place = all_values.sort(dim=-1, descending=True, stable=True)
    return all_ids.gather(-1, place[:, :k]), best[:, :k]
