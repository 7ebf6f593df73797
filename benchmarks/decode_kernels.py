"""What a decode step could reach on a GPU: one CUDA graph, by PyTorch's kernels and by ours.

    python benchmarks/decode_kernels.py

With the 7B shape in bf16, random weights, no sampling, 192 tokens in every sequence's cache. Each
row says how far its logits are from those of the plain step. A step by our kernels (src/kernels)
has ten of them a layer. Then one layer's attention, products of few rows, and the threshold of
top-p, beside what PyTorch has. `TRITON_INTERPRET=1` with small sizes runs the same on a CPU, where
only the errors matter.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from common import config_of, copy_rate, free_memory, random_model, seconds
from torch import Tensor

from src.cli import run
from src.kernels.attention import Variant, paged_attention, variant
from src.kernels.norm import add_rms_norm
from src.kernels.product import vector_product
from src.kernels.rotation import rotate_and_write
from src.kernels.swiglu import swiglu
from src.kernels.threshold import threshold
from src.models.config import ModelConfig
from src.models.transformer import Transformer
from src.parallel.layers import SKINNY_ROWS, linear
from src.parallel.setup import start, stop

ON_GPU = torch.cuda.is_available()
CONTEXT, PAGE = 192, 16  # tokens of every sequence, and of a page
PAGES = CONTEXT // PAGE + 2  # of a sequence: room for 224 tokens


class Context:
    """The layout of a step: n sequences of 192 tokens, each layer's keys and values at random.

    They lie in pages, [n · pages, kv heads, 16, head_dim], or as PyTorch's attention wants them,
    [n, kv heads, tokens, head_dim]: the same numbers.
    """

    context = PAGES * PAGE

    def __init__(
        self, config: ModelConfig, n: int, dtype: torch.dtype, device: torch.device, paged: bool
    ) -> None:
        torch.manual_seed(0)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for store in (self.keys, self.values):
            for _ in range(config.n_layers):
                shape = (n, config.n_kv_heads, self.context, config.head_dim)
                x = torch.randn(shape, device=device, dtype=dtype)
                if paged:
                    x = x.unflatten(2, (PAGES, PAGE)).transpose(1, 2).flatten(0, 1)
                store.append(x.contiguous())
        self.table = torch.arange(n * PAGES, dtype=torch.int32, device=device).view(n, PAGES)
        self.positions = torch.full((n,), CONTEXT, device=device)
        self.mask = torch.zeros(n, 1, 1, self.context, dtype=dtype, device=device)
        self.mask[..., CONTEXT + 1 :] = -torch.inf

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        """In the model's own forward: by PyTorch, with a mask."""
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, CONTEXT], values[:, :, CONTEXT] = k, v
        grouped = q.unflatten(1, (k.size(1), -1))  # heads that share keys are queries of one head
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask)
        return out.flatten(1, 2)


def plain_step(model: Transformer, last: Tensor, context: Context) -> Tensor:
    """The logits after each sequence's newest token, by the model's forward."""
    return model.logits(model(last, context))


def fused_step(model: Transformer, last: Tensor, context: Context) -> Tensor:
    """The same by our kernels, in one pass from norm to norm."""
    config, seen = model.config, context.positions + 1
    rotary = model.rotary(context)
    x, delta = model.tok_embeddings(last), None
    for i, block in enumerate(model.layers):
        x, h = add_rms_norm(x, delta, block.attention_norm.weight, config.norm_eps)
        qkv = linear(h, block.attention.projections.stacked.weight)
        places = (context.keys[i], context.values[i], context.table)
        heads = (config.n_heads, config.n_kv_heads)
        q = rotate_and_write(qkv, rotary, *places, context.positions, *heads)
        out = paged_attention(q, *places, seen)
        delta = linear(out.flatten(1), block.attention.wo.weight)
        x, h = add_rms_norm(x, delta, block.ffn_norm.weight, config.norm_eps)
        gate_up = block.feed_forward.projections.stacked.weight
        if len(h) <= SKINNY_ROWS:
            gated = vector_product(h, gate_up, paired=True)
        else:
            gated = swiglu(linear(h, gate_up))
        delta = linear(gated, block.feed_forward.w2.weight)
    return model.logits(add_rms_norm(x, delta, model.norm.weight, config.norm_eps)[1])


def replayed(work: Callable[[], Tensor], rounds: int = 20) -> tuple[float, Tensor]:
    """Seconds of one replay of the work's CUDA graph, and what it gave; without a GPU of a call."""
    result = work()
    if not ON_GPU:
        return seconds(work), result
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    graph.replay()
    took = []
    for _ in range(rounds):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        graph.replay()
        end_event.record()
        torch.cuda.synchronize()
        took.append(start_event.elapsed_time(end_event) / 1e3)
    return median(took), result.clone()


def relative(result: Tensor, wanted: Tensor) -> float:
    return float((result.double() - wanted.double()).norm() / wanted.double().norm())


def steps(model: Transformer, device: torch.device, bandwidth: float, batches: list[int]) -> None:
    config, dtype = model.config, model.norm.weight.dtype
    weights = sum(p.nbytes for name, p in model.named_parameters() if "tok_embeddings" not in name)
    token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize
    print("| step | ms | of the memory roofline | error of the logits |\n|---|---|---|---|")
    for n in batches:
        last = torch.arange(n, device=device) % 500 + 1
        least = (weights + n * token * (CONTEXT + 1)) / bandwidth
        context, rows = Context(config, n, dtype, device, paged=False), []
        plain = partial(plain_step, model, last, context)
        with (
            mock.patch("src.models.elementwise._has_kernels", lambda x: False),
            mock.patch("src.parallel.layers.SKINNY_ROWS", 0),
        ):
            took, logits = replayed(plain)
        rows.append(("PyTorch's kernels", took, 0.0))
        took, result = replayed(plain)
        rows.append(("ours but for attention", took, relative(result, logits)))
        del context, plain  # before there are pages
        free_memory()
        context = Context(config, n, dtype, device, paged=True)
        took, result = replayed(partial(fused_step, model, last, context))
        rows.append(("ours", took, relative(result, logits)))
        for name, took, error in rows:
            print(
                f"| batch {n}, {name} | {1e3 * took:.2f} | {least / took:.2f} | {error:.1e} |",
                flush=True,
            )
        del context
        free_memory()


def attentions(config: ModelConfig, device: torch.device, dtype: torch.dtype, n: int) -> None:
    """Of one layer: PyTorch's kernels with a mask, and ours in some variants."""
    bandwidth, dim = copy_rate(device), config.head_dim
    print("\n| attention of one layer | us | of the cache's bytes |\n|---|---|---|")
    for heads, kv_heads in ((32, 32), (32, 8)):
        sizes = ModelConfig(heads * dim, 1, heads, kv_heads, dim, 1, 1)
        whole, context = (Context(sizes, n, dtype, device, paged) for paged in (False, True))
        q = torch.randn(n, heads, dim, device=device).to(dtype)
        least = 2 * n * kv_heads * (CONTEXT + 1) * dim * dtype.itemsize / bandwidth
        label = f"{n} × {CONTEXT} tokens, {heads}/{kv_heads} heads"
        inputs = (q.unflatten(1, (kv_heads, -1)), whole.keys[0], whole.values[0], whole.mask)
        library = partial(F.scaled_dot_product_attention, *inputs)
        for has_cudnn in (True, False) if ON_GPU else (False,):
            torch.backends.cuda.enable_cudnn_sdp(has_cudnn)
            took, wanted = replayed(library)
            name = "cuDNN" if has_cudnn else "PyTorch's own"
            print(f"| {label}, {name} | {1e6 * took:.0f} | {least / took:.2f} |")
        pages = (context.keys[0], context.values[0], context.table, context.positions + 1)
        chosen = variant(q, context.keys[0], PAGES)
        variants = [
            Variant(block, 1, warps, stages, product)
            for block in (16, 32, 64)
            for warps in (2, 4, 8)
            for stages in (1, 3, 5)
            for product in (False, True)
        ]
        rows = []
        for how in (chosen, *variants) if ON_GPU else (chosen,):
            took, result = replayed(partial(paged_attention, q, *pages, how=how), 5)
            rows.append((took, relative(result, wanted.flatten(1, 2)), how))
        for took, error, how in (rows[0], *sorted(rows[1:])[:5]):
            name = f"{how}{' (chosen)' if how == chosen else ''}, error {error:.0e}"
            print(f"| {label}, {name} | {1e6 * took:.0f} | {least / took:.2f} |", flush=True)


def products(dim: int, hidden_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    """Of few rows: the library's, and ours; of the weight's bytes at the copy rate."""
    bandwidth = copy_rate(device)
    print("\n| product | rows | library | ours | error |\n|---|---|---|---|---|")
    for inside, outside in ((dim, 3 * dim), (dim, 2 * hidden_dim), (hidden_dim, dim)):
        weight = torch.randn(outside, inside, device=device).to(dtype)
        least = weight.nbytes / bandwidth
        for n in (1, 2, 4, 8):
            x = torch.randn(n, inside, device=device).to(dtype)
            theirs, wanted = replayed(partial(F.linear, x, weight))
            ours, result = replayed(partial(vector_product, x, weight))
            shares = f"{least / theirs:.2f} | {least / ours:.2f}"
            print(f"| {inside} → {outside} | {n} | {shares} | {relative(result, wanted):.0e} |")


def thresholds(device: torch.device, n: int) -> None:
    """Of top-p 0.9: ours, and sorting all logits."""

    def by_sorting(z: Tensor, top: Tensor) -> Tensor:
        best = z.sort(-1, descending=True).values
        p = (best - top.unsqueeze(-1)).exp().double()
        kept = (p.cumsum(-1) - p < 0.9 * p.sum(-1, keepdim=True)).sum(-1)
        return best.gather(-1, (kept - 1).unsqueeze(-1)).squeeze(-1)

    print("\n| top-p | rows | sorting, us | ours, us | agree |\n|---|---|---|---|---|")
    for size in (32000, 128256) if ON_GPU else (1000,):
        for rows in (1, n):
            z = 3 * torch.randn(rows, size, device=device)
            top = z.amax(-1)
            theirs, wanted = replayed(partial(by_sorting, z, top))
            ours, result = replayed(partial(threshold, z, top, 0, 0.9, 0.0))
            agree = float((result == wanted).double().mean())
            times = f"{1e6 * theirs:.0f} | {1e6 * ours:.0f}"
            print(f"| {size} | {rows} | {times} | {agree:.2f} |", flush=True)


@torch.no_grad()
def main(
    dim: int = 4096,
    n_layers: int = 32,
    n_heads: int = 32,
    hidden_dim: int = 11008,
    batches: str = "1,8,64,256",
):
    """Measure and print.

    Args:
        dim: width of the model.
        n_layers: its layers.
        n_heads: its heads.
        hidden_dim: width of its feed-forward layers.
        batches: sequences in a step, several separated by commas.
    """
    parallel = start()
    device = parallel.device
    name = torch.cuda.get_device_name(device) if ON_GPU else "CPU"
    bandwidth = copy_rate(device)
    print(f"Device: {name}, torch {torch.__version__}, Triton {triton.__version__}.")
    print(f"Copies at {bandwidth / 1e9:.0f} GB/s.\n")
    dtype = torch.bfloat16 if ON_GPU else torch.float32  # the interpreter's bf16 is another one
    config = config_of(dim, n_layers, dim // n_heads, hidden_dim)
    model = random_model(config, parallel, dtype).eval()
    steps(model, device, bandwidth, [int(n) for n in batches.split(",")])
    del model
    free_memory()
    attentions(config, device, dtype, 256 if ON_GPU else 1)
    products(dim, hidden_dim, device, dtype)
    thresholds(device, 256 if ON_GPU else 2)
    stop()


if __name__ == "__main__":
    run(main)
