"""Join shards into a Hugging Face folder that `transformers` loads: the inverse of checkpoint_split.py, bit for bit.

    python checkpoint_merge.py --ckpt_dir SHARDS --save_dir DIR

A verifier's shards become a …ForSequenceClassification with the same scores. Qwen v1 becomes a Qwen2 model, which computes
the same function (up to seq_length) and needs no code from outside transformers.
"""

import os
from typing import Literal

from src.cli import run


def main(
    ckpt_dir: str,
    save_dir: str,
    config_file: str | None = None,
    model_type: str | None = None,
    tokenizer_file: str | None = None,
    adapter_dir: str | None = None,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    use_chat_template: bool = False,
):
    """Write model.safetensors (in files of at most 5 GB), config.json, generation_config.json and the tokenizer's files.

    Args:
        ckpt_dir: the shards (or any other checkpoint).
        save_dir: the folder to write; replaced as a whole when it already holds a checkpoint.
        config_file: the model's params.json or config.json; found beside the checkpoint when not given.
        model_type: a name such as llama-2-7b to check the sizes against.
        tokenizer_file: found in ckpt_dir when not given.
        adapter_dir: a LoRA adapter in PEFT's format to add to the weights.
        dtype: to write in; the checkpoint's own when not given.
        use_chat_template: write the family's chat template where the checkpoint has none of its own.
    """
    from src.checkpoint.folder import check_apart, check_replaceable, find_tokenizer
    from src.checkpoint.manifest import check_whole
    from src.checkpoint.source import Checkpoint, check_model_type
    from src.checkpoint.write import merge
    from src.data.export import pad_id_of, special_ids_of, write_tokenizer
    from src.data.tokenizer import Tokenizer
    from src.parallel.setup import DTYPES

    if int(os.environ.get("RANK", 0)) != 0:
        return  # started by torchrun with several ranks: one does the work
    check_apart({"save_dir": save_dir}, {"ckpt_dir": ckpt_dir, "adapter_dir": adapter_dir})
    checkpoint = Checkpoint.open(ckpt_dir, config_file, adapter_dir)
    check_whole(checkpoint.folder)
    check_model_type(checkpoint.config, model_type)
    tokenizer = None
    if tokenizer_file or use_chat_template or find_tokenizer(checkpoint.folder):
        tokenizer = Tokenizer.find(
            checkpoint.folder,
            tokenizer_file,
            use_chat_template,
            model_type or checkpoint.config.family,
        )
    merge(
        checkpoint,
        check_replaceable(save_dir),
        special_ids_of(tokenizer),
        dtype and DTYPES[dtype],
        pad_id_of(tokenizer, checkpoint.config.vocab_size),
        lambda source, folder: write_tokenizer(tokenizer, source, folder),
    )
    print(f"wrote {save_dir}")


if __name__ == "__main__":
    run(main)
