"""Four random models, three adapters, and one run per number of ranks, for all tests of PPO."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch import launch
from tests.ppo.worker import all_checks
from tests.trainer.tiny import save_llama

LAYOUTS = {
    "one rank": "1-1",
    "TP 2": "2-2",
    "DP 2": "2-1",
    "TP 4": "4-4",
    "TP 2, DP 2": "4-2",
    "PP 2": "2-1-2",
    "PP 2, TP 2": "4-2-2",
    "PP 2, DP 2": "4-1-2",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    for seed, (role, head) in enumerate(
        [("policy", "lm"), ("reference", "lm"), ("value", "score"), ("verifier", "score")]
    ):
        save_llama(folder / role, head, seed)
    for seed, role in enumerate(("policy", "value", "verifier")):
        save_adapter(folder / f"{role} adapter", folder / "policy", role != "policy", seed)
    return folder


def save_adapter(
    folder: Path, base: Path, scored: bool, seed: int, rank: int = 3, alpha: float = 4.0
) -> None:
    """In PEFT's format, with factors large enough to matter; a score head with it when `scored`."""
    folder.mkdir()
    generator, factors = torch.Generator().manual_seed(seed), {}
    for name, weight in load_file(base / "model.safetensors").items():
        if "_proj" in name:
            for factor, shape in (("A", (rank, weight.size(1))), ("B", (weight.size(0), rank))):
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_{factor}.weight"
                factors[key] = 0.2 * torch.randn(shape, generator=generator)
    if scored:
        factors["base_model.model.score.weight"] = 0.2 * torch.randn(
            1, weight.size(-1), generator=generator
        )
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scored else "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({key.split(".")[-3] for key in factors if ".lora_" in key}),
        "modules_to_save": ["score"] if scored else None,
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(factors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def results(folder):
    """Layout → what the worker found there."""
    all_checks(folder, [(1, 1)])
    launch(2, "tests/ppo/worker.py", str(folder), "2", "1", "1:2", timeout=480)
    launch(4, "tests/ppo/worker.py", str(folder), "4", "2", "2:2", "1:2", timeout=600)
    return {name: torch.load(folder / f"{file}.pt") for name, file in LAYOUTS.items()}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param
