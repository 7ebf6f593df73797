"""Text to ids and back, with the files that lie beside the weights."""

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as RustTokenizer

from src.checkpoint.files import read_json
from src.checkpoint.folder import find_tokenizer
from src.errors import UserError


class Tokenizer:
    """SentencePiece's `tokenizer.model`, or Hugging Face's `tokenizer.json`.

    A prompt is BOS + its ids; a response is its ids + EOS, encoded apart, so that the boundary between the two is known
    in ids. Pad is never EOS: packed batches need none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.suffix == ".model":
                self._sp = SentencePieceProcessor(model_file=str(path))
                self._encode, self._decode = self._sp.encode, self._sp.decode
                self.vocab_size = self._sp.vocab_size()
                self.bos_id, self.eos_id = self._sp.bos_id(), self._sp.eos_id()
            else:
                rust = RustTokenizer.from_file(str(path))
                self._encode = lambda text: rust.encode(text, add_special_tokens=False).ids
                self._decode = lambda ids: rust.decode(ids, skip_special_tokens=True)
                self.vocab_size = max(rust.get_vocab().values()) + 1
                self.bos_id, self.eos_id = _special_ids(rust, path)
            if min(self.bos_id, self.eos_id) < 0:
                raise UserError(f"{path}: has no BOS or EOS; a model needs both")
        except UserError:
            raise
        except Exception as error:  # both libraries raise bare Exception or RuntimeError for a damaged file
            raise UserError(f"{path}: cannot be read as a tokenizer ({str(error).splitlines()[0]})") from None

    @classmethod
    def find(cls, folder: Path, tokenizer_file: str | None = None) -> "Tokenizer":
        """The named file, else the one that lies with the checkpoint."""
        path = Path(tokenizer_file) if tokenizer_file else find_tokenizer(folder)
        if path is None:
            raise UserError(f"{folder}: no tokenizer.model or tokenizer.json there; name the tokenizer by --tokenizer_file")
        if not path.is_file():
            raise UserError(f"--tokenizer_file {path}: no such file")
        return cls(path)

    def prompt_ids(self, text: str) -> list[int]:
        return [self.bos_id, *self._encode(text)]

    def response_ids(self, text: str) -> list[int]:
        return [*self._encode(text), self.eos_id]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, without special tokens and ids that only the model's padded vocabulary has."""
        return self._decode([i for i in ids if i not in (self.bos_id, self.eos_id) and i < self.vocab_size])


def _special_ids(rust: RustTokenizer, path: Path) -> tuple[int, int]:
    """BOS and EOS as `tokenizer_config.json` names them, else Llama's `<s>` and `</s>`."""
    beside = path.parent / "tokenizer_config.json"
    named = read_json(beside) if beside.is_file() else {}
    ids = []
    for key, usual in (("bos_token", "<s>"), ("eos_token", "</s>")):
        token = named.get(key) or usual
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str):
            raise UserError(f"{beside}: {key} is {named.get(key)!r}, a token's text is expected")
        if rust.token_to_id(token) is None:
            raise UserError(f"{path}: {key} {token!r} is not in the vocabulary; tokenizer_config.json names it")
        ids.append(rust.token_to_id(token))
    return ids[0], ids[1]


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError when the tokenizer can produce ids that the model has no embedding for."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} entries, the model {vocab_size}: not this model's tokenizer"
        )
