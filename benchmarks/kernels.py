"""The pieces of a decode step by themselves: products plain and packed, attention of one query, an all-reduce of two ranks.

python benchmarks/kernels.py
"""

import os
import subprocess
import sys

import torch
import torch.nn.functional as F
from common import machine, median, seconds


def timed(work, rounds: int = 31) -> float:
    """Milliseconds, the median."""
    work(), work()
    return 1e3 * median([seconds(work) for _ in range(rounds)])


def products() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 64):
            for k, n in ((512, 1536), (512, 2752), (1376, 512), (512, 32000)):
                x, w = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
                packed = torch.ops.mkldnn._reorder_linear_weight(w)
                plain = timed(lambda: F.linear(x, w))
                fast = timed(
                    lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
                )
                line = f"product {dtype} {rows} x {k} x {n}: plain {plain:.3f} ms, packed {fast:.3f} ms ({plain / fast:.2f})"
                if dtype == torch.float32 and rows == 64:
                    mkl = torch.ops.mkl._mkl_reorder_linear_weight(w, rows)
                    line += f", MKL's packed {timed(lambda: torch.ops.mkl._mkl_linear(x, mkl, w, None, rows)):.3f} ms"
                print(line)


def attention() -> None:
    """One query for each of 64 sequences, over eight layers' caches in turn, so that they come from memory."""
    n, heads, dim, context = 64, 8, 64, 160
    for dtype in (torch.float32, torch.bfloat16):
        layers = [
            [torch.randn(n, heads, context + 32, dim).to(dtype)[:, :, :context] for _ in range(2)]
            for _ in range(8)
        ]
        q, mask = (
            torch.randn(n, heads, 1, dim).to(dtype),
            torch.zeros(n, 1, 1, context, dtype=dtype),
        )

        def kernel():
            for k, v in layers:
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        def two_products():
            for k, v in layers:
                torch.matmul(
                    (torch.matmul(q * dim**-0.5, k.transpose(-1, -2)) + mask).softmax(-1), v
                )

        size = 16 * n * heads * context * dim * dtype.itemsize
        for name, work in (("fused kernel", kernel), ("two products", two_products)):
            print(f"attention {dtype}, {name}: {size / timed(work, 11) / 1e6:.1f} GB/s")


def all_reduces() -> None:
    """What rank 0 of two sees, in this process."""
    import torch.distributed as dist

    from src.parallel.setup import start, stop
    from src.parallel.shared_memory import all_reduce

    parallel, x = start(), torch.zeros(64, 512)
    for name, work in (
        ("gloo", lambda: dist.all_reduce(x, group=parallel.mp_group)),
        ("shared memory", lambda: all_reduce(x, parallel.mp_group)),
    ):
        took = timed(work, 501)
        if parallel.is_main:
            print(f"all-reduce of {x.nbytes // 1024} KB between two ranks, {name}: {took:.3f} ms")
    stop()


if __name__ == "__main__":
    if sys.argv[1:] == ["all-reduce"]:
        all_reduces()
    else:
        print(machine())
        products()
        attention()
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            __file__,
            "all-reduce",
        ]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
