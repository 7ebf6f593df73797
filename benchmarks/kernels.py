"""The pieces of a decode step by themselves.

    python benchmarks/kernels.py

They are products plain, packed and by the kernel in C, and by weights of 4 and 8 bits; attention of
one query by PyTorch and by the kernel in C over pages; an all-reduce of two and four ranks.
"""

import os
import subprocess
import sys
from functools import partial

import torch
import torch.nn.functional as F
from common import machine, median, read_rate, seconds, torchrun

from src.kernels import cpu
from src.models.quantize import KINDS, Quantized, levels_of_bytes, quantized
from src.parallel.setup import has_products_in


def timed(work, rounds: int = 31) -> float:
    """Milliseconds, the median."""
    work(), work()
    return 1e3 * median([seconds(work) for _ in range(rounds)])


def products() -> None:
    shapes = ((512, 1536), (512, 2752), (1376, 512), (512, 32000))
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 64):
            for k, n in shapes:
                product(dtype, rows, k, n)


def product(dtype: torch.dtype, rows: int, k: int, n: int) -> None:
    x, w = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
    plain = timed(lambda: F.linear(x, w))
    line = f"product {dtype} {rows} x {k} x {n}: plain {plain:.3f} ms"
    if has_products_in(dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(w)
        fast = timed(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
        line += f", packed {fast:.3f} ms ({plain / fast:.2f})"
    if rows == 1 and cpu.takes(x, w):
        took = timed(lambda: cpu.few_rows(x, w))
        line += f", in C {took:.3f} ms"
    if dtype == torch.float32 and rows == 64:
        mkl = torch.ops.mkl._mkl_reorder_linear_weight(w, rows)
        took = timed(lambda: torch.ops.mkl._mkl_linear(x, mkl, w, None, rows))
        line += f", MKL's packed {took:.3f} ms"
    print(line)


def products_by_codes(k: int = 896, n: int = 4864) -> None:
    """A frozen weight in codes: as it is, and dequantised for each product."""
    weight = torch.randn(n, k)
    for kind in KINDS:
        for rows in (1, 8, 16):
            product_by_codes(torch.randn(rows, k), quantized(weight, kind))


def product_by_codes(x: torch.Tensor, weight: Quantized) -> None:
    whole = timed(lambda: F.linear(x, weight.dequantized(x.dtype)))
    rows, (n, k) = len(x), weight.shape
    line = f"product {weight.kind} {rows} x {k} x {n}: dequantised {whole:.2f} ms"
    if cpu.takes(x):
        coded = weight.codes, weight.scales, levels_of_bytes(weight.kind, x.device)
        took = timed(lambda: cpu.few_rows_by_codes(x, *coded))
        line += f", in C {took:.2f} ms ({whole / took:.1f})"
    print(line)


def fused_kernel(q: torch.Tensor, layers: list, mask: torch.Tensor) -> None:
    for k, v in layers:
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def two_products(q: torch.Tensor, layers: list, mask: torch.Tensor) -> None:
    scale = q.size(-1) ** -0.5
    for k, v in layers:
        scores = torch.matmul(q * scale, k.transpose(-1, -2)) + mask  # [n, heads, 1, context]
        torch.matmul(scores.softmax(-1), v)


def attention() -> None:
    """One query for each of 64 sequences, over eight layers' caches in turn.

    So many that they come from memory.
    """
    n, heads, dim, context = 64, 8, 64, 160
    for dtype in (torch.float32, torch.bfloat16):
        layers = [
            [torch.randn(n, heads, context + 32, dim).to(dtype)[:, :, :context] for _ in range(2)]
            for _ in range(8)
        ]
        q = torch.randn(n, heads, 1, dim).to(dtype)
        mask = torch.zeros(n, 1, 1, context, dtype=dtype)
        size = 16 * n * heads * context * dim * dtype.itemsize
        for name, work in (("fused kernel", fused_kernel), ("two products", two_products)):
            took = timed(partial(work, q, layers, mask), 11)
            print(f"attention {dtype}, {name}: {took:.1f} ms, {size / took / 1e6:.1f} GB/s")
        if cpu.library() is not None:
            took = timed(paged_attention(n, heads, dim, context, dtype), 11)
            print(f"attention {dtype}, in C: {took:.1f} ms, {size / took / 1e6:.1f} GB/s")


def paged_attention(n: int, heads: int, dim: int, context: int, dtype: torch.dtype):
    """The same work over pages that lie in no order."""
    from src.generation.cache import PAGE

    pages = n * context // PAGE
    layers = [[torch.randn(pages, heads, PAGE, dim).to(dtype) for _ in range(2)] for _ in range(8)]
    q, lengths = torch.randn(n, heads, dim).to(dtype), torch.full((n,), context)
    table = torch.randperm(pages).int().view(n, -1)
    return lambda: [cpu.paged_attention(q, k, v, table, lengths) for k, v in layers]


def all_reduces() -> None:
    """What rank 0 sees, in this process."""
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
            size, ranks = x.nbytes // 1024, parallel.world_size
            print(f"all-reduce of {size} KB between {ranks} ranks, {name}: {took:.3f} ms")
    stop()


if __name__ == "__main__":
    if sys.argv[1:] == ["all-reduce"]:
        all_reduces()
    else:
        print(machine())
        print(f"a plain sum reads {read_rate() / 1e9:.1f} GB/s")
        products()
        products_by_codes()
        attention()
        for n in (2, 4):
            command = [*torchrun(n), __file__, "all-reduce"]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
