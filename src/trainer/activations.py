"""How many tokens a GPU computes at a time in training, where --max_tokens_per_batch does not say.

Counted from sizes alone: what autograd keeps of each token, beside what lies on the device anyway.
So the same run gets the same number again, and a dry run knows it. Off by less than a tenth from
what was measured (docs/performance.md).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from src.models.config import ModelConfig
from src.models.layout import layer_table
from src.models.lora import lora_layers
from src.models.quantize import stored_bytes
from src.models.transformer import Transformer
from src.parallel.context import repeats_of
from src.parallel.setup import Parallel
from src.parallel.sharding import own, sharded_parts
from src.parallel.vocab import LOGITS_AT_ONCE_CUDA
from src.settings.model import PackedBatchSettings
from src.trainer.averages import PASSING
from src.trainer.optimizer import Optimizer

FP32 = 4
USABLE = 0.92  # of the memory: the rest is CUDA's own, the libraries', and gaps
MOST = 2**16  # more at a time is no faster
CHUNK_COPIES = 3  # of a chunk of logits in fp32, and half as many in half precision

Batches = TypeVar("Batches", bound=PackedBatchSettings)


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward and backward takes: of each token, and however many there are."""

    per_token: float
    fixed: float

    def tokens_in(self, room: float) -> int:
        return int((room - self.fixed) / self.per_token)


def activations(
    config: ModelConfig,
    n: int,
    dtype: torch.dtype,
    recompute: str,
    lora: bool = False,
    sequence_parallel: bool = False,
    context: int = 1,
) -> Activations:
    """Of a model in training at `n` model-parallel ranks. recompute: --checkpoint_activations.

    context: ranks that divide the tokens; `per_token` is a rank's part of the bytes of each.
    """
    how = n, dtype, recompute, lora, sequence_parallel, context
    kept, at_work = layer_activations(config, *how)
    size = dtype.itemsize
    logits = LOGITS_AT_ONCE_CUDA * CHUNK_COPIES * (FP32 + size / 2)
    per_token = (config.n_layers * kept + at_work + end_activations(config, size)) / context
    return Activations(per_token, logits if config.head == "lm" else 0.0)


def layer_activations(
    config: ModelConfig,
    n: int,
    dtype: torch.dtype,
    recompute: str,
    lora: bool = False,
    sequence_parallel: bool = False,
    context: int = 1,
) -> tuple[float, float]:
    """Bytes of each token that a layer keeps for backward, and those of one that is at work."""
    size, d, table = dtype.itemsize, config.dim, layer_table(config)
    q, k = (table[f"attention.{name}.weight"].local_shape(n)[0] for name in ("wq", "wk"))
    split = n if sequence_parallel else 1  # ranks that share the tokens between the products
    repeats = repeats_of(k // config.head_dim, context)
    # Norms: their input in fp32, what they make of it, and that times the weight, which is what
    # the products get: all tokens.
    norms = 2 * ((FP32 + size) * d / split + size * d)
    # Products' outputs, queries and keys once more when they are rotated, and attention's output.
    attention = size * (2 * q + 3 * k + q)
    if context > 1:  # kv heads that are repeated, and the output once more when it comes back
        attention += size * (2 * (repeats - 1) * k + q)
    of_products = size * (q + 2 * k + d)
    if config.n_experts:  # each token goes through several, and its rows are copied for them
        f = table["feed_forward.experts.w1.weight"].local_shape(n)[1]
        feed_forward = size * config.experts_per_token * (4 * f + 3 * d)
        of_products += size * config.experts_per_token * (2 * f + d)
    else:
        f = table["feed_forward.w1.weight"].local_shape(n)[0]
        feed_forward = size * 3 * f
        of_products += size * (2 * f + d)
    whole = norms + attention + feed_forward
    kept = {
        "none": whole,
        "selective": size * (d / split + q) + of_products,
        "full": size * d / split,
    }[recompute]
    # Its gradients, or what is computed again of it.
    # With adapters twice its products: counted where it was measured, with the adapters apart.
    return kept, whole + (of_products if lora else 0)


def end_activations(config: ModelConfig, size: int) -> float:
    """Bytes of each token outside of the layers: embedding, last norm, rotation."""
    return (FP32 + 3 * size) * config.dim + FP32 * 2 * config.head_dim


def rounded_down(tokens: int) -> int:
    """To a power of two, or one and a half times that: 1, 2, 3, 4, 6, 8, 12 …."""
    power = 1 << (tokens.bit_length() - 1)
    return power * 3 // 2 if tokens >= power * 3 // 2 > power else power


def tokens_at_once(trained: Iterable[Activations], memory: int, held: int, max_seq_len: int) -> int:
    """How many tokens to compute at a time; a row of `max_seq_len` at least.

    trained: of each model; memory: of the device; held: what lies there while they are trained,
    gradients and optimizers whole.
    """
    fitting = min(each.tokens_in(USABLE * memory - held) for each in trained)
    return max(max_seq_len, rounded_down(min(max(fitting, 1), MOST)))


def limited(
    batches: Batches,
    trained: list[tuple[Transformer, Optimizer]],
    held: int,
    parallel: Parallel,
    memory: int | None = None,
) -> Batches:
    """The settings with a limit on tokens on a GPU, where they have none; elsewhere as they are.

    held: see `held_bytes`; memory: of the device, in bytes, found out when not given. All ranks
    come here, and get the limit of the fullest.
    """
    memory = device_memory(parallel.device) if memory is None else memory
    if memory is None or batches.max_tokens_per_batch is not None:
        return batches
    of_each = [
        activations(
            model.config,
            optimizer.parallel.layout.tp,
            model.dtype,
            model.recompute,
            bool(lora_layers(model)),
            model.sequence_parallel,
            parallel.context.size,
        )
        for model, optimizer in trained
    ]
    most = torch.tensor(held, device=parallel.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    tokens = tokens_at_once(of_each, memory, int(most), batches.max_seq_len)
    return replace(batches, max_tokens_per_batch=tokens)


def held_bytes(models: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> int:
    """What a step keeps on the device beside activations, on this rank.

    Weights, those that several models share once; gradients, both averages and the masters, also
    before they are made.
    """
    models = list(models)
    weights = {id(weight): weight for model in models for weight in model.parameters()}
    held = sum(stored_bytes(own(weight.data)) for weight in weights.values())
    held += sum(gathered_bytes(model) for model in models if isinstance(model, Transformer))
    for optimizer in optimizers:
        held += sum(FP32 * own(p).numel() for p in optimizer.parameters)
        state = optimizer.state_bytes()
        held += min(state, PASSING) if optimizer.method.offload else state
    return held


def gathered_bytes(model: Transformer) -> int:
    """What data-parallel ranks that share weights put together of them at a time, at most."""
    if not sharded_parts(model):
        return 0
    *parts, _ = sharded_parts(model)
    of_parts = [(numbers_of(part), trained_numbers_of(part)) for part in parts]
    ends = [
        total - sum(of_part[i] for of_part in of_parts)
        for i, total in enumerate((numbers_of(model), trained_numbers_of(model)))
    ]
    shared: Any = next(model.parameters())
    overlaps = shared.device_mesh.device_type == "cuda"  # also where it rests in host memory
    end = ends[0], ends[1]
    return bytes_together(of_parts, end, model.dtype.itemsize, model.shard_stage, overlaps)


def bytes_together(
    parts: list[tuple[int, int]], end: tuple[int, int], size: int, stage: int, overlaps: bool
) -> int:
    """Bytes of shared weights that are put together at a time, with as much of the gradients.

    parts, end: numbers, and those that are trained, of each block and of the model around them;
    size: bytes of a number; stage: ZeRO's; overlaps: whether a GPU gets the next part's weights,
    and sums the last part's gradients, meanwhile.

    Gradients are summed in fp32. Stage 3 keeps the model's end and the part at work: in forward
    beside what it and the part before came in, in backward beside its gradients. Stage 2 keeps all
    weights. The end comes first, and is summed last.
    """
    of_parts, trained = [n for n, _ in parts], [n for _, n in parts]
    most, (of_end, trained_end) = max(of_parts), end
    beside = 2 if overlaps else int(stage == 2)
    at_work = max(3 * size * most, beside * size * most + (size + FP32) * max(trained))
    others = sum(of_parts) - most if stage == 2 else 0
    at_last = max(2 * size * of_end, (size + FP32) * trained_end + size * trained[0])
    return max(at_work + size * (of_end + trained_end + others), at_last)


def numbers_of(part: nn.Module) -> int:
    """In a part's weights, all rows of those that ranks share."""
    return sum(weight.numel() for weight in part.parameters())


def trained_numbers_of(part: nn.Module) -> int:
    """Of these, those that are trained."""
    return sum(weight.numel() for weight in part.parameters() if weight.requires_grad)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def described(tokens: int | None) -> list[str]:
    """What the log and the dry run say of the limit, if there is one."""
    return (
        [] if tokens is None else [f"at most {tokens:,} tokens at a time (--max_tokens_per_batch)"]
    )
