"""One rank of tests/checkpoint/test_stages.py: loads each folder at each layout of the ranks.

    stages_worker.py OUT NAME=FOLDER …

OUT/NAME.MP-PP.RANK.safetensors: every parameter; OUT/NAME.MP-PP.RANK.json: the files that were read
for them. OUT/NAME.MP-PP-saved: the model saved again, by all ranks.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from src.checkpoint.files import TensorFile
from src.checkpoint.load import load_model
from src.checkpoint.save import save_model
from src.checkpoint.source import Checkpoint
from src.parallel.setup import start, stop

# of 2 and of 4 ranks: (model-parallel ranks, stages), the other ranks data-parallel
LAYOUTS = {2: ((2, 1), (1, 2), (1, 1)), 4: ((4, 1), (2, 2), (1, 4), (1, 2))}


class Reads:
    """The names of the files that tensors are read from."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        read = TensorFile.read

        def noted(file: TensorFile, *args):
            self.names.add(file.path.name)
            return read(file, *args)

        TensorFile.read = noted


def main(out: str, *named: str) -> None:
    reads, ranks = Reads(), start(timeout=120).world_size
    for mp_size, pp_size in LAYOUTS[ranks]:
        parallel = start(mp_size, timeout=120, pipeline_parallel_size=pp_size)
        for name, folder in (pair.split("=", 1) for pair in named):
            checkpoint = Checkpoint.open(folder)
            reads.names.clear()
            model = load_model(checkpoint, parallel, torch.float32)
            stem = Path(out) / f"{name}.{mp_size}-{pp_size}.{parallel.rank}"
            stem.with_name(f"{stem.name}.json").write_text(json.dumps(sorted(reads.names)))
            save_file(
                {key: tensor.detach().contiguous() for key, tensor in model.named_parameters()},
                stem.with_name(f"{stem.name}.safetensors"),
            )
            saved = Path(out) / f"{name}.{mp_size}-{pp_size}-saved"
            save_model(model, parallel, str(saved), checkpoint)
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
