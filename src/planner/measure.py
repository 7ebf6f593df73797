"""What is timed and counted on the ranks that run: random models, seconds, bytes."""

import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from src.checkpoint.load import load_model
from src.checkpoint.names import hf_tensors
from src.checkpoint.source import Checkpoint
from src.models.batch import Sequence
from src.models.config import ModelConfig
from src.models.hf_config import hf_config
from src.models.init import initial_std, random_tensor
from src.models.layout import tensor_table
from src.parallel.setup import Parallel, pick_dtype
from src.ppo.roles import Role
from src.trainer.optimizer import Optimizer


def sizes_by_name(
    dim: int, layers: int, heads: int, kv_heads: int, hidden: int, vocabulary: int
) -> dict[str, int]:
    """A Llama's sizes, by the names of `ModelConfig`."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size")
    return dict(zip(names, (dim, layers, heads, kv_heads, hidden, vocabulary)))


def llama_of(sizes: Mapping[str, Any]) -> ModelConfig:
    """A Llama of these sizes, by the names of `ModelConfig`."""
    return ModelConfig(**sizes, head_dim=sizes["dim"] // sizes["n_heads"])


def random_folder(folder: Path, config: ModelConfig, seed: int = 0) -> Path:
    """A Hugging Face folder with random weights; made once."""
    from safetensors.torch import save_file

    if (folder / "config.json").is_file():
        return folder
    tensors: dict[str, torch.Tensor] = {}
    for name, spec in tensor_table(config).items():
        std = initial_std(name, spec, config.n_layers)
        tensors |= hf_tensors(name, random_tensor(name, spec, std, seed), config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(hf_config(config, "float32", ids)))
    return folder


def most_allocated(step: Callable[[], object]) -> int:
    """Bytes of PyTorch's that came in a step, at their most; on the CPU by its own profiler."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    # of what comes and, less than 0, of what goes
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes), default=0)


def most_of_ranks(figure: float) -> float:
    """That of the rank that has most."""
    every = [0.0] * dist.get_world_size()
    dist.all_gather_object(every, figure)
    return max(every)


def timed(work: Callable[[], object]) -> float:
    """Seconds until all ranks have done it."""
    meet()
    began = time.perf_counter()
    work()
    meet()
    return time.perf_counter() - began


def meet() -> None:
    """Wait for all ranks, and for what they have started on a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    dist.barrier()


def role_of(
    folder: Path, name: str, head: str, division: Parallel, recompute: str | None, eps: float = 1e-8
) -> Role:
    """A random model in its layout; with an optimizer where it is trained. recompute: None: not."""
    layout, dtype = division.layout, pick_dtype(None, division.device)
    checkpoint = Checkpoint.open(str(folder))
    if recompute is None:
        model = load_model(checkpoint, division, dtype, head)
        return Role(name, model.requires_grad_(False), division)
    model = load_model(
        checkpoint, division, dtype, head, zero=layout.zero, stages_per_rank=layout.vp
    )
    model.recompute, model.sequence_parallel = recompute, layout.sp
    return Role(name, model, division, Optimizer(model, division, eps=eps, zero=layout.zero))


def some_sequences(
    count: int, prompt: int, response: int, vocab_size: int, seed: int
) -> list[Sequence]:
    """Random ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, (count, prompt + response), generator=generator).tolist()
    return [Sequence(row, prompt) for row in ids]
