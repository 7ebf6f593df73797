"""PPO's four roles, where they are computed, and where their tensors lie."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from src.models.exchange import parts_in
from src.models.quantize import plain_parts
from src.models.transformer import Transformer
from src.parallel.host import Offload, Storages, storages_of
from src.parallel.setup import Parallel
from src.parallel.sharding import let_go, own
from src.trainer.optimizer import Optimizer
from src.trainer.passes import Passes, passes_of

AtWork = tuple[tuple[str, ...], bool]  # names of roles, and whether they are trained


@dataclass(frozen=True)
class Role:
    """A model: "policy", "value", "reference" or "reward"; its ranks; and, if trained, by what.

    parallel: its own division of the run's ranks, or of some of them. beside: what else the role
    keeps, such as exact weights.
    """

    name: str
    model: Transformer
    parallel: Parallel
    optimizer: Optimizer | None = None
    beside: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def passes(self) -> Passes:
        """How its micro-batches go through it."""
        return passes_of(self.model, self.parallel, self.optimizer)

    def weights(self) -> list[Tensor]:
        """As plain tensors; none that rest in host memory anyway (--offload_params)."""
        parts = (part for w in self.model.parameters() for part in plain_parts(own(w.data)))
        weights = [*parts, *self.beside.values()]
        return [x for x in weights if x.device.type == self.parallel.device.type]

    def state(self) -> list[Tensor]:
        """The optimizer's, as `weights`."""
        if self.optimizer is None or self.optimizer.rests_in_host:
            return []
        return self.optimizer.state_tensors()

    def gradient_bytes(self) -> int:
        """Of the gradients, while a step is under way."""
        if self.optimizer is None:
            return 0
        return sum(4 * own(p).numel() for p in self.model.parameters() if p.requires_grad)


class Stage:
    """Which roles are on the device.

    With `offload` all others lie in host memory, and come back bit for bit; so do the optimizers'
    states while nothing is trained. What several roles share (a trunk under adapters) stays while
    one is at work. Roles come in the same order each iteration: where the device has memory that
    nothing has needed so far, the next one is brought back while the one before it is at work.
    """

    def __init__(self, offload: bool, device: torch.device) -> None:
        self.host = Offload(device) if offload else None
        self.roles: dict[str, Role] = {}
        self.peak: dict[str, int] = {}  # bytes of each role on the device, at most
        self.last: AtWork = ((), False)
        self.following: dict[AtWork, AtWork] = {}  # who came after whom

    def add(self, role: Role) -> Role:
        """Takes a role in, and to host memory at once."""
        self.roles[role.name], self.peak[role.name] = role, 0
        with self.at_work():
            return role

    def trained(self) -> dict[str, tuple[Transformer, Optimizer]]:
        """(model, optimizer) of each role that has one, by name."""
        roles = self.roles.values()
        return {r.name: (r.model, r.optimizer) for r in roles if r.optimizer is not None}

    @contextmanager
    def at_work(self, *names: str, training: bool = False) -> Iterator[None]:
        """The named roles (those that there are) on the device; when training, their optimizers."""
        if self.host is not None:
            self._place((names, training), self.host)
        yield
        at_work = [self.roles[name] for name in names if name in self.roles]
        for role in at_work:
            if role.model.shard_stage:
                let_go(role.model)
        self._measure(at_work * training)

    def _place(self, now: AtWork, host: Offload) -> None:
        """All that is not at work now, nor next if there is room, to host memory; the rest here."""
        self.following[self.last] = now
        self.last = now
        present = {k: v for role in self.roles.values() for k, v in self._of(role, True).items()}
        host.forget_all_but(present)
        needed, next_ = self._needed(now), self._needed(self.following.get(now, now))
        more = {key: storage for key, storage in next_.items() if key not in needed}
        if host.size_of(more) > host.spare():
            next_ = {}
        staying = needed.keys() | next_.keys() | host.away.keys()
        host.send({key: present[key] for key in present if key not in staying})
        host.begin_to_fetch([key for key in needed if key in host.away])
        host.arrived()
        host.begin_to_fetch([key for key in next_ if key in host.away])

    def _needed(self, at_work: AtWork) -> Storages:
        names, training = at_work
        roles = [self.roles[name] for name in names if name in self.roles]
        return {k: v for role in roles for k, v in self._of(role, training).items()}

    @staticmethod
    def _of(role: Role, training: bool) -> Storages:
        return storages_of(role.weights() + (role.state() if training else []))

    def _measure(self, trained: list[Role]) -> None:
        """What two roles share counts for the first of them."""
        seen: set[int] = set()
        for role in self.roles.values():
            storages = self._of(role, training=True)
            held = sum(storage.nbytes() for key, storage in storages.items() if key not in seen)
            seen |= storages.keys()
            gradients = role.gradient_bytes() if role in trained else 0
            self.peak[role.name] = max(self.peak[role.name], held + gradients)


class MovingReference:
    """A reference that follows the policy: reference ← decay · reference + (1 − decay) · policy.

    It is kept in fp32 beside the role.
    """

    def __init__(self, reference: Role, decay: float) -> None:
        self.decay, self.layout = decay, reference.parallel.layout
        stages, tied = reference.model.stages, reference.model.config.tie_word_embeddings
        self.held_by = partial(stages.holders, tied=tied)
        self.weights = dict(reference.model.named_parameters())
        self.exact = reference.beside
        for name, weight in self.weights.items():
            self.exact[name] = weight.detach().float()  # in fp32 the weight itself

    @torch.no_grad()
    def follow(self, policy: Role) -> None:
        """One step towards the policy, its adapter added in."""
        for name, weight in parts_in(policy.model, policy.parallel, self.layout, self.held_by):
            if name in self.exact:
                self.exact[name].lerp_(weight.float(), 1 - self.decay)
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """The reference's weights from the exact ones, in their own dtype."""
        for name, weight in self.weights.items():
            if weight.dtype != torch.float32:
                weight.copy_(self.exact[name])
