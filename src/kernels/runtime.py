"""Triton, where there is a GPU, or where TRITON_INTERPRET in the environment asks for it.

Elsewhere nothing of it is imported. What stands for it then lets the kernels' files be read, and
their plain functions be called.
"""

import functools
import os
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

triton: Any = SimpleNamespace(jit=lambda kernel: kernel)
tl: Any = SimpleNamespace(constexpr=None)
if find_spec("triton") and (torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ):
    triton, tl = import_module("triton"), import_module("triton.language")


def takes(x: Tensor) -> bool:
    """Whether the kernels work on it: they come with CUDA builds, and are for what lies there."""
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def power_of_two(size: int) -> int:
    """The next one, which ranges in kernels have to be long."""
    return 1 << (size - 1).bit_length()


def dense_rows(x: Tensor) -> Tensor:
    """x itself if its last axis is contiguous, as kernels read it, else a copy."""
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; one in the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
