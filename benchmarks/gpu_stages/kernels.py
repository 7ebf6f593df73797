"""benchmarks/decode_kernels.py: what a decode step's kernels could reach, by themselves."""

import subprocess
import sys

import torch
from common import ROOT

from gpu_stages.shared import Say, Sizes


def measure(sizes: Sizes, say: Say) -> None:
    if not torch.cuda.is_available():
        return say(left_out="its kernels need a GPU")
    script = str(ROOT / "benchmarks" / "decode_kernels.py")
    done = subprocess.run([sys.executable, script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    say(text=done.stdout)
    if done.returncode:
        sys.exit(f"decode_kernels.py ended with exit code {done.returncode}")
