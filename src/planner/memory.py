"""Bytes of a rank: what each model holds in a layout, and what a phase takes beside that."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from src.generation.cache import PAGE, pages_for
from src.generation.scheduler import READ_ALONE
from src.models.config import ModelConfig
from src.models.exchange import BUCKET
from src.parallel.gradients import BUCKET_BYTES
from src.parallel.layout import Layout
from src.parallel.vocab import LOGITS_AT_ONCE, LOGITS_AT_ONCE_CUDA
from src.planner.cost import RankPart, numbers_of, parts_of, stages_of
from src.planner.work import MicroBatch, sizes_of
from src.trainer.activations import (
    CHUNK_COPIES,
    FP32,
    bytes_together,
    end_activations,
    layer_activations,
)
from src.trainer.budget import Budget, model_budget, training_budget


def held(config: ModelConfig, layout: Layout, dtype: torch.dtype, trained: bool) -> Budget:
    """Weights, gradients and optimizer of the fullest rank."""
    # However the tokens are divided, and wherever the ranks are.
    plain = Layout(layout.models, layout.pp, layout.tp, zero=layout.zero, vp=layout.vp)
    return _held(config, plain, dtype, trained)


@lru_cache(2**14)
def _held(config: ModelConfig, layout: Layout, dtype: torch.dtype, trained: bool) -> Budget:
    if not trained:
        return model_budget(config, layout.tp, dtype, None, layout.pp)
    stages = stages_of(config, layout)
    how = dict(zero=layout.zero, stages=stages)
    return training_budget(config, layout.tp, layout.models, dtype, **how)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Beside:
    """What a phase takes of a rank beside all that is held: by kind."""

    gradients: float = 0.0
    activations: float = 0.0
    gathered: float = 0.0
    cache: float = 0.0
    copy: float = 0.0

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.gathered + self.cache + self.copy


def of_training(
    config: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    n: int,
    batch: MicroBatch,
    recompute: str,
    kind: str,
) -> Beside:
    """Of a step of n micro-batches. kind: of the device."""
    size, split = dtype.itemsize, layout.tp if layout.sp else 1
    sizes, batch = sizes_of(config, layout.tp), batch / layout.cp
    budget = held(config, layout, dtype, True)
    of_rank = _on_cpu if kind == "cpu" else _on_gpu
    shares = layout.models > 1 and layout.zero >= 2
    gradients, gathered = float(budget.gradients), 0.0
    # What stages keep of the micro-batches that are under way at a time; the fullest rank's.
    activations = 0.0
    for rank, part in enumerate(parts_of(config, layout)):
        layers = _under_way(config, layout, rank, n)
        own = of_rank(config, layout, part, layers, dtype, batch, recompute)
        if layout.pp > 1:  # what goes from stage to stage
            own += n * layout.vp * batch.tokens * size * config.dim / split
        activations = max(activations, own)
    if shares:
        # Where most is kept the end of the model is put together; with stage 2 all of it.
        layer, embedding = sizes.stored, 0 if config.tie_word_embeddings else sizes.embedding
        end = sizes.embedding if config.head == "lm" else config.dim
        if kind == "cpu":
            gathered = size * (end + (layout.zero == 2) * (layer * config.n_layers + embedding))
        else:
            parts = [(embedding, embedding)] * bool(embedding) + [(layer, layer)] * config.n_layers
            gathered = bytes_together(parts, (end, end), size, layout.zero, overlaps=True)
    if n == 1 and layout.pp == 1:
        # Activations go as gradients come: they are not there together.
        bucket = min(BUCKET_BYTES, gradients) if layout.models > 1 and not shares else 0.0
        activations = max(bucket, activations + gathered - gradients)
        gathered = 0.0
    return Beside(gradients, activations, gathered)


def _on_gpu(
    config: ModelConfig,
    layout: Layout,
    part: RankPart,
    layers: float,
    dtype: torch.dtype,
    batch: MicroBatch,
    recompute: str,
) -> float:
    """A rank's activations as --max_tokens_per_batch counts them: a little more than measured."""
    how = layout.tp, dtype, recompute, False, layout.sp, layout.cp
    kept, at_work = layer_activations(config, *how)
    ends = end_activations(config, dtype.itemsize) * (part.first + part.last) / 2
    loss = _loss(config, layout, batch, dtype.itemsize, "cuda") if part.last else 0.0
    return batch.tokens * (kept * layers + at_work + ends) + loss


def _on_cpu(
    config: ModelConfig,
    layout: Layout,
    part: RankPart,
    layers: float,
    dtype: torch.dtype,
    batch: MicroBatch,
    recompute: str,
) -> float:
    """A rank's activations where attention goes row by row, in fp32.

    Norms keep what they read and what they make of it; the last layer, past its attention, has the
    needed rows alone. Most is held when the loss is made, or in the layer before the last one.
    """
    size, tokens, needed = dtype.itemsize, batch.tokens, min(batch.needed, batch.tokens)
    split = layout.tp if layout.sp else 1
    sizes = sizes_of(config, layout.tp)
    d, q, k, f = config.dim, sizes.q, sizes.k, sizes.f
    norm = size * (d / split + d)
    before = tokens * (norm + size * (q + 2 * k) + FP32 * (q + k))
    # Behind a prompt that several share, keys and values are copies, and scores are kept.
    before += FP32 * (batch.copied * 2 * k + batch.masked * q / config.head_dim)
    past = norm + FP32 * q + size * 3 * f
    whole = before + tokens * past
    last = before + needed * past if part.last and not config.n_experts else whole
    kept = {
        "none": whole,
        "selective": tokens * size * (d / split + q + q + 2 * k + d + 2 * f),
        "full": tokens * size * 2 * d / split,
    }[recompute]
    of_last = last if recompute == "none" else kept
    again = 0.0 if recompute == "none" else whole
    in_backward = tokens * size * (2 * f + d) + again
    if not part.last:  # another stage goes on
        return kept * layers + in_backward
    at_end = of_last + 2 * needed * size * d + _loss(config, layout, batch, size, "cpu")
    return kept * (layers - 1) + max(at_end, in_backward)


def of_generation(
    config: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    slots: int,
    longest: int,
    prompt_tokens: float,
    is_copy: bool,
    kind: str,
) -> Beside:
    """Of a session. slots: sequences that run at a time; longest: tokens of one."""
    size, sizes = dtype.itemsize, sizes_of(config, layout.tp)
    page = 2 * config.n_layers * sizes.k * PAGE * size
    cache = (slots * pages_for(longest) + 1) * page
    widest = max(sizes.f, config.dim)
    reading = min(READ_ALONE, prompt_tokens) * 6 * widest * size
    choosing = slots * sizes.vocabulary * 3 * FP32
    weights = numbers_of(config, layout) * size
    # A processor's products read weights in an order of their own.
    packed = config.n_layers * sizes.stored * size + sizes.head * size if kind == "cpu" else 0
    at_work = max(reading, choosing) + packed
    if not is_copy:
        return Beside(activations=at_work, cache=cache)
    # What is under way when weights come is gone when the cache does.
    under_way = max(0.0, min(BUCKET, weights) - cache - at_work)
    return Beside(activations=at_work, cache=cache, copy=weights + under_way)


def of_scoring(
    config: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    batch: MicroBatch,
    kind: str,
    is_copy: bool = False,
) -> Beside:
    """Of passes without gradients: one layer at work."""
    size = dtype.itemsize
    _, at_work = layer_activations(config, layout.tp, dtype, "none")
    work = batch.tokens * at_work / 2
    work += _logits(config, layout, batch, size, kind)
    weights = numbers_of(config, layout) * size
    copy = weights + min(BUCKET, weights) if is_copy else 0.0
    return Beside(activations=work, copy=copy)


def _logits(config: ModelConfig, layout: Layout, batch: MicroBatch, size: int, kind: str) -> float:
    """Of a chunk of rows: logits in fp32, and what is made of them."""
    if config.head != "lm":
        return 0.0
    numbers = batch.needed * sizes_of(config, layout.tp).vocabulary
    if kind == "cuda":
        return min(LOGITS_AT_ONCE_CUDA, numbers) * CHUNK_COPIES * (FP32 + size / 2)
    # In fp32 the exponentials take the logits' place, and their gradients the exponentials'.
    return min(LOGITS_AT_ONCE, numbers) * FP32 * (1 if size == FP32 else 2.5)


def _loss(config: ModelConfig, layout: Layout, batch: MicroBatch, size: int, kind: str) -> float:
    """Of a chunk of logits, with the head's gradient, which is made beside them."""
    if config.head != "lm":
        return 0.0
    head = FP32 * sizes_of(config, layout.tp).head
    return _logits(config, layout, batch, size, kind) + head


def _under_way(config: ModelConfig, layout: Layout, rank: int, n: int) -> float:
    """Layers that a rank keeps activations of at a time, once for each micro-batch.

    By 1F1B, and by its interleaved form, in which stages of a rank take turns.
    """
    if layout.pp == 1:
        return config.n_layers
    stages, n = stages_of(config, layout), max(n, layout.pp)
    own = [len(stages.layers(stage)) for stage in stages.of_rank(rank)]
    if layout.vp == 1:
        return own[0] * min(layout.pp - rank, n)
    ahead = (layout.pp - rank - 1) * 2 + (layout.vp - 1) * layout.pp + 1
    turns = range(min(ahead, n * layout.vp))
    return sum(own[turn // layout.pp % layout.vp] for turn in turns)
