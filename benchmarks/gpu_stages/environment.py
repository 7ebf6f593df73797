"""The machine, and its two rates: copies, and matrix products of random numbers."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from common import copy_rate

from gpu_stages.shared import FULL, Say, Sizes, device_name
from src.parallel.setup import matmul_rate, pick_device


def measure(sizes: Sizes, say: Say) -> None:
    device = pick_device()
    on_gpu = device.type == "cuda"
    say(
        device=device_name(device),
        memory_gb=torch.cuda.get_device_properties(device).total_memory / 1e9 if on_gpu else None,
        torch=torch.__version__,
        python=platform.python_version(),
        triton=_version("triton"),
        transformers=_version("transformers"),
    )
    size = 2**30 if sizes is FULL else 2**20
    say(
        copy_gb_per_s=copy_rate(device, size) / 1e9,
        matmul_tflops=matmul_rate(torch.bfloat16, device) / 1e12,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
