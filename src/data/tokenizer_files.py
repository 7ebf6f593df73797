"""What the files beside a tokenizer say of it, and its own file, told by what it holds."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from src.checkpoint.folder import end_ids
from src.checkpoint.json_file import read_json
from src.checkpoint.manifest import has_manifest
from src.data.pieces import from_pieces
from src.data.ranks import QWEN, byte_level, from_ranks, from_tekken
from src.errors import UserError

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_QWEN_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# no class: what the model's family has, Llama's for most
_HEED_ADD_BOS = (
    "",
    *(f"{name}Tokenizer" for name in ["Llama", "CodeLlama", "Gemma", "Cohere", "GPTNeoX"]),
)
# which put a space before a text by add_prefix_space alone
_SET_PREFIX = ("GPT2Tokenizer", "GPTNeoXTokenizer", "RobertaTokenizer", "Qwen2Tokenizer")
# True where the control tokens that texts spell out are text, and those that a template writes are
# not: transformers' split_special_tokens is for both.
TEXTS_ALONE = "split_special_tokens_in_texts"
_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")

_FLAGS = ("add_bos_token", "legacy", "add_prefix_space", "split_special_tokens", TEXTS_ALONE)


@dataclass(frozen=True)
class TokenizerConfig:
    """`tokenizer_config.json`, with what `special_tokens_map.json` and `added_tokens.json` add.

    path: of the first, there or not; tokens: texts by their names (`bos_token` …); listed: special
    tokens without a name; flags: text → what an object says of such a token (`lstrip` …); added:
    id → token of those added to the vocabulary; raw: all that the first file holds, {} without it.
    """

    path: Path
    raw: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)
    flags: dict[str, dict[str, bool]] = field(default_factory=dict)
    added: dict[int, AddedToken] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "TokenizerConfig":
        """Raises UserError for what gives a key another type than it has."""
        path, special = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
        raw = read_json(path) if path.is_file() else {}
        tokens: dict[str, str] = {}
        listed: list[str] = []
        flags: dict[str, dict[str, bool]] = {}
        files = [(path, raw), (special, _if_there(special))]
        # As in transformers: the map has the last word, unless added tokens are described.
        for file, values in reversed(files) if "added_tokens_decoder" in raw else files:
            for key, token in values.items():
                if key in _LISTS:
                    listed += _texts(token, f"{file}: {key}")
                    objects = token.values() if isinstance(token, dict) else token or []
                    flags |= {t["content"]: _flags(t) for t in objects if isinstance(t, dict)}
                elif key in NAMED or (key.endswith("_token") and isinstance(token, str | dict)):
                    tokens.pop(key, None)
                    if token is not None:
                        (tokens[key],) = _texts([token], f"{file}: {key}")
                    if isinstance(token, dict):
                        flags[tokens[key]] = _flags(token)
        for key in _FLAGS:
            if not isinstance(raw.get(key), bool | None):
                raise UserError(f"{path}: {key} is {raw[key]!r}, true or false is expected")
        settings = raw.get("sp_model_kwargs")
        if not isinstance(settings, dict | None):
            raise UserError(f"{path}: sp_model_kwargs is {settings!r}, an object is expected")
        if (settings or {}).get("enable_sampling"):
            raise UserError(
                f"{path}: sp_model_kwargs asks for sampled pieces (enable_sampling): a text would "
                "have other ids each time; take it out"
            )
        added = dict(_added(folder, raw, {*tokens.values(), *listed}))
        return cls(path, raw, tokens, listed, flags, added)

    def heeds_add_bos(self, kind: str) -> bool:
        """Whether `add_bos_token` counts for a vocabulary of this kind.

        Beside a tokenizer.json it does for a few classes in transformers 4, and for none in 5.
        """
        return kind != "json" or self.class_name in _HEED_ADD_BOS

    @property
    def class_name(self) -> str:
        """The tokenizer's class in transformers, the slow one's name, "" where it is not said."""
        return str(self.raw.get("tokenizer_class") or "").removesuffix("Fast")

    @property
    def splits_special(self) -> bool:
        """Whether the special tokens that a text spells out are text."""
        return any(self.raw.get(key) is True for key in ("split_special_tokens", TEXTS_ALONE))

    @property
    def has_no_bos(self) -> bool:
        """Whether the file says that there is none by name, whatever stands before a text."""
        return "bos_token" in self.raw and "bos_token" not in self.tokens

    def add_bos(self, kind: str) -> bool | None:
        """Whether a text begins with BOS, if the file says so and is heeded."""
        return self.raw.get("add_bos_token") if self.heeds_add_bos(kind) else None


def _if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _texts(tokens: Any, where: str) -> list[str]:
    """The texts of tokens in a list, or by names; each a text or an object with its content."""
    values = list(tokens.values()) if isinstance(tokens, dict) else [] if tokens is None else tokens
    listed = values if isinstance(values, list) else []
    texts: list[Any] = [t.get("content") if isinstance(t, dict) else t for t in listed]
    if listed is not values or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where} is {tokens!r}, the text of each token is expected")
    return texts


def _flags(token: dict[str, Any]) -> dict[str, bool]:
    known = ("lstrip", "rstrip", "single_word", "normalized")
    return {key: bool(token[key]) for key in known if key in token}


def _added(
    folder: Path, config: dict[str, Any], special: set[str]
) -> Iterator[tuple[int, AddedToken]]:
    """The tokens that were added to a vocabulary, as older versions of transformers wrote them.

    special: those that are special where the files do not say.
    """
    plain, listed = _if_there(folder / "added_tokens.json"), config.get("added_tokens_decoder")
    try:
        described = {int(i): dict(token) for i, token in (listed or {}).items()}
        for text, i in plain.items():
            described.setdefault(int(i), {"content": text, "special": text in special})
        for i, token in sorted(described.items()):
            text = token["content"]
            if not isinstance(text, str) or not text or not 0 <= i < 2**31:
                raise ValueError
            # A token counts as it is spelled: what is done to texts is not done to it.
            is_special = bool(token.get("special", True))
            yield i, AddedToken(text, special=is_special, **{"normalized": False} | _flags(token))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder}: added_tokens.json or added_tokens_decoder of tokenizer_config.json "
            "lacks a token's text or id"
        ) from None


def stop_ids_in(folders: list[Path]) -> list[int]:
    """The `eos_token_id` of each generation_config.json and config.json, a number or several."""
    stop_ids: list[int] = []
    names = ("generation_config.json", "config.json")
    for path in (folder / name for folder in folders for name in names):
        stop_ids += end_ids(_if_there(path), path)
    return stop_ids


def is_foreign_verifier(folder: Path) -> bool:
    """Whether a classifier lies there that was not written here, where a manifest would be."""
    said = _if_there(folder / "config.json").get("architectures")
    names = said if isinstance(said, list) else []
    return not has_manifest(folder) and any(
        str(name).endswith("ForSequenceClassification") for name in names
    )


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's file as a runtime.

    kind: "json", "sentencepiece", "ranks" or "tekken"; bos, eos: the texts that the file itself, or
    the usual names, give them; after_bos: the special tokens that it puts between BOS and a text.
    """

    kind: str
    rust: RustTokenizer
    bos: str | None
    eos: str | None
    after_bos: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path, config: TokenizerConfig) -> "Vocabulary":
        """The file's content tells what it is. Raises UserError when it is none of these."""
        with path.open("rb") as file:
            first = file.read(4096)
        added = config.added.items()
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", first) or path.suffix == ".tiktoken":
            vocabulary = cls("ranks", *from_ranks(path))
        elif first.lstrip()[:1] == b"{":
            vocabulary = _of_json(path, config)
        else:
            has_prefix = config.raw.get("add_prefix_space") is not False
            pieces = from_pieces(path.read_bytes(), str(path), added, has_prefix)
            vocabulary = cls("sentencepiece", *pieces)
        # What was added later, where the file lacks it; and as the config describes it.
        rust, described = vocabulary.rust, config.raw.get("added_tokens_decoder") or {}
        missing = {t.content: i for i, t in added if rust.token_to_id(t.content) is None}
        for i, token in added:
            found = rust.token_to_id(token.content)
            if token.content not in missing and found != i:
                raise UserError(
                    f"{config.path.parent}: the added token {token.content!r} has id {i} there, "
                    f"and {found} in {path.name}: they belong to different tokenizers"
                )
            if token.content in missing or (vocabulary.kind == "json" and str(i) in described):
                (rust.add_special_tokens if token.special else rust.add_tokens)([token])
        rust = _numbered(rust, missing, str(config.path.parent))
        return replace(vocabulary, rust=rust)


def _of_json(path: Path, config: TokenizerConfig) -> Vocabulary:
    raw = read_json(path)
    if isinstance(raw.get("config"), dict) and "vocab" in raw:  # words of a vocab.json, perhaps
        return Vocabulary("tekken", *from_tekken(path, raw))
    if path.name == "vocab.json":
        return _of_merges(path, raw, config)
    try:
        rust = RustTokenizer.from_file(str(path))
    # the library raises bare Exception for whatever it cannot read
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a tokenizer ({reason})") from None
    added = {token["content"]: token["id"] for token in raw.get("added_tokens") or []}
    rust = _numbered(rust, added, str(path))
    if getattr(rust.model, "dropout", None):
        raise UserError(
            f"{path}: its model has dropout {rust.model.dropout:.3g}: a text would have other ids "
            "each time; take it out"
        )
    # A text is read whole, whatever the file was saved with.
    rust.no_truncation()
    rust.no_padding()
    # Classes that split words anew put a space before a text by the config alone.
    words = rust.pre_tokenizer
    if config.class_name in _SET_PREFIX and isinstance(words, pre_tokenizers.ByteLevel):
        words.add_prefix_space = bool(config.raw.get("add_prefix_space"))
        rust.pre_tokenizer = words
    # Special tokens before the text: the file's own post-processor puts them there.
    encoded = rust.encode("a")
    marks = zip(encoded.tokens[:-1], encoded.special_tokens_mask)
    before = [token for token, _ in takewhile(lambda mark: mark[1], marks)]
    return Vocabulary("json", rust, before[0] if before else None, None, tuple(before[1:]))


def _numbered(rust: RustTokenizer, wanted: dict[str, int], where: str) -> RustTokenizer:
    """The runtime where added tokens have their ids, with holes between them where there are.

    wanted: text → id. The library numbers them one after the other, whatever a file says, unless
    they are in the vocabulary. Raises UserError where another token has such an id.
    """
    if all(rust.token_to_id(text) == i for text, i in wanted.items()):
        return rust
    added = {t.content: i for i, t in rust.get_added_tokens_decoder().items()} | wanted
    whole = json.loads(rust.to_str())
    vocabulary = whole["model"]["vocab"]
    is_list = isinstance(vocabulary, list)  # whose places are the ids
    others = {} if is_list else {i: text for text, i in vocabulary.items()}
    for text, i in added.items():
        if is_list or others.setdefault(i, text) != text:
            other = f"{others[i]!r} has" if i in others else "does not follow its pieces"
            raise UserError(f"{where}: the added token {text!r} has id {i}, which {other}")
    whole["model"]["vocab"] = vocabulary | added
    return RustTokenizer.from_str(json.dumps(whole))


def _of_merges(path: Path, ids: dict[str, int], config: TokenizerConfig) -> Vocabulary:
    """`vocab.json`, read as `ids`, and the `merges.txt` beside it."""
    merges = path.with_name("merges.txt")
    if not merges.is_file() or config.raw.get("tokenizer_class") not in _QWEN_CLASSES:
        raise UserError(
            f"{path}: with merges.txt it does not say how a text is split, unless "
            f"tokenizer_config.json names {_QWEN_CLASSES[0]} as tokenizer_class; save its "
            "tokenizer.json: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    lines = merges.read_text("utf-8").split("\n")
    pairs = [line.split() for line in lines if line and not line.startswith("#version")]
    try:
        model = models.BPE(ids, [(left, right) for left, right in pairs])
    # the library raises bare Exception for what does not fit together
    except Exception as error:
        raise UserError(f"{path}: does not go with {merges.name} ({error})") from None
    rust = byte_level(model, QWEN.pattern)
    rust.normalizer = normalizers.NFC()
    return Vocabulary("json", rust, None, QWEN.eos)
