"""Four random models, and one run per number of ranks, shared by all the tests of PPO."""

import pytest
import torch

from tests.launch import launch
from tests.ppo.worker import all_checks
from tests.trainer.tiny import save_llama

LAYOUTS = {"one rank": "1-1", "TP 2": "2-2", "DP 2": "2-1", "TP 4": "4-4", "TP 2, DP 2": "4-2"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    for seed, (role, head) in enumerate(
        [("policy", "lm"), ("reference", "lm"), ("value", "score"), ("verifier", "score")]
    ):
        save_llama(folder / role, head, seed)
    return folder


@pytest.fixture(scope="session")
def results(folder):
    """Layout → what the worker found there."""
    all_checks(folder, [1])
    launch(2, "tests/ppo/worker.py", str(folder), "2", "1")
    launch(4, "tests/ppo/worker.py", str(folder), "4", "2")
    return {name: torch.load(folder / f"{file}.pt") for name, file in LAYOUTS.items()}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param
