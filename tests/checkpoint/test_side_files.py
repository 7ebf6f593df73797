"""Which files go along when a checkpoint is split, just as they are."""

import pytest

from src.checkpoint.folder import copy_side_files, find_tokenizer


@pytest.fixture
def folders(tmp_path):
    source, target = tmp_path / "download" / "weights", tmp_path / "target"
    source.mkdir(parents=True), target.mkdir()
    (source / "generation_config.json").write_text("own generation_config.json")
    return source, target


def write(folder, *names):
    for name in names:
        (folder / name).write_text(f"{folder.name} {name}")


def test_the_weights_own_files_all_go_along(folders):
    source, target = folders
    write(source, "tokenizer.model", "tokenizer.json", "tokenizer_config.json")
    copy_side_files(source, target)
    assert sorted(f.name for f in target.iterdir()) == sorted(f.name for f in source.iterdir())
    assert find_tokenizer(target).read_text() == find_tokenizer(source).read_text()


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3", "tekken.json"])
def test_a_tokenizer_beside_the_folder_goes_along_with_what_describes_it(folders, name):
    source, target = folders
    write(source.parent, name, "tokenizer_config.json")
    write(source, "tokenizer_config.json")
    copy_side_files(source, target)
    assert find_tokenizer(target).read_text() == f"download {name}"
    assert (target / "tokenizer_config.json").read_text() == "download tokenizer_config.json"
    assert (target / "generation_config.json").is_file()
