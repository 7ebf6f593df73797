"""On a GPU, with random weights of released shapes: decoding, rollouts, and training steps.

    # the 7B shape in bf16; training: 1.3B whole, 7B with LoRA
    python benchmarks/gpu.py
    # the same code, tried on a CPU
    CUDA_VISIBLE_DEVICES= python benchmarks/gpu.py --dim 256 --n_layers 2 --n_heads 4 \\
        --hidden_dim 688 --batch 8 --full_dim 256 --full_layers 2 --full_hidden_dim 688 --length 128

Decoding after 128 tokens of prompt; rollouts of prompts of 64 to 128 tokens, up to 128 new ones
each; training steps on sequences of one length, half of it prompt. Prints tables for
docs/performance.md, with the device's name. A row that does not fit the memory says so.
"""

import gc
from statistics import median
from typing import Literal

import torch
from common import seconds  # which finds `src`, too

from src.checkpoint.load import put
from src.cli import run
from src.generation.engine import Engine
from src.generation.sampling import Sampling
from src.models.batch import Sequence
from src.models.config import ModelConfig
from src.models.elementwise import compile_elementwise
from src.models.layout import tensor_table
from src.models.lora import LoRAConfig, add_lora
from src.models.transformer import Transformer, build
from src.parallel.setup import Parallel, matmul_rate, start, stop
from src.settings.model import PackedBatchSettings
from src.trainer.fit import train_step
from src.trainer.meter import Meter
from src.trainer.optimizer import Optimizer
from src.trainer.solver import SolverObjective

VOCABULARY = 32000
NEW_TOKENS = (16, 64)  # a decode step is what the second costs beyond the first, per token


def main(
    dim: int = 4096,
    n_layers: int = 32,
    n_heads: int = 32,
    hidden_dim: int = 11008,
    batch: int = 256,
    full_dim: int = 2048,
    full_layers: int = 24,
    full_hidden_dim: int = 5504,
    length: int = 2048,
    train_batch: int = 8,
    rounds: int = 3,
    only: Literal["generation", "training"] | None = None,
    cudnn: bool = False,
):
    """Measure and print.

    Args:
        dim: width of the model.
        n_layers: its layers.
        n_heads: its heads.
        hidden_dim: width of its feed-forward layers.
        batch: sequences of the rollouts.
        full_dim: width of the model that is trained as a whole, with heads as wide as the other's.
        full_layers: its layers.
        full_hidden_dim: width of its feed-forward layers.
        length: tokens of a sequence in training.
        train_batch: sequences of a training step.
        rounds: of each; the median counts.
        only: one of the two parts.
        cudnn: with cuDNN's attention, which `start` turns off.
    """
    parallel, head_dim = start(), dim // n_heads
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    shape = config_of(dim, n_layers, head_dim, hidden_dim)
    full = config_of(full_dim, full_layers, head_dim, full_hidden_dim)
    on_gpu = parallel.device.type == "cuda"
    name = torch.cuda.get_device_name(parallel.device) if on_gpu else "CPU"
    bandwidth = copy_rate(parallel.device)
    rate = matmul_rate(torch.bfloat16, parallel.device)
    say(parallel, f"Device: {name} x {parallel.world_size}, torch {torch.__version__}.")
    say(parallel, f"Copies at {bandwidth / 1e9:.0f} GB/s, products at {rate / 1e12:.1f} TFLOP/s.\n")
    if only != "training":
        generation(shape, parallel, bandwidth, batch, rounds)
    if only != "generation":
        say(parallel, "| | step, s | tokens/s | MFU | memory, GB | where the time goes |")
        say(parallel, "|---|---|---|---|---|---|")
        for config, label, lora, recompute in (
            (full, "full fine-tune", False, "none"),
            (full, "full fine-tune, recomputed in part", False, "selective"),
            (shape, "LoRA, rank 16, recomputed in part", True, "selective"),
            (shape, "LoRA, rank 16, recomputed", True, "full"),
            (full, "full fine-tune, compiled", False, "none"),  # compiles for all that follows
        ):
            if label.endswith("compiled"):
                compile_elementwise()
            model = random_model(config, parallel)
            size = sum(p.numel() for p in model.parameters()) * parallel.mp_size
            if lora:
                add_lora(model.requires_grad_(False), LoRAConfig(16), 0, parallel)
            model.recompute = recompute
            row = f"| {size / 1e9:.2f}B, {label}, {train_batch} × {length} tokens "
            try:
                row += training(model, parallel, length, train_batch, rounds)
            except torch.OutOfMemoryError:
                row += "| does not fit | | | | |"
            say(parallel, row)
            del model  # before the next is made
            free_memory()
    stop()


def config_of(dim: int, n_layers: int, head_dim: int, hidden_dim: int) -> ModelConfig:
    heads = dim // head_dim
    sizes = (dim, n_layers, heads, heads, head_dim, hidden_dim, VOCABULARY)
    return ModelConfig(*sizes, max_seq_len=4096)


def random_model(
    config: ModelConfig, parallel: Parallel, dtype: torch.dtype = torch.bfloat16
) -> Transformer:
    device = parallel.device
    model = build(config, parallel.mp_rank, parallel.mp_size, dtype)
    model.stack_projections(device)
    with torch.no_grad():
        for name, spec in tensor_table(config).items():
            shape = spec.local_shape(parallel.mp_size)
            random = torch.randn(shape, dtype=dtype, device=device) * 0.02
            put(model, name, torch.ones(shape) if len(shape) == 1 else random, device)
    return model


def say(parallel: Parallel, line: str) -> None:
    if parallel.is_main:
        print(line, flush=True)


def free_memory() -> None:
    """What a model's cycles of references still hold, and what PyTorch keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def copy_rate(device: torch.device) -> float:
    """Bytes/s read and written by the median of copies of more than a cache holds."""
    x = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / median(seconds(lambda: y.copy_(x)) for _ in range(10))


def generation(
    config: ModelConfig, parallel: Parallel, bandwidth: float, batch: int, rounds: int
) -> None:
    """Prints decode steps by batch, beside the bytes that each must read, and rollouts."""
    model = random_model(config, parallel).eval()
    weights = sum(p.nbytes for name, p in model.named_parameters() if "tok_embeddings" not in name)
    token = 2 * config.n_layers * model.kv_heads * config.head_dim * 2  # bytes of the cache
    say(parallel, "| | step, ms | tokens/s | of the memory roofline |\n|---|---|---|---|")
    for n in sorted({1, 8, 64, batch}):
        took = decode_step(model, parallel, n, rounds)
        least = (weights + n * token * (128 + sum(NEW_TOKENS) / 2)) / bandwidth
        say(parallel, f"| batch {n} | {1e3 * took:.2f} | {n / took:.0f} | {least / took:.2f} |")

    say(parallel, "\n| rollouts | tokens | s | tokens/s |\n|---|---|---|---|")
    one_in_a_hundred = set(range(2, 2 + VOCABULARY // 100))  # a response has about 100 tokens
    for label, prompts, stops in (
        (f"{batch}, of one length", batch, set()),
        (f"{batch}, as they end", batch, one_in_a_hundred),
        (f"{2 * batch} in a queue, as they end", 2 * batch, one_in_a_hundred),
    ):
        tokens, took = rollouts(model, parallel, batch, prompts, stops)
        say(parallel, f"| {label} | {tokens} | {took:.2f} | {tokens / took:.0f} |")
    say(parallel, "")
    del model
    free_memory()


def decode_step(model: Transformer, parallel: Parallel, n: int, rounds: int) -> float:
    """Seconds of one decode step of n sequences."""
    prompts = [[1 + (7 * i + j) % 31000 for j in range(128)] for i in range(n)]
    engine = Engine(model, parallel, n, 128 + max(NEW_TOKENS), kv_cache_gb=60)

    def generate(new_tokens: int) -> None:
        engine.generate(prompts, Sampling(max_new_tokens=new_tokens), set())

    generate(2)
    low, high = (
        median(seconds(lambda new=new: generate(new)) for _ in range(rounds)) for new in NEW_TOKENS
    )
    return (high - low) / (NEW_TOKENS[1] - NEW_TOKENS[0])


def rollouts(
    model: Transformer, parallel: Parallel, slots: int, n: int, stops: set[int]
) -> tuple[int, float]:
    """Tokens and seconds of n rollouts, `slots` at a time."""
    prompts = [[1 + (13 * i + j) % 31000 for j in range(64 + i % 65)] for i in range(n)]
    engine = Engine(model, parallel, slots, 256, kv_cache_gb=60)
    completions = []

    def generate() -> None:
        completions.extend(engine.generate(prompts, Sampling(max_new_tokens=128), stops))

    took = seconds(generate)
    return sum(len(completion.tokens) for completion in completions), took


def training(model: Transformer, parallel: Parallel, length: int, batch: int, rounds: int) -> str:
    """The rest of a row: the median of a few optimizer steps."""
    rows = [
        Sequence([1 + (7 * i + j) % 31000 for j in range(length)], length // 2)
        for i in range(batch * parallel.dp_size)
    ]
    objective = SolverObjective(rows, parallel.device)
    batches = PackedBatchSettings(max_batch_size=batch)
    optimizer, meter = Optimizer(model, parallel), Meter(model, objective, parallel)
    if parallel.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps, numbers = [], list(range(len(rows)))
    for _ in range(rounds + 1):
        meter.start()
        train_step(model, optimizer, objective, numbers, batches, parallel, 1e-5)
        steps.append(meter.read(numbers))
    # the first warms up
    step = sorted(steps[1:], key=lambda step: step["seconds"])[(rounds - 1) // 2]
    phases = ", ".join(
        f"{name.split('/')[1]} {value:.3f}"
        for name, value in step.items()
        if name.startswith("seconds/")
    )
    return (
        f"| {step['seconds']:.3f} | {step['tokens_per_s']:.0f} "
        f"| {step['mfu']:.2f} | {step['memory_gb']:.1f} | {phases} |"
    )


if __name__ == "__main__":
    run(main)
