"""Log-probabilities over a vocabulary that is split across ranks: the logits are never gathered."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)
from torch import Tensor

from src.parallel.deterministic import by_tiles, linear
from src.parallel.shared_memory import Operation, all_reduce

# The logit of a padded vocabulary entry: a probability of exactly 0, and finite in every dtype.
IMPOSSIBLE = -30000.0
LOGITS_AT_ONCE, LOGITS_AT_ONCE_CUDA = 2**25, 2**27  # numbers in a chunk: 128 MiB in fp32, 512 MiB


def mp_all_reduce(x: Tensor, op: Operation = dist.ReduceOp.SUM) -> Tensor:
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
    """z, in place, with a probability of 0 for what is not kept.

    z: [N, vocabulary / n]; kept: bits, [N, bytes], or None: all.
    """
    return z if kept is None else z.masked_fill_(~unpack_bits(kept, z.size(-1)), IMPOSSIBLE)


def row_sums(x: Tensor) -> Tensor:
    """Each row's sum, [N, …] → [N]."""
    return by_tiles(lambda rows: rows.sum(-1), x)


def in_rows(x: Tensor) -> Tensor:
    """One number of each row, [N], as [N, 1]; several, [N, k], as they are."""
    return x.unsqueeze(-1) if x.dim() == 1 else x


class _SoftmaxState(NamedTuple):
    """What the gradient needs beside the exponentials: [N], and like the targets."""

    total: Tensor  # the exponentials' sum, over all ranks
    column: Tensor  # the target's among this rank's, if `is_local`
    is_local: Tensor


def _softmax(
    z: Tensor, targets: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None, _SoftmaxState]:
    """log softmax(z)[target], like the targets, and the entropy, [N].

    z itself, [N, vocabulary / n], fp32, becomes its exponentials, softmax(z) · total. targets: [N],
    or, without entropy, [N, k].
    """
    z -= mp_all_reduce(z.amax(-1), dist.ReduceOp.MAX).unsqueeze(-1)
    start, stop = vocab_range(z.size(-1))
    is_local = (targets >= start) & (targets < stop)
    column = (targets - start).clamp(0, z.size(-1) - 1)
    of_target = z.gather(-1, in_rows(column)).view_as(column) * is_local
    if targets.dim() > 1:
        total, of_target = mp_all_reduce(row_sums(z.exp_())), mp_all_reduce(of_target)
        state = _SoftmaxState(total, column, is_local)
        return of_target - total.log().unsqueeze(-1), None, state
    if entropy:
        p = z.exp()
        sums = [row_sums(p), of_target, row_sums(p * z)]
        z.copy_(p)
    else:
        # A third row for nothing: in which order ranks are summed may depend on the size, and with
        # it the last bit.
        sums = [row_sums(z.exp_()), of_target, torch.zeros_like(of_target)]
    total, of_target, weighted = mp_all_reduce(torch.stack(sums))
    log_total = total.log()
    # H = −Σ p (z − log total) = log total − Σ exp(z) z / total
    h = log_total - weighted / total if entropy else None
    return of_target - log_total, h, _SoftmaxState(total, column, is_local)


def _softmax_gradient(
    exp: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
    state: _SoftmaxState,
    scale: float,
) -> Tensor:
    """scale × the gradient for z, in the exponentials' place.

    With p = softmax(z): d log p_t / d z_j = 1[j = t] − p_j and d H / d z_j = −p_j (log p_j + H).
    """
    grad = torch.zeros_like(state.column, dtype=exp.dtype) if grad is None else grad * scale
    entropy_part = None
    if grad_entropy is not None and entropy is not None:
        p = exp / state.total.unsqueeze(-1)
        log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log_()  # p = 0 contributes 0
        factor = (grad_entropy * scale).unsqueeze(-1)
        entropy_part = log_p.add_(entropy.unsqueeze(-1)).mul_(p).mul_(factor)
    of_row = grad if grad.dim() == 1 else grad.sum(-1)
    exp *= (-of_row / state.total).unsqueeze(-1)
    exp.scatter_add_(-1, in_rows(state.column), in_rows(grad * state.is_local))
    return exp if entropy_part is None else exp.sub_(entropy_part)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, temperature: float, kept: Tensor | None):
        ctx.set_materialize_grads(False)
        exp = keep_only(logits.float() / temperature, kept)  # a copy: the logits stay as they are
        logprobs, entropy, state = _softmax(exp, targets, entropy=True)
        ctx.save_for_backward(exp, entropy, *state)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, grad_entropy: Tensor):
        exp, entropy, *saved = ctx.saved_tensors
        state, scale = _SoftmaxState(*saved), 1 / ctx.temperature
        grad = _softmax_gradient(exp.clone(), grad_logprobs, grad_entropy, entropy, state, scale)
        return grad.to(ctx.dtype), None, None, None


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under its row of logits, and the row's entropy; fp32, in nats.

    logits: this rank's columns, [N, vocabulary / n]; targets: global token ids, [N]; kept: this
    rank's tokens that have a probability at all, as bits, [N, bytes]; returns ([N], [N]).
    """
    return _TokenLogprobs.apply(logits, targets, temperature, kept)


def rows_at_once(n: int, weight: Tensor, copies: int = 1) -> int:
    """Of n rows, how many have their logits computed at a time: chunks of one size.

    weight: this rank's rows of the output layer; copies: of the logits that are there at a time.
    """
    numbers = (LOGITS_AT_ONCE_CUDA if weight.is_cuda else LOGITS_AT_ONCE) // copies
    most = max(1, numbers // weight.size(0))
    chunks = max(1, -(-n // most))
    return max(1, -(-n // chunks))


def chunks_of(
    n: int, weight: Tensor, groups: Sequence[int] | None = None, copies: int = 1
) -> list[list[slice]]:
    """Which of n rows a loss is taken of at once, and of these which have logits at a time.

    groups: of rows that a loss must see together, sizes that sum to n; rows are alone without.
    Whole groups share a chunk; one that is larger than a chunk has several. There is one chunk at
    least, empty without rows: ranks that have rows meet the others in it.
    """
    at_once = rows_at_once(n, weight, copies)
    if groups is None:
        return [[slice(start, min(start + at_once, n))] for start in range(0, max(n, 1), at_once)]
    chunks: list[list[slice]] = []
    start = end = 0
    for size in [*groups, n + at_once]:  # the last closes what is open
        if end > start and end + size - start > at_once:
            parts = range(start, end, at_once)
            chunks.append([slice(a, min(a + at_once, end)) for a in parts])
            start = end
        end += size
    return chunks or [[slice(0, 0)]]


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
        temperature, entropy, kept, holes, groups = options
        grads_of, loss = (
            ProductGradients(ctx, hidden, weight),
            torch.zeros((), device=hidden.device),
        )

        def softmax(rows: slice) -> tuple[Tensor, Tensor, Tensor | None, _SoftmaxState]:
            """The exponentials of some rows' logits, and what `_softmax` says of them."""
            # Logits: [rows, vocabulary / n], without padding, fp32.
            z = linear(hidden[rows], weight)
            z[:, real:] = IMPOSSIBLE
            for first, last in holes:
                z[:, first:last] = IMPOSSIBLE
            z = z.float()
            if temperature != 1:
                z /= temperature
            keep_only(z, None if kept is None else kept[rows])
            return z, *_softmax(z, targets[rows], entropy)

        for parts in chunks_of(targets.size(0), weight, groups):
            chunk = slice(parts[0].start, parts[-1].stop)
            known = softmax(chunk) if len(parts) == 1 else None
            if known is not None:
                _, logprobs, h, _ = known
            else:  # a group that is larger than a chunk: once for the loss, once for the gradient
                of_parts = [softmax(rows)[1:3] for rows in parts]
                logprobs = torch.cat([x for x, _ in of_parts])
                h = torch.cat([x for _, x in of_parts if x is not None]) if entropy else None
            # The caller's loss of these rows, and its gradient for log-probabilities and entropies.
            with torch.enable_grad():
                inputs = [x.requires_grad_() for x in (logprobs, h) if x is not None]
                chunk_loss = loss_of(logprobs, h, chunk)
                grads = torch.autograd.grad(chunk_loss, inputs, allow_unused=True)
            loss += chunk_loss.detach()
            # From there to the logits, and to what they are a product of, while they are there.
            for rows in parts:
                z, _, h, state = known or softmax(rows)
                within = slice(rows.start - chunk.start, rows.stop - chunk.start)
                grad, grad_h = (None if x is None else x[within] for x in (*grads, None)[:2])
                grad = _softmax_gradient(z, grad, grad_h, h, state, ctx.scale / temperature)
                grads_of.add(rows, grad)
        grads_of.save()
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *ProductGradients.scaled(ctx, grad), None, None, None, None


class ProductGradients:
    """The gradients of logits' two factors, hidden states and weight, a chunk of rows at a time.

    They are made in a function's forward and scaled in its backward. ctx.scale: what the caller
    multiplies them by until then.
    """

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor) -> None:
        """ctx: of a function whose first two inputs these are."""
        self.ctx, self.hidden, self.weight = ctx, hidden, weight
        # fp16 would lose what is smaller than 6e-8
        ctx.scale = 1024.0 if weight.dtype == torch.float16 else 1.0
        wants_hidden, self.wants_weight = ctx.needs_input_grad[:2]
        self.of_hidden = torch.empty_like(hidden) if wants_hidden else None
        self.of_weight: Tensor | None = None  # fp32

    def add(self, rows: slice, grad: Tensor) -> None:
        """grad: for the rows' logits, [rows, vocabulary / n]."""
        grad, hidden = grad.to(self.weight.dtype), self.hidden[rows]
        if self.of_hidden is not None:
            torch.mm(grad, self.weight, out=self.of_hidden[rows])
        if not self.wants_weight:
            return
        if self.of_weight is None:
            self.of_weight = torch.mm(grad.t(), hidden).float()
        elif grad.dtype == self.of_weight.dtype:
            self.of_weight.addmm_(grad.t(), hidden)
        else:
            self.of_weight.add_(torch.mm(grad.t(), hidden))

    def save(self) -> None:
        """For backward."""
        self.ctx.save_for_backward(self.of_hidden, self.of_weight)

    @staticmethod
    def scaled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What was saved, times the loss's gradient; in place, once: it is the function's own."""
        factor = grad / ctx.scale
        hidden, weight = (None if x is None else x.mul_(factor) for x in ctx.saved_tensors)
        return hidden, weight


def target_loss(
    hidden: Tensor,
    weight: Tensor,
    real: int,
    targets: Tensor,
    loss_of: LossOf,
    temperature: float = 1.0,
    entropy: bool = False,
    kept: Tensor | None = None,
    holes: Sequence[tuple[int, int]] = (),
    groups: Sequence[int] | None = None,
) -> Tensor:
    """A loss that each row, or each group of neighbouring rows, has for itself, summed.

    It is Σ over chunks of rows of loss_of(log-probabilities, entropies or None, rows). The logits
    live a chunk at a time, and the gradient of the chunk's loss is taken while they are there, so
    that nothing as large as [N, vocabulary] is kept or computed twice. Backward may be called once.
    What the sum is divided by is better divided outside: half-precision gradients keep more digits
    when they are about 1.

    hidden: [N, dim]; weight: this rank's rows of the output layer, [vocabulary / n, dim], `real` of
    them without padding, and of these none in the ranges [start, stop) of `holes`; targets: global
    token ids, [N], or, without entropy, several of each row, [N, k], whose log-probabilities the
    loss then gets; kept: see `token_logprobs`; groups: sizes of the groups, which sum to N. One
    with more rows than a chunk has its logits computed twice.
    """
    options = (temperature, entropy, kept, holes, groups)
    return _TargetLoss.apply(hidden, weight, real, targets, loss_of, options)
