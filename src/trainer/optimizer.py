"""An optimizer's step, with a gradient norm that is right under tensor parallelism."""

import math
import operator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from src.errors import UserError
from src.models.attention import Packed
from src.models.exchange import placement_of, specs_of
from src.models.places import Placement
from src.models.transformer import Transformer
from src.parallel.gradients import GradientBuckets
from src.parallel.layers import copies_of
from src.parallel.setup import Parallel
from src.parallel.sharding import let_go, let_go_after_backward, own
from src.parallel.shared_memory import all_reduce
from src.settings.run import TrainingRunSettings
from src.settings.training import OptimizerSettings
from src.trainer.adam import MasterAdamW, Places
from src.trainer.averages import PLAIN, Method, bytes_of_form, is_for_muon

GOOD_STEPS_TO_DOUBLE = 1000  # of the fp16 loss scale


def lr_at(step: int, total: int, lr: float, warmup: float, schedule: str) -> float:
    """Learning rate of the step (counted from 0) of `total`.

    Linear warm-up over the share `warmup`, then the schedule: "cosine" and "linear" fall to 0 at
    the end; "constant" stays.
    """
    warm_steps = math.ceil(warmup * total)
    if step < warm_steps:
        return lr * (step + 1) / warm_steps
    progress = (step - warm_steps) / max(1, total - warm_steps)
    return (
        lr
        * {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }[schedule]
    )


def places_of(model: Transformer, parallel: Parallel) -> Places:
    """How what is trained of a model lies on its ranks."""
    placement = placement_of(model, parallel)
    if not placement.sharded:
        placement = Placement(placement.tp)
    specs, weights = specs_of(model), dict(model.named_parameters())
    return Places(parallel, {own(weights[name]): spec for name, spec in specs.items()}, placement)


def has_master(parameter: Tensor, kept: Tensor) -> bool:
    """Whether a weight's fp32 master holds more than the weight, of which it may be a copy."""
    return kept.dtype != parameter.dtype


def sums_of_squares(tensors: list[Tensor], by_rows: bool) -> Tensor:
    """Each tensor's, exact to fp64's rounding of what it adds: [tensors].

    by_rows: rows in fp32, where fp64 is slow (the CPU): as exact as all in fp64, and a tenth of
    its time. A GPU reads numbers no faster than it adds them in fp64, all tensors in few kernels.
    """
    if by_rows:
        tensors = [x if x.dim() == 1 else torch.linalg.vector_norm(x, dim=-1) for x in tensors]
        return torch.stack([row.double().square().sum() for row in tensors])
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square()


def idle_forward(model: Transformer, device: torch.device) -> Tensor:
    """A forward of one token, whatever it is: this rank's part in what others put together."""
    return model(torch.zeros(1, dtype=torch.long, device=device), Packed([1], device))


def most_of(count: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """The largest of the ranks' counts."""
    most = torch.tensor(count, device=device)
    all_reduce(most, group, dist.ReduceOp.MAX)
    return int(most)


class Optimizer:
    """One model's optimizer. Call `backward` for each micro-batch, then `step` once.

    Gradients are fp32 whatever the weights are. With `zero` 1 each data-parallel rank keeps the
    optimizer's state, masters included, of its share of the parameters (ZeRO stage 1, arXiv
    1910.02054), by PyTorch's ZeroRedundancyOptimizer. Of a model whose weights are shared (stages 2
    and 3) each keeps that of its rows.
    """

    def __init__(
        self,
        model: Transformer,
        parallel: Parallel,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        zero: int = 1,
        method: Method = PLAIN,
    ) -> None:
        self.method = method
        self.parallel, self.max_grad_norm = parallel, max_grad_norm
        self.model, self.shares_weights = model, model.shard_stage >= 2
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.shares_weights:
            for parameter in self.parameters:
                parameter.grad_dtype = torch.float32
        # Ranks that hold the same values of each.
        self.copies = torch.tensor([copies_of(p) for p in self.parameters], device=parallel.device)
        # Where weights are between steps: shared ones may be in host memory.
        rests_on = own(self.parameters[0]).device if self.parameters else parallel.device
        self.works_on = torch.device("cpu") if method.on_cpu else rests_on
        # Whether masters and averages are in host memory between steps.
        self.rests_in_host = method.offload or rests_on.type != parallel.device.type
        self.buckets = None  # with shared weights, FSDP sums the gradients
        if parallel.dp_size > 1 and not self.shares_weights:
            self.buckets = GradientBuckets(self.parameters, parallel)
        # Weights that meet a part of the tokens only on each of the model's ranks.
        self.partial = [p for p in model.partial_gradients() if p.requires_grad]
        # Weight decay is for matrices: a norm's weights are no slopes.
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() == 1]
        adam = "adamw" if method.kind == "muon" else method.kind
        of_muon: set[Tensor] = set()
        if method.kind == "muon":
            named = model.named_parameters()
            of_muon = {p for name, p in named if p.requires_grad and is_for_muon(name, p.dim())}
        groups: list[dict[str, Any]] = [
            {"params": [own(p) for p in parameters], "weight_decay": decay, "kind": kind}
            for parameters, decay, kind in (
                ([p for p in matrices if p in of_muon], weight_decay, "muon"),
                ([p for p in matrices if p not in of_muon], weight_decay, adam),
                (vectors, 0.0, adam),
            )
            if parameters
        ] or [{"params": [], "kind": adam}]  # a rank may have nothing to train
        make: Any = MasterAdamW
        if method != PLAIN:
            make = partial(MasterAdamW, method=method, places=places_of(model, parallel))
        self.adam: torch.optim.Optimizer
        self.local: MasterAdamW  # of the parameters whose state this rank keeps
        if zero and parallel.dp_size > 1 and not self.shares_weights:
            # it takes a while to import
            from torch.distributed.optim import ZeroRedundancyOptimizer

            self.adam = ZeroRedundancyOptimizer(
                groups, make, process_group=parallel.dp_group, betas=betas, eps=eps, lr=0.0
            )
            self.local = self.adam.optim
        else:
            self.adam = self.local = make(groups, betas=betas, eps=eps)
        # fp16 gradients under 6e-8 vanish: the loss is scaled up, and the gradients down again.
        self.fp16 = bool(self.parameters) and model.dtype == torch.float16
        self.loss_scale = 2.0**16 if self.fp16 else 1.0
        self.good_steps = self.skipped_in_a_row = 0

    @classmethod
    def of(
        cls,
        settings: OptimizerSettings,
        model: Transformer,
        parallel: Parallel,
        run: TrainingRunSettings,
        eps: float = 1e-8,
    ) -> "Optimizer":
        """By a script's settings."""
        decay, norm = settings.weight_decay, settings.max_grad_norm
        betas = settings.beta1, settings.beta2
        method = Method.of(settings, run)
        return cls(model, parallel, decay, norm, betas, eps, run.zero, method)

    def backward(self, loss: Tensor, last: bool = False) -> None:
        """Add one micro-batch's gradient; with `last` ranks begin to sum while it is computed."""
        if last and self.buckets:
            self.buckets.arm()
        if self.shares_weights:
            let_go_after_backward(self.model, last or self.model.shard_stage == 3)
        (loss * self.loss_scale).backward()

    def idle_backward(self, last: bool = False) -> None:
        """A micro-batch of nothing, whose gradients are zeros.

        Ranks that share weights put them together in each, so that all must have as many.
        """
        self.backward(self.idle_loss(idle_forward(self.model, self.parallel.device)), last)

    def idle_loss(self, hidden: Tensor) -> Tensor:
        """0, which everything has gone into that losses use, so that all gets a gradient."""
        loss = hidden.float().sum() * 0.0
        ends = {"lm": "vocabulary_weight", "score": "score.weight"}
        if head := ends.get(self.model.config.head):
            loss = loss + operator.attrgetter(head)(self.model)[:1].float().sum() * 0.0
        return loss

    def backward_done(self) -> None:
        """To be called before any other exchange of the data-parallel ranks in a step.

        A rank that had no micro-batch begins its sums only now, and all ranks must exchange in one
        order.
        """
        if self.buckets:
            self.buckets.start_rest()

    @property
    def sharded(self) -> bool:
        """Whether each data-parallel rank keeps a part of the state only."""
        return self.adam is not self.local or self.shares_weights

    def kept(self) -> list[tuple[Tensor, Tensor]]:
        """(what this rank keeps of a weight, its fp32 master or itself), where it has the state."""
        return [(self.local.parameter_of[kept], kept) for kept, _ in self.local.forms()]

    def state_tensors(self) -> list[Tensor]:
        """What this rank keeps from step to step: Adam's averages, and half precision's masters."""
        averages = [
            x
            for state in self.local.state.values()
            for x in state.values()
            if isinstance(x, Tensor)
        ]
        return averages + [master for _, master in self.local.rounded]

    def state_bytes(self) -> int:
        """What this rank saves of it: the same but for the counters; also before the first step."""
        averages = sum(bytes_of_form(form) for _, form in self.local.forms())
        return averages + sum(kept.nbytes for p, kept in self.kept() if has_master(p, kept))

    @torch.no_grad()
    def step(self, lr: float) -> dict[str, float]:
        """One update with the summed gradients of all ranks.

        Returns the gradient norm before clipping, and `skipped`: a norm that is not finite skips
        the step, on every rank alike, since every rank computes the same norm.
        """
        if self.buckets:
            self.buckets.finish()
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
            if self.shares_weights:
                own(parameter).grad = own(parameter.grad)
        self._sum_partial()
        self._sum_ends()
        norm = float(self._grad_norm()) / self.loss_scale
        skipped = not math.isfinite(norm)
        if not skipped:
            factor = min(1.0, self.max_grad_norm / (norm + 1e-6)) / self.loss_scale
            # The fused step divides the gradients by this, so that clipping takes no pass of its
            # own.
            self.local.grad_scale = (
                None if factor == 1.0 else torch.tensor(1 / factor, device=self.works_on)
            )
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self._rescale(skipped)
        for parameter in self.parameters:
            parameter.grad = own(parameter).grad = None
        if self.shares_weights:
            let_go(self.model)
        return {"grad_norm": norm, "skipped": float(skipped)}

    def _sum_partial(self) -> None:
        """What ranks of a model have parts of becomes the same on all, in one exchange."""
        if not self.partial:
            return
        gradients = [own(p.grad) for p in self.partial if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in gradients]).to(self.parallel.device)
        all_reduce(flat, self.parallel.mp_group)
        for grad, whole in zip(gradients, flat.split([grad.numel() for grad in gradients])):
            grad.copy_(whole.view_as(grad))

    def _sum_ends(self) -> None:
        """A tied embedding on the first and on the last stage stays one weight."""
        part = self.model.part
        at_both = self.model.config.tie_word_embeddings and part.first != part.last
        if not at_both or self.parallel.ends_group is None:
            return
        grad = self.model.vocabulary_weight.grad
        if grad is not None:
            all_reduce(grad, self.parallel.ends_group)

    def check_skipped(self, limit: int, batch: str) -> None:
        """Raise UserError, on every rank alike, when so many steps in a row were skipped.

        batch: what the last one was on.
        """
        if self.skipped_in_a_row >= limit:
            raise UserError(
                f"the gradient norm was not finite in {limit} steps in a row "
                f"(--max_skipped_steps), the last on {batch}: the run is stopped; a lower --lr or "
                "--dtype fp32 may help, or these rows hold something odd"
            )

    def _grad_norm(self) -> Tensor:
        """√ of the sum of squares over all ranks of the model, the same on every rank.

        What several ranks hold alike is counted once.
        """
        gradients = [own(p.grad) for p in self.parameters if p.grad is not None]
        total = torch.zeros((), dtype=torch.float64, device=self.parallel.device)
        if gradients:  # a stage may train nothing
            squares = sums_of_squares(gradients, by_rows=gradients[0].device.type == "cpu")
            total += (squares.to(self.parallel.device) / self.copies).sum()
        all_reduce(total, self.parallel.model_group)
        if self.shares_weights:
            all_reduce(total, self.parallel.dp_group)
        return total.sqrt()

    def _rescale(self, skipped: bool) -> None:
        """fp16: halve the loss scale when gradients overflow, double it after long without."""
        if not self.fp16:
            return
        self.good_steps = 0 if skipped else self.good_steps + 1
        if skipped:
            self.loss_scale /= 2
        elif self.good_steps == GOOD_STEPS_TO_DOUBLE:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0
