"""What a Hugging Face folder says of its tokenizer: its files, special ids and chat template."""

from pathlib import Path

from src.checkpoint.files import read_json
from src.checkpoint.folder import copy_side_files
from src.data.tokenizer import Tokenizer


def special_ids_of(tokenizer: Tokenizer | None) -> dict[str, int | list[int] | None]:
    """`bos_token_id` and `eos_token_id` for config.json and generation_config.json.

    The latter is a list where several end a text.
    """
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    stops = [tokenizer.eos_id, *sorted(tokenizer.stop_ids - {tokenizer.eos_id})]
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
    }


def pad_id_of(tokenizer: Tokenizer | None, vocab_size: int) -> int:
    """An id that ends no text, for a classifier that scores the last token that is not padding.

    It is one of the padded vocabulary, else SentencePiece's unknown (0), else BOS.
    """
    if tokenizer is None:
        return 0
    if tokenizer.vocab_size < vocab_size:
        return tokenizer.vocab_size
    is_sentencepiece = tokenizer.path.suffix == ".model" and not tokenizer.ranked
    return 0 if is_sentencepiece or tokenizer.bos_id is None else tokenizer.bos_id


def write_tokenizer(tokenizer: Tokenizer | None, source: Path, folder: Path) -> None:
    """Write the tokenizer's files into `folder`, in a form that transformers reads.

    source: the checkpoint's folder.
    """
    copy_side_files(source, folder, tokenizer.path if tokenizer else None)
    if tokenizer is None:
        return
    template = tokenizer.chat.source if tokenizer.chat and not tokenizer.chat.own else None
    config = folder / "tokenizer_config.json"
    # transformers reads tiktoken's ranks only by code from the model's folder: they are converted,
    # and the template is taken out of the config before that is written anew.
    if tokenizer.ranked:
        if config.is_file() and not (folder / "chat_template.jinja").exists():
            configured = read_json(config).get("chat_template")
            template = configured if isinstance(configured, str) else template
        for name in ("qwen.tiktoken", "tokenizer.model", "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
        tokenizer.save_json(folder)
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
