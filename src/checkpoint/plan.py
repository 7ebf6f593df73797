"""What splitting and loading a model would take: names, shapes and bytes of every rank, without a byte of its weights."""

from dataclasses import dataclass

import torch

from src.checkpoint.names import generalised
from src.models.config import ModelConfig
from src.models.layout import TensorSpec, tensor_table
from src.models.transformer import build


@dataclass(frozen=True)
class Plan:
    """A model at `n` ranks. Bytes of weights: of the whole model, and of each rank, which are all alike."""

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
        kinds: dict[str, list[TensorSpec]] = {}
        for name, spec in self.table.items():
            kinds.setdefault(generalised(name).replace("{}", "*"), []).append(spec)
        rows = [("tensor", "number", "whole", f"rank of {self.n}", "bytes per rank")]
        for name, specs in kinds.items():
            whole, local = specs[0].shape, specs[0].local_shape(self.n)
            size = torch.Size(local).numel() * self.dtype.itemsize * len(specs)
            rows.append((name, str(len(specs)), str(list(whole)), str(list(local)), f"{size:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 1 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths))
            )
            for row in rows
        ]
        overhead = self.rank_bytes * self.n / self.total_bytes - 1
        return [
            *lines,
            f"{self.parameters:,} parameters, {self.total_bytes:,} bytes ({str(self.dtype).removeprefix('torch.')})",
            f"each of {self.n} ranks: {self.rank_bytes:,} bytes; copies and padding over all ranks: {100 * overhead:.2f} %",
        ]


def dry_run(config: ModelConfig, n: int, dtype: torch.dtype) -> Plan:
    """Lay the model out at `n` ranks, and build the first and the last part on the meta device to see that they are what a shard holds."""
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
                f"rank {rank} of {n}: {wrong} is built as {built.get(wrong)}, its shard holds {planned.get(wrong)}"
            )
    return Plan(config, n, dtype, table)
