"""A mixture of experts: each token is sent to the few likeliest of them.

There is one matrix product per expert over its tokens. Experts are cut inside, like any
feed-forward layer: every rank holds a part of each, and no token changes rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.attention import gather_rows
from src.models.config import ModelConfig
from src.models.quantize import Quantized, dense
from src.parallel.layers import (
    ReplicatedLinear,
    copy_to_model_parallel_region,
    reduce_from_model_parallel_region,
)


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
            torch.mm(rows, dense(weight[e]).t(), out=y)
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


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Every expert's product over its own rows.

    x: [M, in], the experts' rows one after the other; counts: rows of each, [E];
    weight: [E, out, in] → [M, out].
    """
    # what CUDA's grouped product asks for
    aligned = weight.size(1) % 8 == weight.size(2) % 8 == 0
    if x.is_cuda and x.dtype == torch.bfloat16 and aligned and not isinstance(weight, Quantized):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).int())
    return _Grouped.apply(x, weight, counts.tolist())


class GroupedLinear(nn.Module):
    """One linear layer of all experts, column- or row-parallel.

    weight: [experts, out, in], this rank's part of each.
    """

    replicas = None

    def __init__(self, weight: nn.Parameter, row_parallel: bool) -> None:
        super().__init__()
        self.weight, self.row_parallel = weight, row_parallel

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return grouped_linear(x, self.weight, counts)


class Experts(nn.Module):
    """All experts' feed-forward layers, on rows sorted by expert."""

    def __init__(self, shard) -> None:
        super().__init__()
        self.w1 = GroupedLinear(shard["w1.weight"], row_parallel=False)
        self.w2 = GroupedLinear(shard["w2.weight"], row_parallel=True)
        self.w3 = GroupedLinear(shard["w3.weight"], row_parallel=False)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x, counts)) * self.w3(x, counts), counts)


class MixtureOfExperts(nn.Module):
    def __init__(self, config: ModelConfig, shard) -> None:
        super().__init__()
        self.config = config
        self.gate = ReplicatedLinear(shard["gate.weight"])
        self.experts = Experts(shard.part("experts"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, dim] → [N, dim], and how the router decided, [N, 2, experts].

        That is its probabilities and its choices (0 or 1).
        """
        k, n_experts = self.config.experts_per_token, self.config.n_experts
        probabilities = self.gate(x).float().softmax(-1)
        weights, chosen = probabilities.topk(k, sorted=False)  # [N, k] each
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        # Each rank's experts give a part of the output, so the gradient of the weights is a sum
        # over the ranks, like x's.
        weights = copy_to_model_parallel_region(weights.to(x.dtype))
        rows = copy_to_model_parallel_region(x)
        # Each token k times, sorted by expert: [N, dim] → [N · k, dim]; and back.
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=n_experts)
        rows = gather_rows(rows.unsqueeze(1).expand(-1, k, -1).flatten(0, 1), order)
        out = gather_rows(self.experts(rows, counts), order.argsort()).unflatten(0, (-1, k))
        out = reduce_from_model_parallel_region(torch.einsum("tkd,tk->td", out, weights))
        choices = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0)
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
