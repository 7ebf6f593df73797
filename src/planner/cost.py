"""Seconds of what a model does in a layout: passes, optimizer steps, generation, change of layout.

All ranks of a layout do alike; the fullest stage of a pipeline counts, and what others wait for it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from src.generation.scheduler import READ_ALONE
from src.models.config import ModelConfig
from src.models.exchange import BUCKET
from src.models.stages import Stages, cut_in_stages
from src.parallel.gradients import BUCKET_BYTES
from src.parallel.layout import Layout
from src.planner.hardware import ADAM_BYTES, Hardware, Link, Links, Rates
from src.planner.work import (
    FP32,
    MicroBatch,
    Sizes,
    Work,
    backward_of,
    decode_head,
    decode_layer,
    head_forward,
    head_training,
    layers_forward,
    sizes_of,
)


@lru_cache(2**12)
def stages_of(config: ModelConfig, layout: Layout) -> Stages:
    return cut_in_stages(config, layout.pp, layout.vp)


@dataclass(frozen=True)
class RankPart:
    """What a rank of a pipeline has of a model: how many layers, and whether its ends."""

    layers: int
    first: bool
    last: bool


@lru_cache(2**12)
def parts_of(config: ModelConfig, layout: Layout) -> tuple[RankPart, ...]:
    stages = stages_of(config, layout)
    if stages.count == 1:
        return (RankPart(config.n_layers, True, True),)
    return tuple(
        RankPart(
            sum(len(stages.layers(stage)) for stage in stages.of_rank(rank)),
            0 in stages.of_rank(rank),
            stages.count - 1 in stages.of_rank(rank),
        )
        for rank in range(stages.ranks)
    )


@lru_cache(2**12)
def numbers_of(config: ModelConfig, layout: Layout) -> int:
    """Weights of the fullest rank, before data-parallel ranks share them."""
    sizes = sizes_of(config, layout.tp)
    tied = config.tie_word_embeddings

    def of(part: RankPart) -> int:
        head = part.last and config.head == "lm" and not (tied and part.first)
        return part.layers * sizes.stored + sizes.embedding * (part.first + head)

    return max(of(part) for part in parts_of(config, layout))


@dataclass(frozen=True, eq=False)  # one machine's: caches know it by itself
class Cost:
    """Seconds on a machine. size: bytes of a weight, and of an activation."""

    hardware: Hardware
    size: int

    # --- passes -----------------------------------------------------------------------------------

    def score(self, config: ModelConfig, layout: Layout, n: int, batch: MicroBatch) -> float:
        """Of n micro-batches of each model, without gradients."""
        passes = self._through(config, layout, n, batch, self.hardware.score, None)
        if layout.zero < 2 or layout.models == 1:
            return passes
        forwards = n if layout.zero == 3 else 1
        return self._beside(passes, self._put_together(config, layout, forwards, 0))

    def train(
        self, config: ModelConfig, layout: Layout, n: float, batch: MicroBatch, recompute: str
    ) -> float:
        """Of the passes of a step of n micro-batches, forward and backward, with exchanges."""
        passes = self._through(config, layout, n, batch, self.hardware.train, recompute)
        if layout.zero < 2 or layout.models == 1:
            return passes
        forwards = 2 * n if layout.zero == 3 else 1
        return self._beside(passes, self._put_together(config, layout, forwards, n))

    def _put_together(
        self, config: ModelConfig, layout: Layout, forwards: float, backwards: float
    ) -> float:
        """Weights that ranks share are put together so often, gradients dealt out."""
        numbers, links = numbers_of(config, layout), self._between_models(layout)
        share, parts = (layout.models - 1) / layout.models, config.n_layers + 2
        sent = share * numbers * (self.size * forwards + FP32 * backwards)
        moved = numbers * (self.size * forwards + 2 * FP32 * backwards)  # in the rank's memory
        exchanged = _seconds(links.gather, sent, parts * (forwards + backwards))
        return exchanged + moved / self.hardware.fresh

    def _beside(self, passes: float, exchanged: float) -> float:
        """Seconds of passes with exchanges that a GPU makes meanwhile."""
        return max(passes, exchanged) if self.hardware.overlaps else passes + exchanged

    def update(self, config: ModelConfig, layout: Layout, backward: float) -> float:
        """Of an optimizer's step, with the sum of the gradients.

        backward: seconds of the pass that a GPU sums gradients in.
        """
        numbers, models = numbers_of(config, layout), layout.models
        exchanged = 0.0
        own = numbers / models if layout.zero else numbers
        if models > 1 and layout.zero < 2:
            links = self._between_models(layout)
            share = (models - 1) / models
            buckets = 1 + numbers * FP32 / BUCKET_BYTES
            summed = _seconds(links.reduce, 2 * share * numbers * FP32, buckets)
            exchanged = max(0.0, summed - backward) if self.hardware.overlaps else summed
            if layout.zero == 1:  # who has updated a weight gives it to the others, some at a time
                exchanged += _seconds(links.send, share * numbers * self.size, 3 * config.n_layers)
        # Of others' gradients the norm alone is taken.
        others = 0 if layout.zero >= 2 else (numbers - own) * FP32 / ADAM_BYTES
        return exchanged + (own + others) / self.hardware.numbers

    def _through(
        self,
        config: ModelConfig,
        layout: Layout,
        n: float,
        batch: MicroBatch,
        rates: Rates,
        recompute: str | None,
    ) -> float:
        """n micro-batches through all stages. recompute: None without gradients."""
        sizes, cp = sizes_of(config, layout.tp), layout.cp
        batch = batch / cp
        of_ranks = [
            self._of_rank(config, layout, sizes, part, batch, rates, recompute)
            for part in parts_of(config, layout)
        ]
        most = max(of_ranks)
        if layout.pp == 1:
            return n * most
        # Ranks fill up one after the other, stage by stage of theirs, and empty again.
        waits = (sum(of_ranks) - most) / layout.vp
        passed = batch.tokens * config.dim * self.size / (layout.tp if layout.sp else 1)
        ways = (1 if recompute is None else 2) * layout.vp
        send = self._between_stages(layout).send
        exposed = layout.pp - 1 if self.hardware.overlaps else n + layout.pp - 1
        return n * most + waits + exposed * ways * _seconds(send, passed)

    def _of_rank(
        self,
        config: ModelConfig,
        layout: Layout,
        sizes: Sizes,
        part: RankPart,
        batch: MicroBatch,
        rates: Rates,
        recompute: str | None,
    ) -> float:
        split = layout.tp if layout.sp else 1
        how = config, sizes, batch, self.size, part.layers, part.last, split
        forward = layers_forward(*how)
        work, exchanges = forward, 1
        if recompute is not None:
            work, exchanges = work + backward_of(forward, sizes), 2
            if recompute == "full":
                work, exchanges = work + forward, 3
            elif recompute == "selective":
                work = work + Work(elements=forward.elements)
        if part.last and batch.needed:
            head = head_forward if recompute is None else head_training
            work = work + head(sizes, batch, self.size)
        work = work + Work(calls=1)
        return work.seconds(rates) + exchanges * self._in_layers(config, layout, part, batch)

    def _in_layers(
        self, config: ModelConfig, layout: Layout, part: RankPart, batch: MicroBatch
    ) -> float:
        """Exchanges of a pass in one direction among the ranks that share tensors, or tokens."""
        size, in_context = self.size, 0.0
        if layout.cp > 1:  # queries, keys and values go to their heads' rank, and the output back
            sizes = sizes_of(config, layout.tp)
            sent = batch.tokens * (2 * sizes.q + 2 * sizes.k) * size * (layout.cp - 1) / layout.cp
            of_group = layout.cp * layout.model_size
            between = self.hardware.links(layout.first, of_group, layout.size // of_group)
            in_context = part.layers * _seconds(between.gather, sent, 4)
        if layout.tp == 1:
            return in_context
        links = self.hardware.links(layout.first, layout.tp, layout.size // layout.tp)
        whole = batch.tokens * config.dim * size * (layout.tp - 1) / layout.tp
        if layout.sp:
            of_layer = 4 * _seconds(links.gather, whole)
        else:
            of_layer = 2 * _seconds(links.reduce, 2 * whole)
        ends = part.first * _seconds(links.gather, whole)
        if part.last and config.head == "lm":  # sums over the vocabulary
            ends += 3 * _seconds(links.reduce, 2 * batch.needed * FP32)
        return in_context + part.layers * of_layer + ends

    # --- generation -------------------------------------------------------------------------------

    def generate(
        self,
        config: ModelConfig,
        layout: Layout,
        sequences: int,
        slots: int,
        prompt: int,
        response: float,
        samples: int,
    ) -> float:
        """Of responses to the prompts of each model, `samples` to one; `slots` run at a time."""
        sizes, layers = sizes_of(config, layout.tp), config.n_layers
        # Prompts are read once for all samples.
        prompts = sequences / samples
        whole = MicroBatch.of_rows(prompts, prompt, 1, config.sliding_window)
        forwards = max(1.0, whole.tokens / READ_ALONE)
        read = layers_forward(config, sizes, whole, self.size)
        read = read + Work(layers=(forwards - 1) * layers, calls=forwards)
        read = read + head_forward(sizes, whole, self.size)
        ready = (layers * sizes.stored + sizes.head) * self.size / self.hardware.session
        alone = Layout(layout.dp, tp=layout.tp, first=layout.first)
        all_layers = RankPart(layers, True, True)
        exchanged = self._in_layers(config, alone, all_layers, whole)
        # Then a token for each that runs, in all as many as there are to say.
        steps = response * sequences / slots
        context = prompt + response / 2
        if config.sliding_window:
            context = min(context, config.sliding_window)
        step = decode_layer(sizes, slots, context, self.size) * layers
        step = step + decode_head(sizes, slots, self.size)
        of_step = self._in_layers(config, alone, all_layers, MicroBatch(slots, 0, slots))
        if layout.tp > 1:  # what each rank draws from
            of_step += 2 * self.hardware.links(layout.first, layout.tp, layout.dp).reduce.latency
        return (
            ready
            + read.seconds(self.hardware.score)
            + exchanged
            + steps * (step.seconds(self.hardware.decode) + of_step)
        )

    # --- change of layout -------------------------------------------------------------------------

    def relayout(self, config: ModelConfig, source: Layout, target: Layout) -> float:
        """Of a model's weights from one layout into another one, in memory."""
        received = received_bytes(config, source, target, self.size)
        new = numbers_of(config, target) * self.size
        # Each rank's source is near: a model that lies on its own node, where there is one.
        per_node, last = self.hardware.per_node, max(source.ranks.stop, target.ranks.stop)
        within = target.first in source.ranks and target.ranks.stop <= source.ranks.stop
        is_near = last <= per_node or (source.model_size <= per_node and within)
        links = self.hardware.node if is_near else self.hardware.network
        buckets = 1 + 3 * new * target.model_size / BUCKET
        return new / self.hardware.copies + _seconds(links.send, received, buckets)

    # --- links ------------------------------------------------------------------------------------

    def _between_models(self, layout: Layout) -> Links:
        return self.hardware.links(layout.first, layout.size)

    def _between_stages(self, layout: Layout) -> Links:
        return self.hardware.links(layout.first, layout.model_size, layout.models)


def received_bytes(config: ModelConfig, source: Layout, target: Layout, size: int) -> float:
    """What the rank that lacks most gets of its new part. By even cuts, layer by layer."""
    of_source, of_target = stages_of(config, source), stages_of(config, target)

    def held(layout: Layout, stages: Stages, rank: int) -> tuple[list[range], float, float]:
        """Layers, and the range of each tensor, that a rank has."""
        if rank not in layout.ranks:
            return [], 0.0, 0.0
        stage, part = divmod((rank - layout.first) % layout.model_size, layout.tp)
        layers = [range(config.n_layers)]
        if stages.count > 1:
            layers = [stages.layers(s) for s in stages.of_rank(stage)]
        return layers, part / layout.tp, (part + 1) / layout.tp

    def share(rank: int) -> float:
        """Of its new part, what it has already."""
        has, low, high = held(source, of_source, rank)
        wants, new_low, new_high = held(target, of_target, rank)
        kept = max(0.0, min(high, new_high) - max(low, new_low)) / (new_high - new_low)
        if source.zero >= 2:  # rows of a part, which are elsewhere in parts of another cut
            kept = kept / source.models if source.tp == target.tp else 0.0
        both = sum(max(0, min(a.stop, b.stop) - max(a.start, b.start)) for a in has for b in wants)
        return kept * both / sum(map(len, wants))

    # Models are alike: the first and the last ones tell.
    ranks = [*target.ranks]
    ends = max(source.model_size, target.model_size)
    some = ranks if len(ranks) <= 2 * ends else [*ranks[:ends], *ranks[-ends:]]
    lacks = 1 - min(share(rank) for rank in some[:: max(1, len(some) // 32)])
    return numbers_of(config, target) * size * lacks


def _seconds(link: Link, traffic: float, calls: float = 1) -> float:
    return calls * link.latency + traffic / link.bandwidth


def slots_of(sequences: int, limit: int, share: int) -> int:
    """Sequences that run at a time, where the cache has room for a share of them."""
    return max(1, min(limit, math.ceil(sequences / share)))
