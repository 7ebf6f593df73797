"""Text to ids and back, with the files that lie beside the weights.

Every kind of file becomes one runtime, Hugging Face's `tokenizers`: src/data/pieces.py and
src/data/ranks.py read the others' files for it.
"""

import codecs
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Encoding, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from src.checkpoint.folder import find_tokenizer
from src.data.chat import DEFAULT_DATE, Chat, Counted, find_chat, has_template
from src.data.messages import Conversation, Message, Messages, Question
from src.data.pieces import begin_text_once
from src.data.ranks import put_before
from src.data.tokenizer_files import (
    TokenizerConfig,
    Vocabulary,
    is_foreign_verifier,
    stop_ids_in,
)
from src.data.turns import Span, assistant_spans, tokens_of
from src.errors import UserError

# Put inside a control token that a text spells out, so that it is text: two that are no characters
# (Unicode keeps them free for such use), taken out again before the text is encoded.
_MARK = "\ufdd0\ufdd1"
_USUAL_BOS, _USUAL_EOS = ("<s>", "<|begin_of_text|>"), ("</s>", "<|end_of_text|>")
_AROUND = 256  # characters on each side of a cut that are read with and without it
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a piece of SentencePiece's for one byte


def _is_byte(token: str) -> bool:
    return _BYTE.fullmatch(token) is not None


def _mark_each(error: UnicodeError) -> tuple[str, int]:
    """One replacement character for each byte that is no text, as SentencePiece writes them."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("a_mark_each", _mark_each)


class Tokenizer:
    """A model's tokenizer, from whichever file it lies in.

    A prompt is BOS (where the model has one) + its ids; a response is its ids + EOS. With a chat
    template, a prompt is the user's turn up to where the answer begins, a response the rest up to
    the end of the turn. The two are encoded apart, so that the boundary is known in ids. Pad is
    never EOS: packed batches need none.

    `bos_id`: None for a model without. `eos_id`: ends a trained response. `stop_ids`: each of them
    ends a generation. `chat`: None without a template. `control`: text → id of the special tokens.
    `as_text`: whether one that a text spells out is text. `names_bos`: whether templates are told
    BOS. `spelled_out`: how often texts that were encoded spelled out each of them. `lossy`:
    how many had characters without a token, and the first such.
    """

    def __init__(
        self,
        path: Path,
        folder: Path | None = None,
        use_chat_template: bool = False,
        family: str = "llama",
        special_tokens: str = "control",
        chat_date: str = DEFAULT_DATE,
    ) -> None:
        """folder: the checkpoint's, if the tokenizer lies elsewhere.

        family: whose template is used if no file has one. special_tokens: what a special token is
        that a text spells out: "control", as in transformers, or "text". chat_date: the day that a
        template writes, YYYY-MM-DD.
        """
        self.path = path
        self._made_of = path, folder, use_chat_template, family, special_tokens, chat_date
        folders = list(dict.fromkeys((path.parent, folder or path.parent)))
        self.config = config = TokenizerConfig.read(path.parent)
        vocabulary = Vocabulary.read(path, config)
        self.kind, self._rust = vocabulary.kind, vocabulary.rust
        if self.kind == "sentencepiece" and config.raw.get("legacy") is False:
            begin_text_once(self._rust)
        self._ids = self._rust.get_vocab()
        self.vocab_size = max(self._ids.values()) + 1
        added = self._rust.get_added_tokens_decoder()
        self.control = {token.content: i for i, token in added.items() if token.special}
        self._texts = {i: text for text, i in self.control.items()}
        # What files call special is so. A word that fills up batches, though, stays a word.
        for key, text in sorted([*config.tokens.items(), *(("", text) for text in config.listed)]):
            if self._ids.get(text) in added or (text in self._ids and key != "pad_token"):
                self._counted(text, key)
        # A config's ids may be another tokenizer's: an ordinary token never ends a text.
        may_end = {*self.control, *(token.content for token in added.values()), None}  # no token
        stops = [i for i in stop_ids_in(folders) if self._rust.id_to_token(i) in may_end]
        self._bos_of_file = vocabulary.bos
        if vocabulary.after_bos and not use_chat_template and config.add_bos(self.kind) is None:
            before = " ".join((vocabulary.bos or "", *vocabulary.after_bos))
            raise UserError(
                f"{path}: its post-processor puts {before} before a text, and one token, BOS, is "
                "supported; leave the others out of it, or go by a template: --use_chat_template"
            )
        self.bos_id = self._begin(vocabulary.bos)
        self.eos_id = self._end(vocabulary.eos, [i for i in stops if self._rust.id_to_token(i)])
        self.stop_ids = {self.eos_id, *stops}
        self.as_text = special_tokens == "text" or config.splits_special
        self.spelled_out: Counter[str] = Counter()
        self.lossy = Counted()
        self._limit: int | None = None  # ids that the model has an embedding for
        self.chat: Chat | None = None
        self._is_foreign_verifier = is_foreign_verifier(folder or path.parent)
        self._unused_template = not use_chat_template and has_template(folders)
        # A null takes BOS from the folder's own template, as in transformers, not from texts.
        self.names_bos = not (config.has_no_bos and has_template(folders))
        # One file serves texts and chats: what a template asks of it holds without one, too.
        is_open = self.kind == "sentencepiece" and config.raw.get("legacy") is None
        chat = None
        if use_chat_template or is_open:
            chat = self._chat_of(folders, family, chat_date, use_chat_template)
        if chat is not None and is_open and self._parts_by_control(chat):
            begin_text_once(self._rust, doubles=True)
        if chat is not None and use_chat_template:
            self._start_chat(chat)

    def __reduce__(self) -> tuple:
        """As it was made, for another process; its counts begin anew there."""
        return _made_again, (type(self), self._made_of, self._limit)

    # --- what begins and ends a text ----------------------------------------------------------

    def _begin(self, bos: str | None) -> int | None:
        """BOS, if texts begin with one. bos: what the file itself puts there."""
        config, add = self.config, self.config.add_bos(self.kind)
        named = config.tokens.get("bos_token")
        if add and named is None and bos is None:
            raise UserError(f"{config.path}: says add_bos_token, but names no bos_token")
        if add or (bos is not None and add is None):
            return self._counted(named if add and named else bos, "bos_token")
        if add is None and not config.raw and self.kind == "json":
            # nobody says anything: the usual names
            usual = next((text for text in _USUAL_BOS if text in self._ids), None)
            return None if usual is None else self._counted(usual, "bos_token")
        return None

    def _end(self, eos: str | None, stops: list[int]) -> int:
        """EOS. eos: the file's own; stops: what configs call so."""
        named = self.config.tokens.get("eos_token", eos)
        if named is not None:
            return self._counted(named, "eos_token")
        if stops:
            return stops[0]
        usual = next((text for text in _USUAL_EOS if text in self._ids), None)
        if usual is not None:
            return self._counted(usual, "eos_token")
        raise UserError(
            f"{self.path}: has no EOS that is known; name it as eos_token in {self.config.path}"
        )

    def _counted(self, text: str | None, key: str) -> int:
        """The id of a token that is from now on a special one."""
        if text not in self._ids:
            raise UserError(
                f"{self.path}: {key} {text!r} is not in the vocabulary; {self.config.path.name} "
                "names it"
            )
        if text not in self.control:
            # An added token keeps its flags, such as to take the space after it; a word has those
            # that it is named with.
            added = self._rust.get_added_tokens_decoder().get(self._ids[text])
            named = {"content": text, "normalized": False} | self.config.flags.get(text, {})
            token = AddedToken(**(named if added is None else added.__getstate__()))
            self._rust.add_special_tokens([token])
            self.control[text] = self._ids[text]
            self._texts[self._ids[text]] = text
        return self._ids[text]

    def _chat_of(self, folders: list[Path], family: str, date: str, is_used: bool) -> Chat | None:
        """The template that goes with the tokenizer.

        Where it is not used, None if there is none that can be; else that raises UserError.
        """
        tokens = {"eos_token": self._texts.get(self.eos_id, "")}
        if self.bos_id is not None:
            tokens["bos_token"] = self._texts.get(self.bos_id, "")
        tokens |= self.config.tokens
        if not self.names_bos:
            tokens["bos_token"] = ""
        has_prefix = self._rust.encode("a", add_special_tokens=False).tokens[0] != "a"
        try:
            return find_chat(folders, family, tokens, self.control, has_prefix, date)
        except UserError:
            if is_used:
                raise
            return None

    def _parting(self, chat: Chat) -> set[str]:
        """The added tokens by which a template sets turns apart."""
        added = {t.content: i for i, t in self._rust.get_added_tokens_decoder().items()}
        return set(_any_of(added).findall(chat.structure))

    def _parts_by_control(self, chat: Chat) -> bool:
        """Whether a template writes control tokens between the texts, besides BOS and EOS.

        The texts then go on as it writes them.
        """
        ends = {text for text, i in self.control.items() if i in (self.bos_id, self.eos_id)}
        between = (self.control.keys() | self._parting(chat)) - ends
        return _any_of(between).search(chat.sample) is not None

    def _start_chat(self, chat: Chat) -> None:
        """Use the template, and let its turn's end be EOS."""
        self.chat = chat
        # A token by which the template sets turns apart is a special one, whatever files say or
        # leave unsaid; one that a system's text mentions or that opens the answer need not be.
        for text in self._parting(chat) - self.control.keys():
            self._counted(text, "chat_template")
        added = {t.content: i for i, t in self._rust.get_added_tokens_decoder().items()}
        # The first special token after an answer ends it, in training and in generation.
        end = _any_of(added | self.control).search(chat.ending)
        self._ending = chat.ending[: end.start()] if end else ""
        self._after_end = chat.ending[end.end() :] if end else chat.ending
        self._has_end = end is not None
        self._end_takes_space = False
        if end:
            self.eos_id = self._counted(end[0], "chat_template")
            self.stop_ids.add(self.eos_id)
            # It may take the space before it, which the answer then lacks.
            end_token = self._rust.get_added_tokens_decoder()[self.eos_id]
            self._end_takes_space = end_token.lstrip
        self._last_of_prompt = self.prompt_ids("?")[-1]
        self.lossy = Counted()  # nobody asked that

    @classmethod
    def find(
        cls,
        folder: Path,
        tokenizer_file: str | None = None,
        use_chat_template: bool = False,
        family: str = "llama",
        special_tokens: str = "control",
        chat_date: str = DEFAULT_DATE,
    ) -> "Tokenizer":
        """The named file, else the one that lies with the checkpoint."""
        path = Path(tokenizer_file) if tokenizer_file else find_tokenizer(folder)
        if path is None:
            raise UserError(
                f"{folder}: no tokenizer.json, tokenizer.model, tekken.json or qwen.tiktoken "
                "there; name the tokenizer by --tokenizer_file"
            )
        if not path.is_file():
            raise UserError(f"--tokenizer_file {path}: no such file")
        return cls(path, folder, use_chat_template, family, special_tokens, chat_date)

    # --- ids ------------------------------------------------------------------------------------

    def prompt_ids(self, text: Question) -> list[int]:
        """What the model reads before it answers `text`, or the last message of a conversation.

        With a chat template BOS is there if the template writes it.
        """
        if not isinstance(text, str):
            return self.conversation_ids(text)
        text = self._spelling(text)
        if self.chat:
            return self._embedded(self._encode(self.chat.prompt(text)), text)
        ids = self._embedded(self._encode(text), text)
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        if not ids:
            raise UserError(
                f"{self.path}: has no BOS, and a prompt is empty; "
                "leave out the rows with an empty text"
            )
        return ids

    def conversation_ids(self, messages: list[Message]) -> list[int]:
        """What the model reads before it answers the last of the messages, by its template.

        Raises UserError without a chat template.
        """
        conversation = messages if isinstance(messages, Messages) else Messages(messages)
        text = self._chat_for_conversations.prompt(self._all_spelled(conversation))
        return self._embedded(self._encode(text), str(messages[-1].get("content")))

    def whole_conversation(self, conversation: Conversation) -> tuple[list[int], list[list[Span]]]:
        """The ids of a whole conversation, and which of them each trained turn of it is.

        The ids are those of the template's text, as transformers has them; a turn is [start, stop)
        of ids, or several such: every token that has a character of it. Where the template ends the
        last turn with no token, EOS does. Raises UserError without a chat template, or where a turn
        cannot be found.
        """
        chat = self._chat_for_conversations
        spelled = replace(conversation, messages=self._all_spelled(conversation.messages))
        text, turns = chat.bounded(
            lambda: assistant_spans(chat, spelled, self._any_added, self._ending)
        )
        encoding = self._encoded(self._marked if _MARK in text else self._rust, text)
        ids, offsets = self._embedded(encoding.ids, text), encoding.offsets
        if turns and turns[-1][-1][1] > len(text):
            ids, offsets = [*ids, self.eos_id], [*offsets, (len(text), len(text) + 1)]
        return ids, [[tokens_of(offsets, span) for span in turn] for turn in turns]

    @property
    def _chat_for_conversations(self) -> Chat:
        if self.chat is None:
            raise UserError(
                f"{self.path}: conversations are written by a chat template: give "
                "--use_chat_template"
            )
        return self.chat

    def _all_spelled(self, value: Any) -> Any:
        """Every text within, as `_spelling` has it."""
        if isinstance(value, Messages):
            messages, tools = ([*map(self._all_spelled, x)] for x in (value, value.tools or []))
            return Messages(messages, tools or None)
        if isinstance(value, str):
            return self._spelling(value)
        if isinstance(value, dict):
            return {key: self._all_spelled(item) for key, item in value.items()}
        return [self._all_spelled(item) for item in value] if isinstance(value, list) else value

    def response_ids(self, text: str, sampled: bool = False, ended: bool = True) -> list[int]:
        """`text` as the model would answer it, up to and with `eos_id`.

        Goes after `prompt_ids` of any text. sampled: whether a model wrote it, see `Chat.response`;
        ended: False for one that was cut: its end, and what the template writes there, are missing.
        """
        text = self._spelling(text)
        if self.chat:
            written = self.chat.response(text, sampled or not ended, is_cut=not ended)
            written += self._ending if ended else ""
            written = written.rstrip() if ended and self._end_takes_space else written
            ids = self._encode_after(written, self._last_of_prompt)
        else:
            ids = self._encode(text)
        return [*self._embedded(ids, text), *([self.eos_id] if ended else [])]

    def text_ids(self, texts: list[str], goes_on: list[bool]) -> list[list[int]]:
        """The ids of plain texts, without what begins or ends one; by all cores at once.

        goes_on: which go on where the text before was cut, at a place that `may_cut` allows.
        """
        spelled = [self._spelling(text) for text in texts]
        by_runtime: dict[tuple[bool, bool], list[int]] = {}
        for i, text in enumerate(spelled):
            by_runtime.setdefault((_MARK in text, goes_on[i]), []).append(i)
        ids: list[list[int]] = [[]] * len(texts)
        for (is_marked, is_rest), places in by_runtime.items():
            if is_rest and not self._rest_begins_as_text:
                rust = self._marked_going_on if is_marked else self._going_on
            else:
                rust = self._marked if is_marked else self._rust
            of_runtime = [spelled[i] for i in places]
            if self._may_lose:
                found = [self._read(rust, text) for text in of_runtime]
            else:  # without where each token lies, which nobody asks for
                batch = rust.encode_batch_fast(of_runtime, add_special_tokens=False)
                found = [encoding.ids for encoding in batch]
            for i, of_text in zip(places, found):
                ids[i] = self._embedded(of_text, spelled[i])
        return ids

    def may_cut(self, text: str, place: int) -> bool:
        """Whether the ids of text[:place] and of text[place:] are, one after the other, the text's.

        True is certain: no token of the vocabulary spans the two characters at the place, so that
        none is made across it, and the text around it is split and normalised alike with and
        without the cut, which rules look at a few characters to decide. Of no use beside special
        tokens.
        """
        left, right = text[max(0, place - _AROUND) : place], text[place : place + _AROUND]
        if not left or not right or self._any_control.search(left + right):
            return False
        if not self._spanned.isdisjoint(self._spelled_pairs(left[-1], right[0])):
            return False
        whole, *halves = self.text_ids([left + right, left, right], [True] * 3)
        return whole == halves[0] + halves[1]

    @cached_property
    def _rest_begins_as_text(self) -> bool:
        """Whether what goes on after a cut is read as a text of its own is.

        Where spaces at a text's start are taken off, the one that is put there makes up for them.
        """
        first, rest, whole = (
            rust.encode(text, add_special_tokens=False).ids
            for rust, text in ((self._rust, "a"), (self._going_on, " b"), (self._rust, "a b"))
        )
        return first + rest != whole

    @cached_property
    def _spanned(self) -> set[str]:
        """Any two characters that lie side by side in a token, as files write tokens."""
        return {token[i : i + 2] for token in self._ids for i in range(len(token) - 1)}

    def _spelled_pairs(self, left: str, right: str) -> set[str]:
        """Two characters of a text as a token may have them side by side."""
        if "ByteLevel" in repr(self._rust.decoder):
            spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            left, right = (spelling.pre_tokenize_str(text)[0][0] for text in (left, right))
            return {left[-1] + right[0]}
        return {left + right, (left + right).replace(" ", "▁")}

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, without special tokens and ids of the model's padded vocabulary."""
        plain = [i for i in ids if i not in self._texts and i < self.vocab_size]
        text = self._rust.decode(plain, skip_special_tokens=True)
        if "\ufffd" not in text or "<0x0A>" not in self._ids:
            return text
        # Of bytes in a row the runtime gives up all where one is wrong: here each that is none.
        tokens: list[str] = []
        for is_byte, group in groupby(map(self.text_of, plain), _is_byte):
            run = list(group)
            if is_byte:
                bytes_ = bytes(int(token[3:5], 16) for token in run)
                run = list(bytes_.decode("utf-8", "a_mark_each"))
            tokens += run
        return self._rust.decoder.decode(tokens)

    def spelled(self, ids: list[int]) -> str:
        """Text of the ids with special tokens written out, for people to read."""
        parts: list[str] = []
        plain: list[int] = []
        for i in [*ids, None]:
            if i is not None and i not in self._texts:
                plain.append(i)
                continue
            parts += [self.decode(plain)] if plain else []
            parts += [self._texts[i]] if i is not None else []
            plain = []
        return "".join(parts)

    def _spelling(self, text: str) -> str:
        """The text, where special tokens that it spells out are counted, or marked as text."""
        # Of a mark that it holds itself, one within is taken out again.
        text = text.replace(_MARK, _MARK[0] + _MARK + _MARK[1])
        if not any(name in text for name in self._first_characters):
            return text
        found = self._any_control.findall(text)
        self.spelled_out.update(found)
        if not (found and self.as_text):
            return text
        return self._any_control.sub(lambda token: token[0][0] + _MARK + token[0][1:], text)

    @cached_property
    def _any_control(self) -> re.Pattern:
        return _any_of(self.control)

    @cached_property
    def _any_added(self) -> re.Pattern:
        """Any token that may end a turn."""
        return _any_of({t.content for t in self._rust.get_added_tokens_decoder().values()})

    @cached_property
    def _first_characters(self) -> set[str]:
        return {text[0] for text in self.control}

    def _encode(self, text: str) -> list[int]:
        return self._read(self._marked if _MARK in text else self._rust, text)

    def _encode_after(self, text: str, last: int) -> list[int]:
        """The ids of a text that goes on after the id `last`."""
        # In some tokenizers the ids after a special token depend on its being there.
        if last in self._texts:
            return self._encode(self._texts[last] + text)[1:]
        return self._read(self._marked_going_on if _MARK in text else self._going_on, text)

    def _read(self, rust: RustTokenizer, text: str) -> list[int]:
        """The ids of a text by one of the runtimes."""
        return self._encoded(rust, text).ids

    def _encoded(self, rust: RustTokenizer, text: str) -> Encoding:
        encoding = rust.encode(text, add_special_tokens=False)
        if self._may_lose and self._lost(encoding, text):
            # what the file itself composes is not lost
            composed = unicodedata.normalize("NFKC", text)
            lost = self._lost(rust.encode(composed, add_special_tokens=False), composed)
            if lost:
                self.lossy.add(lost)
        return encoding

    def _lost(self, encoding: Encoding, text: str) -> str:
        """The characters of a text, a word at most, that no token holds; "" where there are none.

        Of those that show: neither space nor marks of order or direction.
        """
        read = bytearray(len(text))
        for i, (start, end) in zip(encoding.ids, encoding.offsets):
            token = self._rust.id_to_token(i)
            # a space that is put before a text lies, by the library, on its first character
            if token != "▁" and (i != self._unknown_id or text[start:end] == token):
                read[start:end] = b"1" * (end - start)
        shows = (
            c if not is_read and c not in _MARK + "▁" and unicodedata.category(c) != "Cf" else " "
            for c, is_read in zip(text, read)
        )
        return next(iter("".join(shows).split()), "")

    @cached_property
    def _may_lose(self) -> bool:
        """Whether there may be characters that no token holds: there are none for bytes."""
        return "ByteLevel" not in repr(self._rust.decoder) and "<0x0A>" not in self._ids

    @cached_property
    def _unknown_id(self) -> int | None:
        """What stands for characters without a token."""
        of_model = getattr(self._rust.model, "unk_token", None)
        return self._ids.get(of_model or self.config.tokens.get("unk_token") or "<unk>")

    @cached_property
    def _going_on(self) -> RustTokenizer:
        """The same without the space that some put before a text: for text that goes on."""
        return _without_prefix(self._rust)

    @cached_property
    def _marked(self) -> RustTokenizer:
        """The same that takes marks out of a text after it has looked for special tokens."""
        return _unmarking(self._rust)

    @cached_property
    def _marked_going_on(self) -> RustTokenizer:
        return _unmarking(self._going_on)

    # --- what others ask of it ------------------------------------------------------------------

    def fit(self, vocab_size: int) -> None:
        """Make sure that the model has an embedding for what can be encoded.

        vocab_size: the model's. Tokens that were added past its end, such as a pad token that no
        text holds, are refused where a text holds one. Raises UserError when others lie there.
        """
        if self.vocab_size <= vocab_size:
            return
        added = self._rust.get_added_tokens_decoder()
        past = {text: i for text, i in self._ids.items() if i >= vocab_size}
        needed = {self.bos_id, self.eos_id}
        if self.chat:
            needed |= {i for text, i in past.items() if text in self.chat.sample}
        for text, i in past.items():
            if i not in added:
                raise UserError(
                    f"{self.path}: has {self.vocab_size} entries, the model {vocab_size}: "
                    "not this model's tokenizer"
                )
            if i in needed:
                raise UserError(
                    f"{self.path}: {text!r} has id {i}, and the model's {vocab_size} embeddings "
                    "lack it: enlarge the model, or take the tokenizer that it was trained with"
                )
        self._limit = vocab_size
        self.stop_ids = {i for i in self.stop_ids if i < vocab_size}

    def _embedded(self, ids: list[int], text: str) -> list[int]:
        if self._limit is not None and max(ids, default=0) >= self._limit:
            token = self._rust.id_to_token(max(ids))
            raise UserError(
                f"{text.replace(_MARK, '')[:80]!r}: holds {token!r}, which {self.path} has as id "
                f"{max(ids)} and the model, with {self._limit} embeddings, lacks; take it out of "
                "the text"
            )
        return ids

    def without_text(self, vocab_size: int) -> list[tuple[int, int]]:
        """The ranges [start, stop) of a model's ids that this tokenizer has no token for."""
        known = sorted(i for i in {*self._ids.values(), *self.stop_ids} if i < vocab_size)
        ends = zip([-1, *known], [*known, vocab_size])
        return [(last + 1, i) for last, i in ends if i > last + 1]

    @property
    def facts(self) -> dict[str, tuple[int, str]]:
        """What there was to be known of the texts so far: how many, and the first such."""
        counted = {"lossy": self.lossy, **(self.chat.counted if self.chat else {})}
        facts = {name: (of.count, of.first) for name, of in counted.items() if of.count}
        return facts | {f"token {text}": (n, "") for text, n in self.spelled_out.items()}

    def add_facts(self, facts: dict[str, tuple[int, str]]) -> None:
        """Count what another process found."""
        counted = {"lossy": self.lossy, **(self.chat.counted if self.chat else {})}
        for name, (count, first) in facts.items():
            if name.startswith("token "):
                self.spelled_out[name.removeprefix("token ")] += count
            elif name in counted:
                counted[name].count += count
                counted[name].first = counted[name].first or first

    def forget_facts(self) -> None:
        """Count anew."""
        self.spelled_out.clear()
        for of in (self.lossy, *(self.chat.counted.values() if self.chat else ())):
            of.count, of.first = 0, ""

    def notes(self) -> list[str]:
        """What a user should know of how texts are read: of the files, and of texts so far."""
        lines = []
        if self._unused_template:
            lines.append(
                f"{self.path.parent}: has a chat template, which is not used: an instruct model "
                "answers little without it; --use_chat_template writes prompts by it"
            )
        lines += [] if self.chat else self._notes_of_bos()
        if self.spelled_out:
            shown = ", ".join(f"{text} ({n})" for text, n in self.spelled_out.most_common(5))
            reading = (
                "they are read as text"
                if self.as_text
                else "they act as control tokens; --special_tokens text reads them as text"
            )
            lines.append(f"texts spell out special tokens: {shown}; {reading}")
        if self.lossy.count:
            unknown = self._unknown_id
            fate = "left out" if unknown is None else f"read as {self.text_of(unknown)}"
            lines.append(
                f"{self.lossy.count} texts hold characters that {self.path} has no token for, such "
                f"as {self.lossy.first[:40]!r}: they are {fate}"
            )
        if self.chat and not self._has_end and self._after_end.strip():
            lines.append(
                f"{self.chat.name}: writes {self._after_end!r} after an answer, and {self.path} "
                f"has no token for it: answers end with {self._texts[self.eos_id]} in its place; "
                "add the template's tokens to the tokenizer, or take its own template"
            )
        if self.chat and self._has_end and self._after_end and self._is_foreign_verifier:
            lines.append(
                f"{self.chat.name}: writes {self._after_end!r} after {self._texts[self.eos_id]}, "
                "which is left off: an answer is scored at that token; transformers scores a whole "
                "conversation at its last, as this classifier may have been trained"
            )
        lines += self.chat.notes() if self.chat else []
        return lines

    def _notes_of_bos(self) -> list[str]:
        """Where files disagree on BOS, or none says whether texts begin with the one they name."""
        config, of_file = self.config, self._bos_of_file
        said, named = config.raw.get("add_bos_token"), config.tokens.get("bos_token")
        is_heeded = config.heeds_add_bos(self.kind)
        if self.kind == "json" and said is not None and said != (of_file is not None):
            counts = (
                "the former counts, as in transformers 4 (5 goes by the latter)"
                if is_heeded
                else f"the latter counts, as in transformers for {config.raw['tokenizer_class']}"
            )
            return [
                f"{config.path}: says add_bos_token {str(said).lower()}, and {self.path.name} "
                f"puts {of_file or 'nothing'} before a text: {counts}"
            ]
        if self.bos_id is None and said is None and named and named != self._texts[self.eos_id]:
            puts, theirs = (
                '"add_bos_token": true in tokenizer_config.json',
                " 5 (4 puts it there for Llama's classes)",
            )
            if not is_heeded:
                puts, theirs = f"a post-processor in {self.path.name}", ""
            return [
                f"{self.path}: names {named} as BOS, and no file says that texts begin with it: "
                f"they do not, as in transformers{theirs}; {puts} lets them"
            ]
        return []

    @cached_property
    def identity(self) -> str:
        """A digest of all that decides ids: equal where two tokenizers read every text alike."""
        whole = json.loads(self._rust.to_str())
        parts = {k: v for k, v in whole.items() if k not in ("post_processor", "decoder")}
        vocabulary = parts["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigrams' scores, whose last digit a file may lose
            parts["model"]["vocab"] = [(token, f"{score:.9g}") for token, score in vocabulary]
        chat = self.chat.source if self.chat else None
        text = json.dumps([parts, self.bos_id, chat], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def reading(self) -> str:
        """A text of all that decides ids, also of texts that spell out special tokens."""
        told = sorted(self.chat.told.items()) if self.chat else None
        others = self.eos_id, self.as_text, self._limit, self._made_of[-1], told
        return f"{self.identity} {json.dumps(others)}"

    @cached_property
    def vocabulary(self) -> str:
        """A digest of which id stands for which text: equal where ids mean the same."""
        tokens = self._rust.get_vocab(with_added_tokens=True)
        text = json.dumps(sorted(tokens.items()))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def to_json(self, pad: str | None = None) -> str:
        """`tokenizer.json`, which reads every text as this tokenizer does.

        pad: a token that is added if it is not there.
        """
        rust = RustTokenizer.from_str(self._rust.to_str())
        put_before(rust, None if self.bos_id is None else self._texts[self.bos_id])
        if pad is not None:
            rust.add_special_tokens([pad])
        return rust.to_str(pretty=False)

    @property
    def puts_space_before(self) -> bool | None:
        """What the file's splitting into words says of a space before a text, if it does."""
        return getattr(self._rust.pre_tokenizer, "add_prefix_space", None)

    def is_of(self, path: Path) -> bool:
        """Whether a file is SentencePiece's, with the pieces that this tokenizer has."""
        try:
            pieces = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError):
            return False
        return all(
            self._ids.get(pieces.id_to_piece(i)) == i
            for i in range(len(pieces))
            if not pieces.is_unused(i)
        )

    def id_of(self, token: str) -> int | None:
        """The id of a token as it is written in the files; None where there is none."""
        return self._ids.get(token)

    def text_of(self, token_id: int) -> str:
        """A token as it is written in the files."""
        text = self._rust.id_to_token(token_id)
        assert text is not None, f"{token_id} is no id of {self.path}"
        return text


def _made_again(kind: type[Tokenizer], made_of: tuple, limit: int | None) -> Tokenizer:
    tokenizer = kind(*made_of)
    if limit is not None:
        tokenizer.fit(limit)
    return tokenizer


def _any_of(control: Iterable[str]) -> re.Pattern:
    """A pattern of any of the texts, the longest first; of nothing when there are none."""
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")


def _without_prefix(rust: RustTokenizer) -> RustTokenizer:
    whole = json.loads(rust.to_str())
    parts = {key: _unprefixed(whole[key]) for key in ("normalizer", "pre_tokenizer")}
    if parts == {key: whole[key] for key in parts}:
        return rust
    return RustTokenizer.from_str(json.dumps(whole | parts))


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


def _unmarking(rust: RustTokenizer) -> RustTokenizer:
    whole = json.loads(rust.to_str())
    # Looked for in the text as it stands, marks and all.
    whole["added_tokens"] = [
        token | ({"normalized": False} if token["special"] else {})
        for token in whole["added_tokens"]
    ]
    marked = RustTokenizer.from_str(json.dumps(whole))
    unmark = normalizers.Replace(_MARK, "")
    before = marked.normalizer
    marked.normalizer = unmark if before is None else normalizers.Sequence([unmark, before])
    return marked
