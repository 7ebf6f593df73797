"""One transformer for every family, role and degree.

It works on packed tokens [N]: a layout object says where each sequence lies and does the attention (`Packed` for whole
sequences, the generation cache for one token at a time), so training, scoring, prefill and decoding are one forward.
Head counts are read off the shards' shapes; what the families differ in are values of the config.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from src.models.attention import gather_rows
from src.models.config import ModelConfig
from src.models.elementwise import HeadNorm, RMSNorm, rotate, swiglu
from src.models.experts import MixtureOfExperts, balance_loss
from src.models.layout import TensorSpec, tensor_table
from src.models.rotary import logn, ntk_rotary, rotary_table
from src.parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    ReplicatedLinear,
    RowParallelLinear,
    Stacked,
    VocabParallelEmbedding,
    copy_to_model_parallel_region,
    parameter,
    reduce_from_model_parallel_region,
)
from src.parallel.vocab import IMPOSSIBLE

_aten = torch.ops.aten
KEPT = {  # what is dear to compute: products and attention
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
}


def _keep_products(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


# Activation checkpointing: what of a block is computed again in backward. "full": all but its input.
CHECKPOINTING = {
    "selective": partial(create_selective_checkpoint_contexts, _keep_products),
    "full": noop_context_fn,
}


class Shard:
    """Parameters of one rank of `n`, made by name as the table says; `at` looks into a part of the model."""

    def __init__(self, table: dict[str, TensorSpec], rank: int, n: int, prefix: str = "") -> None:
        self.table, self.rank, self.n, self.prefix = table, rank, n, prefix

    def at(self, part: str) -> "Shard":
        return Shard(self.table, self.rank, self.n, f"{self.prefix}{part}.")

    def spec(self, name: str) -> TensorSpec:
        return self.table[self.prefix + name]

    def real(self, name: str) -> int:
        """How much of this rank's part along the cut is no padding."""
        start, stop = self.spec(name).local_range(self.rank, self.n)
        return stop - start

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.table

    def __getitem__(self, name: str) -> nn.Parameter | None:
        """A parameter, or None where the model has none of the name (a bias)."""
        if name not in self:
            return None
        spec = self.spec(name)
        return parameter(spec.local_shape(self.n), spec.copies(self.n))


class Attention(nn.Module):
    def __init__(
        self, config: ModelConfig, layer: int, shard: Shard, replicas: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window = config.sliding_window if layer >= config.first_window_layer else 0
        self.wq = ColumnParallelLinear(shard["wq.weight"], shard["wq.bias"])
        self.wk = ColumnParallelLinear(shard["wk.weight"], shard["wk.bias"], replicas)
        self.wv = ColumnParallelLinear(shard["wv.weight"], shard["wv.bias"], replicas)
        self.wo = RowParallelLinear(shard["wo.weight"])
        self.q_norm = HeadNorm(shard["q_norm.weight"], config.norm_eps) if config.qk_norm else None
        self.k_norm = HeadNorm(shard["k_norm.weight"], config.norm_eps) if config.qk_norm else None
        self.heads = shard.real("wq.weight") // config.head_dim  # without padding
        self.stacked: Stacked | None = None

    def stack(self, device: torch.device) -> None:
        self.stacked = Stacked([self.wq, self.wk, self.wv], device)

    def forward(
        self, x: Tensor, layout, rotary: tuple[Tensor, Tensor], rows: Tensor | None = None
    ) -> Tensor:
        x = copy_to_model_parallel_region(x)
        layers = (self.wq, self.wk, self.wv)
        parts = (
            self.stacked(x, layers).split(self.stacked.sizes, -1)
            if self.stacked
            else [layer(x) for layer in layers]
        )
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = layout.attend(self.layer, rotate(q, rotary[0]), rotate(k, rotary[1]), v, self.window)
        padding = out.size(1) - self.heads
        if padding:  # a padded head beside a real kv head would give its values' mean, and wo's zeros a gradient
            out = F.pad(out[:, : self.heads], (0, 0, 0, padding))
        out = out.flatten(-2)
        return reduce_from_model_parallel_region(
            self.wo(out if rows is None else gather_rows(out, rows))
        )


class FeedForward(nn.Module):
    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(shard["w1.weight"])
        self.w2 = RowParallelLinear(shard["w2.weight"])
        self.w3 = ColumnParallelLinear(shard["w3.weight"])
        self.stacked: Stacked | None = None

    def stack(self, device: torch.device) -> None:
        self.stacked = Stacked([self.w1, self.w3], device)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = copy_to_model_parallel_region(x)
        layers = (self.w1, self.w3)
        joined = (
            self.stacked(x, layers)
            if self.stacked
            else torch.cat([layer(x) for layer in layers], -1)
        )
        return reduce_from_model_parallel_region(self.w2(swiglu(joined))), None


class Block(nn.Module):
    def __init__(
        self, config: ModelConfig, layer: int, shard: Shard, replicas: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.attention = Attention(config, layer, shard.at("attention"), replicas)
        feed_forward = shard.at("feed_forward")
        self.feed_forward = (
            MixtureOfExperts(config, feed_forward)
            if config.n_experts
            else FeedForward(feed_forward)
        )
        self.attention_norm = RMSNorm(shard["attention_norm.weight"], config.norm_eps)
        self.ffn_norm = RMSNorm(shard["ffn_norm.weight"], config.norm_eps)

    def forward(
        self, x: Tensor, layout, rotary: tuple[Tensor, Tensor], rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output (at some rows only), and its router's decisions where it has experts."""
        attended = self.attention(self.attention_norm(x), layout, rotary, rows)
        x = (x if rows is None else gather_rows(x, rows)) + attended
        out, router = self.feed_forward(self.ffn_norm(x))
        return x + out, router


class Transformer(nn.Module):
    """The trunk and its head: `output` (vocabulary logits) or `score` (a scalar), as `config.head` says.

    It is rank `rank` of `n`'s part. Parameters are uninitialised: `src/checkpoint` fills them. `replicas`: the ranks that
    share this rank's kv heads. In training mode Qwen v1's extrapolation past its context is off, as in its own code.
    """

    def __init__(
        self,
        config: ModelConfig,
        rank: int = 0,
        n: int = 1,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        shard = Shard(tensor_table(config), rank, n)
        embedding = shard["tok_embeddings.weight"]
        if config.tie_word_embeddings:
            self.tok_embeddings = VocabParallelEmbedding(embedding, rank)
        else:
            self.tok_embeddings = ParallelEmbedding(embedding, config.dim)
        self.layers = nn.ModuleList(
            Block(config, i, shard.at(f"layers.{i}"), replicas) for i in range(config.n_layers)
        )
        self.norm = RMSNorm(shard["norm.weight"], config.norm_eps)
        if config.head == "score":
            self.score = ReplicatedLinear(shard["score.weight"])
        else:
            vocabulary = "tok_embeddings.weight" if config.tie_word_embeddings else "output.weight"
            self.vocabulary = shard.real(vocabulary)  # entries of this rank without padding
            self.vocabulary_part = shard.spec(vocabulary).local_shape(n)[
                0
            ]  # with padding: the logits' columns
            if not config.tie_word_embeddings:
                self.output = ColumnParallelLinear(shard["output.weight"])
        self.kv_heads = (
            shard.spec("layers.0.attention.wk.weight").local_shape(n)[0] // config.head_dim
        )  # of this rank
        self.recompute = "none"  # activation checkpointing: see CHECKPOINTING
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self._rotary = None

    def forward(self, tokens: Tensor, layout, rows: Tensor | None = None) -> Tensor:
        """Hidden states after the last norm. tokens: ids [N], laid out as `layout` says → [N, dim].

        rows: those that are wanted, each once → [len(rows), dim]; past the last attention nothing is computed for others.
        With experts, and gradients wanted, the layout gets each sequence's `balance_loss`.
        """
        rotary = self.rotary(layout)
        x, routers = self.tok_embeddings(tokens), []
        for block in self.layers:
            last = (
                block is self.layers[-1] and not self.config.n_experts
            )  # the experts' balance counts every token
            wanted = rows if last else None
            if self.recompute != "none" and torch.is_grad_enabled():
                again = CHECKPOINTING[self.recompute]
                x, router = checkpoint(
                    block, x, layout, rotary, wanted, use_reentrant=False, context_fn=again
                )
            else:
                x, router = block(x, layout, rotary, wanted)
            if router is not None and torch.is_grad_enabled() and self.router_aux_loss_coef:
                routers.append(layout.means(router))
        if routers:
            layout.balance_loss = balance_loss(routers)
        if rows is not None and self.config.n_experts:
            x = gather_rows(x, rows)
        return self.norm(x)

    def stack_projections(self, device: torch.device) -> None:
        """One product for q, k, v, and one for w1, w3: allocates these weights, to be filled in place. For plain weights only."""
        for block in self.layers:
            block.attention.stack(device)
            if isinstance(block.feed_forward, FeedForward):
                block.feed_forward.stack(device)

    @property
    def vocabulary_weight(self) -> nn.Parameter:
        """The output layer's, which may be the embedding's."""
        return (self.tok_embeddings if self.config.tie_word_embeddings else self.output).weight

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's columns of the vocabulary's logits: [M, dim] → [M, vocabulary / n]."""
        logits = F.linear(copy_to_model_parallel_region(hidden), self.vocabulary_weight)
        padding = logits.size(-1) - self.vocabulary
        return (
            F.pad(logits[..., : self.vocabulary], (0, padding), value=IMPOSSIBLE)
            if padding
            else logits
        )

    def scores(self, hidden: Tensor) -> Tensor:
        """The scalar head in fp32, the same on every rank: [M, dim] → [M]."""
        return F.linear(hidden.float(), self.score.weight.float()).squeeze(-1)

    def rotary(self, layout) -> tuple[Tensor, Tensor]:
        """The rotation of each token's queries and of its keys, complex, [N, head_dim / 2] each."""
        c, positions = self.config, layout.positions
        device = positions.device
        if (
            self._rotary is None
            or self._rotary.size(0) < layout.context
            or self._rotary.device != device
        ):
            self._rotary = rotary_table(c, max(layout.context, 256), device)
        keys = self._rotary[positions]
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
) -> Transformer:
    """Rank `rank` of `n`'s part of the model on the meta device: names, shapes and copies, no memory."""
    with torch.device("meta"):
        model = Transformer(config, rank, n, replicas)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model
