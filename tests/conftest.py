"""What tests of several parts share, and how `make test` divides them among two processes."""

import os

import pytest
import torch

from src.parallel.setup import start, stop

# Files that take long, longest first, so that both processes end at about the same time.
LONG = (
    "ppo/test_iteration.py",
    "ppo/test_shared_trunk.py",
    "faults/test_faults.py",
    "generation/test_generation.py",
    "faults/test_nodes.py",
    "faults/test_changed.py",
    "trainer/test_steps.py",
    "trainer/test_preference.py",
    "trainer/test_distillation.py",
    "models/test_parity.py",
    "kernels/test_kernels.py",
    "test_scripts.py",
    "test_preference_scripts.py",
    "trainer/test_saving.py",
    "faults/test_long.py",
    "checkpoint/test_several_nodes.py",
    "test_cli.py",
    "test_families.py",
    "test_gpu_bench.py",
    "checkpoint/test_memory.py",
    "checkpoint/test_checkpoint.py",
    "checkpoint/test_round_trips.py",
    "checkpoint/test_formats.py",
    "parallel/test_vocab.py",
    "parallel/test_shared_memory.py",
    "generation/test_streaming.py",
    "generation/test_session.py",
    "generation/test_journal.py",
)

# Files whose checks are all made by one run of tests/trainer/worker.py at each number of ranks.
ONE_LAUNCH = {
    f"trainer/test_{name}.py"
    for name in ("steps", "preference", "distillation", "pipeline", "context")
}

if "PYTEST_XDIST_WORKER" in os.environ:  # each process takes its share of the cores
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["PYTEST_XDIST_WORKER_COUNT"]


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cuda", "cpu"),
        help="where tests/gpu runs (`make gpu`); on cpu only its own logic is tried",
    )
    parser.addoption(
        "--full-faults",
        action="store_true",
        help="every fault, with all repetitions (`make faults`)",
    )
    parser.addoption(
        "--smollm",
        action="store_true",
        help="also every step of `make smollm SMALL=1`: five minutes, and a package of 100 MB",
    )


def pytest_configure(config):
    """The suite is about the CPU's paths, also beside a GPU, which its ranks would outnumber."""
    if config.getoption("--device") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """What shares launches runs in one process: a file's tests, and several files of a part."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            if file.removeprefix("tests/") in ONE_LAUNCH:
                return "tests/trainer"
            return "tests/ppo" if file.startswith("tests/ppo/") else file

    return Together(config, log)


def pytest_collection_modifyitems(items):
    """Long files first."""
    turn = {f"tests/{file}": i for i, file in enumerate(LONG)}
    items.sort(key=lambda item: turn.get(item.nodeid.partition("::")[0], len(LONG)))


@pytest.fixture
def parallel():
    parallel = start(1)
    torch.set_num_threads(1)  # tensors this small only wait for more
    yield parallel
    stop()
