"""What splitting and loading a model would take, told without a byte of its weights.

That is the names, shapes and bytes of every rank.
"""

from dataclasses import dataclass

import torch

from src.checkpoint.names import generalised
from src.models.config import ModelConfig
from src.models.layout import TensorSpec, tensor_table
from src.models.transformer import build


@dataclass(frozen=True)
class Plan:
    """A model at `n` ranks.

    Bytes are those of the weights: of the whole model, and of each rank, which are all alike.
    """

    config: ModelConfig
    n: int
    dtype: torch.dtype
    table: dict[str, TensorSpec]

    @property
    def parameters(self) -> int:
        return sum(torch.Size(spec.shape).numel() for spec in self.table.values())

    @property
    def total_bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    @property
    def rank_bytes(self) -> int:
        return (
            sum(torch.Size(spec.local_shape(self.n)).numel() for spec in self.table.values())
            * self.dtype.itemsize
        )

    def lines(self) -> list[str]:
        """A line per kind of tensor (layers are alike), then the sums."""
        specs_of: dict[str, list[TensorSpec]] = {}  # "layers.*.attention.wq.weight" → every layer's
        for name, spec in self.table.items():
            specs_of.setdefault(generalised(name).replace("{}", "*"), []).append(spec)
        rows = [("tensor", "number", "whole", f"rank of {self.n}", "bytes per rank")]
        for name, specs in specs_of.items():
            whole, local = specs[0].shape, specs[0].local_shape(self.n)
            size = torch.Size(local).numel() * self.dtype.itemsize * len(specs)
            rows.append((name, str(len(specs)), str(list(whole)), str(list(local)), f"{size:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths))
            )
            for row in rows
        ]
        overhead = self.rank_bytes * self.n / self.total_bytes - 1
        return [
            *lines,
            f"{self.parameters:,} parameters, {self.total_bytes:,} bytes "
            f"({str(self.dtype).removeprefix('torch.')})",
            f"each of {self.n} ranks: {self.rank_bytes:,} bytes; "
            f"copies and padding over all ranks: {100 * overhead:.2f} %",
        ]


def dry_run(config: ModelConfig, n: int, dtype: torch.dtype) -> Plan:
    """Lay the model out at `n` ranks.

    The first and the last part are built on the meta device, to see that they are what a shard
    holds.
    """
    table = tensor_table(config)
    for rank in {0, n - 1}:
        model = build(config, rank, n, dtype)
        built = {name: tuple(p.shape) for name, p in model.named_parameters()}
        planned = {name: spec.local_shape(n) for name, spec in table.items()}
        if built != planned:
            wrong = next(
                name
                for name in built.keys() | planned.keys()
                if built.get(name) != planned.get(name)
            )
            raise AssertionError(
                f"rank {rank} of {n}: {wrong} is built as {built.get(wrong)}, "
                f"its shard holds {planned.get(wrong)}"
            )
    return Plan(config, n, dtype, table)
