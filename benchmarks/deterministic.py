"""What --deterministic costs: the forward of a few rows and of many, and a training step.

    python benchmarks/deterministic.py                                  # the 58M shape in fp32
    python benchmarks/deterministic.py --dtype bf16 --dim 4096 --n_layers 8 --hidden_dim 11008

Random weights; sides alternate, medians. The forward is the whole model's on sequences of one
length, with the logits of each sequence's last token; the last column counts how many of its rows
have other bits than the same sequence by itself.
"""

from typing import Literal

import torch
from common import alternate, machine, median, seconds  # which finds `src`, too
from gpu import config_of, random_model

from src.cli import run
from src.models.attention import Packed
from src.models.batch import Sequence
from src.parallel import deterministic
from src.parallel.setup import pick_dtype, start, stop
from src.settings.model import PackedBatchSettings
from src.trainer.fit import train_step
from src.trainer.optimizer import Optimizer
from src.trainer.solver import SolverObjective

SHAPES = ((1, 1), (8, 1), (64, 1), (256, 1), (1, 4), (8, 195))  # sequences, tokens of each


def main(
    dim: int = 512,
    n_layers: int = 8,
    hidden_dim: int = 1376,
    rounds: int = 5,
    dtype: Literal["bf16", "fp32"] | None = None,
):
    """Measure and print.

    Args:
        dim: width of the model, in heads of 64.
        n_layers: its layers.
        hidden_dim: width of its feed-forward layers.
        rounds: of each; the median counts.
        dtype: fp32 when not given; on a GPU bf16.
    """
    parallel = start(1, deterministic=True)  # which sets what CUDA reads when it starts
    device = parallel.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
    kind = pick_dtype(dtype, device)
    print(f"{name}; {kind}\n")
    model = random_model(config_of(dim, n_layers, 64, hidden_dim), parallel, kind)

    def both(work) -> tuple[float, float]:
        def side(wanted: bool) -> float:
            deterministic.turn_on(device.type) if wanted else deterministic.turn_off()
            return seconds(work)

        sides = {"off": lambda: side(False), "on": lambda: side(True)}
        return tuple(median(times) for times in alternate(sides, rounds).values())

    print("| | off, ms | on, ms | ratio | rows with other bits alone: off | on |")
    print("|---|---|---|---|---|---|")
    for n, length in SHAPES:
        tokens = torch.randint(3, 30000, (n * length,), device=device)

        @torch.no_grad()
        def logits(tokens=tokens, n=n, length=length):
            layout = Packed([length] * n, device)
            return model.logits(model(tokens, layout, layout.ends))

        off, on = both(logits)
        others = []
        for wanted in (False, True):
            deterministic.turn_on(device.type) if wanted else deterministic.turn_off()
            together = logits()
            alone = [logits(part, 1, length) for part in tokens.split(length)]
            others.append(sum(not torch.equal(a[0], b) for a, b in zip(alone, together)))
        print(
            f"| forward, {n} × {length} | {1e3 * off:.1f} | {1e3 * on:.1f} | {on / off:.2f} "
            f"| {others[0]} of {n} | {others[1]} |"
        )

    rows = [Sequence([1 + (7 * i + j) % 31000 for j in range(195)], 66) for i in range(8)]
    objective, optimizer = SolverObjective(rows, device), Optimizer(model, parallel)
    batches = PackedBatchSettings(max_batch_size=8)
    off, on = both(
        lambda: train_step(model, optimizer, objective, list(range(8)), batches, parallel, 1e-5)
    )
    print(f"| step, 8 × 195 | {1e3 * off:.1f} | {1e3 * on:.1f} | {on / off:.2f} | | |")
    stop()


if __name__ == "__main__":
    run(main)
