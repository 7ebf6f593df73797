"""Which tokenizer goes along with a saved checkpoint."""

import pytest

from src.checkpoint.folder import copy_side_files, find_tokenizer


@pytest.fixture
def folders(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    tokenizer = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
    for name in (*tokenizer, "generation_config.json"):
        (source / name).write_text(f"own {name}")
    return source, target


def test_the_weights_own_files_all_go_along(folders):
    source, target = folders
    copy_side_files(source, target, source / "tokenizer.model")
    assert sorted(f.name for f in target.iterdir()) == sorted(f.name for f in source.iterdir())


def test_another_tokenizer_in_use_is_the_one_found_again(folders, tmp_path):
    source, target = folders
    tokenizer = tmp_path / "elsewhere" / "mine.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text("mine")
    copy_side_files(source, target, tokenizer)
    assert find_tokenizer(target).read_text() == "mine"
    assert (target / "generation_config.json").is_file()
    assert not (target / "tokenizer.model").exists()
