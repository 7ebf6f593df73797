"""What tests of several parts share."""

import pytest
import torch

from src.parallel.setup import start, stop


def pytest_addoption(parser):
    parser.addoption(
        "--full-faults",
        action="store_true",
        help="every fault, with all repetitions (`make faults`)",
    )


@pytest.fixture
def parallel():
    parallel = start(1)
    torch.set_num_threads(1)  # tensors this small only wait for more
    yield parallel
    stop()
