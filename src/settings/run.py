"""How a run is divided among ranks, what numbers it computes in, and the dry run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from src.settings.declaration import MAY_CHANGE, Above, AtLeast, Between, Settings, Unit

Dtype = Annotated[
    Literal["bf16", "fp16", "fp32"] | None,
    "of weights and activations; bf16 on a GPU and fp32 on the CPU when not given. What is trained "
    "is saved in it when given, else in the checkpoint's own where that is narrower",
]
Seed = Annotated[int, Between(0, 2**63 - 1), "of everything random"]


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """The run: ranks, numbers, seed."""

    model_parallel_size: Annotated[
        int | None, AtLeast(1), MAY_CHANGE, "ranks per model; all of them when not given"
    ] = None
    dtype: Dtype = None
    seed: Seed = 0
    timeout: Annotated[
        float,
        Above(0, 10**7),
        Unit("seconds"),
        MAY_CHANGE,
        "that a collective may take before the run is given up",
    ] = 1800.0
    deterministic: Annotated[
        bool,
        "the same bits again: deterministic algorithms only, and products whose rows do not depend "
        "on how many others are computed with them. Slower; on the CPU it only does the second",
    ] = False


@dataclass(frozen=True, kw_only=True)
class TrainingRunSettings(RunSettings):
    """The run: ranks, numbers, seed, memory."""

    pipeline_parallel_size: Annotated[
        int,
        AtLeast(1),
        MAY_CHANGE,
        "cut the model's layers into so many stages, each on ranks of its own (1F1B), that compute "
        "a step's micro-batches one after the other; give as many of these as there are stages, or "
        "more (--accumulation_steps, --max_tokens_per_batch)",
    ] = 1
    stages_per_rank: Annotated[
        int,
        AtLeast(1),
        MAY_CHANGE,
        "stages that each rank of a pipeline computes (interleaved 1F1B): ranks wait less, and "
        "exchange more",
    ] = 1
    zero: Annotated[
        Literal[0, 1, 2, 3],
        MAY_CHANGE,
        "what data-parallel ranks share: the optimizer's state (1, ZeRO stage 1), gradients and, "
        "between steps, weights too (2), weights at all times, put together block by block (3); "
        "nothing (0)",
    ] = 1
    offload_params: Annotated[
        bool,
        MAY_CHANGE,
        "keep each rank's share of weights, gradients and optimizer in host memory, and update it "
        "there; blocks come to the device when they are computed. With --zero 3",
    ] = False
    offload_optimizer: Annotated[
        bool,
        MAY_CHANGE,
        "keep the optimizer's averages, and half precision's fp32 masters, in host memory; they "
        "pass over the device in parts while a step is taken",
    ] = False
    cpu_adam: Annotated[
        bool,
        MAY_CHANGE,
        "with --offload_optimizer: update the weights on the CPU, where the state is; gradients go "
        "there and new weights come back. For where that is quicker than the state's way to the "
        "device and back",
    ] = False
    checkpoint_activations: Annotated[
        Literal["none", "selective", "full"],
        MAY_CHANGE,
        "what of each block is computed again in backward, to save memory: nothing (none), all but "
        "products and attention (selective), or all but its input (full)",
    ] = "none"
    sequence_parallel: Annotated[
        bool,
        MAY_CHANGE,
        "let each of the ranks that share a model hold a part of the tokens between its products "
        "(Megatron's sequence parallelism): norms and what residuals keep take that much less "
        "memory, for as many bytes between the ranks",
    ] = False
    context_parallel_size: Annotated[
        int,
        AtLeast(1),
        MAY_CHANGE,
        "let so many models divide the tokens of their rows, for rows longer than a device holds: "
        "each has a part of the tokens, and in attention all tokens of a part of its heads "
        "(Ulysses). A divisor of the query heads that a rank of a model has",
    ] = 1
    compile: Annotated[
        bool,
        MAY_CHANGE,
        "let torch.compile make one kernel each of the norms and of SwiGLU; that needs a C++ "
        "compiler on the CPU, a C compiler on a GPU",
    ] = False
    fp8: Annotated[
        bool,
        "compute the products of linear layers in 8-bit floating point in training, forward and "
        "backward; on an H100 or later. Not the output layer, routers, adapters and experts",
    ] = False

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.stages_per_rank > 1 and self.pipeline_parallel_size == 1:
            yield (
                f"--stages_per_rank {self.stages_per_rank}: has no effect without "
                "--pipeline_parallel_size"
            )
        if self.pipeline_parallel_size > 1 and self.zero >= 2:
            yield (
                f"--pipeline_parallel_size {self.pipeline_parallel_size} --zero {self.zero}: "
                "weights would be put together for every micro-batch of every stage; give --zero 1"
            )
        if self.offload_params and self.zero != 3:
            yield f"--offload_params: is for --zero 3, and it is {self.zero}"
        for name in ("offload_optimizer", "cpu_adam"):
            if self.offload_params and getattr(self, name):
                yield (
                    f"--{name}: has no effect with --offload_params, which keeps the optimizer's "
                    "state in host memory and updates weights there already; give one of the two"
                )
        if self.cpu_adam and not (self.offload_optimizer or self.offload_params):
            yield (
                "--cpu_adam: updates weights where the optimizer's state is in host memory; give "
                "--offload_optimizer too"
            )
        if self.fp8 and self.dtype not in (None, "bf16"):
            yield f"--fp8: is for --dtype bf16, and it is {self.dtype}"
        if self.fp8 and self.deterministic:
            yield (
                "--fp8 --deterministic: a tensor's scale is that of its largest number, so that "
                "rows depend on those beside them; give one of the two"
            )


@dataclass(frozen=True, kw_only=True)
class DryRunSettings(Settings):
    """Dry run."""

    dry_run: Annotated[
        bool,
        MAY_CHANGE,
        "read and check everything, print the rows, an example with its loss mask, the bytes of "
        "each rank and the steps; train and write nothing. --model_type alone is enough for the "
        "bytes",
    ] = False
    world_size: Annotated[
        int | None,
        AtLeast(1),
        Unit("ranks"),
        MAY_CHANGE,
        "with --dry_run: plan for so many ranks; those that were started when not given",
    ] = None

    def problems(self) -> Iterator[str]:
        if self.world_size is not None and not self.dry_run:
            yield f"--world_size {self.world_size}: has no effect without --dry_run"
