"""A mixture of experts: each token is sent to the few likeliest of them.

There is one matrix product per expert over its tokens. Experts are cut inside, like any
feed-forward layer: every rank holds a part of each, and no token changes rank.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.config import ModelConfig
from src.models.quantize import Quantized, dense
from src.parallel import deterministic
from src.parallel.layers import ReplicatedLinear
from src.parallel.mappings import WHOLE, Region, copy_to_model_parallel_region

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Grouped(torch.autograd.Function):
    """x[rows of e] W[e]ᵀ for every expert e.

    By hand: indexing W in autograd would fill a zero W per expert in backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(x.size(0), weight.size(1))
        for e, (rows, y) in enumerate(zip(x.split(counts), out.split(counts))):
            if len(rows):  # it need not be dequantised for nothing
                y.copy_(deterministic.linear(rows, weight[e]))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_w = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for e, (g, rows) in enumerate(zip(grad.split(ctx.counts), x.split(ctx.counts))):
            start = sum(ctx.counts[:e])
            if grad_x is not None:
                torch.mm(g, dense(weight[e]), out=grad_x[start : start + len(rows)])
            if grad_w is not None:
                torch.mm(g.t(), rows, out=grad_w[e])
        return grad_x, grad_w, None


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Every expert's product over its own rows.

    x: [M, in], the experts' rows one after the other; ends: where each one's end, [E], int32;
    weight: [E, out, in] → [M, out].
    """
    # PyTorch's takes plain weights whose rows and columns are multiples of 16 bytes. What it gives
    # a row may depend on the others.
    together = 16 // x.element_size()
    aligned = weight.size(1) % together == weight.size(2) % together == 0
    takes = x.dtype in _GROUPED_DTYPES and aligned and not isinstance(weight, Quantized)
    if takes and not deterministic.is_on():
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    counts = [stop - start for start, stop in pairwise([0, *ends.tolist()])]
    return _Grouped.apply(x, weight, counts)


class GroupedLinear(nn.Module):
    """One linear layer of all experts, column- or row-parallel.

    weight: [experts, out, in], this rank's part of each.
    """

    replicas = None

    def __init__(self, weight: nn.Parameter, row_parallel: bool) -> None:
        super().__init__()
        self.weight, self.row_parallel = weight, row_parallel

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_linear(x, self.weight, ends)


class Experts(nn.Module):
    """All experts' feed-forward layers, on rows sorted by expert, which end at `ends`."""

    def __init__(self, shard) -> None:
        super().__init__()
        self.w1 = GroupedLinear(shard["w1.weight"], row_parallel=False)
        self.w2 = GroupedLinear(shard["w2.weight"], row_parallel=True)
        self.w3 = GroupedLinear(shard["w3.weight"], row_parallel=False)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x, ends)) * self.w3(x, ends), ends)


class _Reordered(torch.autograd.Function):
    """x[index], which has every row k times; `places`: where each row's k copies are, [rows · k].

    Its gradient gathers the copies and sums them: no accumulation in an order of chance.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.copies = len(index) // len(x) if len(x) else 1
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.index_select(0, ctx.saved_tensors[0])
        if ctx.copies > 1:
            grad = grad.unflatten(0, (-1, ctx.copies)).sum(1)
        return grad, None, None


class MixtureOfExperts(nn.Module):
    def __init__(self, config: ModelConfig, shard) -> None:
        super().__init__()
        self.config = config
        self.gate = ReplicatedLinear(shard["gate.weight"])
        self.experts = Experts(shard.part("experts"))

    def forward(self, x: Tensor, region: Region = WHOLE) -> tuple[Tensor, Tensor]:
        """[N, dim] → [N, dim], and how the router decided, [N, 2, experts].

        That is its probabilities and its choices (0 or 1), of all tokens, wherever x has them.
        """
        k = self.config.experts_per_token
        probabilities = region.whole(self.gate(x)).float().softmax(-1)
        weights, chosen = probabilities.topk(k, sorted=False)  # [N, k] each
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        # Each rank's experts give a part of the output, so the gradient of the weights is a sum
        # over the ranks, like x's.
        weights = copy_to_model_parallel_region(weights.to(x.dtype))
        rows = region.enter(x)
        # Each token k times, sorted by expert: [N, dim] → [N · k, dim]; and back.
        order = chosen.flatten().argsort(stable=True)
        places = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        choices = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0)
        # counted so that nothing waits for the host, as `bincount` would
        ends = choices.sum(0, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        out = self.experts(_Reordered.apply(rows, order // k, places), ends)
        out = _Reordered.apply(out, places, order).unflatten(0, (-1, k))
        out = region.leave(torch.einsum("tkd,tk->td", out, weights))
        return out, torch.stack((probabilities, choices), 1)


def balance_loss(router: list[Tensor]) -> Tensor:
    """The load-balancing loss of each sequence, [sequences].

    arXiv 2101.03961, equation 4, over all layers together, as transformers has it:
    experts · Σ_e (share of choices)_e (mean probability)_e, summed over the choices of a token.

    router: per layer, the mean over each sequence's tokens of `MixtureOfExperts`' second result,
    [sequences, 2, experts].
    """
    probabilities, choices = torch.stack(router).mean(0).unbind(1)
    return probabilities.size(-1) * (probabilities * choices).sum(-1)
