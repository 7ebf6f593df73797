"""Cut a checkpoint into one shard per rank, in Meta's layout.

    python checkpoint_split.py --ckpt_file CKPT --save_path DIR --n 8

Under torchrun (one rank does the work): torchrun -- checkpoint_split.py …; without the --, torchrun's own parser refuses --n
as an ambiguous abbreviation of its flags.

CKPT is a Hugging Face folder, one .bin / .pth / .safetensors file with its config beside it, or a folder of
consolidated.*.pth for any degree. Splitting is for speed of loading: every script also reads CKPT as it is.
"""

import os

from src.cli import run


def main(ckpt_file: str, save_path: str, n: int = 8, config_file: str | None = None, model_type: str | None = None):
    """Write consolidated.00.pth … and params.json, and copy the tokenizer's files.

    Args:
        ckpt_file: the checkpoint: a folder or a single file.
        save_path: the folder to write; replaced as a whole when it already holds a checkpoint.
        n: how many shards, one per model-parallel rank.
        config_file: the model's params.json or config.json; found beside the checkpoint when not given.
        model_type: a name such as llama-2-7b to check the sizes against.
    """
    from src.checkpoint.folder import check_apart, check_replaceable
    from src.checkpoint.source import Checkpoint, check_model_type
    from src.checkpoint.write import split
    from src.errors import UserError

    if n < 1:
        raise UserError(f"--n {n}: at least one shard is needed")
    if int(os.environ.get("RANK", 0)) != 0:
        return  # started by torchrun with several ranks: one does the work
    check_apart({"save_path": save_path}, {"ckpt_file": ckpt_file})
    checkpoint = Checkpoint.open(ckpt_file, config_file)
    check_model_type(checkpoint.config, model_type)
    split(checkpoint, check_replaceable(save_path), n)
    print(f"wrote {n} shards to {save_path}")


if __name__ == "__main__":
    run(main)
