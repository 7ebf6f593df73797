"""The Triton kernels against plain PyTorch, on the CPU.

Triton reads its environment once, so its interpreter gets a process of its own, for all cases.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*command, interpret=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only")
def test_every_kernel_gives_what_plain_pytorch_does():
    assert find_spec("triton"), "pip install -r requirements-dev.txt"
    files = ("tests/kernels/cases.py", "tests/models/test_elementwise.py")
    cases = run("-m", "pytest", "-q", "-x", "-p", "tests.kernels.forced", *files, interpret="1")
    assert cases.returncode == 0, cases.stdout[-6000:] + cases.stderr[-2000:]


def test_without_a_gpu_nothing_of_triton_is_imported():
    everything = "import src.kernels.norm, src.models.transformer, src.generation.engine"
    done = run("-c", f"{everything}, sys; assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr
