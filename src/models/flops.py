"""Floating-point operations of a training step: what the mathematics needs.

Recomputation is not counted.
"""

import math
from dataclasses import dataclass

import torch.distributed as dist

from src.models.config import ModelConfig
from src.models.layout import tensor_table
from src.models.lora import lora_layers
from src.models.transformer import Transformer


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of the whole model, over all its ranks.

    per_token: in the trunk; per_needed: for each row that the loss needs, in the head and past the
    last layer's attention; per_pair: for each pair of tokens, in attention.
    """

    per_token: float
    per_needed: float
    per_pair: float

    @classmethod
    def of(cls, model: Transformer, pipeline: dist.ProcessGroup | None = None) -> "TrainingFlops":
        """2 per weight forward, 2 for the input's gradient, and 2 more for a trained weight's own.

        Layers below the lowest with a trained weight need no gradients; of a frozen model only the
        forward is left. Of the experts those count that a token goes through. A collective of the
        ranks that are stages of the model, if it is a pipeline.
        """
        config = model.config
        trained = {
            name.replace(".base.", "."): p.requires_grad for name, p in model.named_parameters()
        }
        adapters = [
            (name, layer.config.rank, layer.spec.shape) for name, layer in lora_layers(model)
        ]
        if pipeline is not None:
            every: list = [None] * dist.get_world_size(pipeline)
            dist.all_gather_object(every, (trained, adapters), group=pipeline)
            trained = {name: flag for part, _ in every for name, flag in part.items()}
            adapters = [adapter for _, part in every for adapter in part]
        # The lowest layer that needs gradients; the embedding is below all of them.
        trains = [name.split(".") for name, is_trained in trained.items() if is_trained]
        layers = [int(number) for part, number, *_ in trains if part == "layers"]
        lowest = min(layers, default=config.n_layers)
        lowest = -1 if trained["tok_embeddings.weight"] else lowest
        # The model's own weights: a matrix each, or a stack of the experts'.
        per_token = per_needed = 0.0
        for name, spec in tensor_table(config).items():
            if len(spec.shape) < 2 or name == "score.weight":
                continue
            weights = float(math.prod(spec.shape))
            if name in ("tok_embeddings.weight", "output.weight"):
                if name == "output.weight" or (config.tie_word_embeddings and config.head == "lm"):
                    per_needed += weights * (2 + 2 * any(trained.values()) + 2 * trained[name])
                continue
            if len(spec.shape) == 3:
                weights *= config.experts_per_token / config.n_experts
            flops = weights * (2 + 2 * (int(name.split(".")[1]) >= lowest) + 2 * trained[name])
            if _past_attention(name, config):
                per_needed += flops
            else:
                per_token += flops
        # Adapters, whose factors are all trained.
        for name, rank, shape in adapters:
            weights = rank * (shape[-1] + shape[-2])
            flops = 6.0 * weights * (config.experts_per_token if len(shape) == 3 else 1)
            if _past_attention(name, config):
                per_needed += flops
            else:
                per_token += flops
        # Scores and the weighted sum of values: 4 per pair and column forward, twice that backward.
        passes = 3 * config.n_layers - 2 * max(lowest, 0)
        per_pair = 4.0 * config.n_heads * config.head_dim * passes
        return cls(per_token, per_needed, per_pair)

    def __call__(self, tokens: int, needed: int, pairs: float) -> float:
        return self.per_token * tokens + self.per_needed * needed + self.per_pair * pairs


def _past_attention(name: str, config: ModelConfig) -> bool:
    """Whether a weight stands behind the last attention.

    There only the rows are computed that the loss needs.
    """
    is_in_last = name.startswith(f"layers.{config.n_layers - 1}.") and not config.n_experts
    return is_in_last and (".wo" in name or ".feed_forward." in name)


def attention_pairs(config: ModelConfig, length: int, prefix: int = 0) -> float:
    """Pairs of a query and a key that it sees, in one sequence.

    It is a mean over the layers, some of which may have a window.
    """

    def pairs(window: int) -> float:
        # `short`: queries that see everything before them
        short = max(0, min(length, window - prefix)) if window else length
        return short * prefix + short * (short + 1) / 2 + (length - short) * window

    layers, plain = config.n_layers, config.n_layers
    if config.sliding_window:
        plain = min(config.first_window_layer, layers)
    return (plain * pairs(0) + (layers - plain) * pairs(config.sliding_window)) / layers
