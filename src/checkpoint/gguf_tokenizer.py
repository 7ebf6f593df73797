"""A GGUF file's tokenizer and chat template, from its metadata to files of Hugging Face's kind.

Two kinds of vocabulary: byte-level BPE with its merges (`gpt2`), written as `tokenizer.json`, and
SentencePiece's BPE by scores (`llama`), written as `tokenizer.model`.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from src.checkpoint.gguf import GGUFFile
from src.data.pieces import from_pieces
from src.errors import UserError

# Kinds of entry (llama.cpp's llama_token_type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `tokenizer.ggml.pre` → into which pieces a text is cut before the merges, one pattern after the
# other. Names that llama.cpp treats alike stand together.
SPLITS = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "roberta-bpe"), (_GPT2,)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), (_LLAMA3,)),
    **dict.fromkeys(("smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (r"\p{N}", _GPT2)),
    "tekken": (_TEKKEN,),
}
# Whose words are looked up whole before any merge, and which begin with BOS unless they say not to.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
# Whose texts are composed (NFC) first; GGUF does not say it.
_COMPOSED = ("qwen2", "deepseek-r1-qwen")
# Keys of the metadata for the tokens of tokenizer_config.json.
_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")


class _Vocabulary:
    """What the metadata holds: the entries in their order, and the flags."""

    def __init__(self, file: GGUFFile) -> None:
        self.path, self._get = file.path, lambda key: file.get(f"tokenizer.ggml.{key}")
        self.kind = self._get("model")
        if self.kind not in ("gpt2", "llama"):
            raise UserError(
                f"{file.path}: tokenizer.ggml.model is {self.kind!r}; gpt2 and llama are supported"
            )
        self.tokens: list[str] = self._get("tokens") or []
        self.types: list[int] = list(self._get("token_type") or ())
        self.types = self.types or [NORMAL] * len(self.tokens)
        self.merges, self.scores = self._get("merges"), self._get("scores")
        lists = [x for x in (self.types, self.scores) if x is not None]
        if not self.tokens or any(len(x) != len(self.tokens) for x in lists):
            raise UserError(f"{file.path}: tokenizer.ggml.tokens and what belongs to them differ")
        self.pre = self._get("pre")
        if self.pre is None:
            # files from before there was the key
            arch = file.get("general.architecture", "")
            self.pre = "qwen2" if arch.startswith("qwen") else "default"
        self.chat_template: str | None = file.get("tokenizer.chat_template")
        # Rows of the model without a token: [PAD400] in place 400 is user-defined in older files.
        special = {self.id_of(key) for key in (*_TOKENS.values(), *_STOPS)}
        for i, (token, kind) in enumerate(zip(self.tokens, self.types)):
            if kind == UNUSED or (kind == USER_DEFINED and token == f"[PAD{i}]"):
                self.types[i] = CONTROL if i in special else UNUSED

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        return default if value is None else bool(value)

    def id_of(self, key: str) -> int | None:
        """A special token's id; None where there is none."""
        value = self._get(key)
        if value is None:
            return None
        if not 0 <= value < len(self.tokens):
            raise UserError(
                f"{self.path}: tokenizer.ggml.{key} is {value}, of {len(self.tokens)} tokens"
            )
        return int(value)

    @property
    def adds_bos(self) -> bool:
        return self.flag("add_bos_token", self.kind == "llama" or self.pre in _WHOLE_WORDS)


def write_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Write the tokenizer's files, its config with the chat template, and generation_config.json.

    Raises UserError for a kind of vocabulary, or a way to cut texts, that is not known.
    """
    if file.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return
    vocabulary = _Vocabulary(file)
    original = file.get("tokenizer.huggingface.json")  # the file itself, which some converters keep
    if original:
        (folder / "tokenizer.json").write_text(original, encoding="utf-8")
    elif vocabulary.kind == "gpt2":
        _byte_level(vocabulary).save(str(folder / "tokenizer.json"))
    else:
        (folder / "tokenizer.model").write_bytes(_sentencepiece(vocabulary))
    _write_json(folder / "tokenizer_config.json", _config(vocabulary))
    stops = list(dict.fromkeys(i for key in _STOPS if (i := vocabulary.id_of(key)) is not None))
    generation = {
        "bos_token_id": vocabulary.id_of("bos_token_id"),
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": vocabulary.id_of("padding_token_id"),
    }
    _write_json(
        folder / "generation_config.json",
        {key: value for key, value in generation.items() if value not in (None, [])},
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(vocabulary: _Vocabulary) -> dict[str, Any]:
    """`tokenizer_config.json`."""
    is_byte_level = vocabulary.kind == "gpt2"
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if is_byte_level else "LlamaTokenizer",
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": vocabulary.flag("add_eos_token", False),
        "clean_up_tokenization_spaces": False,
    }
    if not is_byte_level:
        config["add_prefix_space"] = vocabulary.flag("add_space_prefix", True)
    for name, key in _TOKENS.items():
        i = vocabulary.id_of(key)
        config[name] = None if i is None else vocabulary.tokens[i]
    if vocabulary.chat_template:
        config["chat_template"] = vocabulary.chat_template
    return config


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    """Byte-level BPE: GPT-2's alphabet, the merges in their order, texts cut as `pre` says."""
    tokens, pre = vocabulary.tokens, vocabulary.pre
    if pre not in SPLITS:
        raise UserError(
            f"{vocabulary.path}: tokenizer.ggml.pre is {pre!r}, and how such texts are cut is not "
            f"known here; known: {', '.join(SPLITS)}. Give the original tokenizer.json by "
            "--tokenizer_file"
        )
    used = [i for i, kind in enumerate(vocabulary.types) if kind != UNUSED]
    ids = {tokens[i]: i for i in used}
    if len(ids) < len(used):
        raise UserError(f"{vocabulary.path}: tokenizer.ggml.tokens holds a token twice")
    if not isinstance(vocabulary.merges, list):
        raise UserError(f"{vocabulary.path}: no tokenizer.ggml.merges, which BPE needs")
    # A part of a merge may be a space in no byte-level alphabet: the first one parts them.
    merges = [
        (merge[:cut], merge[cut + 1 :])
        for merge in vocabulary.merges
        for cut in [merge.index(" ", 1) if " " in merge[1:] else 0]
    ]
    unknown = next((merge for merge in merges if not {*merge, "".join(merge)} <= ids.keys()), None)
    if unknown:
        raise UserError(
            f"{vocabulary.path}: the merge {' '.join(unknown)!r} is of tokens that are not there"
        )
    whole_words = pre in _WHOLE_WORDS
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=whole_words))
    tokenizer.normalizer = normalizers.NFC() if pre in _COMPOSED else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, kind in zip(tokens, vocabulary.types)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    bos = vocabulary.id_of("bos_token_id")
    if vocabulary.adds_bos and bos is not None:
        text = tokens[bos]
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{text} $A",
                    pair=f"{text} $A {text}:1 $B:1",
                    special_tokens=[(text, bos)],
                ),
            ]
        )
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> bytes:
    """A `tokenizer.model`: BPE by scores, with bytes for what the pieces cannot spell."""
    # protobuf makes its classes at run time
    from sentencepiece import sentencepiece_model_pb2 as proto

    if vocabulary.scores is None:
        raise UserError(f"{vocabulary.path}: no tokenizer.ggml.scores, by which pieces are joined")
    model = proto.ModelProto()  # type: ignore[attr-defined]
    kinds = model.SentencePiece
    # Those at the end are left out; between others they keep the others' ids.
    size = max((i + 1 for i, kind in enumerate(vocabulary.types) if kind != UNUSED), default=0)
    rows = list(zip(vocabulary.tokens, vocabulary.scores, vocabulary.types))
    for text, score, kind in rows[:size]:
        piece = model.pieces.add(piece=text, score=score)
        # the same numbers in both formats but for llama.cpp's "undefined"
        piece.type = kind if NORMAL <= kind <= BYTE else kinds.NORMAL
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = size
    trainer.byte_fallback = BYTE in vocabulary.types
    for name, key in _TOKENS.items():
        i = vocabulary.id_of(key)
        setattr(trainer, name.replace("_token", "_id"), -1 if i is None else i)
        if i is not None:
            setattr(trainer, name.replace("_token", "_piece"), vocabulary.tokens[i])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = vocabulary.flag("add_space_prefix", True)
    normalizer.remove_extra_whitespaces = vocabulary.flag("remove_extra_whitespaces", False)
    normalizer.escape_whitespaces = True
    data: bytes = model.SerializeToString()
    from_pieces(data, str(vocabulary.path))  # what cannot be read is refused here
    return data
