"""Saved steps: whole or not at all, damage found, exact at any degree."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import save_file

from src.checkpoint.manifest import described_all, problems, read_manifest, write_manifest
from src.checkpoint.steps import Steps, list_steps, open_step
from src.errors import UserError
from src.parallel.host import HostCopies
from src.trainer.optimizer import Optimizer
from src.trainer.state import SavedModel, counters_of, restore, tensors_of
from tests.launch import launch
from tests.trainer.saving_worker import made, pairs
from tests.trainer.tiny import ours, save_llama

STAGES = ("made", "written", "manifest", "renamed", "published", "pruned")


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    save_llama(folder / "lm", "lm", 0)
    launch(4, "tests/trainer/saving_worker.py", folder, timeout=480)
    return torch.load(folder / "saving.pt")


@pytest.mark.parametrize("kind, before, after", [*pairs()])
def test_weights_and_optimizer_state_come_back_in_any_layout_bit_for_bit(
    reloaded, kind, before, after
):
    assert reloaded["wrong"][kind, before, after] == []


def test_what_is_compared_holds_weights_and_averages_and_no_padding(reloaded):
    averages, masters = ["exp_avg", "exp_avg_sq"], ["master"]
    of_kind = {
        "full fp32": [*averages, "weight"],
        "full bf16": [*averages, "master", "weight"],
        "LoRA": [*averages, "weight"],
        "8 bits, updated on the CPU": sorted(
            [*averages, *masters, "exp_avg_absmax", "exp_avg_sq_absmax", "weight"]
        ),
        "Muon, state in host memory": [*averages, *masters, "momentum", "weight"],
    }
    for (kind, layout), names in reloaded["kept"].items():
        shares = "ZeRO 3" in layout and kind != "full fp32" and kind != "LoRA"
        assert names == [x for x in of_kind[kind] if x != "weight" or not shares], (kind, layout)


@pytest.fixture
def saved(tmp_path, parallel):
    """A model in training of a kind, saved: (its tensors, the saved model, its counters)."""
    save_llama(tmp_path / "lm", "lm", 0)

    def save(kind: str):
        model, optimizer = made(tmp_path, parallel, kind, seed=1)
        tensors = HostCopies(parallel.device).of(kind, tensors_of(model, optimizer))
        save_file(tensors, tmp_path / "model.mp-00.dp-00.safetensors")
        return tensors, SavedModel(tmp_path, "model", {"mp": 1, "dp": 1}), counters_of(optimizer)

    return save


def test_a_run_that_goes_on_in_fp32_takes_up_the_masters(saved, parallel, tmp_path):
    """Not the weights that half precision had made of them."""
    tensors, step, counters = saved("full bf16")
    model = ours(tmp_path / "lm", parallel)
    restore(model, Optimizer(model, parallel), step, counters)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, tensors[f"master/{name}"]), name
        assert not torch.equal(weight, tensors[f"weight/{name}"].float()) or weight.dim() == 1, name


@pytest.mark.parametrize(
    "kind, dtype, scale",
    [("full fp32", torch.float16, 2.0**16), ("full fp32", torch.float32, 8.0)],
)
def test_a_loss_scale_is_one_of_its_dtype(saved, parallel, tmp_path, kind, dtype, scale):
    _, step, counters = saved(kind)
    model = ours(tmp_path / "lm", parallel, dtype)
    restore(model, optimizer := Optimizer(model, parallel), step, counters | {"loss_scale": 8.0})
    assert optimizer.loss_scale == scale


def test_a_step_of_a_model_of_other_sizes_is_refused(saved, parallel, tmp_path):
    tensors, _, counters = saved("full fp32")
    name = "weight/norm.weight"  # one that a larger one would take up without a word
    save_file(
        tensors | {name: tensors[name][:1].clone()}, tmp_path / "model.mp-00.dp-00.safetensors"
    )
    step = SavedModel(tmp_path, "model", {"mp": 1, "dp": 1})
    model = ours(tmp_path / "lm", parallel)
    with pytest.raises(UserError, match=r"weight/norm.weight has shape \[1\] on rank 0, and"):
        restore(model, Optimizer(model, parallel), step, counters)


class Crash(BaseException):
    """What no handler of ours expects."""


def files(value: float) -> dict:
    return {
        "model.safetensors": {"weight": torch.full((50,), value)},
        "more.safetensors": {"x": torch.arange(9.0) * value},
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_at_any_stage_leaves_a_whole_step(tmp_path, parallel, stage):
    steps = Steps(tmp_path, keep=1, parallel=parallel)
    steps.save(1, files(1.0), {"facts": "one"})
    steps.wait()

    def reached(at: str) -> None:
        if at == stage:
            raise Crash

    crashing = Steps(tmp_path, 1, parallel, reached)
    with pytest.raises(Crash):
        crashing.save(2, files(2.0), {"facts": "two"})
        crashing.wait()
    newest = list_steps(tmp_path)[-1]
    whole = 2 if STAGES.index(stage) >= STAGES.index("renamed") else 1
    assert open_step(newest, parallel)["step"] == whole
    again = Steps(tmp_path, 1, parallel)  # the run that goes on
    again.save(3, files(3.0), {})
    again.wait()
    assert [step.name for step in list_steps(tmp_path)] == ["step-00000003"]
    assert open_step(tmp_path / "step-00000003", parallel)["step"] == 3


def test_a_step_is_never_overwritten(tmp_path, parallel):
    steps = Steps(tmp_path, 2, parallel)
    steps.save(1, files(1.0), {})
    steps.wait()
    with pytest.raises(UserError, match="never overwritten"):
        steps.save(1, files(2.0), {})
        steps.wait()
    assert problems(tmp_path / "step-00000001", read_manifest(tmp_path / "step-00000001")) == []


def test_only_the_newest_stay(tmp_path, parallel):
    steps = Steps(tmp_path, 2, parallel)
    for number in (1, 2, 10, 11):
        steps.save(number, files(float(number)), {})
    steps.wait()
    assert [step.name for step in list_steps(tmp_path)] == ["step-00000010", "step-00000011"]
    assert not list(tmp_path.glob(".tmp*"))


def test_a_step_of_which_a_part_is_removed_is_no_step(tmp_path, parallel, monkeypatch):
    """A kill in the middle of its removal, which would leave what looks like another run's."""
    steps = Steps(tmp_path, 1, parallel)
    steps.save(1, files(1.0), {})
    with monkeypatch.context() as patch:
        remove = shutil.rmtree

        def removes_a_part(path, ignore_errors=False):
            if not ignore_errors:
                (path / "manifest.json").unlink()
                raise OSError(5, "no more")

        patch.setattr(shutil, "rmtree", removes_a_part)
        with pytest.raises(UserError, match="cannot be removed: no more"):
            steps.save(2, files(2.0), {})
            steps.wait()
        patch.setattr(shutil, "rmtree", remove)
        assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]
    assert steps.go_back_to(tmp_path / "step-00000002") == []
    steps.remove_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_folder_that_was_not_finished_is_no_step(tmp_path):
    shutil.os.makedirs(tmp_path / ".tmp-step-00000009")
    save_file({"x": torch.ones(2)}, tmp_path / ".tmp-step-00000009" / "model.safetensors")
    write_manifest(tmp_path / ".tmp-step-00000009", {}, step=9)
    (tmp_path / "step-00000008").mkdir()  # without a manifest
    assert list_steps(tmp_path) == []


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage") / "step-00000005"
    folder.mkdir()
    for i in range(3):
        save_file(
            {"a": torch.randn(40, 30), "b": torch.randn(7)},
            folder / f"model.mp-{i:02d}.dp-00.safetensors",
        )
    write_manifest(folder, described_all(folder), step=5)
    return folder


def test_every_flipped_byte_is_found_and_its_file_named(step, parallel):
    rng, found = random.Random(0), 0
    for _ in range(100):
        file = rng.choice(sorted(step.glob("*.safetensors")))
        data = file.read_bytes()
        at = rng.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        with pytest.raises(UserError, match=file.name):
            open_step(step, parallel)
        file.write_bytes(data)
        found += 1
    assert found == 100 and open_step(step, parallel)["step"] == 5


def test_every_truncation_is_found_and_its_file_named(step, parallel):
    rng = random.Random(1)
    for _ in range(50):
        file = rng.choice(sorted(step.glob("*.safetensors")))
        data = file.read_bytes()
        file.write_bytes(data[: rng.randrange(len(data))])
        with pytest.raises(UserError, match=file.name):
            open_step(step, parallel)
        file.write_bytes(data)
    assert open_step(step, parallel)["step"] == 5


def test_a_missing_file_is_named_and_an_older_step_offered(tmp_path, parallel):
    steps = Steps(tmp_path, 3, parallel)
    for number in (1, 2):
        steps.save(number, files(float(number)), {})
    steps.wait()
    (tmp_path / "step-00000002" / "more.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"more.safetensors: missing; --resume .*step-00000001 goes on from there"
    ):
        open_step(tmp_path / "step-00000002", parallel)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"files": []},
        {"files": {"../x": {"size": 1, "sha256": ""}}},
        {"files": {"x": 3}},
    ],
)
def test_a_manifest_that_lies_is_refused(step, tmp_path, change):
    shutil.copytree(step, tmp_path / "step")
    manifest = json.loads((step / "manifest.json").read_text()) | change
    (tmp_path / "step" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest.json"):
        read_manifest(tmp_path / "step")
