"""How many tokens fit a GPU, beside what was measured on one."""

from dataclasses import replace

import pytest
import torch

from src import dry_run
from src.models.config import ModelConfig
from src.models.lora import LoRAConfig
from src.parallel.layout import Layout
from src.settings.model import PackedBatchSettings
from src.trainer import activations as module
from src.trainer import averages
from src.trainer.activations import (
    Activations,
    activations,
    held_bytes,
    limited,
    rounded_down,
    tokens_at_once,
)
from src.trainer.averages import Method
from src.trainer.budget import training_budget
from src.trainer.optimizer import Optimizer
from tests.trainer.tiny import ours, save_llama

FULL = ModelConfig(2048, 24, 16, 16, 128, 5504, 32000)
SEVEN = ModelConfig(4096, 32, 32, 32, 128, 11008, 32000)
MIXTRAL = replace(SEVEN, n_kv_heads=8, hidden_dim=14336, n_experts=8, experts_per_token=2)
H100 = 84_900_000_000  # bytes of an H100 80GB
LORA = LoRAConfig(16)
METHODS = [
    Method("adamw8bit"),
    Method("muon"),
    Method("adamw", offload=True),
    Method("adamw8bit", offload=True, on_cpu=True),
]

# docs/performance.md, 8 x 2048 tokens on an H100: GB at most; without the gradients, which are not
# there yet when a step's first backward begins.
MEASURED = {
    ("none", False): (FULL, 55.6),
    ("selective", False): (FULL, 40.1),
    ("full", True): (SEVEN, 23.3),
}


@pytest.mark.parametrize("recompute, lora", MEASURED)
def test_memory_is_a_little_more_than_was_measured(recompute, lora):
    config, measured = MEASURED[recompute, lora]
    budget = training_budget(config, 1, 1, torch.bfloat16, LORA if lora else None)
    each = activations(config, 1, torch.bfloat16, recompute, lora)
    total = budget.weights + budget.optimizer + each.fixed + 8 * 2048 * each.per_token
    assert measured <= total / 1e9 <= 1.1 * measured


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_token_takes_a_part_of_its_bytes_on_each_rank_that_divides_them(recompute):
    """And more kv heads are kept where they are repeated."""
    for config, ranks, most in ((SEVEN, 4, 1.1), (MIXTRAL, 4, 1.1), (MIXTRAL, 32, 1.3)):
        alone, divided = (
            activations(config, 1, torch.bfloat16, recompute, context=n).per_token
            for n in (1, ranks)
        )
        assert alone < ranks * divided < most * alone


CASES = [  # config, recompute, lora, ranks of the model → tokens
    (FULL, "none", False, 1, 16384),
    (FULL, "selective", False, 1, 32768),
    (FULL, "full", False, 1, 65536),
    (SEVEN, "full", True, 1, 65536),
    (SEVEN, "selective", True, 1, 16384),
    (SEVEN, "none", False, 1, 2048),  # weights and optimizer alone do not: one row
    (SEVEN, "none", False, 8, 16384),
    (MIXTRAL, "full", True, 8, 65536),
]


@pytest.mark.parametrize("config, recompute, lora, n, tokens", CASES)
def test_the_default_is_what_fits(config, recompute, lora, n, tokens):
    held = training_budget(config, n, 1, torch.bfloat16, LORA if lora else None).total
    each = activations(config, n, torch.bfloat16, recompute, lora)
    assert tokens_at_once([each], H100, held, 2048) == tokens


def test_the_largest_model_that_is_trained_decides():
    small, large = Activations(1e6, 1e9), Activations(2e6, 1e9)
    assert tokens_at_once([small], 50 * 10**9, 0, 16) == 32768
    assert tokens_at_once([small, large], 50 * 10**9, 0, 16) == 16384
    assert tokens_at_once([small], 50 * 10**9, 10**12, 16) == 16, "one row goes in any case"


def test_rounding():
    pairs = {1: 1, 2: 2, 3: 3, 4: 4, 5: 4, 6: 6, 7: 6, 8: 8, 11: 8, 12: 12, 24575: 16384}
    assert {tokens: rounded_down(tokens) for tokens in pairs} == pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_settings_get_a_limit_on_a_gpu_alone(tmp_path, parallel, dtype):
    model = ours(save_llama(tmp_path / "lm"), parallel, dtype)
    optimizer, batches = Optimizer(model, parallel), PackedBatchSettings(max_seq_len=16)
    held = held_bytes([model, model], [optimizer])
    assert held == training_budget(model.config, 1, 1, dtype).total - 4 * len(optimizer.parameters)
    pair = [(model, optimizer)]
    assert limited(batches, pair, held, parallel) is batches, "no GPU"
    given = replace(batches, max_tokens_per_batch=7)
    assert limited(given, pair, held, parallel, memory=H100) is given
    each = activations(model.config, 1, dtype, "none")
    memory = (held + each.fixed + 1600 * each.per_token) / module.USABLE
    found = limited(batches, pair, held, parallel, memory=int(memory))
    assert found == replace(batches, max_tokens_per_batch=1536)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_what_other_optimizers_hold_is_counted(tmp_path, parallel, monkeypatch, dtype, method):
    monkeypatch.setattr(averages, "SMALLEST", 1500)
    model = ours(save_llama(tmp_path / "lm"), parallel, dtype)
    optimizer = Optimizer(model, parallel, method=method)
    budget = training_budget(model.config, 1, 1, dtype, method=method)
    held = held_bytes([model], [optimizer])
    counters = 4 * len(optimizer.parameters)
    masters = sum(4 * p.numel() for p in optimizer.parameters)
    # An update on the CPU has fp32 masters of its own there, which need not be saved.
    unsaved = masters if method.on_cpu and dtype == torch.float32 else 0
    assert held == budget.total - counters - unsaved
    optimizer.idle_backward()
    optimizer.step(1e-3)
    kept = sum(x.nbytes for x in optimizer.state_tensors())
    assert (budget.optimizer, budget.host) == ((0, kept) if method.offload else (kept, 0))
    assert optimizer.state_bytes() == kept - counters - unsaved


def test_the_log_and_the_dry_run_say_it(parallel, monkeypatch):
    class Run:
        checkpoint_activations, sequence_parallel = "none", False

    class Settings:
        batches, run, lora = PackedBatchSettings(), Run(), type("LoRA", (), {"is_on": False})()

    held = training_budget(FULL, 1, 1, torch.bfloat16).total
    plan = ([FULL], Layout(), torch.bfloat16, held, parallel)
    assert dry_run._limit_lines(Settings(), *plan) == []
    monkeypatch.setattr(dry_run, "device_memory", lambda device: H100)
    line = "at most 16,384 tokens at a time (--max_tokens_per_batch)"
    assert dry_run._limit_lines(Settings(), *plan) == [line]
