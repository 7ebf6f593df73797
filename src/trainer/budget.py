"""What a model in training takes of a rank's memory, from its table of tensors alone.

The numbers are those of what is built: the same table, the same share of the optimizer's state
(ZeroRedundancyOptimizer's). Activations, batches and libraries come on top.
"""

import heapq
from dataclasses import dataclass

import torch

from src.kernels.codes import BLOCK
from src.models.config import ModelConfig
from src.models.layout import TensorSpec, tensor_table
from src.models.lora import TARGETS, LoRAConfig, lora_table
from src.models.places import Placement
from src.models.stages import Stages, cut_in_stages
from src.models.streaming import BUFFERS
from src.trainer.averages import PASSING, PLAIN, Method, bytes_of_form, form_of, is_for_muon

FP32 = 4  # bytes of a gradient, and of a master weight


@dataclass(frozen=True)
class Budget:
    """Bytes of the fullest rank."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    host: int = 0  # of the optimizer's state in host memory

    @property
    def total(self) -> int:
        """On the device, with what of the state in host memory passes over it at a time."""
        return self.weights + self.gradients + self.optimizer + min(self.host, PASSING)


def model_budget(
    config: ModelConfig,
    n: int,
    dtype: torch.dtype,
    quantize: str | None = None,
    pp_size: int = 1,
) -> Budget:
    """A frozen model at `n` ranks, or at so many for each stage of a pipeline."""
    stages = cut_in_stages(config, pp_size)
    weights = [0] * pp_size
    for name, spec in tensor_table(config).items():
        for rank in stages.holders(name, config.tie_word_embeddings):
            weights[rank] += _weight_bytes(name, spec, n, dtype, quantize)
    return Budget(max(weights))


def streamed_bytes(
    config: ModelConfig,
    n: int,
    dtype: torch.dtype,
    quantize: str | None = None,
    lora: LoRAConfig | None = None,
) -> tuple[int, int]:
    """(bytes on the device, bytes in host memory) of a model whose layers come in turn.

    At `n` ranks, with an adapter beside the weights, if there is one. What aligns the tensors of a
    layer, less than 64 bytes each, comes on top.
    """
    layers = sum(
        _weight_bytes(name, spec, n, dtype, quantize)
        for name, spec in tensor_table(config).items()
        if name.startswith("layers.")
    )
    ends = model_budget(config, n, dtype, quantize).weights - layers
    layers += adapter_bytes(config, n, dtype, lora)
    return ends + layers // config.n_layers * min(BUFFERS, config.n_layers), layers


def training_budget(
    config: ModelConfig,
    n: int,
    dp_size: int,
    dtype: torch.dtype,
    lora: LoRAConfig | None = None,
    quantize: str | None = None,
    freeze_layers: int = 0,
    zero: int = 1,
    stages: Stages | None = None,
    method: Method = PLAIN,
) -> Budget:
    """A model in training at `n` model-parallel and `dp_size` data-parallel ranks.

    lora: the adapter that is trained in place of the weights; stages: of a pipeline, whose fullest
    rank counts; method: of the optimizer.
    """
    stages = stages or Stages()
    adapter = {} if lora is None else lora_table(config, lora)
    how = lora is not None, n, dp_size, dtype, quantize, freeze_layers, zero, method

    def of_ranks(table: dict[str, TensorSpec]) -> list[dict[str, TensorSpec]]:
        """What each rank of the pipeline holds of it."""
        parts: list[dict[str, TensorSpec]] = [{} for _ in range(stages.ranks)]
        for name, spec in table.items():
            for rank in stages.holders(name, config.tie_word_embeddings):
                parts[rank][name] = spec
        return parts

    tables = zip(of_ranks(tensor_table(config)), of_ranks(adapter))
    budgets = [_rank_budget(table, of_adapter, *how) for table, of_adapter in tables]
    return max(budgets, key=lambda budget: budget.total)


def _rank_budget(
    table: dict[str, TensorSpec],
    adapter: dict[str, TensorSpec],
    adapted: bool,
    n: int,
    dp_size: int,
    dtype: torch.dtype,
    quantize: str | None,
    freeze_layers: int,
    zero: int,
    method: Method,
) -> Budget:
    """`training_budget` of a rank with these tensors, of the model and of its adapter."""
    weights = sum(_weight_bytes(name, spec, n, dtype, quantize) for name, spec in table.items())
    trained = dict(table)
    if adapted:
        weights += sum(_numel(spec, n) for spec in adapter.values()) * dtype.itemsize
        score = {name: spec for name, spec in table.items() if name == "score.weight"}
        trained = adapter | score
    at_first = dict(trained)
    frozen = {"tok_embeddings"} | {f"layers.{i}" for i in range(freeze_layers)}
    if freeze_layers:
        trained = {name: spec for name, spec in trained.items() if not _is_in(name, frozen)}
    shares_weights = zero >= 2 and dp_size > 1
    # Weights that are in fp32 anyway are their own masters, but for an update elsewhere.
    is_own_master = (dtype == torch.float32 or shares_weights) and not method.on_cpu
    placement = Placement(n, dp_size, sharded=shares_weights)

    def state(name: str, spec: TensorSpec) -> _State:
        """Both averages, or what the method has, the master, and a counter of steps."""
        group = 2 if len(spec.shape) == 1 else 1
        kind = method.kind
        if kind == "muon":
            group, kind = (0, kind) if is_for_muon(name, len(spec.shape)) else (group, "adamw")
        shape = placement.local_shape(spec, 0)  # the first rank has no fewer rows than others
        numbers, whole = torch.Size(shape).numel(), torch.Size(spec.shape).numel()
        averages = bytes_of_form(form_of(kind, shape, whole))
        return _State(numbers, group, averages + (0 if is_own_master else FP32 * numbers) + FP32)

    states = [state(name, spec) for name, spec in trained.items()]
    gradients = FP32 * sum(each.numbers for each in states)
    if shares_weights:
        # Each rank keeps its rows, in fp32 what is trained but for --freeze_layers, as FSDP has it.
        rows = {name: _numel_of(placement, spec) for name, spec in {**table, **at_first}.items()}
        exact = sum(rows[name] for name in at_first)
        weights = FP32 * exact + dtype.itemsize * (sum(rows.values()) - exact)
    divides = zero and dp_size > 1 and not shares_weights
    shares = _zero_shares(states, dp_size) if divides else [states]
    optimizer = max(sum(each.size for each in share) for share in shares)
    if method.offload:
        return Budget(weights, gradients, 0, optimizer)
    return Budget(weights, gradients, optimizer)


def adapter_bytes(config: ModelConfig, n: int, dtype: torch.dtype, lora: LoRAConfig | None) -> int:
    """A frozen adapter at `n` ranks."""
    specs = lora_table(config, lora).values() if lora is not None else []
    return sum(_numel(spec, n) for spec in specs) * dtype.itemsize


def _numel_of(placement: Placement, spec: TensorSpec) -> int:
    """Of the first rank, which has no fewer rows than others."""
    return torch.Size(placement.local_shape(spec, 0)).numel()


def _numel(spec: TensorSpec, n: int) -> int:
    return torch.Size(spec.local_shape(n)).numel()


def _weight_bytes(
    name: str, spec: TensorSpec, n: int, dtype: torch.dtype, quantize: str | None
) -> int:
    if quantize is None or name.split(".")[-2] not in TARGETS or not name.endswith(".weight"):
        return _numel(spec, n) * dtype.itemsize
    # Codes of 4 or 8 bits, rows padded to whole blocks, and an fp32 scale for each block.
    *rows, width = spec.local_shape(n)
    blocks = torch.Size(rows).numel() * -(-width // BLOCK)
    return blocks * (BLOCK // (2 if quantize == "nf4" else 1) + FP32)


def _is_in(name: str, parts: set[str]) -> bool:
    return any(name.startswith(f"{part}.") for part in parts)


@dataclass(frozen=True)
class _State:
    """Of a parameter: how many numbers it has, its group in the optimizer, its state's bytes."""

    numbers: int
    group: int
    size: int


def _zero_shares(states: list[_State], dp_size: int) -> list[list[_State]]:
    """Whole parameters, group after group, the largest first, each to the emptiest rank."""
    shares: list[list[_State]] = [[] for _ in range(dp_size)]
    filled = [(0, rank) for rank in range(dp_size)]  # a heap; of equals the first rank
    for each in sorted(states, key=lambda each: (each.group, -each.numbers)):
        numbers, rank = filled[0]
        shares[rank].append(each)
        heapq.heapreplace(filled, (numbers + each.numbers, rank))
    return shares
