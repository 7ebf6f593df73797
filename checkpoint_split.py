"""Cut a checkpoint into one shard per rank, in Meta's layout.

    python checkpoint_split.py --ckpt_file CKPT --save_path DIR --n 8
    python checkpoint_split.py --model_type llama-2-70b --n 8 --dry_run

Under torchrun (one rank does the work): torchrun -- checkpoint_split.py …; without the --, torchrun's own parser refuses --n
as an ambiguous abbreviation of its flags.

CKPT is a Hugging Face folder, one .bin / .pth / .safetensors file with its config beside it, or a folder of
consolidated.*.pth for any degree. Splitting is for speed of loading: every script also reads CKPT as it is.
"""

import os
from typing import Literal

from src.cli import run


def main(
    ckpt_file: str | None = None,
    save_path: str | None = None,
    n: int = 8,
    config_file: str | None = None,
    model_type: str | None = None,
    adapter_dir: str | None = None,
    dry_run: bool = False,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
):
    """Write consolidated.00.pth … and params.json, and copy the tokenizer's files.

    Args:
        ckpt_file: the checkpoint: a folder or a single file.
        save_path: the folder to write; replaced as a whole when it already holds a checkpoint.
        n: how many shards, one per model-parallel rank: any number.
        config_file: the model's params.json or config.json; found beside the checkpoint when not given.
        model_type: a name such as llama-2-7b to check the sizes against.
        adapter_dir: a LoRA adapter in PEFT's format to add to the weights.
        dry_run: only print the names, shapes and bytes of each rank; needs no weights: --model_type or --config_file will do.
        dtype: what a dry run without a checkpoint counts bytes in; bf16 when not given.
    """
    from src.checkpoint.folder import check_apart, check_replaceable
    from src.checkpoint.manifest import check_whole
    from src.checkpoint.plan import dry_run as lay_out
    from src.checkpoint.source import Checkpoint, check_model_type, read_config
    from src.checkpoint.write import split
    from src.errors import UserError
    from src.models.hf_config import PRESETS
    from src.parallel.setup import DTYPES

    if not 1 <= n <= 10_000:
        raise UserError(f"--n {n}: at least one shard is needed, and at most 10,000")
    if dtype is not None and ckpt_file is not None:
        raise UserError(
            f"--dtype {dtype}: shards have the checkpoint's own; the flag is for a --dry_run without --ckpt_file"
        )
    if adapter_dir is not None and ckpt_file is None:
        raise UserError("--adapter_dir: has no effect without --ckpt_file")
    if not dry_run and (ckpt_file is None or save_path is None):
        raise UserError("--ckpt_file and --save_path are needed (but for --dry_run)")
    if int(os.environ.get("RANK", 0)) != 0:
        return  # started by torchrun with several ranks: one does the work
    if ckpt_file is None:
        if config_file is None and model_type not in PRESETS:
            raise UserError(
                f"--dry_run without --ckpt_file needs --config_file, or a --model_type of {', '.join(PRESETS)}"
            )
        config = PRESETS[model_type] if config_file is None else read_config(config_file)
        check_model_type(config, model_type)
        if config.vocab_size == -1:
            raise UserError(
                f"{config_file}: vocab_size is -1, which the tensors would tell; give --ckpt_file"
            )
        print("\n".join(lay_out(config, n, DTYPES[dtype or "bf16"]).lines()))
        return
    if save_path is not None:
        check_apart({"save_path": save_path}, {"ckpt_file": ckpt_file, "adapter_dir": adapter_dir})
    checkpoint = Checkpoint.open(ckpt_file, config_file, adapter_dir)
    check_whole(checkpoint.folder)
    check_model_type(checkpoint.config, model_type)
    if dry_run:
        print("\n".join(lay_out(checkpoint.config, n, checkpoint.dtype).lines()))
        return
    split(checkpoint, check_replaceable(save_path), n)
    print(f"wrote {n} shards to {save_path}")


if __name__ == "__main__":
    run(main)
