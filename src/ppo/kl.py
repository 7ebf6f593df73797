"""How strongly the policy is held to its reference."""


class KLController:
    """kl_coef, fixed, or steered towards a target (arXiv 1909.08593, section 2.2).

    A steered one moves once per batch, by the batch's mean KL.
    """

    def __init__(
        self, kl_coef: float, target: float | None = None, horizon: float = 10000.0
    ) -> None:
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, mean_kl: float, samples: int) -> None:
        """Move after a batch. mean_kl: nats per response, Σ_t (log π_old − log π_ref) on average.

        samples: responses in the batch.
        """
        if self.target is not None:
            error = min(max(mean_kl / self.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * samples / self.horizon
