"""What tests of several parts share, and how `make test` divides them among two processes."""

import os

import pytest
import torch

from src.parallel.setup import start, stop

# Files whose tests start ranks under torchrun, which take all cores: they run one after the other
# (`-m launches`). All others run in two processes (`-m "not launches"`), a file in one of them.
LAUNCHES = (
    "checkpoint/test_checkpoint.py",
    "checkpoint/test_formats.py",
    "checkpoint/test_memory.py",
    "checkpoint/test_refusals.py",
    "checkpoint/test_round_trips.py",
    "faults/test_damage.py",
    "faults/test_faults.py",
    "generation/test_generation.py",
    "generation/test_journal.py",
    "models/test_parity.py",
    "parallel/test_shared_memory.py",
    "parallel/test_vocab.py",
    "ppo/test_iteration.py",
    "ppo/test_shared_trunk.py",
    "test_cli.py",
    "test_families.py",
    "test_scripts.py",
    "trainer/test_saving.py",
    "trainer/test_steps.py",
)

# The suite is about the CPU's paths, also on a machine with a GPU: its ranks outnumber the GPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

if "PYTEST_XDIST_WORKER" in os.environ:  # each process takes its share of the cores
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["PYTEST_XDIST_WORKER_COUNT"]


def pytest_addoption(parser):
    parser.addoption(
        "--full-faults",
        action="store_true",
        help="every fault, with all repetitions (`make faults`)",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "launches: in a file that starts ranks under torchrun")


@pytest.hookimpl(tryfirst=True)  # before what reads the marks
def pytest_collection_modifyitems(items):
    """A file's tests stay in one process, which has what they share."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(file))
        if file.removeprefix("tests/") in LAUNCHES:
            item.add_marker(pytest.mark.launches)


@pytest.fixture
def parallel():
    parallel = start(1)
    torch.set_num_threads(1)  # tensors this small only wait for more
    yield parallel
    stop()
