"""One rank of tests/checkpoint: loads each checkpoint and writes down what it then holds.

    checkpoint_worker.py OUT TOKENS NAME=FOLDER …

OUT/NAME.RANK.safetensors: every parameter, and the outputs on TOKENS.json's sequences, which are
this rank's logits, or the scores. OUT/NAME.RANK.refused: why it was not loaded.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from src.checkpoint.load import load_model
from src.checkpoint.save import save_model
from src.checkpoint.source import Checkpoint
from src.errors import UserError
from src.models.attention import Packed
from src.models.batch import Batch, Sequence, sequence_scores
from src.parallel.setup import start, stop


def main(out: str, tokens: str, *named: str) -> None:
    parallel = start(timeout=120)
    all_rows = json.loads(Path(tokens).read_text())
    for name, folder in (pair.split("=", 1) for pair in named):
        checkpoint = Checkpoint.open(folder)
        try:
            model = load_model(checkpoint, parallel, torch.float32)
        except UserError as error:  # the launcher may end a rank before it has said so
            (Path(out) / f"{name}.{parallel.rank}.refused").write_text(str(error))
            raise
        last_id = checkpoint.config.vocab_size - 1
        rows = [[min(token, last_id) for token in row] for row in all_rows]
        batch = Batch.of([Sequence(row, 1) for row in rows], parallel.device)
        with torch.no_grad():
            if checkpoint.config.head == "score":
                outputs = sequence_scores(model, batch)  # [rows]
            else:
                hidden = model(batch.tokens, Packed([len(row) for row in rows]))  # [tokens, dim]
                outputs = model.logits(hidden)  # [tokens, vocabulary / n]
        tensors = {key: parameter.detach() for key, parameter in model.named_parameters()}
        tensors["outputs"] = outputs
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            Path(out) / f"{name}.{parallel.rank}.safetensors",
        )
        save_model(model, parallel, str(Path(out) / f"{name}-saved"), checkpoint)
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
