"""Join shards into a Hugging Face folder that `transformers` loads: the inverse of splitting.

    python checkpoint_merge.py --ckpt_dir SHARDS --save_dir DIR

Bit for bit. DIR gets model.safetensors (in files of at most 5 GB), config.json,
generation_config.json and the tokenizer's files; with --use_chat_template the family's chat
template where the checkpoint has none of its own. A verifier's shards become a
…ForSequenceClassification with the same scores. Qwen v1 becomes a Qwen2 model, which computes the
same function (up to seq_length) and needs no code from outside transformers. With --adapter_dir
the adapter's own tokenizer and chat template go along, where it has them.
"""

import os
from functools import partial

from src.cli import run
from src.settings.scripts import CheckpointMergeSettings


def main(settings: CheckpointMergeSettings) -> None:
    """Write the folder."""
    from src.checkpoint.folder import check_apart, check_replaceable, find_tokenizer
    from src.checkpoint.json_file import read_json
    from src.checkpoint.manifest import check_whole
    from src.checkpoint.source import Checkpoint, check_model_type
    from src.checkpoint.write import merge
    from src.data.export import special_ids_of, write_tokenizer
    from src.inputs import open_tokenizer
    from src.parallel.setup import DTYPES

    if int(os.environ.get("RANK", 0)) != 0:
        return  # started by torchrun with several ranks: one does the work
    model, save_dir, dtype = settings.model, settings.folder.save_dir, settings.folder.dtype

    # Open and check.
    read = {"ckpt_dir": model.ckpt_dir, "adapter_dir": model.adapter_dir}
    check_apart({"save_dir": save_dir}, read)
    checkpoint = Checkpoint.open(model.ckpt_dir, model.config_file, model.adapter_dir)
    config, source = checkpoint.config, checkpoint.folder
    check_whole(source)
    check_model_type(config, model.model_type)
    tokenizer = None
    found = find_tokenizer(source, checkpoint.adapter_folder)
    if model.tokenizer_file or model.use_chat_template or found:
        tokenizer = open_tokenizer(model, checkpoint)

    # Write.
    about = source, config.vocab_size, config.head == "score"
    special_ids = special_ids_of(tokenizer, *about)
    generation = source / "generation_config.json"
    if tokenizer is None and generation.is_file():  # where shards keep a config.json's ids
        said = read_json(generation)
        special_ids = {key: said.get(key) if i is None else i for key, i in special_ids.items()}
    merge(
        checkpoint,
        check_replaceable(save_dir),
        special_ids,
        DTYPES[dtype] if dtype else None,
        lambda folder: write_tokenizer(tokenizer, folder, *about),
    )
    own = tokenizer is not None and tokenizer.path.parent == checkpoint.adapter_folder
    print(f"wrote {save_dir}" + (", with the adapter's own tokenizer" if own else ""))


command = partial(run, main)

if __name__ == "__main__":
    command()
