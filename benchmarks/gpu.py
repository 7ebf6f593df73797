"""On a GPU, with random weights of released shapes: decoding, rollouts, and training steps.

    # the 7B shape in bf16; training: 1.3B whole, 7B with LoRA
    python benchmarks/gpu.py
    # the same code, tried on a CPU
    CUDA_VISIBLE_DEVICES= python benchmarks/gpu.py --dim 256 --n_layers 2 --n_heads 4 \\
        --hidden_dim 688 --batch 8 --full_dim 256 --full_layers 2 --full_hidden_dim 688 --length 128

Decoding 128 new tokens after 128; steps on sequences of one length, half of it prompt. Prints
tables for docs/performance.md, with the device's name.
"""

import sys
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.cli import run


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
        rounds: of each; the best counts.
        only: one of the two parts.
    """
    import torch

    from src.checkpoint.load import put
    from src.models.config import ModelConfig
    from src.models.layout import tensor_table
    from src.models.transformer import build
    from src.parallel.setup import start, stop

    parallel = start()
    device, dtype = parallel.device, torch.bfloat16

    def random_model(dim: int, n_layers: int, n_heads: int, hidden_dim: int):
        sizes = (dim, n_layers, n_heads, n_heads, dim // n_heads, hidden_dim, 32000)
        config = ModelConfig(*sizes, max_seq_len=4096)
        model = build(config, parallel.mp_rank, parallel.mp_size, dtype)
        model.stack_projections(device)
        with torch.no_grad():
            for name, spec in tensor_table(config).items():
                shape = spec.local_shape(parallel.mp_size)
                random = torch.randn(shape, dtype=dtype, device=device) * 0.02
                put(model, name, torch.ones(shape) if len(shape) == 1 else random, device)
        return model

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    shape = (dim, n_layers, n_heads, hidden_dim)
    if parallel.is_main:
        print(f"Device: {name} x {parallel.world_size}, torch {torch.__version__}.\n")
    if only != "training":
        generation(random_model(*shape), parallel, wait, batch, rounds)
    if only != "generation":
        if parallel.is_main:
            print("| | step, s | tokens/s | MFU | memory, GB | where the time goes |")
            print("|---|---|---|---|---|---|")
        full = (full_dim, full_layers, full_dim // (dim // n_heads), full_hidden_dim)
        for name, sizes, lora, recompute in (
            ("full fine-tune", full, False, "none"),
            ("full fine-tune, recomputed in part", full, False, "selective"),
            ("LoRA, rank 16", shape, True, "selective"),
        ):
            model = random_model(*sizes)
            training(name, model, parallel, lora, recompute, length, train_batch, rounds)
            del model  # before the next is made
    stop()


def training(
    name: str, model, parallel, lora: bool, recompute: str, length: int, batch: int, rounds: int
) -> None:
    """Prints a row: the best of a few optimizer steps."""
    import torch

    from src.models.batch import Sequence
    from src.models.lora import LoRAConfig, add_lora
    from src.settings.model import PackedBatchSettings
    from src.trainer.fit import Meter, train_step
    from src.trainer.optimizer import Optimizer
    from src.trainer.solver import SolverObjective

    size = sum(p.numel() for p in model.parameters()) * parallel.mp_size
    if lora:
        add_lora(model.requires_grad_(False), LoRAConfig(16), 0, parallel)
    model.recompute = recompute
    rows = [
        Sequence([1 + (7 * i + j) % 31000 for j in range(length)], length // 2)
        for i in range(batch * parallel.dp_size)
    ]
    objective = SolverObjective(rows, parallel.device)
    batches = PackedBatchSettings(max_batch_size=batch)
    optimizer, meter, best = Optimizer(model, parallel), Meter(model, objective, parallel), None
    if parallel.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds + 1):  # the first warms up
        meter.start()
        train_step(model, optimizer, objective, list(range(len(rows))), batches, parallel, 1e-5)
        step = meter.read(list(range(len(rows))))
        best = step if best is None or step["seconds"] < best["seconds"] else best
    if parallel.is_main:
        phases = ", ".join(
            f"{k.split('/')[1]} {v:.3f}" for k, v in best.items() if k.startswith("seconds/")
        )
        print(
            f"| {size / 1e9:.2f}B, {name}, {len(rows)} × {length} tokens "
            f"| {best['seconds']:.3f} | {best['tokens_per_s']:.0f} "
            f"| {best['mfu']:.2f} | {best['memory_gb']:.1f} | {phases} |"
        )


def generation(model, parallel, wait, batch: int, rounds: int) -> None:
    """Prints the rows of one sequence, and of a batch of rollouts."""
    import torch

    from src.generation.engine import Engine
    from src.generation.sampling import Sampling

    model.eval()
    device, config = parallel.device, model.config

    def decoding(n: int, new: int) -> float:
        """Seconds of `new` tokens for n sequences, prefill and all."""
        prompts = [[1 + (7 * i + j) % 31000 for j in range(128)] for i in range(n)]
        began = wait()
        Engine(model, parallel, n, 512).generate(
            prompts, Sampling(max_new_tokens=new, temperature=1.0), set()
        )
        return wait() - began

    def rate(n: int) -> float:
        """Seconds of one decode step: what 96 more of them cost."""
        decoding(n, 2)
        return min(decoding(n, 128) - decoding(n, 32) for _ in range(rounds)) / 96

    x = torch.ones(2**28, dtype=torch.uint8, device=device)
    y, times = torch.empty_like(x), []
    for _ in range(10):
        began = wait()
        y.copy_(x)
        times.append(wait() - began)
    bandwidth = 2 * x.nbytes / min(times)
    weights = sum(p.nbytes for name, p in model.named_parameters() if "tok_embeddings" not in name)
    token = 2 * config.n_layers * model.kv_heads * config.head_dim
    cache = token * 192 * model.norm.weight.element_size()  # at the middle of the decoding
    one, many = rate(1), rate(batch)
    if parallel.is_main:
        print(f"Copies at {bandwidth / 1e9:.0f} GB/s.\n")
        print("| | step, ms | tokens/s | of the memory roofline |\n|---|---|---|---|")
        for n, took in ((1, one), (batch, many)):
            least = (weights + n * cache) / bandwidth
            print(f"| batch {n} | {1e3 * took:.2f} | {n / took:.0f} | {least / took:.2f} |")
        print()


if __name__ == "__main__":
    run(main)
