"""tiktoken's files as a byte-level BPE of the same ids.

Two kinds: base64 bytes and their rank, line by line (Qwen v1, Llama 3), and Mistral's tekken.json.
"""

import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from src.errors import UserError


@dataclass(frozen=True)
class Scheme:
    """What a file of ranks leaves unsaid.

    That is how text is split before merging, and the special tokens that follow the ranks.
    """

    name: str
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


QWEN = Scheme(
    name="Qwen's",
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
LLAMA_3 = Scheme(
    name="Llama 3's",
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
# By the number of ranks: a file does not name its vocabulary.
SCHEMES = {151_643: QWEN, 128_000: LLAMA_3}

# Of Mistral's files that list no special tokens (those before version 7).
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
)


def from_ranks(path: Path) -> tuple[RustTokenizer, str | None, str]:
    """`qwen.tiktoken`, or Llama 3's `tokenizer.model`; and the texts of BOS and EOS.

    Raises UserError for another vocabulary: its special tokens and its splitting are not known.
    """
    ranks = _read_ranks(path)
    scheme = SCHEMES.get(len(ranks))
    if scheme is None:
        known = ", ".join(f"{count:,} ({scheme.name})" for count, scheme in SCHEMES.items())
        raise UserError(
            f"{path}: has {len(ranks):,} ranks; known are {known}. Another vocabulary's special "
            "tokens and rule of splitting are not in such a file: give its tokenizer.json"
        )
    rust = byte_level(_bpe(ranks), scheme.pattern)
    if scheme.nfc:
        rust.normalizer = normalizers.NFC()
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
        put_before(rust, scheme.bos)
    return rust, scheme.bos, scheme.eos


def from_tekken(path: Path, raw: dict[str, Any]) -> tuple[RustTokenizer, str, str]:
    """Mistral's `tekken.json`, read as `raw`; and the texts of BOS and EOS.

    The special tokens have the first ids, the ranks follow them.
    """
    try:
        config = raw["config"]
        count = config["default_num_special_tokens"]
        entries = sorted(raw["vocab"], key=lambda entry: entry["rank"])
        entries = entries[: config["default_vocab_size"] - count]
        decode = binascii.a2b_base64
        ranks = {decode(entry["token_bytes"]): entry["rank"] for entry in entries}
        listed = raw.get("special_tokens")
        special = (
            dict(enumerate(_TEKKEN_SPECIAL))
            if listed is None
            else {token["rank"]: token["token_str"] for token in listed}
        )
        pattern = config["pattern"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: is no whole tekken.json ({type(error).__name__}: {error})"
        ) from None
    _check_ranks(path, ranks)
    names = [special.get(i, f"<SPECIAL_{i}>") for i in range(count)]
    rust = byte_level(_bpe(ranks, names), pattern)
    rust.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    put_before(rust, "<s>")
    return rust, "<s>", "</s>"


def put_before(rust: RustTokenizer, bos: str | None) -> None:
    """Let the runtime's own encoding put BOS before every text, or (None) nothing."""
    first, second = (f"{bos} $A", f"{bos} $A {bos} $B") if bos else ("$A", "$A $B")
    special = [(bos, rust.token_to_id(bos))] if bos else []
    rust.post_processor = processors.TemplateProcessing(
        single=first, pair=second, special_tokens=special
    )


def byte_level(model: models.BPE, pattern: str) -> RustTokenizer:
    """A vocabulary of bytes; text is split by the pattern before merging."""
    rust = RustTokenizer(model)
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.ByteLevel()
    return rust


def _bpe(ranks: dict[bytes, int], special: Sequence[str] = ()) -> models.BPE:
    """The ranks as ids, after those of `special`."""
    apart = "\uffff"  # no byte's spelling
    text = apart.join(token.decode("latin-1") for token in ranks)
    spelled = text.translate(_SPELLING).split(apart)
    vocabulary = {text: i for i, text in enumerate([*special, *spelled])}
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    # a piece that is a token as a whole is that token
    return models.BPE(vocabulary, merges, ignore_merges=True)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes → rank, in order of rank: 0, 1, 2, ..., with each single byte among them."""
    ranks: dict[bytes, int] = {}
    decode = binascii.a2b_base64
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            text, rank = line.split()
            ranks[decode(text, strict_mode=True)] = int(rank)
        except ValueError:
            raise UserError(
                f"{path}: line {number} is {line[:60]!r}, not bytes in base64 and their rank"
            ) from None
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    _check_ranks(path, ranks)
    return ranks


def _check_ranks(path: Path, ranks: dict[bytes, int]) -> None:
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


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[int, int]]:
    """The two ranks that each token is merged from, in order of rank.

    tiktoken joins the two neighbours whose union has the lowest rank, the leftmost first, until
    none has one. The merges inside a stretch that ends as one token do not depend on what surrounds
    it, so wherever a token arises, it arises from the same two parts: those that its own bytes come
    to. One merge per token is therefore exact, whatever the ranks. A token that its bytes do not
    come to is only ever a whole piece.
    """
    tokens, rank_of = list(ranks), ranks.get
    # What a token's two parts are: −1 for a byte, which has none, and where none are known.
    lefts = [-1] * len(tokens)
    rights = list(lefts)
    # Whether these are known, and no part of it, however small, ranks after the whole.
    is_plain = [len(token) == 1 for token in tokens]

    def come_to(left: int, right: int, token: int) -> bool:
        """Whether bytes that are to be `left` and `right` become these before they are joined.

        Their merges are undone, the latest first. Where a part on the left and one on the right
        were neighbours, their union must not have been joined before one of them had grown.
        """
        until_left = until_right = token  # when the part on each side grew
        while True:
            if rights[left] >= 0 and (left > right or lefts[right] < 0):
                until_left, left = left, rights[left]
            elif lefts[right] >= 0:
                until_right, right = right, lefts[right]
            else:
                return True
            union = rank_of(tokens[left] + tokens[right])
            # the leftmost of equals goes first
            if union is not None and union < until_left and union <= until_right:
                return False

    for rank, token in enumerate(tokens):
        if is_plain[rank]:
            continue
        is_late = False
        for cut in range(len(token) - 1, 0, -1):
            left = rank_of(token[:cut])
            if left is None:
                continue
            right = rank_of(token[cut:])
            if right is None:
                continue
            if not (is_plain[left] and is_plain[right]):
                is_late = True
            elif come_to(left, right, rank):
                is_plain[rank] = True
                break
        else:
            # Some vocabularies were put together from several: what ranks later comes first there.
            parts = _last_two(token, ranks) if is_late else None
            if parts is None:
                continue
            left, right = parts
        lefts[rank], rights[rank] = left, right
        yield left, right


def _last_two(token: bytes, ranks: dict[bytes, int]) -> tuple[int, int] | None:
    """The two ranks that a token's bytes come to, merged one by one; None if they do not."""
    unranked = len(ranks)  # above every rank
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        unions = [ranks.get(left + right, unranked) for left, right in zip(parts, parts[1:])]
        lowest = min(unions)
        if lowest == unranked:
            return None
        index = unions.index(lowest)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return ranks[parts[0]], ranks[parts[1]]


# Byte-level BPE spells bytes as characters: those that are printable in Latin-1 as themselves, the
# others from 256 on.
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_SPELLING = {byte: 256 + i for i, byte in enumerate(sorted(set(range(256)) - _PRINTABLE))}
