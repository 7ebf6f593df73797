"""Shards of token ids: the library's own ids of whole texts, however they are cut, killed or split.

The reference is the tokenizers library on each document as a whole, and numpy on the files' bytes.
"""

import gzip
import json
import multiprocessing
import random
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from src.data import documents, tokenization
from src.data.documents import separated, sources_of
from src.data.files import text_blocks
from src.data.shards import Shards
from src.data.tokenization import Texts, tokenize
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from tests.test_scripts import call, flags

CODE = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text("utf-8")
SCRIPTS = (
    "日本語のテキスト、中文文本没有空格。Ελληνικά русский; e\u0301 👍🏽 x'ſt\r\n\t  ''' \u3000"
)
GZIP = gzip.compress(CODE.encode(), mtime=0)
ALPHABET = "abc  é\u0301中。，,.!'\n\n\t 12Ω🇨🇭ſ"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(path: Path, pattern: str | None) -> Path:
    """A byte-level BPE; without a pattern its words are whole texts."""
    rust = RustTokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pattern:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    rust.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    rust.train_from_iterator([*CODE[:60_000].split("\n"), SCRIPTS], trainer)
    rust.add_special_tokens(["<s>", "</s>"])
    rust.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


def pieces(path: Path, kind: str, **options) -> Path:
    """SentencePiece's BPE or unigrams."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CODE[:60_000].split("\n"), SCRIPTS]),
        model_prefix=str(path / "tokenizer"),
        model_type=kind,
        vocab_size=700,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return path / "tokenizer.model"


def plain(path: Path) -> Path:
    options = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    return pieces(path, "bpe", **options)


KINDS = {
    "gpt-2": lambda path: byte_level(path, GPT_2),
    "llama-3": lambda path: byte_level(path, LLAMA_3),
    "bytes without words": lambda path: byte_level(path, None),
    "llama-2": plain,
    "nmt_nfkc": lambda path: pieces(path, "unigram"),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return Tokenizer(KINDS[request.param](tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory) -> Tokenizer:
    return Tokenizer(byte_level(tmp_path_factory.mktemp("tokenizer"), LLAMA_3))


def library_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A document as the family wants it, tokenised as a whole."""
    ids = tokenizer._rust.encode(text, add_special_tokens=False).ids
    return [tokenizer.bos_id, *ids, tokenizer.eos_id]


def document_ids(folder: Path) -> list[list[int]]:
    """The documents of finished shards, read off the files by numpy alone."""
    index = json.loads((folder / "index.json").read_text())
    found = []
    for number in range(len(index["shards"])):
        tokens = np.fromfile(folder / f"tokens-{number:05}.bin", index["dtype"])
        ends = np.fromfile(folder / f"documents-{number:05}.bin", "<u8").astype(int)
        found += [part.tolist() for part in np.split(tokens, ends[:-1])]
    return found


def rows_file(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(*sources: Path, **options) -> Texts:
    defaults = dict(field="text", separator=None, shard_tokens=10**6)
    return Texts(list(map(str, sources)), **{**defaults, **options})


def test_a_text_may_be_cut_only_where_its_ids_stay(tokenizer):
    rng = random.Random(0)
    texts = [CODE[:600], SCRIPTS * 3, *("".join(rng.choices(ALPHABET, k=200)) for _ in range(8))]
    allowed = 0
    for text in texts:
        whole = tokenizer._rust.encode(text, add_special_tokens=False).ids
        for place in range(1, len(text)):
            if tokenizer.may_cut(text, place):
                first, rest = tokenizer.text_ids([text[:place], text[place:]], [False, True])
                assert first + rest == whole, (text[:place][-9:], text[place:][:9])
                allowed += 1
    assert allowed > 200


def test_a_long_text_without_blank_lines_has_the_ids_of_the_whole(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 2**10)
    text = (CODE * 2).replace("\n\n", "\n") + SCRIPTS * 200 + "中文文本，没有空格。" * 2000
    (tmp_path / "long.txt").write_bytes(text.encode())
    tokenize(texts_of(tmp_path / "long.txt"), tokenizer, str(tmp_path / "shards"))
    assert document_ids(tmp_path / "shards") == [library_ids(tokenizer, text)]


def test_a_text_without_a_place_to_cut_is_read_whole_or_refused(llama_3, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 2**10)
    text = "x" * 20_000
    (tmp_path / "x.txt").write_text(text)
    tokenize(texts_of(tmp_path / "x.txt"), llama_3, str(tmp_path / "shards"))
    assert document_ids(tmp_path / "shards") == [library_ids(llama_3, text)]
    monkeypatch.setattr(documents, "LONGEST_PIECE", 2**12)
    with pytest.raises(UserError, match=r"x\.txt: document 1 goes on for 4,096 characters"):
        tokenize(texts_of(tmp_path / "x.txt"), llama_3, str(tmp_path / "others"))


def test_sources_of_all_kinds_become_documents_in_order(llama_3, tmp_path):
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n\ntwo\n\n\n\nthree")
    (folder / "b.txt.gz").write_bytes(gzip.compress("vier é".encode()))
    rows_file(folder / "deeper" / "c.jsonl", ["five", "", "six"])
    rows_file(folder / "deeper" / "d.txt.jsonl", ["seven"])
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "eight"}'))
    pq.write_table(pa.table({"text": ["nine"]}), folder / "f.parquet")
    (folder / "deeper" / "read.me").write_text("no text")
    sources = sources_of(f"{folder},{folder}/**/*.jsonl*,{folder}/a.txt")
    index = tokenize(texts_of(*sources, separator="\n\n"), llama_3, str(tmp_path / "shards"))
    expected = ["one\r", "\ntwo", "", "three", "vier é"]  # of a folder its texts come first
    expected += ["eight", "nine", "five", "", "six", "seven"]
    found = document_ids(tmp_path / "shards")
    assert found == [library_ids(llama_3, text) for text in expected if text]
    assert index["empty"] == expected.count("") == 2
    assert index["documents"] == len(found) and index["tokens"] == sum(map(len, found))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_a_text_is_read_in_blocks_of_any_size(tmp_path, size):
    text = "\ufeff" + SCRIPTS + "\ufeff" + SCRIPTS  # the second one is a character of the text
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "cut.txt").write_bytes("é".encode()[:1])
    assert "".join(text_blocks(tmp_path / "a.txt", size)) == text[1:]
    with pytest.raises(UserError, match=r"cut\.txt:1: byte 0xc3 is not UTF-8"):
        list(text_blocks(tmp_path / "cut.txt", size))


def test_a_separator_is_found_wherever_blocks_end():
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices("ab\n", k=rng.randrange(40)))
        separator = rng.choice(["\n", "ab", "aa", "a\na"])
        cuts = sorted(rng.choices(range(len(text) + 1), k=5))
        blocks = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
        whole = "".join(part + "\0" * ends for part, ends in separated(blocks, separator))
        assert whole.split("\0")[:-1] == text.split(separator)


def test_special_tokens_in_a_text_are_what_the_setting_says(tmp_path):
    path = byte_level(tmp_path, LLAMA_3)
    text = "a </s> b <s>c"
    rows = rows_file(tmp_path / "rows.jsonl", [text])
    for kind, count in (("control", 3), ("text", 1)):
        tokenizer = Tokenizer(path, special_tokens=kind)
        tokenize(texts_of(rows), tokenizer, str(tmp_path / kind))
        (ids,) = document_ids(tmp_path / kind)
        assert ids == tokenizer.prompt_ids(text) + [tokenizer.eos_id]
        assert ids.count(tokenizer.eos_id) + ids.count(tokenizer.bos_id) == count + 1
        assert tokenizer.spelled_out.total() == 2 * 2  # once here, once above


def test_shards_are_read_as_one_array(llama_3, tmp_path):
    rng = random.Random(2)
    texts = ["word " * rng.randrange(1, 30) for _ in range(60)]
    rows = rows_file(tmp_path / "rows.jsonl", texts)
    tokenize(texts_of(rows, shard_tokens=100), llama_3, str(tmp_path / "shards"))
    shards = Shards.open(tmp_path / "shards")
    found = [library_ids(llama_3, text) for text in texts]
    tokens, ends = np.concatenate(found), np.cumsum([len(ids) for ids in found])
    assert (shards.tokens, shards.documents) == (len(tokens), 60) and len(shards._starts) > 10
    for _ in range(300):
        start, stop = sorted(rng.choices(range(len(tokens) + 1), k=2))
        assert shards.read(start, stop).tolist() == tokens[start:stop].tolist()
        assert shards.ends(start, stop) == [end for end in ends if start < end <= stop]


# --- Killed, changed, damaged ---------------------------------------------------------------------


def test_killed_at_any_moment_the_files_are_the_same(llama_3, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 2**9)
    monkeypatch.setattr(tokenization, "PER_CORE", 2**11)
    rows = rows_file(tmp_path / "rows.jsonl", CODE[:30_000].split("\n"))
    (tmp_path / "long.txt").write_text(CODE.replace("\n\n", "\n"))
    texts = texts_of(tmp_path / "long.txt", rows, shard_tokens=3000)
    tokenize(texts, llama_3, str(tmp_path / "whole"))

    rng, forked = random.Random(3), multiprocessing.get_context("fork")
    kills = 0
    while kills < 20:
        process = forked.Process(target=tokenize, args=(texts, llama_3, str(tmp_path / "killed")))
        process.start()
        process.join(rng.uniform(0.02, 0.12))
        kills += process.is_alive()
        if not process.is_alive():  # it was done before: once more from the beginning
            for file in (tmp_path / "killed").iterdir():
                file.unlink()
        process.kill()
        process.join()
    tokenize(texts, llama_3, str(tmp_path / "killed"))
    files = sorted((tmp_path / "whole").iterdir())
    assert [f.name for f in files] == sorted(f.name for f in (tmp_path / "killed").iterdir())
    for file in files:
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes(), file.name


class Stopped(Exception):
    pass


def stop(done: int) -> None:
    raise Stopped


def test_a_source_that_changed_meanwhile_is_named(llama_3, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization, "PER_CORE", 2**9)
    rows = rows_file(tmp_path / "rows.jsonl", ["some words"] * 500)
    other = rows_file(tmp_path / "other.jsonl", ["more words"] * 500)
    texts, folder = texts_of(other, rows), str(tmp_path / "shards")
    with pytest.raises(Stopped):
        tokenize(texts, llama_3, folder, stop)
    before = rows.read_text()
    rows.write_text(before.replace("some", "same"))  # as long as before
    with pytest.raises(UserError, match=r"rows\.jsonl: is another than when"):
        tokenize(texts, llama_3, folder)
    rows.write_text(before)
    with pytest.raises(UserError, match="was begun with other settings"):
        tokenize(texts_of(other, rows, shard_tokens=7), llama_3, folder)

    def grow(done: int) -> None:
        rows.write_text(before * 2)

    with pytest.raises(UserError, match=r"rows\.jsonl: was changed while it was read"):
        tokenize(texts, llama_3, folder, grow)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": 3}\n', r'rows.jsonl:1: the field "text" holds 3'),
        (b'{"words": "a"}\n', r'rows.jsonl:1: has no field "text" \(it has words\)'),
        (b'{"text": "a"}\n[]\n', r'rows.jsonl:2: has no field "text" \(it has list\)'),
        (b'{"text": "a"}\n{\n', "rows.jsonl:2: not JSON"),
    ],
)
def test_rows_without_a_text_are_named(llama_3, tmp_path, content, reason):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        tokenize(texts_of(tmp_path / "rows.jsonl"), llama_3, str(tmp_path / "shards"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"one\ntwo\xff", "a.txt:2: byte 0xff is not UTF-8"),
        ("a.txt", b"one\n\0", "a.txt:2: holds a NUL byte"),
        ("a.txt.gz", GZIP[:-12], "a.txt.gz: is damaged"),
        ("a.txt.gz", b"one", "a.txt.gz: is damaged"),
        ("a.txt.gz", GZIP[:20] + b"\xff" * 8 + GZIP[28:], "a.txt.gz: is damaged"),
        ("b.txt", b"", "b.txt: there is no text in the sources"),
    ],
    ids=range(6),  # bytes are no names that two processes agree on
)
def test_what_is_no_text_is_named(llama_3, tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        tokenize(texts_of(tmp_path / name), llama_3, str(tmp_path / "shards"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edited(index: Path, **values) -> None:
    index.write_text(json.dumps(json.loads(index.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: flip(f / "tokens-00001.bin"), "tokens-00001.bin: its SHA-256"),
        (lambda f: (f / "documents-00000.bin").write_bytes(b""), "documents-00000.bin: 0 bytes"),
        (lambda f: (f / "tokens-00000.bin").unlink(), "tokens-00000.bin: missing"),
        (lambda f: (f / "index.json").unlink(), "is unfinished"),
        (lambda f: (f / "index.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: edited(f / "index.json", tokens=1), "is damaged"),
        (lambda f: edited(f / "index.json", dtype="O"), "is damaged"),
        (lambda f: edited(f / "index.json", files={}), "its entry of tokens-00000.bin is damaged"),
        (lambda f: edited(f / "index.json", format=2), "format 2, this code reads 1"),
    ],
)
def test_damaged_shards_are_named(llama_3, tmp_path, damage, reason):
    rows = rows_file(tmp_path / "rows.jsonl", ["some words and more"] * 20)
    tokenize(texts_of(rows, shard_tokens=50), llama_3, str(tmp_path / "shards"))
    damage(tmp_path / "shards")
    with pytest.raises(UserError, match=reason):
        Shards.open(tmp_path / "shards")


def test_a_folder_that_holds_something_else_is_left_alone(llama_3, tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl", ["a"])
    with pytest.raises(UserError, match=r"holds rows\.jsonl, which is no part of shards"):
        tokenize(texts_of(rows), llama_3, str(tmp_path))
    with pytest.raises(UserError, match="is no folder of shards"):
        Shards.open(tmp_path)


# --- The script -----------------------------------------------------------------------------------


def test_the_script_writes_what_it_says(llama_3, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo </s>\n\n\n\nthree")
    options = flags(source=tmp_path / "a.txt", save_dir=tmp_path / "shards")
    named = flags(tokenizer_file=llama_3.path, document_separator=r"\n\n")
    done = call("dataset/build.py", "pretrain", *options, *named)
    assert done.code == 0, done.err
    assert "texts spell out special tokens: </s> (1)" in done.out
    assert "1 documents are empty, and left out" in done.out
    assert "in 3 documents, 1 shards of <u2" in done.out
    texts = ["one", "two </s>", "three"]
    assert document_ids(tmp_path / "shards") == [library_ids(llama_3, text) for text in texts]
    before = {file: file.read_bytes() for file in (tmp_path / "shards").iterdir()}
    again = call("dataset/build.py", "pretrain", *options, *named)
    assert again.code == 0 and before == {file: file.read_bytes() for file in before}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, "give --tokenizer_file or --ckpt_dir: one of the two"),
        ({"tokenizer_file": "{tokenizer}", "document_separator": ""}, "--document_separator"),
        ({"tokenizer_file": "{tokenizer}", "source": "{folder}/b.txt"}, "b.txt: cannot be read"),
        ({"tokenizer_file": "{tokenizer}", "source": "{folder}:0.7,{folder}:0.3"}, "weights mix"),
    ],
)
def test_the_script_refuses(llama_3, tmp_path, more, reason):
    (tmp_path / "a.txt").write_text("one")
    values = {"source": "{folder}/a.txt", "save_dir": "{folder}/shards"} | more
    names = dict(tokenizer=llama_3.path, folder=tmp_path)
    values = {name: value.format(**names) for name, value in values.items()}
    done = call("dataset/build.py", "pretrain", *flags(**values))
    assert done.code == 2 and reason in done.err
