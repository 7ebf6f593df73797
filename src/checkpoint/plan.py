"""What splitting and loading a model would take, told without a byte of its weights.

That is the names, shapes and bytes of every rank.
"""

from dataclasses import dataclass

import torch

from src.checkpoint.names import generalised
from src.models.config import ModelConfig
from src.models.layout import TensorSpec, tensor_table
from src.models.stages import Stages, cut_in_stages
from src.models.transformer import build


@dataclass(frozen=True)
class Plan:
    """A model in stages of `n` ranks each; without --stages in one.

    Bytes are those of the weights: of the whole model, and of each rank, alike in a stage.
    """

    config: ModelConfig
    n: int
    dtype: torch.dtype
    table: dict[str, TensorSpec]
    stages: Stages

    @property
    def parameters(self) -> int:
        return sum(torch.Size(spec.shape).numel() for spec in self.table.values())

    @property
    def total_bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    def rank_bytes(self, stage: int) -> int:
        """Bytes of each of a stage's shards: a tied embedding counts where it is stored."""
        return self.dtype.itemsize * sum(
            torch.Size(spec.local_shape(self.n)).numel()
            for name, spec in self.table.items()
            if self.stages.holders(name, tied=False) == [stage]
        )

    def lines(self) -> list[str]:
        """A line per kind of tensor (layers are alike), then the sums."""
        specs_of: dict[str, list[TensorSpec]] = {}  # "layers.*.attention.wq.weight" → every layer's
        for name, spec in self.table.items():
            specs_of.setdefault(generalised(name).replace("{}", "*"), []).append(spec)
        count = self.stages.count
        per_rank = "bytes per rank" if count == 1 else f"bytes of {count} ranks"
        rows = [("tensor", "number", "whole", f"rank of {self.n}", per_rank)]
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
        every = [self.rank_bytes(stage) for stage in range(self.stages.count)]
        overhead = sum(every) * self.n / self.total_bytes - 1
        return [
            *lines,
            f"{self.parameters:,} parameters, {self.total_bytes:,} bytes "
            f"({str(self.dtype).removeprefix('torch.')})",
            *(
                f"{self._described(stage)}each of {self.n} ranks: {size:,} bytes"
                for stage, size in enumerate(every)
            ),
            f"copies and padding over all ranks: {100 * overhead:.2f} %",
        ]

    def _described(self, stage: int) -> str:
        """What goes before a stage's bytes, where there are several."""
        layers = self.stages.layers(stage)
        return (
            f"stage {stage} of {self.stages.count}, layers {layers[0]} to {layers[-1]}: "
            if self.stages.count > 1
            else ""
        )


def dry_run(config: ModelConfig, n: int, dtype: torch.dtype, stages: int = 1) -> Plan:
    """Lay the model out in `stages` at `n` ranks in all. Raises UserError for too many stages.

    The first and the last part of each stage are built on the meta device, to see that they are
    what a shard holds.
    """
    table, ranks = tensor_table(config), n // stages
    cut = cut_in_stages(config, stages, flag="--stages")
    for stage in range(stages):
        planned = {
            name: spec.local_shape(ranks)
            for name, spec in table.items()
            if stage in cut.holders(name, config.tie_word_embeddings)
        }
        for rank in {0, ranks - 1}:
            model = build(config, rank, ranks, dtype, stages=cut, stage_rank=stage)
            built = {name: tuple(p.shape) for name, p in model.named_parameters()}
            if built != planned:
                wrong = next(
                    name
                    for name in built.keys() | planned.keys()
                    if built.get(name) != planned.get(name)
                )
                raise AssertionError(
                    f"rank {rank} of {ranks}: {wrong} is built as {built.get(wrong)}, "
                    f"its shard holds {planned.get(wrong)}"
                )
    return Plan(config, ranks, dtype, table, cut)
