"""Text to ids and back, with the files that lie beside the weights.

Three kinds of file and two runtimes: SentencePiece's for its own, and `tokenizers` for its own and
for tiktoken's ranks, which are converted as they are read.
"""

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from src.checkpoint.files import read_json
from src.checkpoint.folder import find_tokenizer
from src.data.chat import Chat, find_chat
from src.errors import UserError


class Tokenizer:
    """A model's tokenizer, from `tokenizer.model`, `tokenizer.json` or `qwen.tiktoken`.

    A prompt is BOS (where the model has one) + its ids; a response is its ids + EOS. With a chat
    template, a prompt is the user's turn up to where the answer begins, a response the rest up to
    the end of the turn. The two are encoded apart, so that the boundary is known in ids. Pad is
    never EOS: packed batches need none.

    `bos_id`: None for a model without. `eos_id`: ends a trained response. `stop_ids`: each of them
    ends a generation. `chat`: None without a template. `ranked`: whether the file holds tiktoken's
    ranks, which transformers alone cannot read.
    """

    def __init__(
        self,
        path: Path,
        folder: Path | None = None,
        use_chat_template: bool = False,
        family: str = "llama",
    ) -> None:
        """folder: the checkpoint's, if the tokenizer lies elsewhere.

        family: whose template is used if no file has one.
        """
        self.path = path
        folders = list(dict.fromkeys((path.parent, folder or path.parent)))
        config_file = path.parent / "tokenizer_config.json"
        config = _read_config(config_file) if config_file.is_file() else None
        try:
            self._runtime = _open(path)
        except UserError:
            raise
        # both libraries raise bare Exception or RuntimeError for a damaged file
        except Exception as error:
            raise UserError(
                f"{path}: cannot be read as a tokenizer ({str(error).splitlines()[0]})"
            ) from None
        # A config's ids may be another tokenizer's: an ordinary token never ends a text.
        control, size = self._runtime.control.values(), self._runtime.size
        stops = [i for i in _stop_ids(folders) if i in control or i >= size]
        known_stops = [i for i in stops if i < size]
        self.bos_id, eos_id = self._runtime.special_ids(path, config, known_stops)
        if eos_id is None:
            raise UserError(
                f"{path}: has no EOS that is known; name it as eos_token in {config_file}"
            )
        self.eos_id, self.stop_ids = eos_id, {eos_id, *stops}
        self._special = set(self._runtime.control.values())
        self.vocab_size = self._runtime.size
        self.ranked = isinstance(self._runtime, _Rust) and self._runtime.ranked
        self.chat: Chat | None = None
        if use_chat_template:
            self._start_chat(folders, family, config or {})

    def _start_chat(self, folders: list[Path], family: str, config: dict[str, Any]) -> None:
        """Find the template, and let the tokens that it writes count and its turn's end be EOS."""
        runtime = self._runtime
        text_of = {i: text for text, i in runtime.control.items()}
        tokens = {"eos_token": text_of.get(self.eos_id, "")}
        if self.bos_id is not None:
            tokens["bos_token"] = text_of.get(self.bos_id, "")
        tokens |= {
            key: value
            for key, value in config.items()
            if key.endswith("_token") and isinstance(value, str)
        }
        if family == "llama" and "<|start_header_id|>" in runtime.control:
            family = "llama-3"
        chat = self.chat = find_chat(folders, family, tokens)
        # SentencePiece's file lacks the tokens that were added to a model later. Of these, only
        # those that the template writes: others, such as a pad token, often have no embedding.
        for text, i in _added_tokens(folders).items():
            if i >= runtime.size and text in chat.sample:
                runtime.control[text] = i
        self.vocab_size = max([runtime.size, *(i + 1 for i in runtime.control.values())])
        self._special |= set(runtime.control.values())
        # The first special token after an answer ends it, in training and in generation.
        end = _any_of(runtime.control).search(chat.ending)
        self._ending = chat.ending[: end.start()] if end else ""
        if end:
            self.eos_id = runtime.control[end[0]]
            self.stop_ids.add(self.eos_id)
        self._last_of_prompt = self.prompt_ids("?")[-1]

    @property
    def borrowed_template(self) -> str | None:
        """The chat template in use, if it is the family's: to be kept with what it trained."""
        return self.chat.source if self.chat and not self.chat.own else None

    @classmethod
    def find(
        cls,
        folder: Path,
        tokenizer_file: str | None = None,
        use_chat_template: bool = False,
        family: str = "llama",
    ) -> "Tokenizer":
        """The named file, else the one that lies with the checkpoint."""
        path = Path(tokenizer_file) if tokenizer_file else find_tokenizer(folder)
        if path is None:
            raise UserError(
                f"{folder}: no tokenizer.model, tokenizer.json or qwen.tiktoken there; "
                "name the tokenizer by --tokenizer_file"
            )
        if not path.is_file():
            raise UserError(f"--tokenizer_file {path}: no such file")
        return cls(path, folder, use_chat_template, family)

    def prompt_ids(self, text: str) -> list[int]:
        """What the model reads before it answers `text`.

        With a chat template BOS is there if the template writes it.
        """
        if self.chat:
            return self._runtime.encode_written(self.chat.prompt(text))
        ids = self._runtime.encode(text)
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        if not ids:
            raise UserError(
                f"{self.path}: has no BOS, and a prompt is empty; "
                "leave out the rows with an empty text"
            )
        return ids

    def response_ids(self, text: str) -> list[int]:
        """`text` as the model would answer it, up to and with `eos_id`.

        Goes after `prompt_ids` of any text.
        """
        if self.chat:
            written = self.chat.response(text) + self._ending
            return [*self._runtime.encode_written(written, self._last_of_prompt), self.eos_id]
        return [*self._runtime.encode(text), self.eos_id]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, without special tokens and ids of the model's padded vocabulary."""
        return self._runtime.decode(
            [i for i in ids if i not in self._special and i < self.vocab_size]
        )

    def spelled(self, ids: list[int]) -> str:
        """Text of the ids with special tokens written out, for people to read."""
        names = {i: text for text, i in self._runtime.control.items()}
        parts: list[str] = []
        plain: list[int] = []
        for i in [*ids, None]:
            if i is not None and i not in self._special:
                plain.append(i)
                continue
            parts += [self.decode(plain)] if plain else []
            parts += [names[i]] if i is not None else []
            plain = []
        return "".join(parts)

    def save_json(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as transformers reads them.

        For a folder that leaves this repository with a tokenizer that was tiktoken's. Raises
        UserError for SentencePiece's, which goes as the file it is.
        """
        if not isinstance(self._runtime, _Rust):
            raise UserError(
                f"{self.path}: is SentencePiece's, which transformers reads; copy it instead"
            )
        text_of = {i: text for text, i in self._runtime.control.items()}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.bos_id is not None,
            "bos_token": None if self.bos_id is None else text_of.get(self.bos_id),
            "eos_token": text_of[self.eos_id],
            "clean_up_tokenization_spaces": False,
        } | ({"chat_template": self.chat.source} if self.chat else {})
        self._runtime.save(folder / "tokenizer.json")
        text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError when the tokenizer can produce ids that the model has no embedding for."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} entries, the model {vocab_size}: "
            "not this model's tokenizer"
        )


# --- the two runtimes: `size` (entries of the file), `control` (text → id of the special tokens),
# --- `encode` (of plain text), `encode_written` (of a template's text), `decode`, `special_ids`
# --- (BOS and EOS, or None; config: tokenizer_config.json, or None; stops: what configs call EOS)


class _Pieces:
    """SentencePiece. It never reads a control token from plain text."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sp = SentencePieceProcessor(model_file=str(path))
        self.encode, self.decode = self._sp.encode, self._sp.decode
        self.size = self._sp.vocab_size()
        self.control = {
            self._sp.id_to_piece(i): i for i in range(self.size) if self._sp.is_control(i)
        }

    @cached_property
    def _going_on(self) -> SentencePieceProcessor:
        """The same without the space that it puts before a text: for text that goes on."""
        # protobuf makes its classes at run time
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

        model = ModelProto.FromString(self._path.read_bytes())
        model.normalizer_spec.add_dummy_prefix = False
        return SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode_written(self, text: str, last: int | None = None) -> list[int]:
        """Control tokens where they are spelled, the text between as it stands.

        last: the id that the text goes on from.
        """
        ids = [] if last is None else [last]
        start = len(ids)
        for part in re.split(f"({_any_of(self.control).pattern})", text):
            if part in self.control:
                ids.append(self.control[part])
            elif part:
                # The first text begins as a plain prompt does, with SentencePiece's own space.
                begins = ids in ([], [self._sp.bos_id()])
                ids += (self._sp if begins else self._going_on).encode(part)
        return ids[start:]

    def special_ids(
        self, path: Path, config: dict[str, Any] | None, stops: list[int]
    ) -> tuple[int | None, int | None]:
        bos, eos = (i if i >= 0 else None for i in (self._sp.bos_id(), self._sp.eos_id()))
        if (config or {}).get("add_bos_token") is False:
            bos = None
        return bos, next(iter(stops), None) if eos is None else eos


class _Rust:
    """Hugging Face's `tokenizers`.

    It reads special tokens wherever they are spelled, as `transformers` does.
    """

    def __init__(
        self, rust: RustTokenizer, bos: str = "<s>", eos: str = "</s>", ranked: bool = False
    ) -> None:
        """bos, eos: what they are called if no file says so.

        ranked: whether the file held tiktoken's ranks.
        """
        self._rust, self._usual_bos, self._usual_eos, self.ranked = rust, bos, eos, ranked
        self.save = lambda path: rust.save(str(path))
        self.size = max(rust.get_vocab().values()) + 1
        self.control = {
            token.content: i
            for i, token in rust.get_added_tokens_decoder().items()
            if token.special
        }

    def encode(self, text: str) -> list[int]:
        return self._rust.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._rust.decode(ids, skip_special_tokens=True)

    @cached_property
    def _going_on(self) -> RustTokenizer:
        """The same without the space that some put before a text: for text that goes on."""
        whole = json.loads(self._rust.to_str())
        parts = {key: _unprefixed(whole[key]) for key in ("normalizer", "pre_tokenizer")}
        if parts == {key: whole[key] for key in parts}:
            return self._rust
        return RustTokenizer.from_str(json.dumps(whole | parts))

    def encode_written(self, text: str, last: int | None = None) -> list[int]:
        """The ids of `text`, where `last` is the id that it goes on from."""
        if last is None:
            return self.encode(text)
        # In some tokenizers the ids after a special token depend on its being there.
        for special, i in self.control.items():
            if i == last:
                return self.encode(special + text)[1:]
        return self._going_on.encode(text, add_special_tokens=False).ids

    def special_ids(
        self, path: Path, config: dict[str, Any] | None, stops: list[int]
    ) -> tuple[int | None, int | None]:
        names = config or {}
        bos: int | None
        eos: int | None
        encoded = self._rust.encode("a")
        # a special token before the text: the file's own post-processor puts it there
        if encoded.special_tokens_mask[:-1][:1] == [1]:
            bos = encoded.ids[0]
        elif names.get("add_bos_token") is True:
            bos = self._id_of(names.get("bos_token"), "bos_token", path)
            if bos is None:
                raise UserError(
                    f"{path}: tokenizer_config.json says add_bos_token, but names no bos_token"
                )
        else:  # a config that says neither means none; without a config, the usual name
            bos = self._rust.token_to_id(self._usual_bos) if config is None else None
        eos = self._id_of(names.get("eos_token"), "eos_token", path)
        if eos is None:
            eos = stops[0] if stops else self._rust.token_to_id(self._usual_eos)
        for i in (bos, eos):
            if i is not None:
                text = self._rust.id_to_token(i)
                assert text is not None, f"{i} came from the vocabulary"
                self.control[text] = i
        return bos, eos

    def _id_of(self, token: str | None, key: str, path: Path) -> int | None:
        if token is not None and self._rust.token_to_id(token) is None:
            raise UserError(
                f"{path}: {key} {token!r} is not in the vocabulary; tokenizer_config.json names it"
            )
        return None if token is None else self._rust.token_to_id(token)


def _unprefixed(part: Any) -> Any:
    """A normalizer or pre-tokenizer, as JSON, without the space that it puts before a text."""
    if isinstance(part, list):
        return [_unprefixed(item) for item in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    without_space = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: without_space.get(key, _unprefixed(value)) for key, value in part.items()}


def _any_of(control: dict[str, int]) -> re.Pattern:
    """A pattern of any of the texts, the longest first; of nothing when there are none."""
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")


# --- the files


def _open(path: Path) -> _Pieces | _Rust:
    """The runtime for a file; what it holds tells, since Llama 3's ranks are a `.model` too."""
    with path.open("rb") as file:
        first = file.read(4096)
    if path.suffix == ".tiktoken" or re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", first):
        return _from_ranks(path)
    if path.suffix == ".model":
        return _Pieces(path)
    return _Rust(RustTokenizer.from_file(str(path)))


def _read_config(path: Path) -> dict[str, Any]:
    """`tokenizer_config.json` with its tokens as texts."""
    config = read_json(path)
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(key)
        config[key] = token.get("content") if isinstance(token, dict) else token
        if not isinstance(config[key], str | None):
            raise UserError(f"{path}: {key} is {token!r}, a token's text is expected")
    return config


def _stop_ids(folders: list[Path]) -> list[int]:
    """The `eos_token_id` of each generation_config.json and config.json, a number or several."""
    stop_ids: list[int] = []
    names = ("generation_config.json", "config.json")
    for path in (folder / name for folder in folders for name in names):
        value = read_json(path).get("eos_token_id") if path.is_file() else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise UserError(
                f"{path}: eos_token_id is {value!r}, an id or a list of ids is expected"
            )
        stop_ids += ids
    return stop_ids


def _added_tokens(folders: list[Path]) -> dict[str, int]:
    """Text → id of the tokens that were added to a vocabulary.

    From the files that older versions of transformers wrote.
    """
    ids: dict[str, int] = {}
    for folder in folders:
        added, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
        listed = read_json(config).get("added_tokens_decoder") if config.is_file() else None
        try:
            ids |= {
                text: int(i) for text, i in (read_json(added) if added.is_file() else {}).items()
            }
            ids |= {token["content"]: int(i) for i, token in (listed or {}).items()}
            if not all(
                isinstance(text, str) and text and 0 <= i < 2**31 for text, i in ids.items()
            ):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{folder}: added_tokens.json or added_tokens_decoder of tokenizer_config.json "
                "lacks a token's text or id"
            ) from None
    return ids


# --- tiktoken's files: base64 bytes and their rank


@dataclass(frozen=True)
class _Ranked:
    """What a file of ranks leaves unsaid.

    That is how text is split before merging, and the special tokens that follow the ranks.
    """

    digits: str  # how many digits go into one piece, as a regular expression counts
    special: tuple[str, ...]
    bos: str | None
    eos: str
    nfc: bool = False  # whether text is normalised

    @property
    def pattern(self) -> str:
        return (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            + self.digits
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )


_QWEN = _Ranked(
    digits="",
    special=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *(f"<|extra_{i}|>" for i in range(205)),
    ),
    bos=None,
    eos="<|endoftext|>",
    nfc=True,
)
_LLAMA_3 = _Ranked(
    digits="{1,3}",
    special=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|image|>",
        *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
    ),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
)


def _from_ranks(path: Path) -> _Rust:
    """`qwen.tiktoken`, or Llama 3's `tokenizer.model`, as a byte-level BPE of the same ids."""
    scheme = _LLAMA_3 if path.suffix == ".model" else _QWEN
    ranks = _read_ranks(path)
    rust = RustTokenizer(
        models.BPE(
            {_spelled(token): rank for token, rank in ranks.items()},
            [(_spelled(left), _spelled(right)) for left, right in _merges(ranks)],
            ignore_merges=True,  # a piece that is a token as a whole is that token
        )
    )
    if scheme.nfc:
        rust.normalizer = normalizers.NFC()
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(scheme.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in scheme.special]
    )
    # Special tokens take the ids after the ranks, unless a rank has their text already.
    special_ids = [rust.token_to_id(text) for text in scheme.special]
    if special_ids != list(range(len(ranks), len(ranks) + len(scheme.special))):
        raise UserError(
            f"{path}: has special tokens such as {scheme.special[0]} among its ranks, "
            "where they follow them"
        )
    if scheme.bos:
        rust.post_processor = processors.TemplateProcessing(
            single=f"{scheme.bos} $A",
            pair=f"{scheme.bos} $A {scheme.bos} $B",
            special_tokens=[(scheme.bos, len(ranks))],
        )
    return _Rust(rust, scheme.bos or "", scheme.eos, ranked=True)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes → rank, in order of rank: 0, 1, 2, ..., with each single byte among them."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            text, rank = line.split()
            ranks[base64.b64decode(text, validate=True)] = int(rank)
        except ValueError:
            raise UserError(
                f"{path}: line {number} is {line[:60]!r}, not bytes in base64 and their rank"
            ) from None
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{path}: its {len(ranks)} tokens do not have the ranks 0 to {len(ranks) - 1}; "
            "is it cut short?"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(
            f"{path}: lacks {len(missing)} of the 256 bytes, {missing[0]:#04x} first; "
            "is it cut short?"
        )
    return ranks


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two parts that each token is merged from, in order of rank.

    tiktoken joins the two neighbours whose union has the lowest rank, the leftmost first, until
    none has one. The merges inside a stretch that ends as one token do not depend on what surrounds
    it, so wherever a token arises, it arises from the same two parts: those that its own bytes come
    to. One merge per token is therefore exact, whatever the ranks.
    """
    unranked = len(ranks)  # above every rank
    for token in ranks:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            unions = [ranks.get(left + right, unranked) for left, right in zip(parts, parts[1:])]
            lowest = min(unions)
            if lowest == unranked:
                break  # its bytes stop short of it: it is only ever a whole piece
            index = unions.index(lowest)
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


# Byte-level BPE spells bytes as characters: those that are printable in Latin-1 as themselves, the
# others from 256 on.
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_SPELLING = {byte: 256 + i for i, byte in enumerate(sorted(set(range(256)) - _PRINTABLE))}


def _spelled(token: bytes) -> str:
    return token.decode("latin-1").translate(_SPELLING)
