"""One transformer for every family, role and degree.

It works on packed tokens [N]: a layout object says where each sequence lies and does the attention (`Packed` for whole
sequences, the generation cache for one token at a time), so training, scoring, prefill and decoding are one forward.
Head counts are read off the shards' shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.models.config import ModelConfig
from src.parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    ReplicatedLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_model_parallel_region,
)


def rotary_table(config: ModelConfig, length: int, device: torch.device) -> Tensor:
    """cos and sin of position × frequency, as complex numbers [length, head_dim / 2] (RoFormer, arXiv 2104.09864)."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    angles = torch.outer(torch.arange(length, device=device).float(), 1.0 / config.rope_theta**exponents)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn interleaved pairs (Meta's convention). x: [N, heads, head_dim]; rotary: [N, head_dim / 2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary.unsqueeze(1)).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.wq = ColumnParallelLinear(config.dim, config.n_heads * config.head_dim)
        self.wk = ColumnParallelLinear(config.dim, config.n_kv_heads * config.head_dim)
        self.wv = ColumnParallelLinear(config.dim, config.n_kv_heads * config.head_dim)
        self.wo = RowParallelLinear(config.n_heads * config.head_dim, config.dim)

    def forward(self, x: Tensor, layout, rotary: Tensor) -> Tensor:
        x = copy_to_model_parallel_region(x)
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        out = layout.attend(self.layer, rotate(q, rotary), rotate(k, rotary), v)
        return self.wo(out.flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(config.dim, config.hidden_dim)
        self.w2 = RowParallelLinear(config.hidden_dim, config.dim)
        self.w3 = ColumnParallelLinear(config.dim, config.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = copy_to_model_parallel_region(x)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, layout, rotary: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), layout, rotary)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """The trunk and its head: `output` (vocabulary logits) or `score` (a scalar), as `config.head` says.

    Parameters are uninitialised: `src/checkpoint` or `init_weights` fills them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        embedding = VocabParallelEmbedding if config.tie_word_embeddings else ParallelEmbedding
        self.tok_embeddings = embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if config.head == "score":
            self.score = ReplicatedLinear(config.dim, 1)
        elif not config.tie_word_embeddings:
            self.output = ColumnParallelLinear(config.dim, config.vocab_size)
        self.kv_heads = self.layers[0].attention.wk.weight.size(0) // config.head_dim  # of this rank
        self.recompute = False  # activation checkpointing: keep block inputs only, and compute the rest again
        self._rotary = None

    def forward(self, tokens: Tensor, layout) -> Tensor:
        """Hidden states after the last norm. tokens: ids [N], laid out as `layout` says → [N, dim]."""
        rotary = self.rotary(tokens.device, layout.context)[layout.positions]
        x = self.tok_embeddings(tokens)
        for block in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, layout, rotary, use_reentrant=False)
            else:
                x = block(x, layout, rotary)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's columns of the vocabulary's logits: [M, dim] → [M, vocabulary / n]."""
        weight = self.tok_embeddings.weight if self.config.tie_word_embeddings else self.output.weight
        return F.linear(copy_to_model_parallel_region(hidden), weight)

    def scores(self, hidden: Tensor) -> Tensor:
        """The scalar head in fp32, the same on every rank: [M, dim] → [M]."""
        return F.linear(hidden.float(), self.score.weight.float()).squeeze(-1)

    def rotary(self, device: torch.device, length: int) -> Tensor:
        """The rotary table for at least `length` positions, kept between calls."""
        if self._rotary is None or self._rotary.size(0) < length or self._rotary.device != device:
            self._rotary = rotary_table(self.config, max(length, 256), device)
        return self._rotary


def build(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """This rank's shard of the model, allocated once in its final dtype, not yet filled."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype)
    flags = {name: p.model_parallel for name, p in model.named_parameters()}
    model = model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        parameter.model_parallel = flags[name]
    return model
