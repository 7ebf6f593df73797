"""An adapter's own tokenizer: what it was trained with, to wherever it goes; transformers tells."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import checkpoint_merge
import checkpoint_split
from src.checkpoint.load import load_model
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.inputs import OpenedModel, open_model
from src.logs import RunLog
from src.models.lora import LoRAConfig
from src.parallel.setup import start, stop
from src.settings.model import ModelSettings
from src.settings.scripts import (
    CheckpointMergeSettings,
    CheckpointSplitSettings,
    MergedFolderSettings,
    ShardSettings,
)
from tests.checkpoint import gguf_files
from tests.checkpoint.tiny import VOCABULARY, tiny, write_hf

ADDED = ["<|user|>", "<|bot|>", "<|done|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m.role=='user' else '<|bot|>' }}{{ m.content }}"
    "<|done|>{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)
TEXT = "<|user|>w3 w4<|bot|>w5<|done|>"


@pytest.fixture(scope="module")
def parallel():
    yield start(1)
    stop()


def words(more: int = 0) -> PreTrainedTokenizerFast:
    """The base's: 90 words, and so many more."""
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 90 + more))]
    rust = RustTokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=rust, **tokens)


def with_a_chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As TRL's setup_chat_format leaves it."""
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    tokenizer.eos_token, tokenizer.chat_template = "<|done|>", TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base with its tokenizer, and adapters on it, each in a folder's folder."""
    work = tmp_path_factory.mktemp("made")
    write_hf(work / "base", "llama")
    words().save_pretrained(work / "base")
    saved = dict(modules_to_save=["embed_tokens", "lm_head"])
    how = dict(r=3, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    for name, more in (("chat", saved), ("factors", {})):
        model = get_peft_model(tiny("llama"), LoraConfig(**how, **more))
        model.save_pretrained(work / "trained" / name)
    with_a_chat(words()).save_pretrained(work / "trained" / "chat")
    shutil.copytree(work / "trained" / "factors", work / "plain" / "factors")
    words().save_pretrained(work / "plain")  # above the adapter: whose it is nobody knows
    return work


def opened(parallel, made: Path, adapter: Path | None = None, **more) -> OpenedModel:
    folder = None if adapter is None else str(adapter)
    settings = ModelSettings(ckpt_dir=str(made / "base"), adapter_dir=folder, **more)
    return open_model(settings, parallel, "lm")


def assert_chats(tokenizer: Tokenizer, adapter: Path) -> None:
    """It reads texts and ends them as transformers does by the adapter's folder."""
    wanted = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer._encode(TEXT) == wanted(TEXT, add_special_tokens=False).input_ids
    assert tokenizer.text_of(tokenizer.eos_id) == wanted.eos_token == "<|done|>"
    assert wanted.eos_token_id in tokenizer.stop_ids


@pytest.mark.parametrize("chat", (False, True))
def test_it_counts_before_the_bases(parallel, made, chat, capsys):
    adapter = made / "trained" / "chat"
    model = opened(parallel, made, adapter, use_chat_template=chat)
    assert model.tokenizer.path.parent == adapter
    assert_chats(model.tokenizer, adapter)
    # what the adapter learned has a probability; what nobody has a text for has none
    assert model.checkpoint.config.ids_without_text == ((93, VOCABULARY),)
    if chat:
        turn = [{"role": "user", "content": "w3"}]
        wanted = AutoTokenizer.from_pretrained(adapter)
        ids = wanted.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        assert model.tokenizer.prompt_ids("w3") == ids
    with RunLog(None, "test", {}, 0) as log:
        model.announce(log)
    said = capsys.readouterr().err
    assert f"the tokenizer is the adapter's own, {adapter}" in said
    assert "4 of the model's 97 ids have no token" in said


def test_without_one_it_is_the_bases(parallel, made, capsys):
    """A tokenizer above the adapter's folder is not the adapter's."""
    for adapter in (made / "trained" / "factors", made / "plain" / "factors", None):
        model = opened(parallel, made, adapter)
        assert model.tokenizer.path.parent == made / "base"
        assert model.tokenizer.text_of(model.tokenizer.eos_id) == "</s>"
        with RunLog(None, "test", {}, 0) as log:
            model.announce(log)
    assert "adapter's own" not in capsys.readouterr().err


def test_a_named_file_counts_before_it(parallel, made):
    file = str(made / "base" / "tokenizer.json")
    model = opened(parallel, made, made / "trained" / "chat", tokenizer_file=file)
    assert model.tokenizer.path == Path(file) and model.tokenizer.id_of("<|done|>") is None


@pytest.mark.parametrize("chat", (False, True))
def test_it_is_merged_with_the_model(made, tmp_path, chat, capsys):
    adapter = made / "trained" / "chat"
    settings = ModelSettings(
        ckpt_dir=str(made / "base"), adapter_dir=str(adapter), use_chat_template=chat
    )
    folder = MergedFolderSettings(save_dir=str(tmp_path / "merged"))
    checkpoint_merge.main(CheckpointMergeSettings(model=settings, folder=folder))
    assert "with the adapter's own tokenizer" in capsys.readouterr().out
    assert_exported(tmp_path / "merged", adapter)


def assert_exported(folder: Path, adapter: Path) -> None:
    """transformers reads the folder's tokenizer as the adapter's."""
    ours, wanted = (AutoTokenizer.from_pretrained(path) for path in (folder, adapter))
    for text in (TEXT, "w3 <|done|> w9", "w88 nothing"):
        given = [t(text, add_special_tokens=False).input_ids for t in (ours, wanted)]
        assert given[0] == given[1]
    assert (ours.eos_token, ours.chat_template) == ("<|done|>", TEMPLATE)
    generation = json.loads((folder / "generation_config.json").read_text())
    ends = generation["eos_token_id"]
    assert wanted.eos_token_id in (ends if isinstance(ends, list) else [ends])


def test_it_is_split_with_the_model(made, tmp_path, capsys):
    adapter, shards = made / "trained" / "chat", tmp_path / "shards"
    given = ShardSettings(
        ckpt_file=str(made / "base"), adapter_dir=str(adapter), save_path=str(shards), n=2
    )
    checkpoint_split.main(CheckpointSplitSettings(shards=given))
    assert "with the adapter's own tokenizer" in capsys.readouterr().out
    assert_chats(Tokenizer.find(shards, use_chat_template=True), adapter)
    folder = MergedFolderSettings(save_dir=str(tmp_path / "merged"))
    settings = ModelSettings(ckpt_dir=str(shards))
    checkpoint_merge.main(CheckpointMergeSettings(model=settings, folder=folder))
    assert "own" not in capsys.readouterr().out
    assert_exported(tmp_path / "merged", adapter)


def test_what_is_trained_keeps_it(parallel, made, tmp_path):
    adapter = made / "trained" / "chat"
    model = opened(parallel, made, adapter)
    lora = LoRAConfig(3, 8, targets=("wq",))
    for name, how in (("whole", None), ("adapter", lora)):
        trained = load_model(model.checkpoint, parallel, torch.float32, lora=how)
        model.save(trained, parallel, str(tmp_path / name))
        assert_chats(Tokenizer.find(tmp_path / name), adapter)
        assert_exported(tmp_path / name, adapter)


def test_one_that_does_not_fit_the_model(parallel, made, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(made / "trained" / "factors", adapter)
    words(more=20).save_pretrained(adapter)
    with pytest.raises(UserError, match=f"{adapter}/tokenizer.json: has 110 entries, the model 97"):
        opened(parallel, made, adapter)
    with_a_chat(words(more=6)).save_pretrained(adapter)
    with pytest.raises(UserError, match="'<|done|>' has id 98, and the model's 97 embeddings lack"):
        opened(parallel, made, adapter)


def test_a_template_without_a_tokenizer_is_not_passed_over(parallel, made, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(made / "trained" / "factors", adapter)
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(UserError, match="has a chat template and no tokenizer to read it with"):
        opened(parallel, made, adapter, use_chat_template=True)
    assert opened(parallel, made, adapter).tokenizer.chat is None


def test_it_counts_before_a_gguf_files(tmp_path):
    base = gguf_files.model("llama")
    gguf_files.write_gguf(tmp_path / "m.gguf", base)
    adapter = tmp_path / "adapter"
    how = dict(r=3, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, LoraConfig(**how)).save_pretrained(adapter)
    with_a_chat(words()).save_pretrained(adapter)
    file, shards = str(tmp_path / "m.gguf"), str(tmp_path / "shards")
    given = ShardSettings(ckpt_file=file, adapter_dir=str(adapter), save_path=shards, n=1)
    checkpoint_split.main(CheckpointSplitSettings(shards=given))
    assert_chats(Tokenizer.find(tmp_path / "shards", use_chat_template=True), adapter)
