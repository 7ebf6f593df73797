"""AdamW on fp32 master weights, with a gradient norm that is right under tensor parallelism."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from src.errors import UserError
from src.models.transformer import Transformer
from src.parallel.setup import Parallel

GOOD_STEPS_TO_DOUBLE = 1000  # of the fp16 loss scale
MAX_SKIPPED = 30  # steps in a row; a loss scale of 2^16 has come down to nothing by then


def lr_at(step: int, total: int, lr: float, warmup: float, schedule: str) -> float:
    """Learning rate of the step (counted from 0) of `total`: linear warm-up over the share `warmup`, then the schedule.

    "cosine" and "linear" fall to 0 at the end; "constant" stays.
    """
    warm_steps = math.ceil(warmup * total)
    if step < warm_steps:
        return lr * (step + 1) / warm_steps
    progress = (step - warm_steps) / max(1, total - warm_steps)
    return lr * {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[schedule]


class Optimizer:
    """One model's optimizer. Call `backward` for each micro-batch, then `step` once."""

    def __init__(
        self,
        model: Transformer,
        parallel: Parallel,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parallel, self.max_grad_norm = parallel, max_grad_norm
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        self.copies = [p.copies for p in self.parameters]  # ranks that hold the same values
        decayed = [m for m in self.masters if m.dim() > 1]
        plain = [m for m in self.masters if m.dim() == 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=eps, fused=True)
        fp16 = any(p.dtype == torch.float16 for p in self.parameters)
        self.fp16, self.loss_scale, self.good_steps, self.skipped_in_a_row = fp16, (2.0**16 if fp16 else 1.0), 0, 0

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's loss, in fp32."""
        (loss * self.loss_scale).backward()
        for parameter, master in zip(self.parameters, self.masters):
            if master is not parameter and parameter.grad is not None:
                grad = parameter.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> dict[str, float]:
        """One update with the summed gradients of all ranks; returns the gradient norm before clipping, and `skipped`.

        A norm that is not finite skips the step, on every rank alike, since every rank computes the same norm.
        """
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        if self.parallel.dp_size > 1:
            handles = [dist.all_reduce(m.grad, group=self.parallel.dp_group, async_op=True) for m in self.masters]
            for handle in handles:
                handle.wait()
        norm = float(self._grad_norm()) / self.loss_scale
        skipped = not math.isfinite(norm)
        if not skipped:
            factor = min(1.0, self.max_grad_norm / (norm + 1e-6)) / self.loss_scale
            if factor != 1.0:
                torch._foreach_mul_([m.grad for m in self.masters], factor)
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
            for parameter, master in zip(self.parameters, self.masters):
                if master is not parameter:
                    parameter.copy_(master)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise UserError(
                f"the gradient norm was not finite ({norm}) in {MAX_SKIPPED} steps in a row: the run is stopped, nothing is "
                "saved; a lower --lr or --dtype fp32 may help"
            )
        self._rescale(skipped)
        for master in self.masters:
            master.grad = None
        return {"grad_norm": norm, "skipped": float(skipped)}

    def _grad_norm(self) -> Tensor:
        """√ of the sum of squares over all ranks of the model, copies counted once; the same on every rank."""
        squares = torch.stack([m.grad.double().square().sum() for m in self.masters])
        total = (squares / torch.tensor(self.copies, device=squares.device)).sum()
        dist.all_reduce(total, group=self.parallel.mp_group)
        return total.sqrt()

    def _rescale(self, skipped: bool) -> None:
        """fp16: halve the loss scale when gradients overflow, double it after a long run without."""
        if not self.fp16:
            return
        self.good_steps = 0 if skipped else self.good_steps + 1
        if skipped:
            self.loss_scale /= 2
        elif self.good_steps == GOOD_STEPS_TO_DOUBLE:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0
