"""Generation at another degree than training, on the same ranks.

Weights change hands in memory, never through disk. Training may need 8 ranks to hold a model that
generates faster as four models of 2 ranks each.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from src.checkpoint.load import put
from src.generation.engine import Completion, Engine, Stop
from src.generation.sampling import Sampling
from src.models.exchange import is_spread, tensor_parallel_parts
from src.models.layout import tensor_table
from src.models.places import Layout
from src.models.transformer import Transformer, build
from src.parallel.setup import Parallel


@torch.no_grad()
def relaid(model: Transformer, parallel: Parallel, division: Parallel) -> Transformer:
    """A copy of the model as `division` cuts it, adapters added in; in training mode as it is.

    Plain weights, whatever the model's are.
    """
    config, n = model.config, division.mp_size
    table = tensor_table(config)
    replicas = division.replicas(table["layers.0.attention.wk.weight"].copies(n))
    new = build(config, division.mp_rank, n, model.dtype, replicas)
    new.stack_projections(division.device)
    for name, part in tensor_parallel_parts(model, parallel, Layout(n, division.dp_size)):
        put(new, name, part, division.device)
    return new.requires_grad_(False).train(model.training)


@contextmanager
def plain(model: Transformer, parallel: Parallel) -> Iterator[tuple[Transformer, Parallel]]:
    """A model that every data-parallel rank can compute with at its own pace, and its division.

    The model itself, unless it is stages of a pipeline, or these ranks share its weights. Then a
    copy at a degree at which the pipeline's, or a machine's, ranks share it, so that it takes no
    more memory than it must; dropped afterwards.
    """
    if not is_spread(model):
        yield model, parallel
        return
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", parallel.world_size))
    of_model = parallel.model_size
    fits = ranks_here % of_model == 0 and parallel.world_size % ranks_here == 0
    wide = model.shard_stage == 3 and fits
    division = parallel.regrouped(ranks_here if wide else of_model)
    copy = relaid(model, parallel, division)
    with division.active():
        yield copy, division


class RelaidEngine:
    """An engine for rollouts that lays the model out at its own degree for each call.

    It drops the copy afterwards.
    """

    def __init__(
        self,
        model: Transformer,
        parallel: Parallel,
        mp_size: int,
        max_batch_size: int,
        max_seq_len: int,
        kv_cache_gb: float | None = None,
    ) -> None:
        self.model, self.parallel, self.division = model, parallel, parallel.regrouped(mp_size)
        self.limits = max_batch_size, max_seq_len, kv_cache_gb
        self.seconds = 0.0  # that the last change of layout took

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        stop: Stop | set[int],
        samples: list[int],
        on_tokens=None,
    ) -> list[Completion]:
        """`Engine.generate` for prompts that all ranks of one (training) model give alike.

        All get all completions.
        """
        began = time.perf_counter()
        model = relaid(self.model, self.parallel, self.division)
        self.seconds = time.perf_counter() - began
        if self.division.mp_size > self.parallel.model_size:
            return self._together(model, prompts, sampling, stop, samples, on_tokens)
        # The smaller models share the prompts.
        models = self.parallel.model_size // self.division.mp_size
        local = list(range(self.parallel.model_rank // self.division.mp_size, len(prompts), models))
        local_prompts, local_samples = [prompts[i] for i in local], [samples[i] for i in local]
        with self.division.active():
            engine = Engine(model, self.division, *self.limits)
            done = engine.generate(local_prompts, sampling, stop, local_samples, on_tokens)
        parts = [list(zip(local, done))] * self.parallel.model_size
        dist.all_gather_object(parts, list(zip(local, done)), group=self.parallel.model_group)
        completion_of = dict(pair for part in parts for pair in part)
        return [completion_of[i] for i in range(len(prompts))]

    def _together(
        self,
        model: Transformer,
        prompts: list[list[int]],
        sampling: Sampling,
        stop: Stop | set[int],
        samples: list[int],
        on_tokens,
    ) -> list[Completion]:
        """The prompts of all training models whose ranks share the larger one."""
        asked: list = [None] * self.division.mp_size
        dist.all_gather_object(asked, (prompts, samples), group=self.division.mp_group)
        of_models = asked[:: self.parallel.model_size]
        with self.division.active():
            engine = Engine(model, self.division, *self.limits)
            all_prompts = [prompt for prompts, _ in of_models for prompt in prompts]
            all_samples = [sample for _, samples in of_models for sample in samples]
            done = engine.generate(all_prompts, sampling, stop, all_samples, on_tokens)
        number = self.division.mp_rank // self.parallel.model_size
        first = sum(len(prompts) for prompts, _ in of_models[:number])
        return done[first : first + len(prompts)]
