"""A model in another layout than it is trained in, for what goes better there: generation, scoring.

Weights change hands in memory, never through disk. Training may need 8 ranks to hold a model that
generates faster as four models of 2 ranks each, or as one beside another that scores.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from src.checkpoint.load import allocate
from src.generation.engine import Completion, Engine, OnTokens, Stop
from src.generation.sampling import Sampling
from src.models.exchange import BUCKET, Exchange, is_spread, moves_of
from src.models.lora import merged
from src.models.stages import cut_in_stages
from src.models.transformer import Transformer, build_part
from src.parallel.layout import Layout
from src.parallel.setup import Parallel


class Relayout:
    """Copies of a model in another division of the ranks, planned once and made when asked for."""

    def __init__(
        self, model: Transformer, parallel: Parallel, division: Parallel, bucket: int = BUCKET
    ) -> None:
        """parallel: the model's own division; bucket: see `Exchange`. All ranks come here."""
        self.model, self.division = model, division
        config, layout = model.config, division.layout
        self.stages, tied = cut_in_stages(config, layout.pp), config.tie_word_embeddings
        moves = moves_of(model, parallel, layout, lambda name: self.stages.holders(name, tied))
        ranks = parallel.rank, parallel.world
        self.exchange = Exchange(moves, *ranks, model.dtype, parallel.device, bucket)
        self.seconds = 0.0  # that the last one took

    @torch.no_grad()
    def __call__(self) -> Transformer:
        """A copy with plain weights, adapters added in; in training mode as the model is.

        A collective of all ranks; on those outside of the division it holds nothing.
        """
        began, device = time.perf_counter(), self.division.device
        model = self.model
        new = build_part(model.config, self.division, model.dtype, self.stages)
        allocate(new.requires_grad_(False), device)
        self.exchange(merged(model), dict(new.named_parameters()))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds = time.perf_counter() - began
        return new.train(model.training)


@contextmanager
def plain(model: Transformer, parallel: Parallel) -> Iterator[tuple[Transformer, Parallel]]:
    """A model that every data-parallel rank can compute with at its own pace, and its division.

    The model itself, unless it is stages of a pipeline, these ranks share its weights, or some of
    the run have none of it. Then a copy at a degree at which the pipeline's, or a machine's, ranks
    share it, so that it takes no more memory than it must; dropped afterwards.
    """
    world, of_model = parallel.world_size, parallel.layout.model_size
    if not is_spread(model) and parallel.layout.size == world:
        yield model, parallel
        return
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    fits = ranks_here % of_model == 0 and world % ranks_here == 0
    wide = model.shard_stage == 3 and fits
    # As many ranks as it is on, or the next number that divides those of the run.
    degree = ranks_here if wide else next(n for n in range(of_model, world + 1) if world % n == 0)
    division = parallel.regrouped(degree)
    copy = Relayout(model, parallel, division)()
    with division.active():
        yield copy, division


class RelaidEngine:
    """An engine for rollouts that lays the model out in a division of its own for each call.

    It drops the copy afterwards.
    """

    def __init__(
        self,
        model: Transformer,
        parallel: Parallel,
        layout: Layout,
        max_batch_size: int,
        max_seq_len: int,
        kv_cache_gb: float | None = None,
    ) -> None:
        """parallel: the model's own division; layout: without stages."""
        self.parallel = parallel.laid_out(layout)
        self.relayout = Relayout(model, parallel, self.parallel)
        self.limits = max_batch_size, max_seq_len, kv_cache_gb

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        stop: Stop | set[int],
        samples: list[int],
        on_tokens: OnTokens | None = None,
    ) -> list[Completion]:
        """`Engine.generate`, on all ranks together; those outside of the layout have no prompts."""
        model = self.relayout()
        if not self.parallel.is_member:
            return []
        with self.parallel.active():
            engine = Engine(model, self.parallel, *self.limits)
            return engine.generate(prompts, sampling, stop, samples, on_tokens)
