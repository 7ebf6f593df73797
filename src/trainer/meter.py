"""What a training step cost: time, FLOP/s, memory; and a profile of a few steps."""

import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from src.logs import RunLog
from src.models.flops import TrainingFlops, attention_pairs
from src.models.transformer import Transformer
from src.parallel.clock import clock
from src.parallel.setup import Parallel, matmul_rate
from src.planner.hardware import GPUS

if TYPE_CHECKING:
    from src.trainer.objective import Objective

PROFILED_STEPS = (3, 2)  # steps that pass before the profile, and steps in it
# FLOP/s of dense bf16 and fp16 products by the data sheets, by words of the device's name;
# the first that fits counts.
PUBLISHED: dict[str, float | None] = {
    "NVL": None,  # cards of the names below with other clocks
    "H100 PCIe": GPUS["h100-pcie"].tflops * 1e12,
    "H100": GPUS["h100"].tflops * 1e12,  # SXM
    "H200": GPUS["h200"].tflops * 1e12,
    "A100": GPUS["a100"].tflops * 1e12,
}


def published_rate(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s that the vendor states for products of one device, where that is known."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    names = device_name.replace("-", " ").split()
    fitting = (rate for name, rate in PUBLISHED.items() if set(name.split()) <= set(names))
    return next(fitting, None)


class Meter:
    """Tokens/s, FLOP/s and their share of what matrix products reach (MFU), time, memory."""

    def __init__(self, model: Transformer, objective: "Objective", parallel: Parallel) -> None:
        self.objective, self.parallel, self.config = objective, parallel, model.config
        models = [model] + ([] if objective.frozen is None else [objective.frozen])
        self.flops = [TrainingFlops.of(each, parallel.pp_group) for each in models]
        dtype, device = model.dtype, parallel.device
        rate = torch.tensor(matmul_rate(dtype, device), dtype=torch.float64, device=device)
        dist.all_reduce(rate)  # of all ranks, measured at the same time
        self.rate = float(rate)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        published = published_rate(name, dtype)
        self.published = published and published * parallel.world_size

    def start(self) -> None:
        """A step begins. What lies between steps, such as evaluations, is not theirs."""
        clock.take()
        self.began = time.perf_counter()

    def read(self, batch: list[int]) -> dict[str, float]:
        """Of the step on `batch`, which has just ended."""
        phases = clock.take()
        took = time.perf_counter() - self.began
        o = self.objective
        tokens = sum(o.lengths[i] for i in batch)
        learned = [i for i in batch if o.weights[i]]
        pairs = sum(attention_pairs(self.config, *piece) for i in learned for piece in o.pieces(i))
        flops = sum(of(tokens, sum(o.needed[i] for i in batch), pairs) for of in self.flops)
        memory = torch.tensor(
            peak_memory(self.parallel.device), dtype=torch.float64, device=self.parallel.device
        )
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        return {
            "tokens_per_s": tokens / took,
            "flops_per_s": flops / took,
            "mfu": flops / took / self.rate,
            **({"mfu_published": flops / took / self.published} if self.published else {}),
            "memory_gb": float(memory) / 1e9,
            "seconds": took,
            **{f"seconds/{phase}": seconds for phase, seconds in phases.items()},
        }


def phases_of(scalars: dict[str, float]) -> dict[str, float]:
    """The seconds of each phase, by its name, out of what is logged of a step."""
    prefix = "seconds/"
    return {name.removeprefix(prefix): x for name, x in scalars.items() if name.startswith(prefix)}


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most so far: on a GPU of tensors, else all of them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def profiler(wanted: bool, log: RunLog) -> AbstractContextManager[Any]:
    """A context manager with `step()`: a profile of a few steps, as a trace that Perfetto shows.

    One file for each rank.
    """
    if not wanted or log.log_dir is None:
        return nullcontext(_NoProfiler())
    folder, (wait, active) = Path(log.log_dir), PROFILED_STEPS

    def write(profile: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)  # on a node that has no log
        path = folder / f"trace-rank-{log.rank}.json"
        profile.export_chrome_trace(str(path))
        steps = f"{wait + 1} to {wait + active}"
        log.info(f"profile of steps {steps}: {path}, for https://ui.perfetto.dev")

    schedule = torch.profiler.schedule(wait=wait - 1, warmup=1, active=active, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True)


class _NoProfiler:
    def step(self) -> None:
        pass
