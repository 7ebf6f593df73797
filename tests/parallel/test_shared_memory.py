"""Exchanges through shared memory give gloo's result, the same bits on every rank.

They notice ranks that went apart.
"""

import json
from pathlib import Path

import pytest

from src.parallel.threads import cores
from tests.launch import launch


@pytest.mark.parametrize("n", (2, 3))
def test_shared_memory_reduces_as_gloo_does(tmp_path, n):
    before = set(Path("/dev/shm").glob("all-reduce-*")) if Path("/dev/shm").is_dir() else set()
    launch(n, "tests/parallel/shared_worker.py", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())
    if not results.pop("used"):
        pytest.skip("no Linux on x86, or no shared memory: gloo's own exchanges are used")
    assert "they went apart" in results.pop("apart")
    assert results.pop("shares cores") == (n > cores())
    assert len(results) == 4 * 4 * (3 + 3)
    for name, (error, alike) in results.items():
        assert alike and error <= (1e-2 if "bfloat16" in name else 1e-6), name
    assert set(Path("/dev/shm").glob("all-reduce-*")) <= before, "the file is not left behind"
