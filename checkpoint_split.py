"""Cut a checkpoint into one shard per rank, in Meta's layout, or that by pipeline stage.

    python checkpoint_split.py --ckpt_file CKPT --save_path DIR --n 8
    python checkpoint_split.py --ckpt_file CKPT --save_path DIR --n 8 --stages 4
    python checkpoint_split.py --model_type llama-2-70b --n 8 --dry_run

Under torchrun (one rank does the work): torchrun -- checkpoint_split.py …; without the --,
torchrun's own parser refuses --n as an ambiguous abbreviation of its flags.

CKPT is a Hugging Face folder, one .bin / .pth / .safetensors file with its config beside it, a
folder of consolidated.*.pth for any degree, or a .gguf file, which is unpacked with its tokenizer
and chat template. DIR gets consolidated.00.pth … and params.json, and the tokenizer's files, with
--adapter_dir the adapter's own where it has them. With --stages the layers are cut, too, as for a
pipeline, and a file holds one stage's: consolidated.stage-00-of-04.00.pth is rank 0's of the first
of 4 stages. The other scripts read either at any layout.
Splitting is for speed of loading: every script also reads CKPT as it is, but for GGUF.
"""

import os
from functools import partial

from src.cli import run
from src.settings.scripts import CheckpointSplitSettings


def main(settings: CheckpointSplitSettings) -> None:
    """Write the shards, or with --dry_run say what each would hold."""
    from src.checkpoint.folder import check_apart, check_replaceable, find_tokenizer
    from src.checkpoint.manifest import check_whole
    from src.checkpoint.plan import dry_run as lay_out
    from src.checkpoint.source import Checkpoint, check_model_type, config_of_type
    from src.checkpoint.write import split
    from src.parallel.setup import DTYPES

    if int(os.environ.get("RANK", 0)) != 0:
        return  # started by torchrun with several ranks: one does the work
    shards, model = settings.shards, settings.model

    # Without a checkpoint: what its shards would be, by the sizes alone.
    if shards.ckpt_file is None:
        config = config_of_type(model.model_type, model.config_file)
        plan = lay_out(config, shards.n, DTYPES[shards.dtype or "bf16"], shards.stages)
        print("\n".join(plan.lines()))
        return

    # Open and check.
    if shards.save_path is not None:
        read = {"ckpt_file": shards.ckpt_file, "adapter_dir": shards.adapter_dir}
        check_apart({"save_path": shards.save_path}, read)
    checkpoint = Checkpoint.open(shards.ckpt_file, model.config_file, shards.adapter_dir, gguf=True)
    check_whole(checkpoint.folder)
    check_model_type(checkpoint.config, model.model_type)

    # Write.
    dtype = DTYPES[shards.dtype] if shards.dtype else None
    if shards.dry_run or shards.save_path is None:
        counted = dtype or checkpoint.dtype
        plan = lay_out(checkpoint.config, shards.n, counted, shards.stages)
        print("\n".join(plan.lines()))
        return
    split(checkpoint, check_replaceable(shards.save_path), shards.n, dtype, shards.stages)
    adapter = checkpoint.adapter_folder
    tokenizer = find_tokenizer(checkpoint.folder, adapter)
    own = tokenizer is not None and tokenizer.parent == adapter
    said = ", with the adapter's own tokenizer" if own else ""
    stages = f" in {shards.stages} stages" if shards.stages > 1 else ""
    print(f"wrote {shards.n} shards{stages} to {shards.save_path}{said}")


command = partial(run, main)

if __name__ == "__main__":
    command()
