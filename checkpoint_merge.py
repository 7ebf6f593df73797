"""Join shards into a Hugging Face folder that `transformers` loads: the inverse of checkpoint_split.py, bit for bit.

    python checkpoint_merge.py --ckpt_dir SHARDS --save_dir DIR

A verifier's shards become a LlamaForSequenceClassification with the same scores.
"""

import os

from src.cli import run


def main(ckpt_dir: str, save_dir: str, config_file: str | None = None, model_type: str | None = None):
    """Write model.safetensors (in files of at most 5 GB), config.json and the tokenizer's files.

    Args:
        ckpt_dir: the shards (or any other checkpoint).
        save_dir: the folder to write; replaced as a whole when it already holds a checkpoint.
        config_file: the model's params.json or config.json; found beside the checkpoint when not given.
        model_type: a name such as llama-2-7b to check the sizes against.
    """
    from src.checkpoint.folder import check_apart, check_replaceable
    from src.checkpoint.source import Checkpoint, check_model_type
    from src.checkpoint.write import merge

    if int(os.environ.get("RANK", 0)) != 0:
        return  # started by torchrun with several ranks: one does the work
    check_apart({"save_dir": save_dir}, {"ckpt_dir": ckpt_dir})
    checkpoint = Checkpoint.open(ckpt_dir, config_file)
    check_model_type(checkpoint.config, model_type)
    merge(checkpoint, check_replaceable(save_dir))
    print(f"wrote {save_dir}")


if __name__ == "__main__":
    run(main)
