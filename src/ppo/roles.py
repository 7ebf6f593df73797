"""PPO's four roles, where they are computed, and where their tensors lie."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from src.models.lora import merged_parts
from src.models.quantize import plain_parts
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.trainer.optimizer import Optimizer

T = TypeVar("T")


@dataclass(frozen=True)
class Role:
    """A model: "policy", "value", "reference" or "reward"; its ranks; and, if trained, by what.

    parallel: the run's own division, or one into smaller models: these then share the work that the
    ranks have in common. beside: what else the role keeps, such as exact weights.
    """

    name: str
    model: Transformer
    parallel: Parallel
    optimizer: Optimizer | None = None
    beside: dict[str, Tensor] = field(default_factory=dict)

    def share(self, groups: list[T], whole: Parallel) -> list[T]:
        """Of what all ranks of one of the policy's models have to do, this model's part.

        whole: the run's division.
        """
        models = whole.mp_size // self.parallel.mp_size
        return groups[whole.mp_rank // self.parallel.mp_size :: models]

    def collect(self, x: Tensor, whole: Parallel) -> Tensor:
        """The parts that the models of `share` filled in, put together on all of them; in place.

        The rest of x is 0.
        """
        if self.parallel.mp_size != whole.mp_size:
            if self.parallel.mp_rank:
                x.zero_()  # the first rank of each model speaks for it
            dist.all_reduce(x, group=whole.mp_group)
        return x

    def weights(self) -> list[Tensor]:
        """As plain tensors."""
        parts = (part for w in self.model.parameters() for part in plain_parts(w.data))
        return [*parts, *self.beside.values()]

    def state(self) -> list[Tensor]:
        """The optimizer's."""
        return [] if self.optimizer is None else self.optimizer.state_tensors()

    def gradient_bytes(self) -> int:
        """Of the gradients, while a step is under way."""
        if self.optimizer is None:
            return 0
        return sum(4 * p.numel() for p in self.model.parameters() if p.requires_grad)


class Stage:
    """Which roles are on the device.

    With `offload` all others lie in host memory, and come back bit for bit; so do the optimizers'
    states while nothing is trained. What several roles share (a trunk under adapters) stays while
    one is at work. Offloading empties a tensor's storage and fills it again, so that parameters,
    their views and optimizer states keep their identity.
    """

    def __init__(self, offload: bool = False) -> None:
        self.offload = offload
        self.roles: dict[str, Role] = {}
        self.away: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self.peak: dict[str, int] = {}  # bytes of each role on the device, at most

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
        here = [self.roles[name] for name in names if name in self.roles]
        if self.offload:
            needed = _storages(
                [x for role in here for x in role.weights() + (role.state() if training else [])]
            )
            present = _storages(
                [x for role in self.roles.values() for x in role.weights() + role.state()]
            )
            for key in present.keys() - needed.keys() - self.away.keys():
                self._send_away(key, present[key])
            for key in needed.keys() & self.away.keys():
                self._bring_back(key)
        yield
        self._measure(here if training else [])

    def _measure(self, trained: list[Role]) -> None:
        """What two roles share counts for the first of them."""
        seen: set[int] = set()
        for role in self.roles.values():
            storages = _storages(role.weights() + role.state())
            held = sum(storage.nbytes() for key, storage in storages.items() if key not in seen)
            seen |= storages.keys()
            gradients = role.gradient_bytes() if role in trained else 0
            self.peak[role.name] = max(self.peak[role.name], held + gradients)

    def _send_away(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        host = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
        host.copy_(_bytes(storage))
        self.away[key] = (storage, host)
        storage.resize_(0)

    def _bring_back(self, key: int) -> None:
        storage, host = self.away.pop(key)
        storage.resize_(host.numel())
        _bytes(storage).copy_(host)


def _storages(tensors: list[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The tensors' memory, each piece once, by its identity.

    Views of one piece, such as stacked weights, share it.
    """
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages}


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """All of a storage as numbers."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class MovingReference:
    """A reference that follows the policy: reference ← decay · reference + (1 − decay) · policy.

    It is kept in fp32 beside the role.
    """

    def __init__(self, reference: Role, decay: float) -> None:
        self.decay = decay
        self.weights = dict(reference.model.named_parameters())
        self.exact = reference.beside
        for name, weight in self.weights.items():
            self.exact[name] = weight.detach().float()  # in fp32 the weight itself

    @torch.no_grad()
    def follow(self, policy: Transformer) -> None:
        """One step towards the policy, its adapter added in."""
        for name, weight in merged_parts(policy):
            self.exact[name].lerp_(weight.float(), 1 - self.decay)
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """The reference's weights from the exact ones, in their own dtype."""
        for name, weight in self.weights.items():
            if weight.dtype != torch.float32:
                weight.copy_(self.exact[name])
