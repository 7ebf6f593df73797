"""Generation on a GPU: decoding one sequence beside the memory roofline, and rollouts of many; random weights of a released size.

    python benchmarks/gpu.py                                        # the 7B shape in bf16
    CUDA_VISIBLE_DEVICES= python benchmarks/gpu.py --dim 256 --n_layers 2 --batch 8      # the same code, tried on a CPU

Decoding 128 new tokens after 128. Prints a table for docs/performance.md, with the device's name.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.cli import run  # noqa: E402


def main(dim: int = 4096, n_layers: int = 32, n_heads: int = 32, hidden_dim: int = 11008, batch: int = 256, rounds: int = 3):
    """Measure and print.

    Args:
        dim: width of the model.
        n_layers: its layers.
        n_heads: its heads.
        hidden_dim: width of its feed-forward layers.
        batch: sequences of the rollouts.
        rounds: of each; the best counts.
    """
    import torch

    from src.checkpoint.load import put
    from src.generation.engine import Engine
    from src.generation.sampling import Sampling
    from src.models.config import ModelConfig
    from src.models.layout import tensor_table
    from src.models.transformer import build
    from src.parallel.setup import start, stop

    parallel = start()
    device, dtype = parallel.device, torch.bfloat16
    config = ModelConfig(dim, n_layers, n_heads, n_heads, dim // n_heads, hidden_dim, 32000, max_seq_len=4096)
    model = build(config, parallel.mp_rank, parallel.mp_size, dtype)
    model.stack_projections(device)
    with torch.no_grad():
        for name, spec in tensor_table(config).items():
            shape = spec.local_shape(parallel.mp_size)
            put(
                model,
                name,
                torch.ones(shape) if len(shape) == 1 else torch.randn(shape, dtype=dtype, device=device) * 0.02,
                device,
            )
    model.eval()

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def decoding(n: int, new: int) -> float:
        """Seconds of `new` tokens for n sequences, prefill and all."""
        prompts = [[1 + (7 * i + j) % 31000 for j in range(128)] for i in range(n)]
        began = wait()
        Engine(model, parallel, n, 512).generate(prompts, Sampling(new, 1.0), set())
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
    cache = 2 * n_layers * model.kv_heads * config.head_dim * 192 * dtype.itemsize  # at the middle of the decoding
    one, many = rate(1), rate(batch)
    if parallel.is_main:
        what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"Device: {what} x {parallel.world_size}, torch {torch.__version__}; copies at {bandwidth / 1e9:.0f} GB/s.\n")
        print("| | step, ms | tokens/s | of the memory roofline |\n|---|---|---|---|")
        for n, took in ((1, one), (batch, many)):
            least = (weights + n * cache) / bandwidth
            print(f"| batch {n} | {1e3 * took:.2f} | {n / took:.0f} | {least / took:.2f} |")
    stop()


if __name__ == "__main__":
    run(main)
