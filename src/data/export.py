"""What a checkpoint's folder says of its tokenizer: files, special ids, chat template.

Decisions are written, not files copied: whoever opens the folder, here or in transformers, reads
the same ids as the run that wrote it, and stops where it stopped.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from src.checkpoint.folder import MORE_TEMPLATES, SCORES_FILE, copy_more_templates
from src.checkpoint.json_file import read_json
from src.data.tokenizer import Tokenizer
from src.data.tokenizer_files import TEXTS_ALONE

SpecialIds = dict[str, int | list[int] | None]

# Keys of tokenizer_config.json that stay as they are. What decides ids or ends is written anew.
_KEPT = ("model_max_length", "truncation_side")
# Classes in transformers that fill up batches on the right; the others of ours on the left.
_PAD_RIGHT = (
    *("PreTrainedTokenizer", "TokenizersBackend", "Qwen2Tokenizer"),
    *("GPT2Tokenizer", "GPTNeoXTokenizer", "RobertaTokenizer"),
)
# Keys of generation_config.json that end texts elsewhere than where a trained model ends them.
_FORCED = (
    *("forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"),
    *("exponential_decay_length_penalty", "stop_strings", "decoder_start_token_id"),
)
_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def special_ids_of(
    tokenizer: Tokenizer | None, source: Path, vocab_size: int, scores: bool
) -> SpecialIds:
    """`bos_token_id`, `eos_token_id` (a list where several end a text) and `pad_token_id`.

    For config.json and generation_config.json. Without a tokenizer, what the source's say;
    vocab_size: the model's; scores: whether it is a verifier.
    """
    if tokenizer is None:
        config = source / "config.json"
        raw = read_json(config) if config.is_file() else {}
        return {key: raw.get(key) for key in _KEYS}
    stops = [tokenizer.eos_id, *sorted(tokenizer.stop_ids - {tokenizer.eos_id})]
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": pad_of(tokenizer, vocab_size, scores)[1],
    }


def pad_of(tokenizer: Tokenizer, vocab_size: int, scores: bool) -> tuple[str | None, int | None]:
    """The token that fills up batches, and its id.

    transformers scores the last token that is not padding, so that a verifier's must not end texts.
    It is the tokenizer's own, else a special one that no text holds, else a new one where the model
    has a row to spare, else BOS. A verifier whose tokenizer has none of these gets an id alone.
    """
    known = {text: i for text, i in tokenizer.control.items() if i < vocab_size}
    own = tokenizer.config.tokens.get("pad_token")
    ends = tokenizer.stop_ids
    if own in known and not (scores and known[own] in ends):
        return own, known[own]
    unknown = tokenizer.config.tokens.get("unk_token", "<unk>")
    sample = tokenizer.chat.sample if tokenizer.chat else ""
    free = [
        ("pad" not in text.lower(), text != unknown, i, text)
        for text, i in known.items()
        if i not in ends and i != tokenizer.bos_id and text not in sample
    ]
    if free:
        *_, i, text = min(free)
        return text, i
    if tokenizer.vocab_size < vocab_size and tokenizer.id_of("[PAD]") is None:
        return "[PAD]", tokenizer.vocab_size
    if tokenizer.bos_id is not None and tokenizer.bos_id not in ends:
        return tokenizer.text_of(tokenizer.bos_id), tokenizer.bos_id
    return None, next(i for i in range(vocab_size) if i not in ends) if scores else None


def write_tokenizer(
    tokenizer: Tokenizer | None, folder: Path, source: Path, vocab_size: int, scores: bool
) -> None:
    """Write the tokenizer's files into `folder`, in a form that transformers 4 and 5 read alike.

    source: the checkpoint's folder; vocab_size, scores: see `special_ids_of`.
    """
    generation = source / "generation_config.json"
    if not scores:
        ids = special_ids_of(tokenizer, source, vocab_size, scores)
        said = read_json(generation) if generation.is_file() else {}
        kept = {k: v for k, v in said.items() if tokenizer is None or k not in (*_FORCED, *_KEYS)}
        known = {k: v for k, v in ids.items() if v is not None}
        _write_json(folder / generation.name, kept | known)
    if (source / SCORES_FILE).is_file():
        shutil.copyfile(source / SCORES_FILE, folder / SCORES_FILE)
    if tokenizer is None:
        return
    raw, control = tokenizer.config.raw, tokenizer.control
    tokens = {key: t for key, t in tokenizer.config.tokens.items() if t in control}
    listed = [t for t in tokenizer.config.listed if t in control]
    pad, _ = pad_of(tokenizer, vocab_size, scores)
    is_new = pad is not None and tokenizer.id_of(pad) is None
    config: dict[str, Any] = {key: raw[key] for key in _KEPT if key in raw} | tokens
    config |= {
        # reads tokenizer.json as it stands; others put their own rules in place of the file's
        "tokenizer_class": "PreTrainedTokenizerFast",
        # whose own defaults are others than those of the source's class
        "padding_side": raw.get("padding_side") or _padding_side(tokenizer, source),
        "model_input_names": raw.get("model_input_names") or ["input_ids", "attention_mask"],
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.text_of(tokenizer.eos_id),
    }
    if tokenizer.bos_id is not None:
        text = tokenizer.text_of(tokenizer.bos_id)
        config["bos_token"] = text if tokenizer.names_bos else None
    if "<unk>" in control:
        config.setdefault("unk_token", "<unk>")
    config.pop("pad_token", None)
    config |= {"pad_token": pad} if pad is not None else {}
    config |= {"additional_special_tokens": listed} if listed else {}
    if tokenizer.puts_space_before is not None:  # by this key transformers 4 changes the file's
        config["add_prefix_space"] = tokenizer.puts_space_before
    if tokenizer.as_text:
        # transformers would read the template's own control tokens as text, too
        config[TEXTS_ALONE if tokenizer.chat else "split_special_tokens"] = True
    config |= _write_template(tokenizer, folder, source)
    whole = tokenizer.to_json(pad if is_new else None)
    (folder / "tokenizer.json").write_text(whole, "utf-8")
    for pieces in (tokenizer.path, tokenizer.path.parent / "tokenizer.model"):
        if tokenizer.is_of(pieces):  # which other tools read, with what was added to it
            shutil.copyfile(pieces, folder / "tokenizer.model")
            added = {str(token.pop("id")): token for token in json.loads(whole)["added_tokens"]}
            config["added_tokens_decoder"] = added
            break
    _write_json(folder / "tokenizer_config.json", dict(sorted(config.items())))


def _padding_side(tokenizer: Tokenizer, source: Path) -> str:
    """The side on which transformers fills up the source's batches, where no file says it.

    Where its versions differ, and for files that it does not read, the left: so texts go on.
    """
    name = tokenizer.config.class_name
    if not name and (source / "config.json").is_file():
        # config.json names it, or the model's family has one
        model = read_json(source / "config.json")
        is_qwen = str(model.get("model_type")).startswith("qwen")
        of_family = "Qwen2Tokenizer" if is_qwen and tokenizer.kind == "json" else ""
        name = str(model.get("tokenizer_class") or of_family).removesuffix("Fast")
    return "right" if name in _PAD_RIGHT else "left"


def _write_template(tokenizer: Tokenizer, folder: Path, source: Path) -> dict[str, Any]:
    """The template in use, else the one that lies there: as a file, or what the config gets."""
    target, chat = folder / "chat_template.jinja", tokenizer.chat
    places = list(dict.fromkeys((tokenizer.path.parent, source)))
    more = next((place for place in places if (place / MORE_TEMPLATES).is_dir()), None)
    if more is not None:
        copy_more_templates(more, folder)
    if chat is not None and not chat.own:
        target.write_text(chat.source, "utf-8")
        return {}
    for place in places:
        if (place / target.name).is_file():
            shutil.copyfile(place / target.name, target)
            return {}
        config = place / "tokenizer_config.json"
        template = read_json(config).get("chat_template") if config.is_file() else None
        if isinstance(template, str):
            target.write_text(template, "utf-8")
            return {}
        if template is not None:  # several, by name
            return {"chat_template": template}
    return {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
