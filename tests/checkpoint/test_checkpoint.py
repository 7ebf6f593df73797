"""The two scripts, started as a user does; and which folders they may replace."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.checkpoint.folder import check_apart, check_replaceable
from src.checkpoint.source import Checkpoint
from src.checkpoint.write import merge, split
from src.errors import UserError
from tests.checkpoint.tiny import assert_same, read_hf, write_hf
from tests.launch import launch, start


@pytest.fixture
def hf(tmp_path) -> Path:
    write_hf(tmp_path / "hf", "mixtral", "fused")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": 2}')
    return tmp_path / "hf"


@pytest.mark.parametrize("ranks", (1, 2))
def test_scripts(tmp_path, hf, ranks):
    """Started by plain Python, or by torchrun with more ranks than there is work for."""
    shards, back = tmp_path / "shards", tmp_path / "back"
    # torchrun's own parser takes `--n` for an abbreviation of its options, wherever it stands: only
    # plain Python can give it
    n = ["--n", "3"] if ranks == 1 else []
    launch(ranks, "checkpoint_split.py", "--ckpt_file", str(hf), "--save_path", str(shards), *n)
    assert sorted(path.name for path in shards.iterdir()) == [
        *(f"consolidated.0{i}.pth" for i in range(3 if n else 8)),
        "generation_config.json",
        "manifest.json",
        "params.json",
    ]
    dtype = ["--dtype", "bf16"] if ranks == 1 else []
    flags = ["--ckpt_dir", str(shards), "--save_dir", str(back), *dtype]
    launch(ranks, "checkpoint_merge.py", *flags)
    wanted = write_hf(tmp_path / "wanted", "mixtral")
    if dtype:
        wanted = {key: tensor.bfloat16() for key, tensor in wanted.items()}
    assert_same(read_hf(back), wanted)
    # Its beginning stands in config.json, which shards have not.
    ids = json.loads((back / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 1, "eos_token_id": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "shards", "wanted"]


def test_script_refuses_with_one_line_and_code_2(tmp_path, hf):
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, hf / "model.safetensors")
    flags = ["--ckpt_file", str(hf), "--save_path", str(tmp_path / "new")]
    done = start(1, "checkpoint_split.py", *flags)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"{hf} does not hold" in done.stderr
    assert "model.norm.weight has shape [3], expected [66]" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_folders_with_foreign_files_are_never_replaced(tmp_path, hf):
    target = tmp_path / "target"
    shutil.copytree(hf, target)
    assert check_replaceable(str(target)) == target
    split(Checkpoint.open(str(hf)), target, 2)
    assert check_replaceable(str(target)) == target
    (target / "thesis.tex").write_text("ten years")
    with pytest.raises(UserError, match="thesis.tex, which is no part of a checkpoint"):
        check_replaceable(str(target))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, a folder is needed"):
        check_replaceable(str(tmp_path / "file"))
    flags = ["--ckpt_file", str(hf), "--save_path", str(target), "--n", "4"]
    done = start(1, "checkpoint_split.py", *flags)
    assert done.returncode == 2 and "thesis.tex" in done.stderr
    assert (target / "thesis.tex").read_text() == "ten years"
    assert len(list(target.glob("consolidated*"))) == 2


def test_what_merge_writes_may_be_replaced(tmp_path, hf):
    merge(Checkpoint.open(str(hf)), tmp_path / "out", {"bos_token_id": 1, "eos_token_id": 2})
    assert check_replaceable(str(tmp_path / "out")) == tmp_path / "out"


@pytest.mark.parametrize(
    "saved, read, fine",
    (
        ("a", "b", True),
        ("a", "a", False),
        ("a", "a/b", False),
        ("a/b", "a", True),
        ("a", "ab", True),
        ("a/../b", "b", False),
    ),
)
def test_saving_never_removes_what_is_read(tmp_path, saved, read, fine):
    flags = (
        {"save_path": str(tmp_path / saved)},
        {"ckpt_file": str(tmp_path / read), "adapter_dir": None},
    )
    if fine:
        return check_apart(*flags)
    with pytest.raises(UserError, match="--save_path .* and --ckpt_file .* overlap"):
        check_apart(*flags)
