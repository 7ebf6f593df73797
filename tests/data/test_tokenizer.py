"""Tokenizers and chat templates of all families.

Against tiktoken, SentencePiece and transformers.
"""

import base64
import json
import random
import unicodedata
from datetime import datetime

import pytest
import sentencepiece
import tiktoken
from sentencepiece import SentencePieceProcessor
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from src.checkpoint.manifest import write_manifest
from src.data import chat
from src.data import ranks as rank_files
from src.data.export import write_tokenizer
from src.data.messages import Messages
from src.data.ranks import put_before
from src.data.tokenizer import Tokenizer
from src.errors import UserError

TEXTS = [
    "Janet's ducks lay 16 eggs per day, she'LL eat 1234567 of them. I'm sure it's 3.50!",
    "def f(x):\n    return  x ** 2\n\n\n\tif x:\r\n\r\n        pass   \n",
    "  leading, trailing   ",
    " ",
    "\n",
    "\t \n \t",
    "",
    "a",
    "日本語のテキスト、中文文本。한국어",
    "Ελληνικά русский עברית العربية हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🇨🇭 👍🏽 ☃️",
    "e\u0301 \u1e9b\u0323 A\u030a \u212b ﬁ Ⅷ ①²½",
    "\u00a0nbsp\u2003em\u200bzero\u3000wide\u0085nel\ufeff",
    "'ſ x'ſt 'S 'Ll",
    (
        "<|im_start|>user\n hi<|im_end|>\n<|endoftext|><|extra_0|><|extra_204|> <|not_special|>"
        " <|im_sta"
    ),
    (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|reserved_special_token_2|>"
    ),
    "\0\x7f",
    "x" * 300,
    "#### 72 <<48/2=24>>24 $1,000.00 http://a.b/c?d=e&f=%20",
]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_SPECIAL = [*CHATML_SPECIAL, *(f"<|extra_{i}|>" for i in range(205))]
LLAMA_SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def write_json(path, value):
    path.write_text(json.dumps(value))


def byte_level(size: int) -> RustTokenizer:
    """A byte-level BPE trained on TEXTS, with ChatML's tokens after it."""
    rust = RustTokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    rust.train_from_iterator(TEXTS * 3, trainer)
    rust.add_special_tokens(["<s>", *CHATML_SPECIAL, *LLAMA_SPECIAL])
    return rust


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Ranks as a training brings them out, in order."""
    back = {char: byte for byte, char in bytes_to_unicode().items()}
    model = json.loads(byte_level(900).to_str())["model"]["vocab"]
    return {bytes(back[char] for char in text): rank for text, rank in model.items()}


@pytest.fixture
def known(monkeypatch):
    """known(ranks, scheme): small ranks, taken for those of a vocabulary that there is."""
    return lambda ranks, scheme: monkeypatch.setitem(rank_files.SCHEMES, len(ranks), scheme)


def write_ranks(path, ranks):
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return path


def reference(ranks, pattern, special) -> tiktoken.Encoding:
    ids = {text: len(ranks) + i for i, text in enumerate(special)}
    return tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens=ids)


def noise(count: int) -> list[str]:
    """Texts of characters from everywhere, and of what marks spelled-out control tokens."""
    pick = random.Random(0)
    ranges = [(32, 127)] * 4 + [(9, 14), (32, 33), (0xA0, 0x250), (0x300, 0x370)]
    ranges += [(0x4E00, 0x4E80), (0x1F600, 0x1F640), (0xAC00, 0xAC40)]
    return [
        "".join(chr(pick.randrange(*pick.choice(ranges))) for _ in range(pick.randrange(40)))
        for _ in range(count)
    ] + ["\ufdd0 \ufdd1"]


# --- tiktoken's files


def test_qwen_ranks_give_tiktoken_ids(tmp_path, ranks, known):
    known(ranks, rank_files.QWEN)
    tokenizer = Tokenizer(write_ranks(tmp_path / "qwen.tiktoken", ranks))
    theirs, n = reference(ranks, QWEN_PATTERN, QWEN_SPECIAL), len(ranks)
    for text in TEXTS + noise(500):
        normal = unicodedata.normalize("NFC", text)
        ids = theirs.encode(normal, allowed_special="all")
        assert tokenizer.response_ids(text) == [*ids, n], text
        assert not text or tokenizer.prompt_ids(text) == ids
        assert tokenizer.decode(ids) == theirs.decode([i for i in ids if i < n])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (None, n, {n})
    assert tokenizer.vocab_size == n + 208
    with pytest.raises(UserError, match="has no BOS, and a prompt is empty"):
        tokenizer.prompt_ids("")


def test_llama_3_ranks_are_recognised_by_their_content(tmp_path, ranks, known):
    known(ranks, rank_files.LLAMA_3)
    tokenizer = Tokenizer(write_ranks(tmp_path / "tokenizer.model", ranks))
    n = len(ranks)
    special = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
        12: "<|reserved_special_token_2|>",
        255: "<|reserved_special_token_245|>",
    }
    theirs = reference(ranks, LLAMA_PATTERN, [special.get(i, f"<|other_{i}|>") for i in range(256)])
    for text in TEXTS + noise(300):  # not normalised
        ids = theirs.encode(text, allowed_special="all")
        assert tokenizer.response_ids(text) == [*ids, n + 1], text
    assert tokenizer.prompt_ids("hi") == [n, *theirs.encode("hi")]
    assert tokenizer.prompt_ids("<|begin_of_text|>hi") == [n, *theirs.encode("hi")]  # never twice
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (n, n + 1, n + 256)


def test_ranks_in_any_order_merge_as_tiktoken_merges(tmp_path, known):
    pick = random.Random(1)
    tokens = {bytes(pick.choices(b"ab", k=pick.randrange(2, 7))) for _ in range(40)} - {b"a", b"b"}
    for number in range(20):
        shuffled = pick.sample(sorted(tokens), len(tokens))
        ordered = [bytes([byte]) for byte in range(256)] + shuffled
        ranks = {token: rank for rank, token in enumerate(ordered)}
        known(ranks, rank_files.QWEN)
        ours = Tokenizer(write_ranks(tmp_path / f"{number}.tiktoken", ranks))
        theirs = reference(ranks, QWEN_PATTERN, QWEN_SPECIAL)
        for _ in range(100):
            text = "".join(pick.choices("ab", k=pick.randrange(1, 30)))
            assert ours.prompt_ids(text) == theirs.encode(text)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (
            lambda lines: lines[:300] + [b"no base64!"] + lines[300:],
            "line 301 is b'no base64!', not bytes in base64 and their rank",
        ),
        (lambda lines: lines[:-2] + lines[-1:], "do not have the ranks 0 to"),
        (lambda lines: lines[:200], "lacks 56 of the 256 bytes, 0x"),
        (
            lambda lines: lines + [base64.b64encode(b"<|endoftext|>") + b" %d" % len(lines)],
            "among its ranks",
        ),
        (lambda lines: [], "is it cut short"),
    ],
)
def test_damaged_ranks_are_named(tmp_path, ranks, known, damage, reason):
    path = write_ranks(tmp_path / "qwen.tiktoken", ranks)
    lines = damage(path.read_bytes().splitlines())
    known(lines, rank_files.QWEN)
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=reason) as error:
        Tokenizer(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("size, scheme", [(603, None), (604, rank_files.QWEN)])
def test_ranks_of_another_vocabulary_are_refused(tmp_path, ranks, known, size, scheme):
    if scheme:
        known(range(size), scheme)
    with pytest.raises(UserError, match="has 603 ranks; known are 151,643"):
        Tokenizer(write_ranks(tmp_path / "qwen.tiktoken", ranks))


def tekken(ranks, special=None):
    """Mistral's kind of file, with 20 and more special tokens before the ranks, cut by 10."""
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    sizes = {"default_vocab_size": len(ranks) + 20, "default_num_special_tokens": 30}
    named = {} if special is None else {"special_tokens": special}
    return {"config": {"pattern": LLAMA_PATTERN, **sizes}, "vocab": vocab, **named}


def test_tekken_gives_tiktoken_ids_after_its_special_tokens(tmp_path, ranks):
    path = tmp_path / "tekken.json"
    write_json(path, tekken(ranks))
    tokenizer = Tokenizer.find(tmp_path, use_chat_template=True, family="mistral")
    kept = {token: rank for token, rank in ranks.items() if rank < len(ranks) - 10}
    theirs = reference(kept, LLAMA_PATTERN, [])
    for text in TEXTS + noise(300):
        ids = [i + 30 for i in theirs.encode(text)]
        assert tokenizer.prompt_ids(text) == [1, 3, *ids, 4]
        # the maker's chats take spaces off the end of an answer
        answer = [i + 30 for i in theirs.encode(text.rstrip(" "))]
        assert tokenizer.response_ids(text) == [*answer, 2]
        assert tokenizer.decode([1, 3, *ids, 4]) == theirs.decode([i - 30 for i in ids])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, len(ranks) + 20)
    names = [{"rank": i, "token_str": n} for i, n in enumerate(["<unk>", "<s>", "</s>", "[NEW]"])]
    write_json(path, tekken(ranks, names))
    assert Tokenizer(path).prompt_ids("[NEW]<SPECIAL_29>")[1:] == [3, 29]
    write_json(path, {"config": {}, "vocab": []})
    with pytest.raises(UserError, match="is no whole tekken.json"):
        Tokenizer(path)


# --- BOS, EOS and stops of a tokenizer.json


@pytest.fixture(scope="module")
def rust() -> RustTokenizer:
    return byte_level(500)


def folder_of(tmp_path, rust, **files):
    """A folder with tokenizer.json and JSON files by their names without the suffix."""
    rust.save(str(tmp_path / "tokenizer.json"))
    for name, value in files.items():
        write_json(tmp_path / f"{name}.json", value)
    return tmp_path


NAMES = {
    "bos_token": "<s>",
    "eos_token": {
        "__type": "AddedToken",
        "content": "<|endoftext|>",
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    },
}


@pytest.mark.parametrize(
    "config, processor, has_bos",
    [
        (NAMES, True, True),
        (NAMES, False, False),
        (NAMES | {"add_bos_token": True}, False, True),
        (NAMES | {"add_bos_token": False}, False, False),
        (NAMES | {"bos_token": None}, False, False),
        (None, True, True),
        (None, False, True),  # by its usual name
    ],
)
def test_bos_is_what_transformers_would_add(tmp_path, rust, config, processor, has_bos):
    rust = RustTokenizer.from_str(rust.to_str())
    bos = rust.token_to_id("<s>")
    if processor:
        special = [("<s>", bos)]
        rust.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=special)
    ends = {"eos_token_id": bos + 1}
    files = {"tokenizer_config": config} if config else {"generation_config": ends}
    folder = folder_of(tmp_path, rust, **files)
    tokenizer = Tokenizer.find(folder)
    assert tokenizer.bos_id == (bos if has_bos else None)
    plain = rust.encode("hi", add_special_tokens=False).ids
    assert tokenizer.prompt_ids("hi") == [bos] * has_bos + plain
    assert tokenizer.prompt_ids("<s>hi").count(bos) == 1
    if config and not config.get("add_bos_token"):  # which transformers 4 heeds and 5 does not
        fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(folder / "tokenizer_config.json", config | fast)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.prompt_ids("hi") == theirs("hi")["input_ids"]


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("has_processor", [True, False])
@pytest.mark.parametrize(
    "name", ["PreTrainedTokenizerFast", "GPT2TokenizerFast", "TokenizersBackend", "LlamaTokenizer"]
)
def test_add_bos_token_against_the_file_counts_where_transformers_heeds_it(
    tmp_path, rust, add, has_processor, name
):
    rust = RustTokenizer.from_str(rust.to_str())
    put_before(rust, "<s>" if has_processor else None)
    config = NAMES | {"tokenizer_class": name, "add_bos_token": add, "unk_token": "<|endoftext|>"}
    folder = folder_of(tmp_path, rust, tokenizer_config=config, config={"model_type": "llama"})
    tokenizer = Tokenizer.find(folder)
    for place in (folder, exported(tokenizer, folder)):
        if place == folder and name == "LlamaTokenizer":  # heeded in 4, and not in 5
            assert (tokenizer.bos_id is not None) == add
            continue
        theirs = AutoTokenizer.from_pretrained(place)
        assert tokenizer.prompt_ids("a token") == theirs("a token")["input_ids"]
    counts = "the former counts" if name == "LlamaTokenizer" else "the latter counts"
    notes = [note for note in tokenizer.notes() if "add_bos_token" in note]
    assert len(notes) == (add != has_processor)
    puts = "<s>" if has_processor else "nothing"
    assert all(f"{str(add).lower()}, and tokenizer.json puts {puts}" in note for note in notes)
    assert all(counts in note for note in notes)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast", None])
def test_a_bos_that_is_named_alone_is_told(tmp_path, rust, name):
    folder = folder_of(tmp_path, rust, tokenizer_config=NAMES | {"tokenizer_class": name})
    (note,) = Tokenizer.find(folder).notes()
    assert "names <s> as BOS, and no file says" in note
    is_generic = name == "PreTrainedTokenizerFast"
    assert ("transformers 5 (4 puts it there for Llama's classes)" in note) != is_generic
    assert ("a post-processor in tokenizer.json lets them" in note) == is_generic


@pytest.mark.parametrize("before", ["<s> <|im_start|>", "<|im_start|> <s> <|im_end|>"])
def test_more_tokens_than_bos_before_a_text_are_refused(tmp_path, rust, before):
    rust = RustTokenizer.from_str(rust.to_str())
    special = [(text, rust.token_to_id(text)) for text in before.split()]
    rust.post_processor = processors.TemplateProcessing(f"{before} $A", special_tokens=special)
    folder = folder_of(tmp_path, rust, tokenizer_config=NAMES | {"chat_template": CHATML})
    with pytest.raises(UserError, match="puts .* before a text, and one token, BOS") as error:
        Tokenizer.find(folder)
    assert before in str(error.value)
    assert Tokenizer.find(folder, use_chat_template=True).chat is not None
    write_json(folder / "tokenizer_config.json", NAMES | {"add_bos_token": True})
    assert (
        Tokenizer.find(folder).prompt_ids("a") == rust.encode("<s>a", add_special_tokens=False).ids
    )


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizerFast"])
@pytest.mark.parametrize("puts", [False, True])
@pytest.mark.parametrize("said", [None, False, True])
def test_a_space_before_a_text_is_as_its_class_puts_it(tmp_path, name, puts, said):
    rust = byte_level(500)
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=puts)
    config = NAMES | {"tokenizer_class": name, "unk_token": "<|endoftext|>"}
    config |= {} if said is None else {"add_prefix_space": said}
    folder = folder_of(tmp_path, rust, tokenizer_config=config)
    tokenizer = Tokenizer.find(folder)
    for place in (folder, exported(tokenizer, folder)):
        theirs = AutoTokenizer.from_pretrained(place)
        for text in ("a token", " a", "a<|im_start|>b"):
            assert tokenizer.prompt_ids(text) == theirs(text)["input_ids"], text


def test_a_turn_that_ends_in_no_token_is_told(tmp_path, rust):
    template = CHATML.replace("<|im_", "<|turn_")
    folder = folder_of(tmp_path, rust, tokenizer_config=NAMES | {"chat_template": template})
    tokenizer = Tokenizer.find(folder, use_chat_template=True)
    (note,) = tokenizer.notes()
    assert "writes '<|turn_end|>\\n' after an answer" in note
    assert "answers end with <|endoftext|> in its place" in note
    write_json(folder / "tokenizer_config.json", NAMES | {"chat_template": CHATML})
    assert not Tokenizer.find(folder, use_chat_template=True).notes()


def test_a_classifier_from_elsewhere_is_told_where_it_is_scored(tmp_path, rust):
    config = {"architectures": ["Qwen3ForSequenceClassification"]}
    files = {"tokenizer_config": NAMES | {"chat_template": CHATML}, "config": config}
    folder = folder_of(tmp_path, rust, **files)
    (note,) = Tokenizer.find(folder, use_chat_template=True).notes()
    assert "writes '\\n' after <|im_end|>, which is left off: an answer is scored" in note
    write_manifest(folder, {})  # ours are trained as they are scored
    assert not Tokenizer.find(folder, use_chat_template=True).notes()


def test_a_vocabulary_that_draws_pieces_is_refused(tmp_path, rust):
    whole = json.loads(rust.to_str())
    whole["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    write_json(tmp_path / "tokenizer_config.json", NAMES)
    with pytest.raises(UserError, match="its model has dropout 0.1: a text would have other ids"):
        Tokenizer.find(tmp_path)


def test_a_file_alone_begins_and_ends_by_the_usual_names(tmp_path, rust):
    rust = RustTokenizer.from_str(rust.to_str().replace("<s>", "<|begin_of_text|>"))
    rust.add_special_tokens(["<|end_of_text|>"])
    tokenizer = Tokenizer.find(folder_of(tmp_path, rust))
    begin, end = map(rust.token_to_id, ("<|begin_of_text|>", "<|end_of_text|>"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (begin, end)
    assert tokenizer.prompt_ids("a") == [begin, *rust.encode("a").ids]


def test_all_that_end_a_text_are_found(tmp_path, rust):
    end, turn, word = (rust.token_to_id(text) for text in ("<|endoftext|>", "<|im_end|>", "a"))
    folder = folder_of(
        tmp_path,
        rust,
        tokenizer_config=NAMES,
        config={"eos_token_id": end},
        generation_config={"eos_token_id": [turn, word]},
    )
    tokenizer = Tokenizer.find(folder)
    # an ordinary word ends nothing, unless files call it special
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (end, {end, turn})
    assert tokenizer.decode([word, turn, end, 10**6]) == "a"
    config = NAMES | {"additional_special_tokens": ["a"]}
    write_json(folder / "tokenizer_config.json", config)
    assert Tokenizer.find(folder).stop_ids == {end, turn, word}
    write_json(folder / "tokenizer_config.json", {})
    assert Tokenizer.find(folder).eos_id == turn
    elsewhere = tmp_path / "checkpoint"
    elsewhere.mkdir()
    header = rust.token_to_id("<|eot_id|>")
    write_json(elsewhere / "generation_config.json", {"eos_token_id": header})
    assert header in Tokenizer.find(elsewhere, str(folder / "tokenizer.json")).stop_ids


@pytest.mark.parametrize(
    "files, reason",
    [
        (
            {"tokenizer_config": NAMES | {"eos_token": "<end>"}},
            "eos_token '<end>' is not in the vocabulary",
        ),
        (
            {"tokenizer_config": NAMES | {"eos_token": 7}},
            r"eos_token is \[7\], the text of each token is expected",
        ),
        (
            {"tokenizer_config": {"add_bos_token": True, "eos_token": "<s>"}},
            "says add_bos_token, but names no bos_token",
        ),
        (
            {"tokenizer_config": NAMES, "generation_config": {"eos_token_id": ["2"]}},
            r"eos_token_id is \['2'\], an id",
        ),
        (
            {"tokenizer_config": NAMES | {"extra_special_tokens": "<s>"}},
            "extra_special_tokens is '<s>', the text of each token",
        ),
        (
            {"tokenizer_config": NAMES | {"additional_special_tokens": [3]}},
            r"additional_special_tokens is \[3\], the text of each token",
        ),
        *(
            (
                {file: NAMES | {key: value}},
                f"{file}.json: {key} is {value!r}, the text of each token",
            )
            for file in ("tokenizer_config", "special_tokens_map")
            for key in ("additional_special_tokens", "model_specific_special_tokens")
            for value in (5, True)
        ),
        (
            {"tokenizer_config": NAMES | {"sp_model_kwargs": True}},
            "tokenizer_config.json: sp_model_kwargs is True, an object is expected",
        ),
        (
            {"tokenizer_config": NAMES | {"sp_model_kwargs": ["enable_sampling"]}},
            r"sp_model_kwargs is \['enable_sampling'\], an object is expected",
        ),
        ({}, "has no EOS that is known"),
    ],
)
def test_defects_of_the_files_are_named(tmp_path, rust, files, reason):
    with pytest.raises(UserError, match=reason) as error:
        Tokenizer.find(folder_of(tmp_path, rust, **files))
    assert str(tmp_path) in str(error.value)


FLAGS = [
    {},
    {"rstrip": True},
    {"lstrip": True},
    {"rstrip": True, "lstrip": True},
    {"single_word": True},
    {"normalized": True},
]
OBJECT = {"content": "<tool>", "rstrip": False, "lstrip": True, "single_word": False}
OBJECT |= {"normalized": False, "__type": "AddedToken"}  # against which the file has the last word
CALLED = {
    "listed": {"additional_special_tokens": ["<tool>"]},
    "listed with flags": {"additional_special_tokens": [OBJECT]},
    "listed as more": {"extra_special_tokens": ["<tool>"]},
    "by names": {"model_specific_special_tokens": {"tool_token": "<tool>"}},
    "named": {"sep_token": "<tool>"},
    "named with flags": {"sep_token": OBJECT},
}
AROUND = ["a <tool> b", "a<tool>b", " <tool>\n\nb", "<TOOL> <tool>", "<tool><tool>x", "x \t<tool>"]


def with_tool(rust, flags, text="<tool>"):
    rust = RustTokenizer.from_str(rust.to_str())
    rust.normalizer = normalizers.Lowercase()
    rust.add_tokens([AddedToken(text, **{"normalized": False} | flags)])
    return rust


def exported(tokenizer, folder):
    (folder / "export").mkdir()
    write_tokenizer(tokenizer, folder / "export", folder, 999, scores=False)
    return folder / "export"


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(flags) or "none")
@pytest.mark.parametrize("called", CALLED)
def test_a_token_that_is_called_special_keeps_its_flags(tmp_path, rust, flags, called):
    config = NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"} | CALLED[called]
    folder = folder_of(tmp_path, with_tool(rust, flags), tokenizer_config=config)
    tokenizer = Tokenizer.find(folder)
    for place in (folder, exported(tokenizer, folder)):
        theirs = AutoTokenizer.from_pretrained(place)
        for text in AROUND:
            assert tokenizer.prompt_ids(text) == theirs(text)["input_ids"], text
    ids = tokenizer.prompt_ids("<tool>")
    assert tokenizer.control["<tool>"] in ids and tokenizer.decode(ids) == ""


@pytest.mark.parametrize("key", ["sep_token", "additional_special_tokens"])
def test_a_word_that_is_called_special_has_the_flags_that_it_is_called_with(tmp_path, rust, key):
    token = OBJECT | {"content": "ken"}
    named = {key: token if key == "sep_token" else [token]}
    config = NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"} | named
    folder = folder_of(tmp_path, rust, tokenizer_config=config)
    tokenizer = Tokenizer.find(folder)
    for place in (folder, exported(tokenizer, folder)):
        theirs = AutoTokenizer.from_pretrained(place)
        for text in ("x ken x", "token", "ken  ken"):
            assert tokenizer.prompt_ids(text) == theirs(text)["input_ids"], text


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(flags) or "none")
def test_a_token_that_the_template_writes_keeps_its_flags(tmp_path, rust, flags):
    tool = "<tool>" if "single_word" not in flags else "<tool> "
    template = CHATML.replace("<|im_start|>' + m['role'] + '\n'", f"{tool}\n'")
    template = template.replace("<|im_end|>", "<tool_end>").replace("<|im_start|>assistant", tool)
    more = with_tool(with_tool(rust, flags), flags, "<tool_end>")
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config = NAMES | fast | {"chat_template": template}
    folder = folder_of(tmp_path, more, tokenizer_config=config)
    tokenizer = Tokenizer.find(folder, use_chat_template=True)
    assert tokenizer.text_of(tokenizer.eos_id) == "<tool_end>"
    for place in (folder, exported(tokenizer, folder)):
        theirs = AutoTokenizer.from_pretrained(place)
        for text in (*AROUND, "plain", " spaces  "):
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
            start = theirs.apply_chat_template(
                turns[:1], add_generation_prompt=True, return_dict=False
            )
            assert tokenizer.prompt_ids(text) == start, text
            # what an answer begins with may be one with what the prompt ends with
            if "single_word" in flags or ("lstrip" in flags and text.lower().strip()[0] == "<"):
                continue
            whole = theirs.apply_chat_template(turns, return_dict=False)
            trained = start + tokenizer.response_ids(text)
            assert trained == whole[: len(trained)] and len(whole) - len(trained) <= 1, text


# --- chat templates of a folder, against transformers

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FOLDERS = {
    "chatml": CHATML,
    "an empty thought before the answer": CHATML.replace(
        "m['content'] +",
        "('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m['content'] +",
    ),
    "trims": CHATML.replace("m['content']", "m['content'] | trim"),
    "no generation prompt": CHATML.split("{% if add")[0],
    "llama 3": "{{ bos_token }}" + chat.TEMPLATES["llama-3"].removeprefix("{{ bos_token }}"),
    "brackets": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "words": (
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    ),
    "all that jinja is set up with": (
        "{%- set ns = namespace(n=0) %}\n    {% for m in messages %}\n"
        "    {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{% set ns.n = ns.n + 1 %}{{ {'é': '<a>'} | tojson }}{{ strftime_now('%Y') }}"
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% endfor %}"
    ),
}
ENDS = {"llama 3": "<|eot_id|>", "brackets": "<|endoftext|>", "words": "<|endoftext|>"}
ANSWERS = ["The answer is 4.", "  spaces around  ", "1", "日本語", "multiple\n\nlines\n"]


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("place", ["file", "config", "list"])
def test_prompt_and_response_are_the_conversation_of_transformers(tmp_path, rust, name, place):
    config = NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"}
    folder = folder_of(tmp_path, rust)
    if place == "file":
        (folder / "chat_template.jinja").write_text(FOLDERS[name])
        config["chat_template"] = "not this one"
    else:
        named = {"tool_use": "no", "default": FOLDERS[name]}
        listed = [{"name": key, "template": template} for key, template in named.items()]
        config["chat_template"] = FOLDERS[name] if place == "config" else listed
    write_json(folder / "tokenizer_config.json", config)
    today = f"{datetime.now():%Y-%m-%d}"  # which is what transformers tells a template
    tokenizer = Tokenizer.find(folder, use_chat_template=True, chat_date=today)
    theirs = AutoTokenizer.from_pretrained(folder)
    for question, answer in zip(["2 + 2?", " a ", "'s", "e\u0301", "What\n"], ANSWERS):
        prompt, response = tokenizer.prompt_ids(question), tokenizer.response_ids(answer)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        whole = theirs.apply_chat_template(turns, return_dict=False)
        start = theirs.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        assert (prompt + response) == whole[: len(prompt + response)]
        assert len(whole) - len(prompt + response) <= 1  # the line's end after a turn
        headless = name in ("words", "no generation prompt", "all that jinja is set up with")
        assert prompt[: len(start)] == start and (headless or prompt == start)
        end = ENDS.get(name, "<|im_end|>")
        assert response[-1] == tokenizer.eos_id == theirs.convert_tokens_to_ids(end)
        assert tokenizer.stop_ids == {tokenizer.eos_id, theirs.eos_token_id}
        assert answer.strip() in tokenizer.decode(response)
        text = tokenizer.decode(response)
        assert not headless or text.lstrip().startswith(answer.strip())  # the prompt has the header
        assert text.startswith("<think>") == (name == "an empty thought before the answer")


OLD = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
METASPACE = {  # spaces as ▁, and one before a text: of the old and of the new kind
    "prepend": (OLD, None),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "always": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
}


@pytest.mark.parametrize("kind", METASPACE)
@pytest.mark.parametrize(
    "template",
    [
        "[INST] {} [/INST]|{}</s>",
        "[INST] {} [/INST]| {} </s>",
        "<u> {}<a>|{}</s>",
        "<u>{}<a>| {}</s>",
    ],
)
def test_an_answer_gets_no_space_that_the_conversation_lacks(tmp_path, kind, template):
    alphabet = ["▁", *"[/INST]abc .", "\n"]
    vocabulary = {text: i for i, text in enumerate(dict.fromkeys(["<unk>", *alphabet, "▁a", "▁b"]))}
    rust = RustTokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    rust.normalizer, rust.pre_tokenizer = METASPACE[kind]
    special = ("<s>", "</s>", "<u>", "<a>")
    rust.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    user, answer = template.split("|")
    source = (
        "<s>{% for m in messages %}{% if m.role == 'user' %}"
        + user.format("{{ m.content }}")
        + "{% else %}"
        + answer.format("{{ m.content }}")
        + "{% endif %}{% endfor %}"
    )
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": source,
    }
    folder = folder_of(tmp_path, rust, tokenizer_config=config)
    tokenizer = Tokenizer.find(folder, use_chat_template=True)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in ("a", "ab a", "c"):
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        whole = theirs.apply_chat_template(turns, return_dict=False)
        assert tokenizer.prompt_ids(text) + tokenizer.response_ids(text) == whole


# --- SentencePiece


def train_pieces(path, **options):
    settings = {
        "model_prefix": str(path.with_suffix("")),
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentences = iter(TEXTS[:3] * 9)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, **(settings | options))
    return SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    return path, train_pieces(path)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "json"])
def test_characters_without_a_token_are_told(tmp_path, kind):
    """Where no bytes stand for them they are lost, in transformers as here."""
    if kind == "json":
        rust = RustTokenizer(models.BPE())
        rust.pre_tokenizer = pre_tokenizers.Metaspace()
        rust.decoder = decoders.Metaspace()
        rust.train_from_iterator(["an egg and two"], trainers.BpeTrainer(show_progress=False))
        rust.add_special_tokens(["<s>", "</s>"])
        path = folder_of(tmp_path, rust) / "tokenizer.json"
    else:
        path = tmp_path / "tokenizer.model"
        sizes = {"vocab_size": 60, "hard_vocab_limit": False}
        train_pieces(path, byte_fallback=False, model_type=kind, **sizes)
    tokenizer = Tokenizer(path)
    for text in ("an egg", " an  egg", "<s>an egg", ""):
        tokenizer.response_ids(text)
    assert tokenizer.lossy.count == 0
    tokenizer.spelled_out.clear()
    assert "日" not in tokenizer.decode(tokenizer.response_ids("an 日本 egg"))
    tokenizer.prompt_ids("本")
    (note,) = tokenizer.notes()
    fate = "left out" if kind == "json" else "read as <unk>"
    assert note == (
        f"2 texts hold characters that {path} has no token for, such as '日本': they are {fate}"
    )


def test_what_a_file_composes_or_passes_over_is_not_lost(tmp_path):
    path, names = tmp_path / "tokenizer.model", {"normalization_rule_name": "nmt_nfkc"}
    sizes = {"vocab_size": 70, "hard_vocab_limit": False, "remove_extra_whitespaces": True}
    words = iter(["na\u00efve 한국 an egg"] * 9)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words,
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        minloglevel=2,
        num_threads=1,
        **names | sizes,
    )
    tokenizer = Tokenizer(path)
    for text in (
        "nai\u0308ve",
        unicodedata.normalize("NFD", "한국"),
        "\ufeffan egg",
        "▁an",
        "an\u200begg",
    ):
        tokenizer.response_ids(text)
    assert tokenizer.lossy.count == 0
    tokenizer.response_ids("an 中 egg 日本 egg")
    assert (tokenizer.lossy.count, tokenizer.lossy.first) == (1, "中")


def test_pieces_with_and_without_bos(pieces, tmp_path):
    path, sp = pieces
    tokenizer = Tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, {2})
    assert tokenizer.vocab_size == 420
    # a control token that a text spells out is one, unless it is to be text
    assert tokenizer.prompt_ids("<s>an egg") == [1, *sp.encode("an egg")]
    as_text = Tokenizer(path, special_tokens="text")
    for text in ("<s>an egg", "a</s>", " </s> <unk>", "x<s></s>"):
        assert as_text.prompt_ids(text) == [1, *sp.encode(text)]
        assert as_text.response_ids(text) == [*sp.encode(text), 2]
    assert as_text.spelled_out == {"<s>": 4, "</s>": 6, "<unk>": 2}
    assert tokenizer.response_ids("egg") == [*sp.encode("egg"), 2]
    assert tokenizer.decode([1, *sp.encode(" x  y"), 2, 500]) == " x  y"
    tokenizer.fit(420)
    with pytest.raises(UserError, match="has 420 entries, the model 419"):
        tokenizer.fit(419)
    copy = tmp_path / "tokenizer.model"
    copy.write_bytes(path.read_bytes())
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    assert Tokenizer(copy).prompt_ids("egg") == sp.encode("egg")
    copy.write_bytes(b"\n\x0c")
    with pytest.raises(UserError, match="is no tokenizer that is known"):
        Tokenizer(copy)


@pytest.mark.parametrize(
    "family, answer", [("llama-2-7b", "4 eggs "), ("mistral", "4 eggs"), ("mixtral", "4 eggs")]
)
def test_brackets_in_pieces_are_as_their_makers_encode_them(pieces, family, answer):
    path, sp = pieces
    tokenizer = Tokenizer(path, None, True, family)
    assert tokenizer.prompt_ids("2 + 2?") == [1, *sp.encode("[INST] 2 + 2? [/INST]")]
    assert tokenizer.response_ids("4 eggs") == [*sp.encode(answer), 2]
    assert tokenizer.eos_id == 2


def test_control_pieces_of_a_template(tmp_path):
    sp = train_pieces(tmp_path / "tokenizer.model", control_symbols=["[INST]", "[/INST]"])
    (tmp_path / "chat_template.jinja").write_text(
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer.find(tmp_path, use_chat_template=True)
    start, end = sp.piece_to_id(["[INST]", "[/INST]"])
    assert tokenizer.prompt_ids("an egg") == [1, start, *sp.encode("an egg"), end]
    assert tokenizer.response_ids("an egg") == [*sp.encode("an egg"), 2]


def test_tokens_added_to_pieces_count_as_the_template_writes_them(pieces, tmp_path):
    path, sp = pieces
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    write_json(tmp_path / "added_tokens.json", {"<|im_end|>": 420, "[PAD]": 422})
    added = {"421": {"content": "<|im_start|>"}}
    config = {"chat_template": CHATML, "added_tokens_decoder": added}
    write_json(tmp_path / "tokenizer_config.json", config)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 420})
    plain, tokenizer = Tokenizer.find(tmp_path), Tokenizer.find(tmp_path, use_chat_template=True)
    assert (plain.vocab_size, tokenizer.vocab_size) == (423, 423)
    assert plain.stop_ids == {2, 420} and plain.eos_id == 2
    assert tokenizer.stop_ids == {2, 420} and tokenizer.eos_id == 420
    prompt, response = tokenizer.prompt_ids("egg"), tokenizer.response_ids("egg")
    assert [i for i in prompt if i >= 420] == [421, 420, 421]
    assert [i for i in response if i >= 420] == [420]
    # The text between is as it stands: nothing has a space before it.
    written = "".join(sp.id_to_piece(i) for i in prompt + response if i < 420)
    assert written.replace("<0x0A>", "\n") == "user\negg\nassistant\negg"
    assert tokenizer.decode(prompt) == "user\negg\nassistant\n"
    # One that no text holds needs no embedding; a text that does is refused.
    tokenizer.fit(422)
    assert tokenizer.prompt_ids("egg") == prompt
    with pytest.raises(UserError, match=r"'an \[PAD\]': holds '\[PAD\]', which .* as id 422"):
        tokenizer.prompt_ids("an [PAD]")
    with pytest.raises(UserError, match="the model's 420 embeddings lack"):
        tokenizer.fit(420)
    with pytest.raises(UserError, match="not this model's tokenizer"):
        plain.fit(419)


@pytest.mark.parametrize("prefix", [None, True, False])
@pytest.mark.parametrize("options", [{}, {"user_defined_symbols": ["<go>"]}], ids=["", "go"])
@pytest.mark.parametrize("is_chat", [False, True])
def test_no_space_follows_control_tokens_where_legacy_is_false(tmp_path, prefix, options, is_chat):
    """In texts as in chats, as in both versions of transformers; at a text's beginning one does."""
    train_pieces(tmp_path / "tokenizer.model", **options)
    added = {str(420 + i): {"content": text} for i, text in enumerate(CHATML_SPECIAL)}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "added_tokens_decoder": added}
    config |= names | {"chat_template": CHATML}
    config |= {} if prefix is None else {"add_prefix_space": prefix}
    write_json(tmp_path / "tokenizer_config.json", config)
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    tokenizer = Tokenizer.find(tmp_path, use_chat_template=is_chat)
    texts = ["an egg", " two eggs", "the <|im_start|> egg", "<|im_end|>egg", "x  y\nz", "</s> egg"]
    for place in (tmp_path, exported(tokenizer, tmp_path)):
        theirs = AutoTokenizer.from_pretrained(place)
        for text in [*texts, *["an <go>egg <go> <go>"] * len(options)]:
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
            if is_chat:
                whole = theirs.apply_chat_template(turns, return_dict=False)
                trained = tokenizer.prompt_ids(text) + tokenizer.response_ids(text)
                assert trained == whole[: len(trained)], text
            else:
                ids = theirs(text, add_special_tokens=False)["input_ids"]
                assert tokenizer.prompt_ids(text) == [1, *ids], text


@pytest.mark.parametrize("prefix", [True, False])
def test_what_stands_between_user_defined_pieces_is_what_its_characters_make(tmp_path, prefix):
    """Control tokens that are read as text, and texts that spell out bytes."""
    user = ["\n", "<go>", "=", "12", "s>"]
    options = {"user_defined_symbols": user, "control_symbols": ["[INST]", "<s>s>", "日本"]}
    sp = train_pieces(tmp_path / "tokenizer.model", add_dummy_prefix=prefix, **options)
    tokenizer = Tokenizer(tmp_path / "tokenizer.model", special_tokens="text")
    names = [sp.id_to_piece(i) for i in range(len(sp))]
    texts = [f"{u}{name}{u}" for u in user for name in names] + [name + "\n" for name in names]
    exported(tokenizer, tmp_path)
    for made in (tokenizer, Tokenizer.find(tmp_path / "export", special_tokens="text")):
        for text in texts:
            assert made.prompt_ids(text) == [1, *sp.encode(text)], text
    if prefix:
        marked = tokenizer.prompt_ids("a\n<s>\n<0x0A>\nb")
        assert marked.count(1) == 1 and sp.piece_to_id("<0x0A>") not in marked


def test_ids_without_a_token_are_known(tmp_path, rust, pieces):
    assert Tokenizer(pieces[0]).without_text(420) == []
    assert Tokenizer(pieces[0]).without_text(432) == [(420, 432)]
    whole = json.loads(rust.to_str())  # 507 entries, the last 7 of them special
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["id"] not in (502, 503, 505)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    write_json(tmp_path / "tokenizer_config.json", NAMES)
    assert Tokenizer.find(tmp_path).without_text(512) == [(502, 504), (505, 506), (507, 512)]
    # what ends a generation has no text, but may be sampled
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [501, 509]})
    holes = [(502, 504), (505, 506), (507, 509), (510, 512)]
    tokenizer = Tokenizer.find(tmp_path)
    assert tokenizer.without_text(512) == holes
    ids = {t["content"]: t["id"] for t in whole["added_tokens"]}
    assert tokenizer.prompt_ids("<|start_header_id|><|eot_id|>") == [
        ids["<|start_header_id|>"],
        ids["<|eot_id|>"],
    ]
    # as what another file adds, past the others or in a hole
    added = {"<new>": 502, "<|im_end|>": 509}
    write_json(tmp_path / "added_tokens.json", added)
    tokenizer = Tokenizer.find(tmp_path)
    assert tokenizer.prompt_ids("<new><|im_end|><|eot_id|>") == [502, 509, ids["<|eot_id|>"]]
    assert tokenizer.without_text(512) == [(503, 504), (505, 506), (507, 509), (510, 512)]
    rust.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "added_tokens.json", {"<new>": 510})
    tokenizer = Tokenizer.find(tmp_path)
    assert tokenizer.prompt_ids("<s><new><|eot_id|>") == [500, 510, ids["<|eot_id|>"]]
    assert tokenizer.without_text(512) == [(507, 509), (511, 512)]
    write_json(tmp_path / "added_tokens.json", {"<new>": 506})
    with pytest.raises(UserError, match="'<new>' has id 506, which '<|eot_id|>' has"):
        Tokenizer.find(tmp_path)


def test_tokens_added_to_pieces_are_found_as_they_are_spelled(pieces, tmp_path):
    path, sp = pieces
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    added = {"420": {"content": "<call>", "normalized": True, "special": False}}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": added})
    assert Tokenizer.find(tmp_path).prompt_ids("egg<call>")[1:] == [*sp.encode("egg"), 420]


# --- families without a file, and refusals


SYSTEM, ASKED = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}
SAID, AGAIN = {"role": "assistant", "content": " b "}, {"role": "user", "content": "c"}


@pytest.mark.parametrize(
    "family, control, has_prefix, written",
    [  # as Meta's chat_completion and mistral-common write them
        (
            "llama-2-7b",
            [],
            True,
            "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]",
        ),
        ("mistral", [], True, "<s>[INST] Be kind.\n\na [/INST]  b </s>[INST] c [/INST]"),
        (
            "mistral",
            ["[INST]"],
            True,
            "<s>[INST] a[/INST]  b</s>[INST] Be kind.\n\nc[/INST]",
        ),
        ("mixtral", ["[INST]"], False, "<s>[INST]a[/INST] b</s>[INST]Be kind.\n\nc[/INST]"),
        (
            "mistral",
            ["[INST]", "[SYSTEM_PROMPT]"],
            True,
            "<s>[SYSTEM_PROMPT] Be kind.[/SYSTEM_PROMPT][INST] a[/INST]  b</s>[INST] c[/INST]",
        ),
        (
            "mistral",
            ["[INST]", "[SYSTEM_PROMPT]"],
            False,
            "<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]a[/INST] b</s>[INST]c[/INST]",
        ),
    ],
)
def test_families_write_a_system_text_where_their_makers_do(
    tmp_path, family, control, has_prefix, written
):
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    found = chat.find_chat([tmp_path], family, tokens, control, has_prefix)
    assert found.prompt(Messages([SYSTEM, ASKED, SAID, AGAIN])) == written


def test_families_have_their_templates(tmp_path, rust, pieces):
    folder = folder_of(tmp_path, rust, tokenizer_config=NAMES)
    assert "<|start_header_id|>" in rust.get_vocab()  # which tells Llama 3 from 1 and 2

    def prompt_of(family: str) -> str:
        tokenizer = Tokenizer.find(folder, use_chat_template=True, family=family)
        return tokenizer.chat.prompt("hi")

    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    qwen = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of("qwen") == prompt_of("qwen2") == system + qwen
    assert prompt_of("qwen3_moe") == qwen
    llama = (
        "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert prompt_of("llama") == prompt_of("llama-3.1-8b") == llama
    refused = "has no chat template, and llama models share none; put one there as chat_template"
    with pytest.raises(UserError, match=refused):
        Tokenizer(pieces[0], None, True, "llama")


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('no roles') }}", "fails: no roles"),
        ("{% for m in messages %}", "fails \\(line 1\\): Unexpected end of template"),
        ("{{ messages[0].__class__.__mro__ }}", "fails: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "fails: access to attribute 'append'"),
        ("{{ 1 // 0 }}", "fails: ZeroDivisionError"),
        ("{{ 'a' * 10 ** 11 }}", "fails: computes"),
        ("{{ 'a' * 99999999999 }}", "fails: computes"),
        (
            "{% for i in range(99999) %}{% for m in messages %}{{ m.content * 50 }}"
            "{% endfor %}{% endfor %}",
            "writes more than",
        ),
        (
            "{% for i in range(200) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 0.2 seconds",
        ),
        ("{{ 'nobody asks' }}", "writes 'nobody asks' for a user's 'What is it'"),
    ],
)
def test_a_template_that_fails_is_named(tmp_path, rust, monkeypatch, template, reason):
    if "seconds" in reason:
        monkeypatch.setattr(chat, "SECONDS", 0.2)
    folder = folder_of(tmp_path, rust, tokenizer_config=NAMES)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=reason) as error:
        Tokenizer.find(folder, use_chat_template=True)
    assert str(folder / "chat_template.jinja") in str(error.value)


@pytest.mark.parametrize(
    "template, reason",
    [
        (
            "{% if add_generation_prompt %}A{% else %}B{% endif %}{{ messages[-1].content }}",
            "does not begin with the prompt 'AWhat",
        ),
        ("{{ messages[0].content }}", "writes the answer 0 times"),
        (CHATML.replace("m['role'] +", "{'user': 'user'}[m['role']] +"), "fails: "),
    ],
)
def test_a_template_without_answers_writes_prompts(tmp_path, rust, template, reason):
    folder = folder_of(tmp_path, rust, tokenizer_config=NAMES)
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.find(folder, use_chat_template=True)
    assert "hi" in tokenizer.decode(tokenizer.prompt_ids("hi"))
    with pytest.raises(UserError, match=reason) as error:
        tokenizer.response_ids("4")
    assert str(folder / "chat_template.jinja") in str(error.value)


THOUGHT = "<think>Two and three\nmake five.</think>\n\n5"


@pytest.mark.parametrize(
    "content",
    [
        "m['content'].split('</think>')[-1]",
        "m['content'].split('</think>')[-1].lstrip('\n')",
        "m['content'] | replace('<think>', '')",
        "m['content'][:9]",
        "'always the same'",
    ],
)
def test_nothing_of_an_answer_is_lost(tmp_path, rust, content):
    folder = folder_of(tmp_path, rust, tokenizer_config=NAMES)
    (folder / "chat_template.jinja").write_text(
        CHATML.replace("m['content']", f"(m['content'] if m.role == 'user' else {content})")
    )
    if content == "'always the same'":  # it cannot even be told where an answer would stand
        with pytest.raises(UserError, match="writes the answer 0 times"):
            Tokenizer.find(folder, use_chat_template=True).response_ids("5")
        return
    tokenizer = Tokenizer.find(folder, use_chat_template=True)
    if "9" not in content:
        assert tokenizer.decode(tokenizer.response_ids("5")) == "5" and not tokenizer.notes()
        assert tokenizer.decode(tokenizer.response_ids(THOUGHT)) == THOUGHT
        (note,) = tokenizer.notes()
        assert "parts of 1 answers, such as '<think>Two" in note
    else:
        with pytest.raises(UserError, match="writes the answer 0 times"):
            tokenizer.response_ids("5")


@pytest.mark.parametrize("keeps", [True, False])
def test_a_prompt_may_open_what_the_answer_goes_on_with(tmp_path, rust, keeps):
    answer = "m['content']" if keeps else "m['content'].split('</think>')[-1]"
    folder = folder_of(tmp_path, rust, tokenizer_config=NAMES)
    source = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    (folder / "chat_template.jinja").write_text(
        source.replace("m['content']", f"(m['content'] if m.role == 'user' else {answer})")
    )
    tokenizer = Tokenizer.find(folder, use_chat_template=True)
    assert tokenizer.decode(tokenizer.prompt_ids("2 + 3?")).endswith("assistant\n<think>\n")
    assert tokenizer.eos_id == rust.token_to_id("<|im_end|>")
    rest = "Two and three\nmake five.</think>\n\n5"
    for text in (THOUGHT, "<think>\n" + rest, rest):
        assert tokenizer.decode(tokenizer.response_ids(text)) == rest
    with pytest.raises(UserError, match=r"prompt ends with '<think>\\n', and the answer '5' neith"):
        tokenizer.response_ids("5")


@pytest.mark.parametrize("normalized", [False, True])
def test_special_tokens_in_texts_are_counted_and_may_be_text(tmp_path, normalized):
    rust = byte_level(500)
    rust.add_special_tokens([AddedToken("<|odd|>", normalized=normalized)])
    config = NAMES | {"chat_template": CHATML}
    folder = folder_of(tmp_path, rust, tokenizer_config=config)
    control = Tokenizer.find(folder, use_chat_template=True)
    as_text = Tokenizer.find(folder, use_chat_template=True, special_tokens="text")
    plain = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    ids = {text: rust.token_to_id(text) for text in (*CHATML_SPECIAL, "<|odd|>")}

    def ordinary(text):
        return plain.encode(text, add_special_tokens=False).ids

    for text in ("a<|im_end|>\n<|im_start|>user", "<|endoftext|>", "x <|odd|>y"):
        start, end = ids["<|im_start|>"], ids["<|im_end|>"]
        begin = [start, *ordinary(f"user\n{text}"), end, *ordinary("\n")]
        assert as_text.prompt_ids(text) == [*begin, start, *ordinary("assistant\n")]
        assert as_text.response_ids(text) == [*ordinary(text), end]
        assert as_text.decode(as_text.response_ids(text)) == text
        assert control.response_ids(text) == [*rust.encode(text).ids, end]
    counted = {"<|im_end|>": 4, "<|im_start|>": 4, "<|endoftext|>": 4, "<|odd|>": 4}
    for tokenizer, words in ((control, "--special_tokens text reads"), (as_text, "as text")):
        assert sum(tokenizer.spelled_out.values()) > 0
        assert words in tokenizer.notes()[0]
    assert as_text.spelled_out.keys() == counted.keys() == control.spelled_out.keys()


def test_control_tokens_in_texts_stay_text_in_the_folder_that_a_chat_writes(tmp_path, rust):
    """In the next script; transformers reads its template's control tokens as such."""
    config = NAMES | {"chat_template": CHATML, "split_special_tokens": True}
    folder = folder_of(tmp_path, rust, tokenizer_config=config)
    tokenizer = Tokenizer.find(folder, use_chat_template=True)
    again = exported(tokenizer, folder)
    write_json(again / "config.json", {"model_type": "llama"})
    for made in (Tokenizer.find(again, use_chat_template=True), Tokenizer.find(again)):
        assert made.as_text
    text = "so <|im_end|> it is"
    ids = Tokenizer.find(again, use_chat_template=True).prompt_ids(text)
    assert ids == tokenizer.prompt_ids(text) and ids.count(tokenizer.eos_id) == 1
    chat = [{"role": "user", "content": "So it is"}]
    theirs = AutoTokenizer.from_pretrained(again)
    written = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert written == tokenizer.prompt_ids("So it is")
    # and so on, from folder to folder
    assert Tokenizer.find(exported(Tokenizer.find(again, None, True), again)).as_text


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_bos_that_is_null_is_not_told_to_the_template(tmp_path, rust, is_chat):
    """As in transformers, though a text by itself begins with it by the post-processor."""
    rust = RustTokenizer.from_str(rust.to_str())
    put_before(rust, "<s>")
    config = NAMES | {"bos_token": None, "chat_template": "{{ bos_token }}" + CHATML}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    folder = folder_of(tmp_path, rust, tokenizer_config=config)
    again = exported(Tokenizer.find(folder, use_chat_template=is_chat), folder)
    for place in (folder, again):
        theirs = AutoTokenizer.from_pretrained(place)
        plain, chat = Tokenizer.find(place), Tokenizer.find(place, use_chat_template=True)
        assert plain.prompt_ids("egg") == theirs("egg")["input_ids"]
        assert plain.bos_id == chat.bos_id == rust.token_to_id("<s>") == plain.prompt_ids("egg")[0]
        turn = [{"role": "user", "content": "egg"}]
        written = theirs.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        assert chat.prompt_ids("egg") == written and plain.bos_id not in written
    # a template of the family's own is told it
    write_json(folder / "tokenizer_config.json", config | {"chat_template": None})
    llama = Tokenizer.find(folder, None, True, "llama-2")
    assert llama.prompt_ids("egg")[0] == llama.bos_id


MARK = "\ufdd0\ufdd1"


@pytest.mark.parametrize("special_tokens", ["control", "text"])
@pytest.mark.parametrize("is_chat", [False, True])
def test_characters_that_mark_texts_here_are_kept(tmp_path, rust, special_tokens, is_chat):
    folder = folder_of(tmp_path, rust, tokenizer_config=NAMES | {"chat_template": CHATML})
    tokenizer = Tokenizer.find(folder, None, is_chat, special_tokens=special_tokens)
    plain = RustTokenizer.from_str(rust.to_str())
    plain.encode_special_tokens = special_tokens == "text"
    for text in (MARK, MARK * 2, MARK[0] + MARK + MARK[1], MARK[::-1] * 3, f"a{MARK}b<s>{MARK}c"):
        for whole in (text, f"<{MARK}s>", f"{text}<|im_end|>{text}"):
            ids = plain.encode(whole, add_special_tokens=False).ids
            assert tokenizer.response_ids(whole)[:-1] == ids, whole
            if not is_chat:
                assert tokenizer.prompt_ids(whole) == ids


@pytest.mark.parametrize(
    "value, reason",
    [
        ([{"name": "tools", "template": "x"}], r"are \['tools'\], none is called"),
        (3, "holds a int"),
    ],
)
def test_templates_of_another_kind_are_named(tmp_path, rust, value, reason):
    folder = folder_of(tmp_path, rust, tokenizer_config=NAMES | {"chat_template": value})
    with pytest.raises(UserError, match=reason):
        Tokenizer.find(folder, use_chat_template=True)


def test_merges_alone_are_taken_where_it_is_known_how_texts_are_split(tmp_path, rust):
    write_json(tmp_path / "vocab.json", {"a": 0})
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "a"}
    write_json(tmp_path / "tokenizer_config.json", config)
    with pytest.raises(UserError, match="save its tokenizer.json: AutoTokenizer"):
        Tokenizer.find(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nb c\n")
    with pytest.raises(UserError, match="does not go with merges.txt"):
        Tokenizer.find(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    assert Tokenizer.find(tmp_path).vocab_size == 1
    write_json(tmp_path / "tokenizer_config.json", config | {"tokenizer_class": "GPT2Tokenizer"})
    with pytest.raises(UserError, match="names Qwen2Tokenizer as tokenizer_class"):
        Tokenizer.find(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="name the tokenizer by --tokenizer_file"):
        Tokenizer.find(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.find(tmp_path, str(tmp_path / "none.json"))
