"""Which dtype a script computes in, and how fast the device multiplies in it."""

import time

import pytest
import torch
import torch.nn.functional as F

from src.parallel import setup
from src.parallel.setup import matmul_rate, pick_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("name, warns", (("bf16", True), ("fp16", True), ("fp32", False)))
def test_a_dtype_without_products_is_warned_of(name, warns, parallel, monkeypatch, caplog):
    monkeypatch.setattr(setup, "has_products_in", lambda dtype: dtype == torch.float32)
    assert pick_dtype(name, CPU) == setup.DTYPES[name]
    assert (f"--dtype {name}: this processor has no products in it" in caplog.text) == warns
    caplog.clear()
    assert pick_dtype(None, CPU) == torch.float32
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    pick_dtype(name, CPU)
    assert not caplog.text


@pytest.mark.parametrize("slow_from, largest", ((512, 512), (10**6, 2048)))
def test_the_rate_of_slow_products_is_soon_known(slow_from, largest, monkeypatch):
    """A processor may take minutes for a product that others make in a moment."""
    sizes, now = [], [0.0]

    def product(x, weight):
        sizes.append(len(x))
        now[0] += 2 * len(x) ** 3 / (1e9 if len(x) >= slow_from else 1e13)
        return x

    monkeypatch.setattr(F, "linear", product)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    rate = matmul_rate.__wrapped__(torch.float32, CPU)
    assert max(sizes) == largest and rate == pytest.approx(1e13)
