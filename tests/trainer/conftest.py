"""One run per number of ranks, shared by all the tests of the trainers."""

import pytest
import torch

from tests.launch import launch
from tests.trainer.tiny import VOCAB, save_experts, save_llama
from tests.trainer.worker import all_checks, runs_at

LAYOUTS = {
    "one rank": "1-1",
    "TP 2": "2-2",
    "DP 2": "2-1",
    "TP 4": "4-4",
    "TP 2, DP 2": "4-2",
    "DP 4": "4-1",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainers")
    save_llama(folder / "lm", "lm", 0)
    save_llama(folder / "score", "score", 1)
    save_llama(folder / "reference", "lm", 5)
    # As a larger model of a family may have: more rows in the vocabulary than there are ids.
    sizes = dict(vocab_size=VOCAB + 7, hidden_size=48, num_hidden_layers=3, num_key_value_heads=8)
    save_llama(folder / "teacher", "lm", 6, **sizes)
    save_llama(folder / "deep", "lm", 7, num_hidden_layers=5)
    save_llama(folder / "deep reference", "lm", 10, num_hidden_layers=5)
    save_llama(folder / "tied", "lm", 8, tied=True, num_hidden_layers=3)
    save_experts(folder / "experts")
    save_experts(folder / "deep experts", layers=4)
    heads = dict(hidden_size=48, num_attention_heads=12, num_key_value_heads=3)
    save_llama(folder / "uneven", "lm", 9, **heads)
    save_experts(folder / "even experts", heads=4)
    save_llama(folder / "wide", "lm", 11, hidden_size=384, intermediate_size=512)
    return folder


@pytest.fixture(scope="session")
def one_rank(folder):
    """What the worker found in one process."""
    all_checks(folder, [1])
    return torch.load(folder / "1-1.pt")


@pytest.fixture(scope="session")
def results(folder, one_rank):
    """Layout → what the worker found there."""
    launch(2, "tests/trainer/worker.py", str(folder), "2", "1", timeout=480)
    launch(4, "tests/trainer/worker.py", str(folder), "4", "2", "1", timeout=600)
    return {name: torch.load(folder / f"{file}.pt") for name, file in LAYOUTS.items()}


PIPELINES = {
    "PP 2": "2-1-2",
    "PP 2, TP 2": "4-2-2",
    "PP 2, DP 2": "4-1-2",
    "PP 4": "4-1-4",
    "PP 2, TP 2, DP 2": "8-2-2",
}


@pytest.fixture(scope="session")
def pipelined(folder):
    """Pipeline → what the worker found there."""
    script = "tests/trainer/worker.py"
    launch(2, script, str(folder), "1:2")
    launch(4, script, str(folder), "2:2", "1:2", "1:4", timeout=480)
    launch(8, script, str(folder), "2:2", timeout=600)
    return {name: torch.load(folder / f"{file}.pt") for name, file in PIPELINES.items()}


def everywhere(runs):
    """Each of the runs at each layout that has it."""
    ranks = {layout: int(file.split("-")[0]) for layout, file in LAYOUTS.items()}
    places = [(at, run) for at in LAYOUTS for run in runs if runs_at(run, ranks[at])]
    return pytest.mark.parametrize("layout, run", places)


CONTEXTS = {
    "CP 2": "2-1-1-2",
    "CP 4": "4-1-1-4",
    "CP 2, TP 2": "4-2-1-2",
    "CP 2, DP 2": "4-1-1-2",
    "CP 2, PP 2": "4-1-2-2",
}


@pytest.fixture(scope="session")
def in_context(folder):
    """Division → what the worker found where ranks divide the tokens."""
    script = "tests/trainer/worker.py"
    launch(2, script, str(folder), "1:1:2")
    launch(4, script, str(folder), "1:1:4", "2:1:2", "1:1:2", "1:2:2", timeout=600)
    return {name: torch.load(folder / f"{file}.pt") for name, file in CONTEXTS.items()}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param
