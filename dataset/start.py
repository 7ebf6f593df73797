r"""A small Llama from nothing: a tokenizer trained on a file's texts, and random weights.

    python dataset/start.py --train_file train.json --save_dir DIR --vocab_size 900 \
        --dim 96 --n_layers 2 --n_heads 4

DIR is a Hugging Face folder that `transformers` loads too. For tests, quickstarts and laptops.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

# Run as a script, the repository's root is not on the path, from which src and dataset import; this
# folder is, and goes behind Python's own modules, one of which has the name of inspect.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.sort(key=lambda path: Path(path).resolve() == Path(__file__).resolve().parent)

from src.cli import run
from src.settings.declaration import ROWS, WRITTEN, AtLeast, Unit

# One token each, wherever they stand: what GSM8K's answers are built of, and the numbers up to 99,
# whose sums a small model learns as facts (longer numbers are spelt out of these).
SYMBOLS = ["\n", "<<", ">>", "####", *"+-*/=", *map(str, range(10, 100))]


Size = AtLeast(1, 10**6)


def main(
    train_file: Annotated[
        str, ROWS, 'rows with "instruction" and "output", whose texts the tokenizer learns from'
    ],
    save_dir: Annotated[
        str, WRITTEN, "the folder to write; replaced as a whole when it already holds a checkpoint"
    ],
    vocab_size: Annotated[int, Size, "entries of the tokenizer and the model"] = 900,
    dim: Annotated[int, Size, "width of the hidden state, a multiple of 2 * n_heads"] = 96,
    n_layers: Annotated[int, Size, "blocks"] = 2,
    n_heads: Annotated[int, Size, "attention heads"] = 4,
    n_kv_heads: Annotated[int | None, Size, "key-value heads; n_heads when not given"] = None,
    hidden_dim: Annotated[
        int | None,
        Size,
        "width of the feed-forward layer; 8/3 of dim, rounded up to 32, when not given",
    ] = None,
    max_seq_len: Annotated[int, Size, Unit("tokens"), "the context it is made for"] = 512,
    seed: Annotated[int, "of the weights"] = 0,
) -> None:
    """Train the tokenizer, draw the weights, write the folder."""
    import sentencepiece
    from torch import Tensor

    from src.checkpoint.files import save_tensors
    from src.checkpoint.folder import check_replaceable, whole_folder
    from src.checkpoint.names import hf_tensors
    from src.data.rows import read_solver_rows
    from src.errors import UserError
    from src.models.config import ModelConfig
    from src.models.hf_config import hf_config
    from src.models.init import initial_std, random_tensor
    from src.models.layout import tensor_table

    if dim % (2 * n_heads) or n_heads % (n_kv_heads or n_heads):
        raise UserError(
            f"--dim {dim} --n_heads {n_heads} --n_kv_heads {n_kv_heads}: dim must be a multiple of "
            "2 * n_heads, and n_heads of n_kv_heads"
        )
    # The sizes, and the texts that the tokenizer learns from.
    rows = read_solver_rows(train_file)
    texts = [row["instruction"] for row in rows] + [text for row in rows for text in row["outputs"]]
    folder = check_replaceable(save_dir)
    hidden_dim = hidden_dim or -(-dim * 8 // 3 // 32) * 32
    config = ModelConfig(
        dim,
        n_layers,
        n_heads,
        n_kv_heads or n_heads,
        dim // n_heads,
        hidden_dim,
        vocab_size,
        max_seq_len=max_seq_len,
    )
    # Random weights, as whole tensors by Hugging Face's names.
    tensors: dict[str, Tensor] = {}
    for name, spec in tensor_table(config).items():
        tensor = random_tensor(name, spec, initial_std(name, spec, n_layers), seed)
        tensors |= hf_tensors(name, tensor, config)
    # The folder appears whole.
    with whole_folder(folder) as new:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_prefix=str(new / "tokenizer"),
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                user_defined_symbols=SYMBOLS,
                minloglevel=2,
                num_threads=1,
            )
        except RuntimeError as error:
            raise UserError(
                f"--vocab_size {vocab_size}: no tokenizer of that size from {train_file}: {error}"
            ) from None
        (new / "tokenizer.vocab").unlink()
        save_tensors(tensors, new / "model.safetensors")
        ids: dict[str, int | list[int] | None] = {"bos_token_id": 1, "eos_token_id": 2}
        text = json.dumps(hf_config(config, "float32", ids), indent=1)
        (new / "config.json").write_text(text + "\n")
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"wrote {folder}: {count:,} parameters, vocabulary {vocab_size}")


if __name__ == "__main__":
    run(main)
