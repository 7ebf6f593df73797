"""Which files go along when a checkpoint is split, and that texts then end where they did."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, GenerationConfig

import checkpoint_merge
import checkpoint_split
from src.checkpoint.folder import copy_side_files, find_tokenizer
from src.data.tokenizer import Tokenizer
from src.settings.model import ModelSettings
from src.settings.scripts import (
    CheckpointMergeSettings,
    CheckpointSplitSettings,
    MergedFolderSettings,
    ShardSettings,
)
from tests.checkpoint.test_adapter_tokenizer import ADDED, TEMPLATE, with_a_chat, words
from tests.checkpoint.tiny import write_hf


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


# --- the ids that end a text, and the template, wherever they are said


USER, BOT, DONE = 90, 91, 92  # the ids of ADDED
ENDS = {  # eos_token_id of generation_config.json ("left out": no such file), and of config.json
    "config.json alone": ("left out", [BOT, DONE]),
    "config.json alone, one": ("left out", BOT),
    "both, others": ([DONE, 2], [BOT]),
    "both, alike": ([DONE, BOT], [DONE, BOT]),
    "config.json has fewer": ([DONE, BOT], DONE),
    "null there": (None, BOT),
    "no word of it there": ({}, [BOT, 2]),
    "generation_config.json alone": ([DONE, BOT], None),
    "nobody": ("left out", None),
    "ids past the vocabulary": ("left out", [BOT, 95]),
    "an ordinary word": ("left out", [BOT, 5]),
}


def write_ids(folder: Path, generation, config, **more) -> None:
    """more: of generation_config.json, where there is one."""
    if generation != "left out":
        said = {} if generation == {} else {"eos_token_id": generation}
        (folder / "generation_config.json").write_text(json.dumps(said | more))
    file = folder / "config.json"
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(raw | {"eos_token_id": config}))


def made(folder: Path, named: bool = True) -> Path:
    """A model with a tokenizer, whose files name an EOS or do not."""
    write_hf(folder, "llama")
    with_a_chat(words()).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    if not named:
        (folder / "tokenizer_config.json").unlink()
    return folder


def split(source: Path, target: Path) -> Path:
    given = ShardSettings(ckpt_file=str(source), save_path=str(target), n=2)
    checkpoint_split.main(CheckpointSplitSettings(shards=given))
    return target


def merge(source: Path, target: Path) -> Path:
    model, folder = ModelSettings(ckpt_dir=str(source)), MergedFolderSettings(save_dir=str(target))
    checkpoint_merge.main(CheckpointMergeSettings(model=model, folder=folder))
    return target


def as_list(ids) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


@pytest.mark.parametrize("named", (True, False))
@pytest.mark.parametrize("kind", ENDS)
def test_shards_end_texts_where_their_source_did(tmp_path, kind, named):
    source = made(tmp_path / "hf", named)
    write_ids(source, *ENDS[kind], top_p=0.8)
    wanted = Tokenizer.find(source)
    shards = split(source, tmp_path / "shards")
    ours = Tokenizer.find(shards)
    assert (ours.eos_id, ours.stop_ids) == (wanted.eos_id, wanted.stop_ids)
    generation = GenerationConfig.from_pretrained(merge(shards, tmp_path / "back"))
    assert set(as_list(generation.eos_token_id)) == wanted.stop_ids
    if ENDS[kind][0] != "left out":
        assert json.loads((shards / "generation_config.json").read_text())["top_p"] == 0.8


def test_a_generation_config_that_says_it_all_stays_as_it_is(tmp_path):
    source = made(tmp_path / "hf")
    write_ids(source, [DONE, BOT], BOT)
    text = '{"eos_token_id": [92,   91], "bos_token_id": 1}'
    (source / "generation_config.json").write_text(text)
    shards = split(source, tmp_path / "shards")
    assert (shards / "generation_config.json").read_text() == text


def test_ids_above_the_folder_count_with_its_own(tmp_path):
    """As in Meta's downloads: the tokenizer lies above, with ids of its own."""
    source = made(tmp_path / "download" / "hf")
    (source / "tokenizer.json").rename(tmp_path / "download" / "tokenizer.json")
    write_ids(source, BOT, 2)
    write_ids(tmp_path / "download", DONE, None)
    wanted, ours = (Tokenizer.find(f) for f in (source, split(source, tmp_path / "out" / "shards")))
    assert wanted.stop_ids == {2, BOT, DONE}
    assert (ours.eos_id, ours.stop_ids) == (wanted.eos_id, wanted.stop_ids)


@pytest.mark.parametrize("form", ("file", "text", "list"))
def test_a_template_of_the_folder_goes_with_a_tokenizer_above_it(tmp_path, form):
    source = made(tmp_path / "download" / "hf")
    (source / "tokenizer.json").rename(tmp_path / "download" / "tokenizer.json")
    values = json.loads((source / "tokenizer_config.json").read_text())
    entries = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    if form == "file":
        (source / "chat_template.jinja").write_text(TEMPLATE)
    else:
        values |= {"chat_template": TEMPLATE if form == "text" else entries}
    (source / "tokenizer_config.json").write_text(json.dumps(values))
    shards = split(source, tmp_path / "out" / "shards")
    wanted, ours = (Tokenizer.find(folder, use_chat_template=True) for folder in (source, shards))
    assert ours.prompt_ids("w3 w4") == wanted.prompt_ids("w3 w4") == [USER, 3, 4, DONE, BOT]
    assert ours.eos_id == wanted.eos_id == DONE and ADDED[2] == ours.text_of(DONE)


def test_without_a_tokenizer_the_ids_go_along(tmp_path):
    """config.json's, to the shards and back into transformers' two configs."""
    source = tmp_path / "hf"
    write_hf(source, "llama")
    (source / "tokenizer.json").unlink()
    write_ids(source, "left out", [7, 9])
    ids = dict(bos_token_id=3, eos_token_id=[7, 9], pad_token_id=4)
    raw = json.loads((source / "config.json").read_text()) | ids
    (source / "config.json").write_text(json.dumps(raw))
    back = merge(split(source, tmp_path / "shards"), tmp_path / "back")
    for config in (AutoConfig.from_pretrained(back), GenerationConfig.from_pretrained(back)):
        assert {key: getattr(config, key) for key in ids} == ids
