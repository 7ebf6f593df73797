"""What tests of several parts share, and how `make test` divides them among two processes."""

import os

import pytest
import torch

from src.parallel.setup import start, stop

# Files that take longest, in the order in which they begin; those in a row share what they launch.
LONGEST = (
    ("ppo/test_iteration.py", "ppo/test_shared_trunk.py"),
    ("generation/test_generation.py",),
    ("models/test_parity.py",),
    ("test_scripts.py",),
    ("faults/test_faults.py", "faults/test_damage.py"),
    ("trainer/test_steps.py",),
    ("test_families.py",),
    ("trainer/test_saving.py",),
    ("checkpoint/test_formats.py",),
    ("models/test_elementwise.py",),
    ("test_cli.py",),
    ("parallel/test_vocab.py",),
    ("parallel/test_shared_memory.py",),
)


if "PYTEST_XDIST_WORKER" in os.environ:  # each process takes its share of the cores
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["PYTEST_XDIST_WORKER_COUNT"]


def pytest_addoption(parser):
    parser.addoption(
        "--full-faults",
        action="store_true",
        help="every fault, with all repetitions (`make faults`)",
    )


@pytest.hookimpl(tryfirst=True)  # before what reads the groups
def pytest_collection_modifyitems(items):
    """A file's tests stay in one process, which has what they share; the longest files first."""
    place = {f"tests/{file}": i for i, files in enumerate(LONGEST) for file in files}
    for item in items:
        file = item.nodeid.partition("::")[0]
        group = str(LONGEST[place[file]]) if file in place else file
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.fixture
def parallel():
    parallel = start(1)
    torch.set_num_threads(1)  # tensors this small only wait for more
    yield parallel
    stop()
