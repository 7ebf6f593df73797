"""A step that a CUDA graph can hold: what it dispatches, counted on the CPU by a GPU's branches.

Triton's kernels are counted, not run: what comes out is meaningless, and nothing may look at it.
"""

import importlib
import pkgutil
import re
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import src.kernels
from src.generation.runner import Runner
from src.generation.sampling import Sampling
from src.generation.scheduler import Request, Scheduler
from src.kernels import runtime
from tests.generation.test_session import LONGEST, SAMPLINGS, STOPS, model_of

# They read no memory, or are folded into what uses them.
VIEWS = re.compile(
    "_?(unsafe_)?view(_as_real|_as_complex)?|slice|select|(un)?squeeze|expand|transpose|permute|t|"
    "split(_with_sizes)?|unbind|as_strided|alias|detach|unflatten|_reshape_alias|"
    "empty(_strided|_like)?|new_empty"
)
WAITS = re.compile(
    "_local_scalar_dense|nonzero|item|masked_select|bincount|_?unique.*|equal|is_nonzero|"
    "repeat_interleave|pin_memory"
)
STEPS = {
    "dense": {},
    "window": dict(sliding_window=12),
    "biases and head norms": dict(qkv_bias=True, qk_norm=True),
    "tied": dict(tie_word_embeddings=True),
    "holes": dict(ids_without_text=((3, 5), (50, 61))),
}


class Count(TorchDispatchMode):
    """Of each operator that starts a kernel, how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if not VIEWS.fullmatch(name):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def waiting(operators: Counter) -> set[str]:
    return {name for name in operators if WAITS.fullmatch(name)}


class Launches:
    """Stands for a Triton kernel: counts that it was started."""

    def __init__(self, name: str, calls: Counter) -> None:
        self.name, self.calls = name, calls

    def __getitem__(self, grid):
        def launch(*args, **kwargs) -> None:
            self.calls[self.name] += 1

        return launch


@pytest.fixture
def on_gpu(monkeypatch):
    """The branches for a GPU; returns where kernels are counted."""
    calls: Counter[str] = Counter()
    monkeypatch.setattr(runtime, "takes", lambda x: True)
    for module_info in pkgutil.iter_modules(src.kernels.__path__):
        module = importlib.import_module(f"src.kernels.{module_info.name}")
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launches(name, calls))
    return calls


def counted(
    parallel, on_gpu, sampling, n_layers=2, slots=4, dtype=torch.float32, **changes
) -> tuple[Counter, Counter]:
    """What one static step dispatches: operators, and Triton's kernels."""
    model = model_of(n_layers=n_layers, dtype=dtype, **changes)
    settings = Sampling(max_new_tokens=8, **sampling)
    runner = Runner(model, parallel, slots, 40, LONGEST, settings, STOPS, keep_masks=True)
    scheduler = Scheduler(slots, 40)
    for i in range(slots):
        scheduler.waiting.append(Request([1, 2, 3 + i], 8, i, i))
    with torch.no_grad():
        reading = scheduler.read()
        runner.assign(scheduler.assigned)
        runner.rows[:] = torch.tensor([request.slot for request, _ in reading.read])
        runner._step(slots, 16)  # what is made once is there
        on_gpu.clear()
        with Count() as count:
            runner._step(slots, 16)
    return count.calls, Counter(on_gpu)


@pytest.mark.parametrize("family", STEPS)
@pytest.mark.parametrize("kind", SAMPLINGS)
def test_no_operator_waits_for_the_host(parallel, on_gpu, kind, family):
    operators, kernels = counted(parallel, on_gpu, SAMPLINGS[kind], **STEPS[family])
    assert not waiting(operators), operators
    assert kernels["rotate_and_write_kernel"] == kernels["attention_kernel"] == 2


@pytest.mark.parametrize("family", STEPS)
@pytest.mark.parametrize("slots, dtype, most", ((4, torch.float32, 9), (1, torch.bfloat16, 8)))
def test_nine_kernels_a_layer_or_eight(parallel, on_gpu, slots, dtype, most, family):
    """Four products, two norms, rotation, attention, SwiGLU, which one row's product contains."""
    found = [
        counted(parallel, on_gpu, SAMPLINGS["sampled"], n, slots, dtype, **STEPS[family])
        for n in (2, 5)
    ]
    few, more = (operators + kernels for operators, kernels in found)
    assert (more.total() - few.total()) / 3 == most, more - few


def test_the_count_sees_what_waits():
    with Count() as count:
        torch.arange(4).nonzero()
        torch.ones(1).item()
    assert waiting(count.calls) == {"nonzero", "_local_scalar_dense"}
