"""SentencePiece's files as a runtime of `tokenizers` with the same ids."""

import re
from collections.abc import Iterable
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from src.errors import UserError

_SPACE = "▁"
# sentencepiece_model.proto: kinds of pieces, and of models
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_UNIGRAM, _BPE = 1, 2


def from_pieces(
    data: bytes, where: str, more: Iterable[tuple[int, AddedToken]] = (), has_prefix: bool = True
) -> tuple[RustTokenizer, str | None, str | None]:
    """The runtime, and the texts of BOS and EOS, where the file has them.

    data: the file's content; where: its name, for messages; more: (id, token) of those that were
    added to the vocabulary later; has_prefix: False leaves out the space that SentencePiece puts
    before every text. Raises UserError for what is not SentencePiece's or is not supported.
    """
    # protobuf makes its classes at run time
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    try:
        proto = ModelProto.FromString(data)
        SentencePieceProcessor(model_proto=data)  # which refuses more of what is damaged
    except (DecodeError, RuntimeError):
        raise UserError(
            f"{where}: is no tokenizer that is known: neither tokenizer.json, tekken.json, "
            "tiktoken's ranks nor SentencePiece's"
        ) from None
    trainer, form = proto.trainer_spec, proto.normalizer_spec
    # A token that was added later may have a piece's id: it takes its place.
    added = sorted(more, key=lambda item: item[0])
    names = [piece.piece for piece in proto.pieces]
    for i, token in added:
        if i < len(names):
            names[i] = token.content
    types = [piece.type for piece in proto.pieces]
    kinds = {kind: [n for n, of in zip(names, types) if of == kind] for kind in range(1, 7)}
    if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix:
        raise UserError(f"{where}: is neither BPE nor unigram with spaces before words")
    reached = _reached(names, kinds[_UNUSED])
    if trainer.model_type == _UNIGRAM:
        reached = kinds[_UNUSED]  # places there are ids: none can be left out
    if reached:
        raise UserError(f"{where}: has unused pieces such as {reached[0]!r}: not supported")

    # The model.
    unknown, user_defined = kinds[_UNKNOWN][0], kinds[_USER_DEFINED]
    if trainer.model_type == _BPE:
        vocabulary = {name: i for i, name in enumerate(names) if types[i] != _UNUSED}
        vocabulary |= {t.content: i for i, t in added}
        normal = {
            names[i]: (-piece.score, i)
            for i, piece in enumerate(proto.pieces)
            if piece.type == _NORMAL
        }
        model: models.Model = models.BPE(
            vocabulary,
            _merges(normal),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            ignore_merges=bool(user_defined),  # these stay whole, see below
        )
    else:
        scores = [(name, piece.score) for name, piece in zip(names, proto.pieces)]
        model = models.Unigram(scores, names.index(unknown), trainer.byte_fallback)
    rust = RustTokenizer(model)

    # What is done to a text before, in SentencePiece's order.
    steps: list[normalizers.Normalizer] = []
    if form.precompiled_charsmap:
        steps.append(normalizers.Precompiled(form.precompiled_charsmap))
    if form.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" +"), " ")]
    if form.add_dummy_prefix and has_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if form.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    rust.normalizer = normalizers.Sequence(steps)
    if user_defined:
        longest_first = sorted(user_defined, key=len, reverse=True)
        pattern = Regex("|".join(map(re.escape, longest_first)))
        words: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(pattern, "isolated")]
        if isinstance(model, models.BPE):
            words += _not_whole(model, vocabulary.keys() - set(user_defined))
        rust.pre_tokenizer = pre_tokenizers.Sequence(words) if len(words) > 1 else words[0]

    # And to its pieces afterwards.
    last = [decoders.Strip(" ", 1, 0)] if form.add_dummy_prefix and has_prefix else []
    to_text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    rust.decoder = decoders.Sequence([*to_text, *last])
    special = [AddedToken(n, normalized=False) for n in (unknown, *kinds[_CONTROL])]
    rust.add_special_tokens(special)
    for _, token in added:
        spelled = AddedToken(**{**token.__getstate__(), "normalized": False})
        rust.add_special_tokens([spelled]) if token.special else rust.add_tokens([spelled])

    # Its own names of BOS and EOS; −1 for none.
    bos, eos = (i if 0 <= i < len(names) else None for i in (trainer.bos_id, trainer.eos_id))
    return rust, None if bos is None else names[bos], None if eos is None else names[eos]


def begin_text_once(rust: RustTokenizer, doubles: bool = False) -> None:
    """From now on no space is put before a text that follows a control token.

    Only where everything begins. doubles: there it is put before a space, too, as SentencePiece
    puts it; transformers does not where `legacy` is false.
    """
    if _SPACE not in repr(rust.normalizer):
        return
    steps = list(rust.normalizer)
    is_put = any(isinstance(step, normalizers.Prepend) for step in steps)
    others = [step for step in steps if not isinstance(step, normalizers.Prepend)]
    rust.normalizer = normalizers.Sequence(others)
    scheme = "first" if is_put else "never"
    words = [rust.pre_tokenizer] if rust.pre_tokenizer else []
    parts: list[Any] = [
        pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False),
        *words,
    ]
    if doubles:
        # It puts none before its own kind, and of plain spaces the normalizer has left none. The
        # next step makes of the plain one what the pieces have.
        parts[0].prepend_scheme = "never"
        parts.insert(0, pre_tokenizers.Metaspace(" ", prepend_scheme=scheme, split=False))
    rust.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]


def _reached(names: list[str], unused: list[str]) -> list[str]:
    """Those of the unused pieces that a text may come to while its pieces are joined.

    From two pieces or characters. The others, such as the fillers of a vocabulary, are as if they
    were not there.
    """
    known = set(names)

    def is_part(text: str) -> bool:
        return len(text) == 1 or text in known

    return [
        name
        for name in unused
        if len(name) == 1
        or any(is_part(name[:cut]) and is_part(name[cut:]) for cut in range(1, len(name)))
    ]


def _not_whole(model: models.BPE, names: Iterable[str]) -> list[pre_tokenizers.PreTokenizer]:
    """Splits words that `ignore_merges` would find whole in the vocabulary, and joining would not.

    Those are the texts of control tokens and of bytes. They are cut where joining leaves a gap, so
    that each part is joined as in the whole.
    """
    model.ignore_merges = False
    joining = RustTokenizer(model)
    gaps = {}
    for name in sorted(names):
        found = joining.encode(name, add_special_tokens=False)
        if found.tokens != [name]:
            gaps[name] = sorted({stop for _, stop in found.offsets} - {len(name)}) or [1]
    model.ignore_merges = True
    parts = []
    for name, stops in gaps.items():
        # neither part may itself be such a word
        stop = next((i for i in stops if not {name[:i], name[i:]} & gaps.keys()), stops[0])
        parts.append(f"{re.escape(name[:stop])}(?={re.escape(name[stop:])}\\z)")
    pattern = Regex(rf"\A(?:{'|'.join(parts)})")
    return [pre_tokenizers.Split(pattern, "isolated")] if parts else []


def _merges(normal: dict[str, tuple[float, int]]) -> list[tuple[str, str]]:
    """All ways to join two pieces to one, the best piece first.

    normal: piece → (minus its score, its id), which SentencePiece joins in this order.
    """
    ways = []
    for piece, order in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                ways.append((*order, left, right))
    return [(left, right) for *_, left, right in sorted(ways)]
