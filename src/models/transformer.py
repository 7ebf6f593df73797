"""One transformer for every family, role and degree.

It works on packed tokens [N]: a layout object says where each sequence lies and does the attention
(`Packed` for whole sequences, the generation cache for one token at a time), so training, scoring,
prefill and decoding are one forward. Head counts are read off the shards' shapes; what the
families differ in are values of the config.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from src.models.attention import gather_rows
from src.models.config import ModelConfig
from src.models.elementwise import HeadNorm, RMSNorm, add_rms_norm, rotate, swiglu
from src.models.experts import MixtureOfExperts, balance_loss
from src.models.layout import TensorSpec, fill_padding, tensor_table
from src.models.rotary import logn, ntk_rotary, rotary_table
from src.models.stages import Stages, cut_in_stages
from src.models.streaming import StreamedLayers
from src.parallel.deterministic import linear
from src.parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    Projections,
    ReplicatedLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copies_of,
    exact_linear,
    parameter,
    with_copies,
)
from src.parallel.mappings import (
    WHOLE,
    Region,
    SplitTokens,
    copy_to_model_parallel_region,
)
from src.parallel.setup import Parallel
from src.parallel.vocab import IMPOSSIBLE

KEPT = {  # what is dear to compute: products and attention
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_mm",
    "aten::_grouped_mm",
    "rlhf::adapted_linear",  # a layer's product and its adapter's
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "torch_attn::_varlen_attn",
}


def _keep_products(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    is_kept = op.name() in KEPT
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


# Activation checkpointing: what of a block is computed again in backward. "full": everything, from
# its input.
CHECKPOINTING: dict[str, Callable[[], tuple[AbstractContextManager, AbstractContextManager]]] = {
    "selective": partial(create_selective_checkpoint_contexts, _keep_products),
    "full": noop_context_fn,
}


class Shard:
    """Parameters of one rank of `n`, made by name as the table says.

    `part` looks into a part of the model: names are then those inside it.
    """

    def __init__(self, table: dict[str, TensorSpec], rank: int, n: int, prefix: str = "") -> None:
        self.table, self.rank, self.n, self.prefix = table, rank, n, prefix

    def part(self, name: str) -> "Shard":
        return Shard(self.table, self.rank, self.n, f"{self.prefix}{name}.")

    def spec(self, name: str) -> TensorSpec:
        return self.table[self.prefix + name]

    def real_size(self, name: str) -> int:
        """How much of this rank's part along the cut is no padding."""
        start, stop = self.spec(name).local_range(self.rank, self.n)
        return stop - start

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.table

    def __getitem__(self, name: str) -> nn.Parameter:
        spec = self.spec(name)
        return parameter(spec.local_shape(self.n), spec.copies(self.n))

    def get(self, name: str) -> nn.Parameter | None:
        """A parameter that not every model has (a bias), or None."""
        if name not in self:
            return None
        return self[name]


class Attention(nn.Module):
    def __init__(
        self, config: ModelConfig, layer: int, shard: Shard, replicas: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window = config.sliding_window if layer >= config.first_window_layer else 0
        self.wq = ColumnParallelLinear(shard["wq.weight"], shard.get("wq.bias"))
        self.wk = ColumnParallelLinear(shard["wk.weight"], shard.get("wk.bias"), replicas)
        self.wv = ColumnParallelLinear(shard["wv.weight"], shard.get("wv.bias"), replicas)
        self.wo = RowParallelLinear(shard["wo.weight"])
        self.q_norm = HeadNorm(shard["q_norm.weight"], config.norm_eps) if config.qk_norm else None
        self.k_norm = HeadNorm(shard["k_norm.weight"], config.norm_eps) if config.qk_norm else None
        self.real_heads = shard.real_size("wq.weight") // config.head_dim  # without padding
        self.projections = Projections()

    def stack(self, device: torch.device) -> None:
        self.projections.stack([self.wq, self.wk, self.wv], device)

    def forward(
        self,
        x: Tensor,
        layout,
        rotary: tuple[Tensor, Tensor],
        rows: Tensor | None = None,
        before: Region = WHOLE,
        after: Region = WHOLE,
    ) -> Tensor:
        """[N, dim] → [N, dim]; with `rows` the output is computed for these tokens only.

        before, after: how tokens lie on this model's ranks in the input, and in the output.
        """
        x = before.enter(x)
        projections = (self.wq, self.wk, self.wv)
        if layout.fuses:
            qkv = self.projections.joined(x, *projections)
            norms = self.q_norm, self.k_norm
            out = layout.attend_joined(self.layer, qkv, rotary, norms, self.window)
        else:
            # [N, heads · head_dim] → [N, heads, head_dim]; k and v have this rank's kv heads
            q, k, v = (
                part.unflatten(-1, (-1, self.head_dim))
                for part in self.projections.apart(x, *projections)
            )
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = rotate(q, rotary[0]), rotate(k, rotary[1])
            out = layout.attend(self.layer, q, k, v, self.window)
        # A padded head beside a real kv head would give the mean of its values, and the zeros of
        # wo that meet it a gradient.
        out = fill_padding(out, self.real_heads, dim=1).flatten(-2)  # [N, heads · head_dim]
        return after.leave(self.wo(gather_rows(out, rows)))


class FeedForward(nn.Module):
    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(shard["w1.weight"])
        self.w2 = RowParallelLinear(shard["w2.weight"])
        self.w3 = ColumnParallelLinear(shard["w3.weight"])
        self.projections = Projections()

    def stack(self, device: torch.device) -> None:
        self.projections.stack([self.w1, self.w3], device)

    def forward(self, x: Tensor, region: Region = WHOLE) -> tuple[Tensor, None]:
        """[N, dim] → [N, dim], and None where `MixtureOfExperts` has its router's decisions."""
        x = region.enter(x)
        gated = self.projections.gated(x, self.w1, self.w3)
        if gated is None:
            gated = swiglu(self.projections.joined(x, self.w1, self.w3))
        return region.leave(self.w2(gated)), None


class Block(nn.Module):
    def __init__(
        self, config: ModelConfig, layer: int, shard: Shard, replicas: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.attention = Attention(config, layer, shard.part("attention"), replicas)
        feed_forward = shard.part("feed_forward")
        self.feed_forward = (
            MixtureOfExperts(config, feed_forward)
            if config.n_experts
            else FeedForward(feed_forward)
        )
        self.attention_norm = RMSNorm(shard["attention_norm.weight"], config.norm_eps)
        self.ffn_norm = RMSNorm(shard["ffn_norm.weight"], config.norm_eps)

    def forward(
        self,
        x: Tensor,
        layout,
        rotary: tuple[Tensor, Tensor],
        rows: Tensor | None = None,
        delta: Tensor | None = None,
        before: Region = WHOLE,
        after: Region = WHOLE,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x + delta → x and delta after the block, at `rows` only if given.

        delta: what the block before adds, which one kernel may sum and norm; nothing if None. The
        third is its router's decisions, with experts. before, after: see `Attention`.
        """
        x, normed = add_rms_norm(x, delta, self.attention_norm)
        attended = self.attention(normed, layout, rotary, rows, before, after)
        if rows is not None:
            x = after.own(gather_rows(before.whole(x), rows))
        x, normed = add_rms_norm(x, attended, self.ffn_norm)
        return x, *self.feed_forward(normed, after)


class Layers(nn.ModuleList):
    """Blocks under their numbers in the model, of which a stage of a pipeline has some."""

    def __init__(self, blocks: dict[int, Block]) -> None:
        super().__init__()
        for number, block in blocks.items():
            self.add_module(str(number), block)


@dataclass(frozen=True)
class Part:
    """What a rank computes of a model: all of it, its stages of a pipeline, or nothing.

    layers: of each of its stages; first, last: whether its first stage embeds, and its last one has
    the head.
    """

    layers: tuple[range, ...]
    first: bool = True
    last: bool = True

    @classmethod
    def of(cls, config: ModelConfig, stages: Stages, rank: int | None) -> "Part":
        """A rank's of a pipeline; all of the model without one; nothing of no rank of it."""
        if rank is None:
            return cls((), first=False, last=False)
        if stages.count == 1:
            return cls((range(config.n_layers),))
        numbers = stages.of_rank(rank)
        layers = tuple(stages.layers(s) for s in numbers)
        return cls(layers, 0 in numbers, stages.count - 1 in numbers)


@dataclass
class Received:
    """What comes to a stage from the one before, in place of tokens.

    x: [N, dim]; router: what the layers so far decided, [N, 2, experts], with experts.
    """

    stage: int  # among the rank's own
    x: Tensor
    router: Tensor | None = None


class Transformer(nn.Module):
    """The trunk and its head: `output` (vocabulary logits) or `score` (a scalar), by `config.head`.

    It is rank `rank` of `n`'s part, and of a pipeline the stages of its rank `stage_rank`; of None
    it is nothing, but knows what it is nothing of. Parameters are uninitialised: `src/checkpoint`
    fills them. `replicas`: the ranks that share this rank's kv heads. In training mode Qwen v1's
    extrapolation past its context is off, as in its own code.
    """

    def __init__(
        self,
        config: ModelConfig,
        rank: int = 0,
        n: int = 1,
        replicas: dist.ProcessGroup | None = None,
        stages: Stages | None = None,
        stage_rank: int | None = 0,
    ) -> None:
        super().__init__()
        self.config, self.stages = config, stages or Stages()
        self.part = Part.of(config, self.stages, stage_rank)
        shard = Shard(tensor_table(config), rank, n)
        self.tok_embeddings: VocabParallelEmbedding | ParallelEmbedding
        if config.tie_word_embeddings and (self.part.first or self.part.last):
            embedding = shard["tok_embeddings.weight"]
            if not (self.part.first and self.part.last):  # both ends hold it
                with_copies(embedding, 2 * copies_of(embedding))
            self.tok_embeddings = VocabParallelEmbedding(embedding, rank)
        elif self.part.first:
            self.tok_embeddings = ParallelEmbedding(shard["tok_embeddings.weight"], config.dim)
        self.layers = Layers(
            {
                i: Block(config, i, shard.part(f"layers.{i}"), replicas)
                for layers in self.part.layers
                for i in layers
            }
        )
        if self.part.last:
            self._add_head(shard, rank, n)
        wk = shard.spec("layers.0.attention.wk.weight")
        self.kv_heads = wk.local_shape(n)[0] // config.head_dim  # of this rank
        self.recompute = "none"  # activation checkpointing: see CHECKPOINTING
        # Whether each of the model's ranks holds a part of the tokens between the products, of
        # whole sequences: see `SplitTokens`.
        self.sequence_parallel = False
        # Weights that data-parallel ranks share, or of which there are none here: what they are
        # computed in; and ZeRO's stage.
        self.computes_in: torch.dtype | None = None
        self.shard_stage = 0
        self.streamed: StreamedLayers | None = None  # if layers rest in host memory
        self.received: Received | None = None  # by the stage of a pipeline that is to compute
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self._rotary: Tensor | None = None

    def _add_head(self, shard: Shard, rank: int, n: int) -> None:
        config = self.config
        self.norm = RMSNorm(shard["norm.weight"], config.norm_eps)
        if config.head == "score":
            self.score = ReplicatedLinear(shard["score.weight"])
        elif config.head == "lm":
            vocabulary = "tok_embeddings.weight" if config.tie_word_embeddings else "output.weight"
            # This rank's entries without padding, and with it: so many columns the logits have.
            self.vocabulary = shard.real_size(vocabulary)
            self.vocabulary_part = shard.spec(vocabulary).local_shape(n)[0]
            # Ids that no text has are padding, too: the last of them, and holes [start, stop).
            self.holes: list[tuple[int, int]] = []
            first = rank * self.vocabulary_part
            for start, stop in reversed(config.ids_without_text):
                start, stop = max(start - first, 0), min(stop - first, self.vocabulary)
                if start < stop == self.vocabulary:
                    self.vocabulary = start
                elif start < stop:
                    self.holes.append((start, stop))
            if not config.tie_word_embeddings:
                self.output = ColumnParallelLinear(shard["output.weight"])

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of weights while they are computed with."""
        if self.computes_in is not None:
            return self.computes_in
        return cast(Block, next(iter(self.layers))).attention_norm.weight.dtype

    def forward(self, tokens: Tensor, layout, rows: Tensor | None = None) -> Tensor:
        """Hidden states after the last norm. tokens: ids [N], laid out as `layout` says → [N, dim].

        rows: those that are wanted, each once → [len(rows), dim]; past the last attention nothing
        is computed for others. With experts, and gradients wanted, the layout gets each sequence's
        `balance_loss`.
        """
        x, delta, router, region = self._through(tokens, layout, rows)
        if router is not None:
            layout.balance_loss = balance_loss([layout.means(router / self.config.n_layers)])
        hidden = region.whole(add_rms_norm(x, delta, self.norm)[1])
        return gather_rows(hidden, rows) if self.config.n_experts else hidden

    def region_of(self, tokens: int, layout) -> Region:
        """How so many tokens lie on the model's ranks."""
        splits = self.sequence_parallel and layout.is_whole
        return SplitTokens(tokens) if splits else WHOLE

    def pass_on(self, tokens: Tensor, layout) -> tuple[Tensor, ...]:
        """What a stage of a pipeline, but the last, gives to the next: `Received`'s tensors."""
        x, delta, router, _ = self._through(tokens, layout)
        x = x if delta is None else x + delta
        return (x,) if router is None else (x, router)

    @property
    def balances(self) -> bool:
        """Whether the decisions of experts' routers have a loss of their own."""
        wanted = self.config.n_experts and self.router_aux_loss_coef
        return bool(wanted) and torch.is_grad_enabled()

    def _through(
        self, tokens: Tensor, layout, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Region]:
        """Tokens, or what was received in their place, through the layers of one stage.

        Returns x, what is to be added to it, the sum of the routers' decisions over the layers so
        far where these are balanced, and how x lies.
        """
        region = self.region_of(tokens.size(0), layout)
        stage, router_sum = 0, None
        if self.received is None:
            x = self.tok_embeddings(tokens, region)
        else:
            stage, x, router_sum = self.received.stage, self.received.x, self.received.router
        rotary = self.rotary(layout)
        delta: Tensor | None = None
        for number in self.part.layers[stage]:
            block = self.layers.get_submodule(str(number))
            # Past the last attention only the wanted rows matter; the experts' balance, though,
            # counts every token.
            is_last = number == self.config.n_layers - 1
            wanted = rows if is_last and not self.config.n_experts else None
            before = region
            region = region if wanted is None else region.of(wanted.size(0))
            if self.recompute != "none" and torch.is_grad_enabled():
                # A block keeps what it begins with: one tensor, not two.
                x = x if delta is None else x + delta
                contexts = CHECKPOINTING[self.recompute]
                inputs = x, layout, rotary, wanted, None, before, region
                x, delta, router = checkpoint(
                    block, *inputs, use_reentrant=False, context_fn=contexts
                )
            else:
                x, delta, router = block(x, layout, rotary, wanted, delta, before, region)
            if self.balances:
                router_sum = router if router_sum is None else router_sum + router
        return x, delta, router_sum, region

    def partial_gradients(self) -> list[nn.Parameter]:
        """Weights of which each of the model's ranks has a part of the gradient: their tokens'."""
        if not self.sequence_parallel:
            return []
        return [
            weight
            for name, part in self.named_modules()
            if type(part) is RMSNorm or name.endswith(".gate")  # not the heads' norms
            for weight in part.parameters()
        ]

    def stackable(self) -> list[Attention | FeedForward]:
        """The parts with projections that may be stacked, in order: not the experts."""
        return [part for part in self.modules() if isinstance(part, (Attention, FeedForward))]

    def stack_projections(self, device: torch.device) -> None:
        """Make one product of q, k, v, and one of w1, w3.

        Allocates these weights, to be filled in place. For plain weights only.
        """
        for part in self.stackable():
            part.stack(device)

    def stream_layers(self, device: torch.device) -> None:
        """Let the layers, which are in host memory, come to the device in turn; freezes them."""
        self.requires_grad_(False)
        self.streamed = StreamedLayers(self.layers, device)

    @property
    def vocabulary_layer(self) -> ColumnParallelLinear | VocabParallelEmbedding:
        """The output layer, which may be the embedding."""
        return self.tok_embeddings if self.config.tie_word_embeddings else self.output

    @property
    def vocabulary_weight(self) -> nn.Parameter:
        return self.vocabulary_layer.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's columns of the vocabulary's logits: [M, dim] → [M, vocabulary / n]."""
        layer = self.vocabulary_layer
        hidden = copy_to_model_parallel_region(hidden)
        logits = exact_linear(hidden, layer.weight, packed=layer.packed)
        logits = fill_padding(logits, self.vocabulary, dim=-1, value=IMPOSSIBLE)
        for start, stop in self.holes:
            logits.narrow(-1, start, stop - start).fill_(IMPOSSIBLE)
        return logits

    def scores(self, hidden: Tensor) -> Tensor:
        """The scalar head in fp32, the same on every rank: [M, dim] → [M]."""
        return linear(hidden.float(), self.score.weight.float()).squeeze(-1)

    def rotary(self, layout) -> tuple[Tensor, Tensor]:
        """The rotation of each token's queries and of its keys, complex, [N, head_dim / 2] each."""
        c, positions = self.config, layout.positions
        table = self._rotary
        if table is None or table.size(0) < layout.context or table.device != positions.device:
            # Twice as long as the last one: sequences grow by a token a step.
            length = max(layout.context, 256 if table is None else 2 * table.size(0))
            table = self._rotary = rotary_table(c, length, positions.device)
        keys = table[positions]
        # The rest is Qwen v1's extrapolation past its context.
        if self.training or layout.context <= c.max_seq_len:
            return keys, keys
        if c.use_dynamic_ntk:
            keys = ntk_rotary(c, positions, layout.prompt_lengths)
        return keys * logn(c, positions) if c.use_logn_attn else keys, keys


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: no dropout, and Qwen v1's extrapolation past its context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def build(
    config: ModelConfig,
    rank: int,
    n: int,
    dtype: torch.dtype,
    replicas: dist.ProcessGroup | None = None,
    stages: Stages | None = None,
    stage_rank: int | None = 0,
) -> Transformer:
    """Rank `rank` of `n`'s part on the meta device: names, shapes and copies, no memory."""
    with torch.device("meta"):
        model = Transformer(config, rank, n, replicas, stages, stage_rank)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    if stage_rank is None:
        model.computes_in = dtype
    return model


def build_part(
    config: ModelConfig, parallel: Parallel, dtype: torch.dtype, stages: Stages | None = None
) -> Transformer:
    """What this rank has of a model in a division, as `build` makes it; all ranks come here.

    stages: of a pipeline, one for each of its ranks when not given.
    """
    n = parallel.layout.tp
    # With more ranks than kv heads, neighbours hold the same head and sum its gradients.
    wk = tensor_table(config)["layers.0.attention.wk.weight"]
    replicas = parallel.replicas(wk.copies(n))
    stages = stages or cut_in_stages(config, parallel.layout.pp)
    stage_rank = parallel.pp_rank if parallel.is_member else None
    return build(config, parallel.mp_rank, n, dtype, replicas, stages, stage_rank)
