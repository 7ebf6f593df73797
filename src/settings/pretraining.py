"""What pretrain.py knows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from src.settings.declaration import (
    CONTENT,
    MAY_CHANGE,
    ROWS,
    AtLeast,
    Unit,
    idle,
)
from src.settings.model import DataSettings, ModelSettings, TrainingBatchSettings
from src.settings.scripts import SolverEvaluationSettings, TrainSettings
from src.settings.training import OptimizerSettings

DocumentMask = Annotated[
    bool,
    "let each document of a row see itself alone, its positions from 0; else a row is one sequence "
    "across its documents",
]


@dataclass(frozen=True, kw_only=True)
class StartSettings(ModelSettings):
    """The model and its tokenizer."""

    # none: what TrainSettings is for has a model, or here a config, to start from
    ckpt_dir: Annotated[
        str | None,
        CONTENT,
        "the model to go on from: shards for any degree, or a Hugging Face folder; random weights "
        "by --config_file when not given, with --tokenizer_file",
    ] = None  # type: ignore[assignment]

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from idle(self, ("use_chat_template", "chat_date"), "on texts, which are no chats")
        if self.ckpt_dir:
            return
        yield from idle(self, ("adapter_dir",), "without --ckpt_dir")


@dataclass(frozen=True, kw_only=True)
class StreamSettings(DataSettings):
    """The data."""

    train_file: Annotated[
        str,
        CONTENT,
        ROWS,
        "shards to train on, folders that dataset/build.py pretrain wrote: a, or several as a,b, "
        "or with the shares of their rows as a:0.7,b:0.3",
    ]
    document_mask: DocumentMask = True

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from idle(self, ("map", "map_workers"), "on shards, which hold token ids")


@dataclass(frozen=True, kw_only=True)
class RowSettings(TrainingBatchSettings):
    """Lengths and batches."""

    max_seq_len: Annotated[
        int, AtLeast(2), Unit("tokens"), "of a row, into which documents are packed end to end"
    ] = 1024

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from idle(self, ("strict_length",), "on texts, which are cut into rows")


@dataclass(frozen=True, kw_only=True)
class StepSettings(OptimizerSettings):
    """The optimizer and its schedule."""

    max_steps: Annotated[
        int | None,
        AtLeast(1, 10**12),
        Unit("steps"),
        "so many steps in place of --epochs; the texts begin again where they end",
    ] = None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.max_steps is not None:
            yield from idle(self, ("epochs",), "with --max_steps")


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings(SolverEvaluationSettings):
    """Evaluation before the first step, and after each epoch or as --eval_every says."""

    asked_by: ClassVar[str] = "--valid_file (or --label_file)"
    valid_file: Annotated[
        list[str] | None,
        MAY_CHANGE,
        "shards whose perplexity is measured, each folder's by itself: a,b; --keep_best logprob "
        "keeps the model with the highest mean log-probability",
    ] = None
    valid_rows: Annotated[
        int | None, AtLeast(1), MAY_CHANGE, "of each, the first so many rows; all when not given"
    ] = None

    @property
    def is_asked(self) -> bool:
        return self.valid_file is not None or super().is_asked

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.valid_file is None:
            yield from idle(self, ("valid_rows",), "without --valid_file")


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainSettings):
    """All that pretrain.py knows."""

    model: StartSettings = StartSettings()
    data: StreamSettings
    batches: RowSettings = RowSettings()
    optimizer: StepSettings = StepSettings(lr=3e-4, weight_decay=0.1, beta2=0.95)
    evaluation: PerplexitySettings = PerplexitySettings(eval_batch_size=16)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        model, plans = self.model, self.dry_run.dry_run
        if not model.ckpt_dir and not plans and None in (model.config_file, model.tokenizer_file):
            yield (
                "give --ckpt_dir to go on from a model, or --config_file with --tokenizer_file to "
                "begin one"
            )
        if not model.ckpt_dir and self.lora.is_on:
            yield (
                f"--lora_rank {self.lora.lora_rank}: an adapter is trained on a model; give "
                "--ckpt_dir, or leave --lora_rank out"
            )
