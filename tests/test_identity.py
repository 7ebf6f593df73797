"""Which command is the same run again."""

import shutil

import pytest

from src.checkpoint.manifest import described, write_manifest
from src.identity import differences, held, identity


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x.safetensors").write_text("1")
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_is_what_belongs_to_a_checkpoint(folder):
    before = held(folder)
    (folder / "out.jsonl.partial-0").write_text("what a run writes")
    (folder / "runs").mkdir()
    assert held(folder) == before
    for name in ("x.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text("another")
        assert held(folder) != before, name
        before = held(folder)


def test_a_folder_with_a_manifest_may_be_copied(folder, tmp_path):
    write_manifest(folder, {"x.safetensors": described(folder / "x.safetensors")})
    shutil.copytree(folder, tmp_path / "b", copy_function=shutil.copyfile)  # other times of change
    assert held(tmp_path / "b") == held(folder)
    (folder / "x.safetensors").write_text("2")
    write_manifest(folder, {"x.safetensors": described(folder / "x.safetensors")})
    assert held(tmp_path / "b") != held(folder)


def test_a_file_is_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("a.json", "1"), ("b.json", "1"), ("c.json", "2")):
        (tmp_path / name).write_text(text)

    def of(path, **more):
        return identity({"train_file": path, "lr": 0.1, "log_dir": path, "label_file": None, **more}, {"log_dir"})

    before = of("a.json")
    assert "log_dir" not in before
    assert differences(before, of("a.json")) == differences(before, of("./a.json")) == differences(before, of("b.json")) == []
    assert differences(before, of("c.json")) == ["--train_file a.json → c.json"]
    assert differences(before, of("a.json", lr=0.2)) == ["--lr 0.1 → 0.2"]
    assert differences(before, of("a.json", label_file="c.json")) == ["--label_file None → c.json"]
    (tmp_path / "a.json").write_text("3")
    assert differences(before, of("a.json")) == ["--train_file a.json holds something else now"]
    assert differences(None, {"lr": 1}) == ["--lr None → 1"]
