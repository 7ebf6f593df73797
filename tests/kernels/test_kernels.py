"""The Triton kernels against plain PyTorch, on the CPU.

Triton reads its environment once, so its interpreter gets a process of its own, for all cases, and
so does its compiler.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only")


def run(*command, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def check(*arguments, **variables):
    assert find_spec("triton"), "pip install -r requirements-dev.txt"
    done = run("-m", "pytest", "-q", "-x", *arguments, **variables)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@LINUX
def test_every_kernel_gives_what_plain_pytorch_does():
    files = (
        "tests/kernels/cases.py",
        "tests/models/test_elementwise.py",
        "tests/kernels/session_cases.py",
    )
    check(*files, "-p", "tests.kernels.forced", "-k", "not compil", TRITON_INTERPRET="1")


@LINUX
def test_every_kernel_is_compiled(tmp_path):
    check("tests/kernels/compiled.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_without_a_gpu_nothing_of_triton_is_imported(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    everything = "src.kernels.attention, src.kernels.threshold, src.models.transformer, sys"
    done = run("-c", f"import {everything}; assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr
