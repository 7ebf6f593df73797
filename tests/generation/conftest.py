"""One process for all tests of a file."""

import pytest
import torch

from src.parallel.setup import start, stop


@pytest.fixture(scope="module")
def parallel():
    parallel = start(1)
    torch.set_num_threads(1)  # tensors this small only wait for more
    yield parallel
    stop()
