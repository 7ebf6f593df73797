"""What the benchmarks share.

The 58M Llama, models of random weights, prompts from a file, alternating runs and their medians,
the machine's rates.
"""

import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# 58M parameters
SIZES = dict(dim=512, n_layers=8, n_heads=8, n_kv_heads=8, hidden_dim=1376, vocab_size=32000)


def make_model(folder: Path, seed: int = 0, head: str = "lm", **sizes) -> Path:
    """A Hugging Face folder with random weights; made once."""
    from src.planner.measure import llama_of, random_folder

    return random_folder(folder, llama_of({**SIZES, **sizes}).with_head(head), seed)


def config_of(dim: int, n_layers: int, head_dim: int, hidden_dim: int, vocab_size: int = 32000):
    """Of a Llama with as many kv heads as heads."""
    from src.models.config import ModelConfig

    heads = dim // head_dim
    sizes = (dim, n_layers, heads, heads, head_dim, hidden_dim, vocab_size)
    return ModelConfig(*sizes, max_seq_len=4096)


def random_model(config, parallel, dtype: torch.dtype = torch.bfloat16):
    """A model in memory whose matrices are random, small, and norms' weights 1."""
    from src.checkpoint.load import put
    from src.models.layout import tensor_table
    from src.models.transformer import build

    device = parallel.device
    model = build(config, parallel.mp_rank, parallel.mp_size, dtype)
    model.stack_projections(device)
    with torch.no_grad():
        for name, spec in tensor_table(config).items():
            shape = spec.local_shape(parallel.mp_size)
            random = torch.randn(shape, dtype=dtype, device=device) * 0.02
            put(model, name, torch.ones(shape) if len(shape) == 1 else random, device)
    return model


def free_memory() -> None:
    """What a model's cycles of references still hold, and what PyTorch keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_tokenizer(folder: Path, texts: list[str], vocab_size: int = 4000) -> Path:
    """A SentencePiece tokenizer of the texts beside the model; made once."""
    import sentencepiece

    path = folder / "tokenizer.model"
    if not path.is_file():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            num_threads=2,
        )
    return path


def alternate(
    runs: dict[str, Callable[[], float]], rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Each run's results in turn, round after round: A B A B ….

    With `warm_up` the first round is not counted.
    """
    results: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warm_up):
        for name, run in runs.items():
            value = run()
            if number >= warm_up:
                results[name].append(value)
    return results


def median(values: list[float]) -> float:
    return statistics.median(values)


def seconds(work: Callable[[], object]) -> float:
    """Of `work`, to the end of what it started on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def read_rate(megabytes: int = 1024, rounds: int = 5) -> float:
    """Bytes per second of the best of a few sums over a large tensor, all threads."""
    x = torch.ones(megabytes * 2**20 // 4)
    x.sum()
    return x.nbytes / min(seconds(x.sum) for _ in range(rounds))


def copy_rate(device: torch.device, size: int = 2**30) -> float:
    """Bytes/s read and written by the median of copies of `size` bytes: more than a cache holds."""
    x = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / median([seconds(lambda: y.copy_(x)) for _ in range(10)])


def machine() -> str:
    """One line for the tables."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    model = next(names, "") or platform.processor()
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


def torchrun(ranks: int) -> list[str]:
    """What starts a script on so many ranks; one rank is plain Python."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [sys.executable, *(launcher if ranks > 1 else [])]


def draw_band(axes, steps, runs: list[list[float]], label: str, marker: str | None = None) -> None:
    """The mean of several runs as a line, smallest to largest as a band; axes: matplotlib's."""
    by_step = list(zip(*runs, strict=True))
    means = [sum(values) / len(values) for values in by_step]
    (line,) = axes.plot(steps, means, marker=marker, label=label)
    low, high = list(map(min, by_step)), list(map(max, by_step))
    axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color())


def report(tables: dict[str, Callable[[], list[str]]], only: str | None, out: str | None) -> None:
    """Make the tables, or `only` one of them, print them as Markdown, and write that to `out`."""
    lines = [f"Machine: {machine()}.", ""]
    for name in [only] if only else tables:
        lines += [*tables[name](), ""]
    text = "\n".join(lines)
    print(text)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text)
