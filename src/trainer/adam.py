"""AdamW on fp32 masters, and its variants: averages of 8 bits, Muon, state in host memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.models.layout import TensorSpec
from src.models.places import Placement
from src.parallel.host import Ferry, HostBuffer, host_tensors
from src.parallel.setup import Parallel
from src.trainer.averages import (
    ABSMAX,
    BLOCK,
    MOMENTUM,
    NUMBERS_AT_ONCE,
    PLAIN,
    STEP,
    Form,
    Method,
    form_of,
    read,
    write,
)
from src.trainer.muon import DECAY, matrices_of, orthogonalize

NUMBERS_AT_ONCE_CPU = 2**18  # which stay in its caches
WEIGHT, GRADIENT = "weight", "gradient"


@dataclass(frozen=True)
class Places:
    """How parameters lie on the ranks: specs by parameter, and the placement of all of them."""

    parallel: Parallel
    specs: dict[Tensor, TensorSpec]
    placement: Placement  # among the ranks of one model, or, where rows are shared, among all


@dataclass(frozen=True)
class Piece:
    """Some numbers, [first, last) of the flattened tensors, of a parameter."""

    parameter: Tensor
    kept: Tensor
    state: dict[str, Tensor]
    first: int
    last: int

    def of(self, name: str) -> Tensor:
        """Its numbers of the weight, the gradient, or the state's tensor of that name."""
        if name == GRADIENT:
            assert self.parameter.grad is not None
            return self.parameter.grad.view(-1)[self.first : self.last]
        if name.endswith(ABSMAX):
            return self.state[name][self.first // BLOCK : -(-self.last // BLOCK)]
        x = self.kept if name == WEIGHT else self.state[name]
        return x.view(-1)[self.first : self.last]


# What is done to pieces of one group: (group, their tensors by name, the counter of steps).
Rule = Callable[[dict[str, Any], list[dict[str, Tensor]], Tensor], None]


class MasterAdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW on fp32 masters of half-precision parameters.

    The masters are updated and then rounded. With a `method` other than the default the state is
    worked on in parts, each on the device or, with `on_cpu`, in host memory.
    """

    def __init__(
        self,
        params: list[dict],
        method: Method = PLAIN,
        places: Places | None = None,
        **options,
    ) -> None:
        """places: not needed by the default method."""
        self.method, self._places = method, places
        self.memory: list[HostBuffer] = []  # of what rests in host memory
        groups = [
            {**group, "params": [self._master(p) for p in group["params"]]} for group in params
        ]
        # The fused step divides the gradients by this.
        self.grad_scale: Tensor | None = None
        super().__init__(groups, fused=True, **options)
        parameters = [p for group in params for p in group["params"]]
        masters = [m for group in groups for m in group["params"]]
        self.rounded = [(p, m) for p, m in zip(parameters, masters) if m is not p]
        self.parameter_of = dict(zip(masters, parameters))
        self.ferry = Ferry(places.parallel.device) if places is not None else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nothing returned
        if self.method != PLAIN:
            self._step_in_parts()
            return
        for parameter, master in self.rounded:
            master.grad = parameter.grad
        super().step(closure)
        if self.rounded:
            parameters, masters = map(list, zip(*self.rounded))
            torch._foreach_copy_(parameters, masters)  # few kernels for all of them
            for master in masters:
                master.grad = None

    @property
    def places(self) -> Places:
        assert self._places is not None, "methods other than the default need places"
        return self._places

    # --- what is kept -----------------------------------------------------------------------

    def _master(self, parameter: Tensor) -> Tensor:
        """The parameter itself, where it is in fp32 and updated where it is."""
        if parameter.dtype == torch.float32 and not self.method.on_cpu:
            return parameter
        if not self.method.offload:
            return parameter.detach().float()
        tensors = self._in_host_memory({WEIGHT: (tuple(parameter.shape), torch.float32)})
        return tensors[WEIGHT].copy_(parameter.detach())

    def _in_host_memory(self, form: Form) -> dict[str, Tensor]:
        tensors, memory = host_tensors(form, self.places.parallel.device)
        self.memory.append(memory)
        return tensors

    def form(self, group: dict[str, Any], kept: Tensor) -> Form:
        """What is kept of a weight beside its master, without the counter of steps."""
        whole = 0
        if self._places is not None:
            whole = torch.Size(self.places.specs[self.parameter_of[kept]].shape).numel()
        return form_of(group.get("kind", "adamw"), tuple(kept.shape), whole)

    def forms(self) -> Iterator[tuple[Tensor, Form]]:
        """(kept, what is kept beside it) of each weight whose state this rank keeps."""
        for group in self.param_groups:
            yield from ((kept, self.form(group, kept)) for kept in group["params"])

    def begin(self, kept: Tensor, form: Form) -> dict[str, Tensor]:
        """The state of a weight before the first step, where it rests."""
        if self.method.offload:
            tensors = self._in_host_memory(form)
            return {STEP: torch.zeros((), dtype=torch.float32), **tensors}
        device = kept.device
        state = {STEP: torch.zeros((), dtype=torch.float32, device=device)}
        for name, (shape, dtype) in form.items():
            state[name] = torch.zeros(shape, dtype=dtype, device=device)
        return state

    # --- a step in parts --------------------------------------------------------------------

    def _step_in_parts(self) -> None:
        for kept, form in self.forms():
            if kept not in self.state:
                self.state[kept] = self.begin(kept, form)
            parameter = self.parameter_of[kept]
            assert parameter.grad is not None
            parameter.grad = parameter.grad.contiguous()
        steps = [state[STEP] for state in self.state.values()]
        if steps:
            torch._foreach_add_(steps, 1)
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._muon(group)
            else:
                self._pass(group, None, self._adamw)

    def _adamw(self, group: dict, pieces: list[dict[str, Tensor]], step: Tensor) -> None:
        means, squares = map(list, zip(*map(read, pieces)))
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            [piece[WEIGHT] for piece in pieces],
            [piece[GRADIENT] for piece in pieces],
            means,
            squares,
            [],
            [step] * len(pieces),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=self.grad_scale,
        )
        for piece, mean, square in zip(pieces, means, squares):
            write(piece, mean, square)

    def _muon(self, group: dict) -> None:
        """The update takes the gradient's place, then the change, and then it is added."""
        self._pass(group, [MOMENTUM, GRADIENT], self._with_momentum)
        places, matrices = self.places, []
        shared = places.placement.sharded
        rank = places.parallel.rank if shared else places.parallel.mp_rank
        for kept in group["params"]:
            parameter = self.parameter_of[kept]
            spec = places.specs[parameter]
            matrices += matrices_of(parameter.grad, spec, places.placement, rank)
        orthogonalize(matrices, group["lr"], places.parallel, shared)
        self._pass(group, [WEIGHT, GRADIENT], self._add)

    def _with_momentum(self, group: dict, pieces: list[dict[str, Tensor]], step: Tensor) -> None:
        for piece in pieces:
            update, momentum = piece[GRADIENT], piece[MOMENTUM]
            if self.grad_scale is not None:
                update.div_(self.grad_scale)
            momentum.lerp_(update, 1 - DECAY)
            update.lerp_(momentum, DECAY)  # Nesterov's

    def _add(self, group: dict, pieces: list[dict[str, Tensor]], step: Tensor) -> None:
        for piece in pieces:
            piece[WEIGHT].mul_(1 - group["lr"] * group["weight_decay"]).add_(piece[GRADIENT])

    def _pass(self, group: dict, names: list[str] | None, rule: Rule) -> None:
        """Apply a rule to all pieces of a group's parameters, a part of them at a time.

        names: of what it needs; everything when not given. What rests elsewhere comes and goes
        beside the work on the part before.
        """
        parts, ferry, method = list(self._parts(group)), self.ferry, self.method
        if not parts:
            return
        assert ferry is not None
        works_on = torch.device("cpu") if method.on_cpu else parts[0][0].parameter.device

        def moved(piece: Piece) -> list[str]:
            if method.on_cpu:
                return [GRADIENT]
            if not method.offload:
                return []
            own = [WEIGHT] if piece.kept is not piece.parameter else []
            return [name for name in (*own, *_kinds(piece)) if names is None or name in names]

        def bring(part: list[Piece]):
            return ferry.bring([piece.of(x) for piece in part for x in moved(piece)], works_on)

        copies, event = bring(parts[0])
        for number, part in enumerate(parts):
            ferry.arrived(event, works_on)
            arrived = iter(copies)
            if number + 1 < len(parts):
                copies, event = bring(parts[number + 1])
            here = []
            for piece in part:
                elsewhere = {name: next(arrived) for name in moved(piece)}
                wanted = names or [WEIGHT, GRADIENT, *_kinds(piece)]
                here.append({x: elsewhere[x] if x in elsewhere else piece.of(x) for x in wanted})
            rule(group, here, part[0].state[STEP].to(works_on))
            back: list[tuple[Tensor, Tensor]] = []
            for piece, tensors in zip(part, here):
                changed = [x for x in moved(piece) if x != GRADIENT]
                back += [(piece.of(name), tensors[name]) for name in changed]
                if WEIGHT in tensors and piece.kept is not piece.parameter:
                    rounded = piece.parameter.view(-1)[piece.first : piece.last]
                    back.append((rounded, tensors[WEIGHT]))
            ferry.send(back)
        ferry.finish()

    def _parts(self, group: dict) -> Iterator[list[Piece]]:
        """Pieces of a group's parameters, about so many numbers together; cut between blocks."""
        on_gpu = self.places.parallel.device.type == "cuda"
        most = NUMBERS_AT_ONCE if on_gpu else NUMBERS_AT_ONCE_CPU
        part: list[Piece] = []
        for kept in group["params"]:
            parameter, state = self.parameter_of[kept], self.state[kept]
            for first in range(0, kept.numel(), most):
                last = min(first + most, kept.numel())
                if part and sum(x.last - x.first for x in part) + last - first > most:
                    yield part
                    part = []
                part.append(Piece(parameter, kept, state, first, last))
        if part:
            yield part


def _kinds(piece: Piece) -> list[str]:
    return [name for name in piece.state if name != STEP]
