"""The first losses of a seeded LoRA run with dropout: dropout_worker.py FOLDER OUT."""

import json
import sys
from pathlib import Path

from src.checkpoint.load import load_model
from src.checkpoint.source import Checkpoint
from src.models.lora import LoRAConfig
from src.parallel.setup import DTYPES, start, stop
from src.trainer.fit import prepare
from src.trainer.solver import SolverObjective
from tests.trainer.tiny import some_sequences, training


def main(folder: str, out: str) -> None:
    parallel = start(timeout=120)
    losses = []
    for seed in (0, 0, 1):
        settings = training(seed=seed)
        lora = LoRAConfig(4, 64.0, dropout=0.5)
        model = load_model(Checkpoint.open(folder), parallel, DTYPES["fp32"], seed=0, lora=lora)
        for name, p in model.named_parameters():
            if "lora_b" in name:
                p.data.fill_(0.02)
        prepare(model, settings.optimizer, settings.run, parallel)
        losses.append(
            float(
                SolverObjective(some_sequences(5), parallel.device).loss(
                    model, [0, 1, 2, 3, 4], 10
                )[0]
            )
        )
    if parallel.is_main:
        Path(out).write_text(json.dumps(losses))
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
