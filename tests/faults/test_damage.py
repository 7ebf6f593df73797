"""What a run left, changed by hand: refused by name before any work, and nothing moved.

Or gone on from exactly.
"""

import json
import os
import shutil

import pytest

from src.checkpoint.steps import list_steps
from tests.faults.harness import hashes
from tests.test_scripts import call, must, refused


@pytest.fixture(scope="module")
def left(command, tmp_path_factory):
    """A finished run of 12 steps; the last two saved ones are there."""
    folder = tmp_path_factory.mktemp("left")
    must(*command("SFT", folder, epochs=1))
    return folder


@pytest.fixture
def asked(command, left, tmp_path):
    """Asks for the same run once more, in a copy of what it left."""
    shutil.copytree(left, tmp_path, dirs_exist_ok=True)

    def run(**more):
        return call(*command("SFT", tmp_path, epochs=1, **more))

    return run


def edited(change):
    """A change to the manifest of the newest step."""

    def apply(state):
        path = list_steps(state)[-1] / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return apply


def put(**values):
    return edited(lambda manifest: manifest.update(values))


def finished_says(**values):
    def apply(state):
        path = state / "finished.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def as_file(state):
    shutil.rmtree(state)
    state.touch()


def without(name):
    return edited(lambda manifest: manifest.pop(name))


def without_file(name):
    return edited(lambda manifest: manifest["files"].pop(name))


def with_file(name):
    return edited(lambda manifest: manifest["files"].update({name: {"size": 1, "sha256": ""}}))


def no_manifest(state):
    (list_steps(state)[-1] / "manifest.json").unlink()


def no_json(state):
    (state / "finished.json").write_text("{")


STEP = {
    **{
        f"no {name}": (without(name), f"manifest.json: {name} is None")
        for name in ("step", "settings", "layouts", "counters", "parts")
    },
    "counters of another form": (
        put(counters={"model": {"adam_step": "x"}}),
        "the counters of model are",
    ),
    "a layout that cannot be": (
        put(layouts={"model": {"mp": 1, "dp": 10**9}}),
        "the layout of model is",
    ),
    "of another step": (put(step=4), "is of step 4; its folder was renamed"),
    "no hashes": (put(files={}), "names no model.mp-00.dp-00.safetensors"),
    "a hash less": (
        without_file("random.dp-00.safetensors"),
        "names no random.dp-00.safetensors",
    ),
    "a name too long": (with_file("x" * 300), "its list of files is damaged"),
    "a path that leads out": (with_file("../x"), "its list of files is damaged"),
    "another format": (put(format=True), "format True, this code reads 1"),
    "no manifest": (no_manifest, "step-00000012/manifest.json"),
    "a file in the place of the steps": (
        as_file,
        "model-state is not a folder that can be written to",
    ),
}
FINISHED = {
    "no number": (finished_says(step=None), "finished.json: step is None"),
    "settings of another form": (
        finished_says(settings=[1]),
        "belongs to a run with other settings",
    ),
    "no JSON": (no_json, "finished.json: cannot be read as JSON"),
}


def paths_in(folder) -> list:
    paths = [path for path in folder.rglob("*") if "-logs" not in str(path)]
    return sorted(str(path.relative_to(folder)) for path in paths)


@pytest.mark.parametrize("case", STEP)
def test_a_damaged_step_is_refused(asked, tmp_path, case):
    change, message = STEP[case]
    (tmp_path / "model-state" / "finished.json").unlink()
    shutil.rmtree(tmp_path / "model")
    change(tmp_path / "model-state")
    before = paths_in(tmp_path)
    refused(asked(), message)
    assert paths_in(tmp_path) == before
    if case not in ("settings of another form", "a file in the place of the steps"):
        verified = call("checkpoint_verify.py", "--ckpt_dir", tmp_path / "model-state")
        refused(verified, "step-00000012")


@pytest.mark.parametrize("case", FINISHED)
def test_a_damaged_end_is_refused(asked, tmp_path, case):
    change, message = FINISHED[case]
    change(tmp_path / "model-state")
    before = paths_in(tmp_path)
    refused(asked(), message)
    assert paths_in(tmp_path) == before


def test_a_finished_model_that_was_lost_is_made_again(asked, left, tmp_path):
    (tmp_path / "model" / "consolidated.00.pth").unlink()
    assert asked().code == 0
    assert hashes(tmp_path / "model") == hashes(left / "model")


def test_a_step_of_another_folder_sets_this_one_s_aside(asked, left, tmp_path):
    shutil.copytree(left / "model-state", tmp_path / "other-state")
    assert asked(resume=tmp_path / "other-state" / "step-00000008").code == 0
    assert hashes(tmp_path / "model") == hashes(left / "model")
    state = tmp_path / "model-state"
    assert [step.name for step in list_steps(state)] == ["step-00000012"]
    aside = {path.name for path in (state / "aside-1").iterdir()}
    assert aside == {"finished.json", "step-00000008", "step-00000012"}


def test_no_room_is_said_before_anything_is_set_aside(asked, tmp_path, monkeypatch):
    before = paths_in(tmp_path)
    usage = shutil._ntuple_diskusage(10**6, 10**6, 300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    done = asked(resume="none", save_every=1, keep=100)
    assert done.code == 2 and "are needed for 12 steps (--save_every, --keep)" in done.err
    assert "Traceback" not in done.err
    assert paths_in(tmp_path) == before


def test_a_folder_spelled_otherwise_is_the_same(asked, tmp_path):
    for spelled in (f"{tmp_path}/model/", f"{tmp_path}/model/.", f"{tmp_path}/./model"):
        done = asked(save_dir=spelled)
        assert done.code == 0 and "this run finished after step 12" in done.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(asked, tmp_path):
    file = next(list_steps(tmp_path / "model-state")[-1].glob("model*"))
    file.chmod(0)
    (tmp_path / "model-state" / "finished.json").unlink()
    refused(asked(), f"{file}: cannot be read")
