"""Plain training on rows or texts beside the policy's steps (arXiv 2203.02155, equation 2)."""

import torch
from torch import Tensor

from src.data.kept import Sequences
from src.data.mixture import Mixture
from src.data.stream import Stream
from src.ppo.roles import Role
from src.settings.ppo import PPOSettings
from src.trainer.batches import EndlessBatches, EndlessRows, shares_of, turns_of
from src.trainer.pretraining import PretrainingObjective
from src.trainer.solver import SolverObjective


class PretrainingMix:
    """Gives each of the policy's steps the gradient of some more rows."""

    def __init__(
        self,
        rows: Sequences | Stream,
        batch_size: int,
        settings: PPOSettings,
        device: torch.device,
        mixture: Mixture | None = None,
    ) -> None:
        """batch_size: rows per optimizer step, over all ranks; mixture: of supervised rows."""
        self.settings = settings
        self.objective: SolverObjective
        self.batches: EndlessBatches
        if isinstance(rows, Stream):
            self.objective = PretrainingObjective(rows, device)
            self.batches = EndlessRows(batch_size)
        else:
            self.objective = SolverObjective(rows, device)
            seed = f"{settings.run.seed}/ptx"
            self.batches = EndlessBatches(mixture or len(rows), batch_size, seed)

    def backward(self, role: Role) -> dict[str, Tensor]:
        """Add the gradient of ptx_coef × the mean −log p of the next rows' output tokens.

        Returns this rank's part of the loss.
        """
        assert role.optimizer is not None
        objective, batch, limits = self.objective, next(self.batches), self.settings.batches
        objective.begin(self.batches.taken - 1, batch, role.model)
        batch = [i for i in batch if objective.weights[i]]
        tokens = sum(objective.weights[i] for i in batch)
        total = torch.zeros((), device=objective.device)
        division, most = role.parallel, (limits.max_batch_size, limits.max_tokens_per_batch)
        shares = shares_of(batch, objective.lengths, division.layout.models, *most)

        def loss_of(rows: list[int]) -> Tensor:
            loss, _ = objective.loss(role.model, rows, tokens)
            total.add_(loss.detach())
            return self.settings.pretraining.ptx_coef * loss

        turns = turns_of(shares, division.dp_rank, role.optimizer.shares_weights)
        turns = turns if division.is_member else []
        role.passes.train(turns, objective.batch, loss_of, last=False)
        return {"ptx_loss": total}
