"""Each test is run on `device`, and what comes out is held against the CPU in fp32."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from src.parallel.setup import Parallel, start, stop


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    kind = request.config.getoption("--device")
    if kind is None:
        pytest.skip("about a GPU: `make gpu`, or pytest tests/gpu --device cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda: PyTorch finds no GPU here")
    return torch.device(kind)


@pytest.fixture(scope="session")
def parallel(device) -> Parallel:
    """This process alone on the device; its groups also take the CPU's tensors."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield start(1)
    stop()


@pytest.fixture(scope="session")
def cpu(parallel) -> Parallel:
    """The same on the CPU."""
    return replace(parallel, device=torch.device("cpu"))
