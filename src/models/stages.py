"""A model's layers as the stages of a pipeline: which rank computes which, alike in cost."""

import math
from bisect import bisect
from dataclasses import dataclass

from src.errors import UserError
from src.models.config import ModelConfig
from src.models.layout import layer_table


@dataclass(frozen=True)
class Stages:
    """Stage s, of all, computes the layers [bounds[s], bounds[s + 1]); rank r has r, r + ranks, ….

    The first also embeds, the last also has the last norm and the head.
    """

    bounds: tuple[int, ...] = ()
    ranks: int = 1

    @property
    def count(self) -> int:
        return max(len(self.bounds) - 1, 1)

    def of_rank(self, rank: int) -> range:
        """The stages that a rank of the pipeline computes."""
        return range(rank, self.count, self.ranks)

    def layers(self, stage: int) -> range:
        return range(self.bounds[stage], self.bounds[stage + 1])

    def holders(self, name: str, tied: bool) -> list[int]:
        """Ranks of the pipeline that hold a tensor: one, or both ends a tied embedding."""
        if self.count == 1:
            return [0]
        last = (self.count - 1) % self.ranks
        if name.startswith("layers."):
            number = int(name.split(".")[1])
            return [(bisect(self.bounds, number) - 1) % self.ranks]
        if name.startswith("tok_embeddings."):
            return sorted({0, last}) if tied else [0]
        return [last]


def cut_in_stages(
    config: ModelConfig, ranks: int, per_rank: int = 1, flag: str = "--pipeline_parallel_size"
) -> Stages:
    """The cut whose dearest stage costs least, by operations per token: head and all.

    flag: what said how many, for the message. Raises UserError for more stages than layers.
    """
    count = ranks * per_rank
    if count > config.n_layers:
        times = f" x --stages_per_rank {per_rank}" if per_rank > 1 else ""
        raise UserError(
            f"{flag} {ranks}{times} makes {count} stages, and the model has "
            f"{config.n_layers} layers: give {config.n_layers} or fewer"
        )
    layer = layer_cost(config)
    head = config.vocab_size * config.dim if config.head == "lm" else 0

    def dearest(last: int) -> float:
        """Of a cut whose last stage has so many layers."""
        others = math.ceil((config.n_layers - last) / (count - 1)) if count > 1 else 0
        return max(others * layer, last * layer + head)

    most = config.n_layers - (count - 1)
    last = min(range(1, most + 1), key=lambda n: (dearest(n), -n)) if count > 1 else most
    # The other layers evenly; the stages behind have one less where they do not divide.
    others = config.n_layers - last
    sizes = [others // (count - 1) + (s < others % (count - 1)) for s in range(count - 1)]
    bounds = [0]
    for size in [*sizes, last]:
        bounds.append(bounds[-1] + size)
    return Stages(tuple(bounds), ranks)


def layer_cost(config: ModelConfig) -> float:
    """Weights of a layer that a token meets."""
    share = config.experts_per_token / config.n_experts if config.n_experts else 1.0
    return sum(
        math.prod(spec.shape) * (share if len(spec.shape) == 3 else 1.0)
        for spec in layer_table(config).values()
        if len(spec.shape) > 1
    )
