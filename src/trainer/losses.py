"""What preference learning minimises: pure functions of log-probabilities, [P] or [S], in nats.

P pairs of a better ("chosen") and a worse ("rejected") response to one prompt, or S responses. A
name in `PAIR_LOSSES` or `RESPONSE_LOSSES` is a value of --loss. The caller averages.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# --- Of pairs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sides:
    """The log-probabilities of P pairs' responses, [P] each.

    chosen, rejected: Σ_t log π(y_t | x, y_<t); ref_chosen, ref_rejected: the reference's, 0 where a
    loss has none; chosen_tokens, rejected_tokens: how many tokens each has.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """log π(y) / π_ref(y) of both sides."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """The difference of these: the implicit reward's margin over β."""
        chosen, rejected = self.ratios
        return chosen - rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The mean log-probability of each side's tokens."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


@dataclass(frozen=True)
class Knobs:
    """The losses' constants, by TRL's names.

    label_smoothing: the share of pairs that are labelled the wrong way round; gamma_beta_ratio:
    SimPO's margin γ over its β; the weights are KTO's λ_D and λ_U.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma_beta_ratio: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def dpo(sides: Sides, knobs: Knobs) -> Tensor:
    """−log σ(β · margin) (DPO, arXiv 2305.18290, equation 7)."""
    return -F.logsigmoid(knobs.beta * sides.margin)


def ipo(sides: Sides, knobs: Knobs) -> Tensor:
    """(h − 1 / 2τ)² with τ = β (IPO, arXiv 2310.12036, equation 17).

    h is the margin of the log-ratios per token, as TRL has it from the authors: with the paper's
    sums the loss would grow with the length.
    """
    chosen, rejected = sides.ratios
    margin = chosen / sides.chosen_tokens - rejected / sides.rejected_tokens
    return (margin - 1 / (2 * knobs.beta)).square()


def cdpo(sides: Sides, knobs: Knobs) -> Tensor:
    """(1 − ε) · dpo + ε · dpo of the pair turned round: conservative DPO.

    (Mitchell, "A note on DPO with noisy preferences & relationship to IPO", 2023.)
    """
    x, noise = knobs.beta * sides.margin, knobs.label_smoothing
    return -(1 - noise) * F.logsigmoid(x) - noise * F.logsigmoid(-x)


def robust(sides: Sides, knobs: Knobs) -> Tensor:
    """DPO's loss without the bias of labels that are flipped with probability ε.

    (rDPO, arXiv 2403.00409.) ((1 − ε) · dpo − ε · dpo of the pair turned round) / (1 − 2ε).
    """
    x, noise = knobs.beta * sides.margin, knobs.label_smoothing
    return (noise * F.logsigmoid(-x) - (1 - noise) * F.logsigmoid(x)) / (1 - 2 * noise)


def sppo(sides: Sides, knobs: Knobs) -> Tensor:
    """(r_w − 1 / 2η)² + (r_l + 1 / 2η)², r the log-ratio and η = β.

    (SPPO, arXiv 2405.00675, equation 4.7, with hard probabilities: 1 for the better, 0 for the
    worse.)
    """
    chosen, rejected = sides.ratios
    half = 1 / (2 * knobs.beta)
    return (chosen - half).square() + (rejected + half).square()


def hinge(sides: Sides, knobs: Knobs) -> Tensor:
    """max(0, 1 − β · margin) (RSO's hinge-norm loss, arXiv 2309.06657)."""
    return F.relu(1 - knobs.beta * sides.margin)


def apo_zero(sides: Sides, knobs: Knobs) -> Tensor:
    """1 − σ(β r_w) + σ(β r_l), where the better is better than the model's own outputs.

    (APO, arXiv 2408.06266, equation 7.)
    """
    chosen, rejected = (knobs.beta * ratio for ratio in sides.ratios)
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def apo_down(sides: Sides, knobs: Knobs) -> Tensor:
    """σ(β r_w) + 1 − σ(β · margin), where both are worse than the model's own outputs.

    (APO, arXiv 2408.06266, equation 8.)
    """
    return (knobs.beta * sides.ratios[0]).sigmoid() + 1 - (knobs.beta * sides.margin).sigmoid()


def orpo(sides: Sides, knobs: Knobs) -> Tensor:
    """−log p_w − λ log σ(log odds_w − log odds_l), λ = β.

    (ORPO, arXiv 2403.07691, equations 4 to 7.) log p is the mean over a response's tokens, odds =
    p / (1 − p).
    """
    chosen, rejected = sides.means
    log_odds = [x - log1mexp(x) for x in (chosen, rejected)]
    return -chosen - knobs.beta * F.logsigmoid(log_odds[0] - log_odds[1])


def simpo(sides: Sides, knobs: Knobs) -> Tensor:
    """−log σ(β (m_w − m_l) − γ), m the mean log-probability of a token.

    (SimPO, arXiv 2405.14734, equation 6.)
    """
    chosen, rejected = sides.means
    return -F.logsigmoid(knobs.beta * (chosen - rejected - knobs.gamma_beta_ratio))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, exact at both ends. At 0 it is that of the number next to it.

    (Mächler, "Accurately computing log(1 − exp(−|a|))", 2012.)
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near_zero = x > -0.6931471805599453
    # Both branches stay finite where the other is taken: a gradient of 0 · ∞ would be no number.
    small = torch.where(near_zero, x, -0.5)
    large = torch.where(near_zero, -1.0, x)
    return torch.where(near_zero, (-small.expm1()).log(), (-large.exp()).log1p())


# --- Of single responses --------------------------------------------------------------------------


def kto(ratios: Tensor, labels: Tensor, kl: Tensor, knobs: Knobs) -> Tensor:
    """λ_D (1 − σ(β (r − z))) for a good response, λ_U (1 − σ(β (z − r))) for a bad one, [S].

    (KTO, arXiv 2402.01306, equation 7, less a constant.) ratios: r = log π(y) / π_ref(y), [S];
    labels: whether each is good, [S]; kl: z, the reference point, a number without gradient that is
    not negative.
    """
    signs = torch.where(labels, 1.0, -1.0).to(ratios)
    weights = torch.where(labels, knobs.desirable_weight, knobs.undesirable_weight).to(ratios)
    return weights * (1 - (knobs.beta * signs * (ratios - kl)).sigmoid())


# --- By name --------------------------------------------------------------------------------------

PairLoss = Callable[[Sides, Knobs], Tensor]
PAIR_LOSSES: dict[str, PairLoss] = {
    f.__name__: f for f in (dpo, ipo, cdpo, robust, sppo, hinge, orpo, simpo, apo_zero, apo_down)
}
RESPONSE_LOSSES = {"kto": kto}
SFT = "sft"  # −log p of the good responses' tokens, their mean: beside another
