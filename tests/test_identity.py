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
    before = held(str(folder))
    (folder / "out.jsonl.partial-0").write_text("what a run writes")
    (folder / "runs").mkdir()
    assert held(str(folder)) == before
    for name in ("x.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text("another")
        assert held(str(folder)) != before, name
        before = held(str(folder))


def test_a_folder_with_a_manifest_may_be_copied(folder, tmp_path):
    write_manifest(folder, {"x.safetensors": described(folder / "x.safetensors")})
    shutil.copytree(folder, tmp_path / "b", copy_function=shutil.copyfile)  # other times of change
    assert held(str(tmp_path / "b")) == held(str(folder))
    (folder / "x.safetensors").write_text("2")
    write_manifest(folder, {"x.safetensors": described(folder / "x.safetensors")})
    assert held(str(tmp_path / "b")) != held(str(folder))


def test_what_describes_a_tokenizer_belongs_to_it_and_a_missing_path_is_its_name(folder, tmp_path):
    for name in ("tokenizer.json", "x.json"):
        (folder / name).write_text("{}")
    before, other = held(str(folder / "tokenizer.json")), held(str(folder / "x.json"))
    (folder / "chat_template.jinja").write_text("another")
    assert held(str(folder / "tokenizer.json")) != before and held(str(folder / "x.json")) == other
    assert held("nowhere") != held("elsewhere")
    (folder / "gone.bin").symlink_to(tmp_path / "nowhere")
    before = held(str(folder))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    assert held(str(folder)) != before


def test_a_function_of_a_file_is_both(tmp_path):
    for name, text in (("a.py", "1"), ("b.py", "2"), ("c.py", "1")):
        (tmp_path / name).write_text(text)
    of = lambda text: held(str(tmp_path / text))
    assert (
        of("a.py:f") == of("c.py:f")
        and len({of("a.py:f"), of("a.py:g"), of("b.py:f"), of("a.py")}) == 4
    )


def test_a_file_is_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("a.json", "1"), ("b.json", "1"), ("c.json", "2")):
        (tmp_path / name).write_text(text)

    def of(path, **more):
        return identity(
            {"train_file": path, "lr": 0.1, "log_dir": path, "label_file": None, **more},
            {"log_dir"},
        )

    before = of("a.json")
    assert "log_dir" not in before
    assert (
        differences(before, of("a.json"))
        == differences(before, of("./a.json"))
        == differences(before, of("b.json"))
        == []
    )
    assert differences(before, of("c.json")) == ["--train_file a.json → c.json"]
    assert differences(before, of("a.json", lr=0.2)) == ["--lr 0.1 → 0.2"]
    assert differences(before, of("a.json", label_file="c.json")) == ["--label_file None → c.json"]
    (tmp_path / "a.json").write_text("3")
    assert differences(before, of("a.json")) == ["--train_file a.json holds something else now"]
    assert differences(None, {"lr": 1}) == ["--lr None → 1"]
