"""A tokenizer in use, the folder that is written of it, and transformers on that folder: the same.

Begin, end, stops, ids of plain texts and of conversations.
"""

import json

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from src.checkpoint.folder import (
    MORE_TEMPLATES,
    check_replaceable,
    copy_side_files,
    find_tokenizer,
)
from src.data import ranks as rank_files
from src.data.export import pad_of, special_ids_of, write_tokenizer
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from tests.data import test_tokenizer as other

CHATML, NAMES, TEXTS = other.CHATML, other.NAMES, [t for t in other.TEXTS if t]
TEXTS += ["a token, some text <none> !!", "so <|im_end|>  it\n <|im_start|>  is"]
ranks, rust, pieces = other.ranks, other.rust, other.pieces
MODEL = 1000  # entries of the model's vocabulary
PLAIN = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONTROL = ["[INST]", "[/INST]", "[TOOL]"]


def json_folder(folder, rust, config=None, bos=False, ends=False, **files):
    rust = RustTokenizer.from_str(rust.to_str())
    if bos or ends:
        special = [(text, rust.token_to_id(text)) for text in ("<s>", "<|endoftext|>")]
        form = "<s> $A" + " <|endoftext|>" * ends
        rust.post_processor = processors.TemplateProcessing(form, special_tokens=special)
    rust.enable_truncation(7)
    rust.enable_padding(length=9, pad_token="!", pad_id=0)
    rust.save(str(folder / "tokenizer.json"))
    files["tokenizer_config"] = config
    for name, value in files.items():
        if value is not None:
            other.write_json(folder / f"{name}.json", value)


def pieces_folder(folder, config=None, options=None, **files):
    other.train_pieces(folder / "tokenizer.model", **(options or {}))
    files["tokenizer_config"] = config
    for name, value in files.items():
        if value is not None:
            other.write_json(folder / f"{name}.json", value)


def merges_folder(folder, rust, config):
    """As an older transformers left it: Qwen's class says how texts are split."""
    whole = json.loads(rust.to_str())
    special = {token["content"] for token in whole["added_tokens"]}
    vocabulary = {text: i for text, i in whole["model"]["vocab"].items() if text not in special}
    other.write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in whole["model"]["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    added = {str(token.pop("id")): token for token in whole["added_tokens"]}
    other.write_json(folder / "tokenizer_config.json", config | {"added_tokens_decoder": added})


def ranks_folder(folder, ranks, name):
    other.write_ranks(folder / name, ranks)


def tekken_folder(folder, ranks):
    other.write_json(folder / "tekken.json", other.tekken(ranks))


ENDED = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
ROW = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
SPACED = {  # as a config describes tokens that are in the file already
    "502": ROW | {"content": "<|im_start|>", "rstrip": True, "special": True},
    "503": ROW | {"content": "<|im_end|>", "lstrip": True, "special": True},
}
LISTED = {  # special tokens in all the ways that files name them
    "bos_token": ROW | {"content": "<s>", "__type": "AddedToken"},
    "eos_token": ROW | {"content": "<|endoftext|>", "__type": "AddedToken"},
    "pad_token": "!",  # a word, which stays one
    "cls_token": "<none>",  # not there
    "additional_special_tokens": ["ken", ROW | {"content": "ex", "__type": "AddedToken"}],
    "extra_special_tokens": {"image_token": "ex"},
}
SPECIAL_MAP = {
    "eos_token": "<|im_end|>",
    "additional_special_tokens": ["ex", "<none>"],
}
ADDED = {"<|im_start|>": 420, "<|im_end|>": 421, "<call>": 422}
# name → (how to fill a folder, the model's family, whether a chat template is used)
KINDS = {
    "pieces alone": (lambda d, f: pieces_folder(d), "llama", False),
    "pieces, llama 2's chat": (lambda d, f: pieces_folder(d), "llama-2", True),
    "pieces, mistral's chat": (lambda d, f: pieces_folder(d), "mistral", True),
    "pieces with control brackets": (
        lambda d, f: pieces_folder(d, options={"control_symbols": CONTROL}),
        "mistral",
        True,
    ),
    "pieces with control brackets, plain": (
        lambda d, f: pieces_folder(d, options={"control_symbols": CONTROL}),
        "mistral",
        False,
    ),
    "pieces without BOS": (
        lambda d, f: pieces_folder(d, PLAIN | {"add_bos_token": False}),
        "llama",
        False,
    ),
    "pieces without a space before": (
        lambda d, f: pieces_folder(d, PLAIN | {"add_prefix_space": False}),
        "llama",
        False,
    ),
    "pieces and added tokens": (
        lambda d, f: pieces_folder(d, PLAIN | {"chat_template": CHATML}, added_tokens=ADDED),
        "llama",
        True,
    ),
    "pieces and added tokens, plain": (
        lambda d, f: pieces_folder(d, PLAIN, added_tokens=ADDED),
        "llama",
        False,
    ),
    "pieces with another EOS": (
        lambda d, f: pieces_folder(d, PLAIN | {"eos_token": "<call>"}, added_tokens=ADDED),
        "llama",
        False,
    ),
    "pieces, legacy said": (
        lambda d, f: pieces_folder(
            d, PLAIN | {"legacy": True, "chat_template": CHATML}, added_tokens=ADDED
        ),
        "llama",
        True,
    ),
    "pieces, no legacy": (
        lambda d, f: pieces_folder(d, PLAIN | {"legacy": False}, added_tokens=ADDED),
        "llama",
        False,
    ),
    "unigram, no legacy": (
        lambda d, f: pieces_folder(
            d,
            PLAIN | {"legacy": False},
            options={
                "model_type": "unigram",
                "normalization_rule_name": "nmt_nfkc",
                "vocab_size": 310,
            },
        ),
        "llama",
        False,
    ),
    "user-defined pieces": (
        lambda d, f: pieces_folder(d, options={"user_defined_symbols": ["<go>", "  "]}),
        "llama",
        False,
    ),
    "unigram": (
        lambda d, f: pieces_folder(
            d,
            options={
                "model_type": "unigram",
                "normalization_rule_name": "nmt_nfkc",
                "vocab_size": 310,
            },
        ),
        "llama",
        False,
    ),
    "json": (lambda d, f: json_folder(d, f("rust"), NAMES), "llama", False),
    "json with BOS": (lambda d, f: json_folder(d, f("rust"), NAMES, bos=True), "llama", False),
    "json, BOS by its config": (
        lambda d, f: json_folder(d, f("rust"), NAMES | {"add_bos_token": True}),
        "llama",
        False,
    ),
    "json, no BOS by its config": (
        lambda d, f: json_folder(d, f("rust"), NAMES | {"add_bos_token": False}, bos=True),
        "llama",
        False,
    ),
    "json without a config": (
        lambda d, f: json_folder(d, f("rust"), generation_config={"eos_token_id": 501}),
        "llama",
        False,
    ),
    "json, a map of tokens": (
        lambda d, f: json_folder(d, f("rust"), {}, special_tokens_map=NAMES),
        "llama",
        False,
    ),
    "json, tokens listed": (lambda d, f: json_folder(d, f("rust"), LISTED), "llama", False),
    "json, a list of more tokens": (
        lambda d, f: json_folder(d, f("rust"), NAMES | {"extra_special_tokens": ["ex"]}),
        "llama",
        False,
    ),
    "json, the map against the config": (
        lambda d, f: json_folder(d, f("rust"), NAMES, special_tokens_map=SPECIAL_MAP),
        "llama",
        False,
    ),
    "json, tokens that take spaces": (
        lambda d, f: json_folder(
            d, f("rust"), NAMES | {"added_tokens_decoder": SPACED, "chat_template": CHATML}
        ),
        "llama",
        True,
    ),
    "json that ends texts": (
        lambda d, f: json_folder(d, f("rust"), NAMES | {"add_eos_token": True}, ends=True),
        "llama",
        False,
    ),
    "json, BOS is EOS": (
        lambda d, f: json_folder(d, f("rust"), ENDED | {"bos_token": "<|endoftext|>"}),
        "llama",
        False,
    ),
    "json, control tokens as text": (
        lambda d, f: json_folder(d, f("rust"), NAMES | {"split_special_tokens": True}),
        "llama",
        False,
    ),
    "merges": (
        lambda d, f: merges_folder(d, f("rust"), ENDED | {"tokenizer_class": "Qwen2Tokenizer"}),
        "llama",
        False,
    ),
    "pieces, added tokens described": (
        lambda d, f: pieces_folder(
            d,
            PLAIN
            | {
                "chat_template": CHATML,
                "added_tokens_decoder": {
                    str(i): ROW | {"content": text, "normalized": True, "special": False}
                    for text, i in ADDED.items()
                },
            },
        ),
        "llama",
        True,
    ),
    "a base model's ChatML": (
        lambda d, f: json_folder(
            d,
            f("rust"),
            ENDED | {"chat_template": CHATML},
            generation_config={"eos_token_id": 501, "max_new_tokens": 9, "temperature": 0.6},
        ),
        "qwen2",
        True,
    ),
    "the family's ChatML": (lambda d, f: json_folder(d, f("rust"), ENDED), "qwen2", True),
    "qwen's ranks": (lambda d, f: ranks_folder(d, f("ranks"), "qwen.tiktoken"), "qwen", True),
    "llama 3's ranks": (lambda d, f: ranks_folder(d, f("ranks"), "tokenizer.model"), "llama", True),
    "llama 3's ranks, plain": (
        lambda d, f: ranks_folder(d, f("ranks"), "tokenizer.model"),
        "llama",
        False,
    ),
    "tekken": (lambda d, f: tekken_folder(d, f("ranks")), "mistral", True),
}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path, ranks, monkeypatch):
    """(the tokenizer in use, a folder written of it, whether it writes chats)."""
    fill, family, is_chat = KINDS[request.param]
    scheme = rank_files.LLAMA_3 if family == "llama" else rank_files.QWEN
    monkeypatch.setitem(rank_files.SCHEMES, len(ranks), scheme)
    # The weights lie elsewhere: what describes the tokenizer is beside it.
    source, weights, target = (tmp_path / name for name in ("tokenizer", "weights", "target"))
    for folder in (source, weights, target):
        folder.mkdir()
    fill(source, request.getfixturevalue)
    path = str(find_tokenizer(source))
    tokenizer = Tokenizer.find(weights, path, is_chat, family)
    tokenizer.fit(MODEL)
    write_tokenizer(tokenizer, target, source, MODEL, scores=False)
    ids = special_ids_of(tokenizer, source, MODEL, scores=False)
    # (Whatever a qwen2 folder says, transformers 5 builds Qwen's own normaliser and splitting.)
    model_type = {"mistral": "mistral", "qwen2": "qwen3"}.get(family, "llama")
    other.write_json(target / "config.json", {"model_type": model_type, **ids})
    return tokenizer, target, is_chat


def test_the_folder_written_reads_and_ends_as_the_tokenizer_in_use(kind):
    tokenizer, folder, is_chat = kind
    again = Tokenizer.find(folder, use_chat_template=is_chat)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert again.stop_ids == tokenizer.stop_ids
    if is_chat:
        assert again.chat.source == tokenizer.chat.source and again.chat.own
    for text in TEXTS:
        assert again.prompt_ids(text) == tokenizer.prompt_ids(text), text
        assert again.response_ids(text) == tokenizer.response_ids(text), text
        ids = tokenizer.response_ids(text)
        assert again.decode(ids) == tokenizer.decode(ids)
    assert again.identity == tokenizer.identity
    # Another flag does not change the end that was trained.
    assert Tokenizer.find(folder).eos_id == tokenizer.eos_id


def test_transformers_reads_and_ends_as_the_tokenizer_in_use(kind):
    tokenizer, folder, is_chat = kind
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == tokenizer.eos_id
    if tokenizer.bos_id is not None:
        assert theirs.bos_token_id == tokenizer.bos_id
    for text in TEXTS:
        ids = tokenizer.response_ids(text)[:-1]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids or is_chat, text
        if not is_chat:
            spelled = text.startswith("<|begin_of_text|>")  # transformers puts another before it
            assert spelled or theirs(text)["input_ids"] == tokenizer.prompt_ids(text), text
            continue
        turn = {"role": "user", "content": text}
        prompt = theirs.apply_chat_template([turn], add_generation_prompt=True, return_dict=False)
        assert prompt == tokenizer.prompt_ids(text), text
        turns = [turn, {"role": "assistant", "content": "So it is."}, turn]
        prompt = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert prompt == tokenizer.conversation_ids(turns), text
    # a list of these, as transformers 5 writes it, transformers 4 cannot read
    assert "extra_special_tokens" not in (folder / "tokenizer_config.json").read_text()
    generation = json.loads((folder / "generation_config.json").read_text())
    ends = generation["eos_token_id"]
    assert {ends} if isinstance(ends, int) else set(ends) == tokenizer.stop_ids
    if theirs.pad_token_id is not None:
        assert theirs.pad_token_id == generation["pad_token_id"] < MODEL


@pytest.mark.parametrize("options", [{}, {"user_defined_symbols": ["<go>"]}], ids=["", "go"])
@pytest.mark.parametrize("own", [True, False])
def test_a_folder_written_without_its_template_is_the_same_with_it(tmp_path, own, options):
    """Also where control tokens part the texts, after which no space is put."""
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    sp = other.train_pieces(source / "tokenizer.model", control_symbols=CONTROL, **options)
    if own:
        (source / "chat_template.jinja").write_text(
            "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
            "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
        )
    plain, chat = (Tokenizer.find(source, None, is_chat, "mistral") for is_chat in (False, True))
    write_tokenizer(plain, target, source, MODEL, scores=False)
    again = Tokenizer.find(target, None, True, "mistral")
    start, end = sp.piece_to_id(CONTROL[:2])
    for text in ["an egg", "two\n eggs", "<go> egg", *TEXTS]:
        assert again.prompt_ids(text) == chat.prompt_ids(text), text
        assert again.response_ids(text) == chat.response_ids(text), text
        # and a text by itself begins as SentencePiece lets it
        if not any(token in text for token in plain.control):
            assert plain.prompt_ids(text) == [1, *sp.encode(text)], text
            assert Tokenizer.find(target).prompt_ids(text) == [1, *sp.encode(text)], text
    assert again.prompt_ids("an egg") == [1, start, *sp.encode("an egg"), end]
    assert plain.prompt_ids("[INST] an egg")[1:] == [start, *sp.encode("an egg")]


def test_a_template_that_cannot_be_asks_nothing_of_plain_texts(tmp_path):
    sp = other.train_pieces(tmp_path / "tokenizer.model", control_symbols=CONTROL)
    (tmp_path / "chat_template.jinja").write_text("{{ nothing.there }}")
    tokenizer = Tokenizer.find(tmp_path)
    start = sp.piece_to_id("[INST]")
    assert tokenizer.prompt_ids("[INST] an egg")[1:] == [start, *sp.encode(" an egg")]


READ_ALIKE = ["json, tokens listed", "json, a list of more tokens", "json, BOS is EOS", "merges"]
READ_ALIKE += ["json, the map against the config", "json, tokens that take spaces"]


@pytest.mark.parametrize("name", READ_ALIKE)
def test_files_name_their_tokens_as_transformers_reads_them(name, tmp_path, request):
    fill, family, _ = KINDS[name]
    fill(tmp_path, request.getfixturevalue)
    path = tmp_path / "tokenizer_config.json"
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | json.loads(path.read_text())
    # A word that fills up batches stays a word here, where it ends words of its own there.
    other.write_json(path, config | {"pad_token": "<|endoftext|>", "chat_template": None})
    if not (tmp_path / "vocab.json").is_file():  # it is in tokenizer.json for all to see
        whole = RustTokenizer.from_file(str(tmp_path / "tokenizer.json"))
        whole.no_truncation()
        whole.no_padding()
        whole.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = Tokenizer.find(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_id == theirs.eos_token_id
    # nor does a name make a token, as it does there
    for text in (text.replace("<none>", "") for text in TEXTS):
        assert ours.prompt_ids(text) == theirs(text)["input_ids"], text


LLAMA, QWEN2 = {"tokenizer_class": "LlamaTokenizerFast"}, {"tokenizer_class": "Qwen2Tokenizer"}
PADDED = dict.fromkeys(("bos_token", "pad_token", "eos_token"), "<s>")


@pytest.mark.parametrize(
    "config, model_type, side",
    [
        (LLAMA, "llama", "left"),
        (LLAMA | {"padding_side": "right"}, "llama", "right"),
        (LLAMA, None, "left"),
        ({"tokenizer_class": "CodeLlamaTokenizer"}, "llama", "left"),
        (QWEN2, "qwen3", "right"),
        (QWEN2 | {"padding_side": "left"}, "qwen3", "left"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "llama", "right"),
        ({}, "qwen2", "right"),
        ({"model_input_names": ["input_ids"]}, "qwen2", "right"),
    ],
)
def test_batches_are_filled_up_as_in_transformers_on_the_source(
    tmp_path, rust, pieces, config, model_type, side
):
    """So that what `generate` answers in a batch stays what it was."""
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
        if model_type:
            other.write_json(folder / "config.json", {"model_type": model_type})
    is_qwen = str(model_type).startswith("qwen")  # a class that puts its own rules in place
    text = rust.to_str() if is_qwen else Tokenizer(pieces[0]).to_json()
    (source / "tokenizer.json").write_text(text)
    other.write_json(source / "tokenizer_config.json", PADDED | config)
    write_tokenizer(Tokenizer.find(source), target, source, MODEL, scores=False)
    written = json.loads((target / "tokenizer_config.json").read_text())
    # transformers 4 would have a third for our class, which models do not take
    names = config.get("model_input_names", ["input_ids", "attention_mask"])
    assert (written["padding_side"], written["model_input_names"]) == (side, names)
    filled = [
        AutoTokenizer.from_pretrained(folder)(["a", "an egg"], padding=True)
        for folder in (source, target)
    ]
    assert {**filled[0]} == {**filled[1]} and filled[1].keys() == set(names)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_batches_are_filled_up_on_the_left_where_versions_differ(tmp_path, pieces, model_type):
    """Without a class transformers 4 has Llama's, 5 one that pads on the right."""
    other.write_json(tmp_path / "config.json", {"model_type": model_type})
    (tmp_path / "tokenizer.json").write_text(Tokenizer(pieces[0]).to_json())
    (target := tmp_path / "target").mkdir()
    write_tokenizer(Tokenizer.find(tmp_path), target, tmp_path, MODEL, scores=False)
    assert AutoTokenizer.from_pretrained(target).padding_side == "left"


def test_what_a_base_model_said_of_generation_stays_but_for_its_end(tmp_path, rust):
    json_folder(
        tmp_path,
        rust,
        ENDED | {"chat_template": CHATML},
        generation_config={
            **{"eos_token_id": 501, "max_new_tokens": 9, "temperature": 0.6},
            **{"forced_eos_token_id": 501, "stop_strings": ["a"], "suppress_tokens": [503]},
            **{"pad_token_id": 1000, "min_new_tokens": 7},
        },
    )
    target = tmp_path / "target"
    target.mkdir()
    tokenizer = Tokenizer.find(tmp_path, use_chat_template=True)
    write_tokenizer(tokenizer, target, tmp_path, MODEL, scores=False)
    written = json.loads((target / "generation_config.json").read_text())
    end = rust.token_to_id("<|im_end|>")
    assert written["eos_token_id"] == [end, 501]
    assert (written["max_new_tokens"], written["temperature"]) == (9, 0.6)
    # What would end it elsewhere is left out: here nothing of it was trained.
    assert written.keys() == {"eos_token_id", "pad_token_id", "max_new_tokens", "temperature"}
    assert written["pad_token_id"] == 501
    assert json.loads((target / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    "name", ["pieces alone", "json with BOS", "a base model's ChatML", "tekken"]
)
def test_a_verifier_scores_alike_however_its_batch_is_filled_up(name, tmp_path, request, ranks):
    fill, family, is_chat = KINDS[name]
    fill(tmp_path, request.getfixturevalue)
    path = str(find_tokenizer(tmp_path))
    tokenizer = Tokenizer.find(tmp_path, path, is_chat, family)
    target = tmp_path / "target"
    target.mkdir()
    write_tokenizer(tokenizer, target, tmp_path, MODEL, scores=True)
    pad = special_ids_of(tokenizer, tmp_path, MODEL, scores=True)["pad_token_id"]
    theirs = AutoTokenizer.from_pretrained(target)
    assert theirs.pad_token_id == pad and pad not in tokenizer.stop_ids
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=MODEL, num_labels=1, pad_token_id=pad, **sizes)
    model = LlamaForSequenceClassification(config).eval()
    rows = [tokenizer.prompt_ids(t) + tokenizer.response_ids(t) for t in ("a", "some more text")]
    for side in ("left", "right"):
        batch = theirs.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            scores = model(**batch).logits[:, 0]
            alone = [model(torch.tensor([row])).logits[0, 0] for row in rows]
        assert torch.allclose(scores, torch.stack(alone), atol=1e-6), side


def test_a_pad_is_found_for_every_tokenizer(tmp_path, rust, pieces):
    def pad(config, scores, vocab_size=MODEL):
        json_folder(tmp_path, rust, config)
        return pad_of(Tokenizer.find(tmp_path), vocab_size, scores)

    # a word that a file names is no pad: where it is one, no answer holds it
    assert pad(NAMES | {"pad_token": "!"}, False) == ("<s>", 500)
    assert Tokenizer.find(tmp_path).decode(rust.encode("a!!").ids) == "a!!"
    assert pad(NAMES | {"pad_token": "<s>"}, True) == ("<s>", 500)
    assert pad(NAMES | {"pad_token": "<|endoftext|>"}, False) == ("<|endoftext|>", 501)
    assert pad(NAMES | {"pad_token": "<|endoftext|>"}, True)[1] in (500, 502, 503)
    assert pad_of(Tokenizer(pieces[0]), 420, True) == ("<unk>", 0)
    # one special token, which ends texts: a row to spare, or only an id
    lonely = RustTokenizer.from_str(rust.to_str())
    whole = json.loads(lonely.to_str())
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"] == "<|endoftext|>"]
    whole["added_tokens"][0]["id"] = 500
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    other.write_json(tmp_path / "tokenizer_config.json", ENDED)
    tokenizer = Tokenizer.find(tmp_path)
    assert pad_of(tokenizer, 501, True) == (None, 0)
    assert pad_of(tokenizer, 502, True) == ("[PAD]", 501)
    target = tmp_path / "target"
    target.mkdir()
    write_tokenizer(tokenizer, target, tmp_path, 502, scores=True)
    assert AutoTokenizer.from_pretrained(target).pad_token_id == 501


@pytest.mark.parametrize("puts", [True, False])
def test_a_space_before_a_text_is_said_where_transformers_4_asks(tmp_path, puts):
    """It sets the file's own splitting by the config's key, which it takes for false."""
    rust = other.byte_level(500)
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=puts)
    json_folder(tmp_path, rust, NAMES)
    (target := tmp_path / "target").mkdir()
    write_tokenizer(Tokenizer.find(tmp_path), target, tmp_path, MODEL, scores=False)
    written = json.loads((target / "tokenizer_config.json").read_text())
    assert written["add_prefix_space"] is puts
    assert Tokenizer.find(target).prompt_ids("a") == Tokenizer.find(tmp_path).prompt_ids("a")


def test_a_stale_file_beside_is_not_passed_on(tmp_path, rust):
    json_folder(tmp_path, rust, NAMES)
    other.train_pieces(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.find(tmp_path)
    assert tokenizer.prompt_ids("egg") == rust.encode("egg").ids
    (target := tmp_path / "target").mkdir()
    write_tokenizer(tokenizer, target, tmp_path, MODEL, scores=False)
    assert {path.name for path in target.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }


@pytest.mark.parametrize("name", ["pieces and added tokens", "pieces, added tokens described"])
def test_what_was_added_to_pieces_is_said_beside_their_file(name, tmp_path, request):
    """For tools that read tokenizer.model first: which tokens lie past it, and which are control.

    As llama.cpp's converter looks for them.
    """
    fill, family, is_chat = KINDS[name]
    fill(tmp_path, request.getfixturevalue)
    tokenizer = Tokenizer.find(tmp_path, None, is_chat, family)
    (target := tmp_path / "target").mkdir()
    write_tokenizer(tokenizer, target, tmp_path, MODEL, scores=True)
    pieces = SentencePieceProcessor(model_file=str(target / "tokenizer.model"))
    seen = {i: (pieces.id_to_piece(i), pieces.is_control(i)) for i in range(len(pieces))}
    config = json.loads((target / "tokenizer_config.json").read_text())
    said = config.get("added_tokens_decoder", {})
    seen |= {int(i): (token["content"], token["special"]) for i, token in said.items()}
    assert {i: text for i, (text, _) in seen.items()} == {
        i: tokenizer.text_of(i) for i in range(tokenizer.vocab_size)
    }
    control = {i for i, (_, is_control) in seen.items() if is_control}
    assert control == set(tokenizer.control.values()) >= {420, 421}
    assert said["422"]["special"] is False


@pytest.mark.parametrize("is_chat", [False, True])
def test_templates_besides_the_first_are_passed_on(tmp_path, rust, is_chat):
    source, folders = tmp_path / "source", [tmp_path / name for name in ("written", "split")]
    for folder in (source, *folders):
        folder.mkdir()
    json_folder(source, rust, NAMES)
    (source / "chat_template.jinja").write_text(CHATML)
    (source / MORE_TEMPLATES).mkdir()
    (source / MORE_TEMPLATES / "tool_use.jinja").write_text("tools " + CHATML)
    tokenizer = Tokenizer.find(source, use_chat_template=is_chat)
    write_tokenizer(tokenizer, folders[0], source, MODEL, scores=False)
    copy_side_files(source, folders[1])
    for folder in folders:
        other.write_json(folder / "config.json", {"model_type": "llama"})
        assert AutoTokenizer.from_pretrained(folder).chat_template == {
            "default": CHATML,
            "tool_use": "tools " + CHATML,
        }
        assert check_replaceable(str(folder)) == folder
    (folders[0] / MORE_TEMPLATES / "notes.txt").touch()
    with pytest.raises(UserError, match=f"{MORE_TEMPLATES}/notes.txt, which is no part"):
        check_replaceable(str(folders[0]))


def test_sentencepiece_alone_is_exact(tmp_path):
    """Runs of one character, where several ways to join pieces compete."""
    options = {"control_symbols": CONTROL, "user_defined_symbols": ["<go>"]}
    sp = other.train_pieces(tmp_path / "tokenizer.model", **options)
    tokenizer = Tokenizer(tmp_path / "tokenizer.model", special_tokens="text")
    texts = [c * n for c in "aA 1\n.▁" for n in range(1, 40)] + TEXTS + other.noise(300)
    for text in [*texts, "<go>go<go>", " <go> ", "[INST]"]:
        assert tokenizer.prompt_ids(text) == [1, *sp.encode(text)], text
        assert tokenizer.decode(sp.encode(text)) == sp.decode(sp.encode(text))
    assert isinstance(sp, SentencePieceProcessor)
