"""What training on rows reads, opened and checked before any work."""

from dataclasses import dataclass
from pathlib import Path

from src.checkpoint.folder import SCORES_FILE, beside, check_apart
from src.checkpoint.save import check_save
from src.data.encoding import (
    Comparison,
    Labelled,
    PairRules,
    Prompt,
    TopK,
    check_sides,
    comparisons,
    graded_rows,
    labelled,
    prompt_sequences,
    solver_sequences,
    top_k_rows,
)
from src.data.kept import Sequences
from src.data.loss_mask import LossMask
from src.data.mapping import RowMap
from src.data.mixture import Mixture, read_mixture
from src.data.sources import Named, Source
from src.data.stream import Stream
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.evaluation.perplexity import Perplexity
from src.evaluation.training import GradedData, SolverEvaluation, VerifierEvaluation
from src.evaluation.verifier import score_moments
from src.generation.relayout import plain
from src.inputs import (
    OpenedModel,
    check_log_dir,
    check_trainable,
    check_writable,
    lora_of,
    open_model,
)
from src.logs import RunLog
from src.models.batch import Sequence
from src.models.context import check_heads
from src.models.fp8 import check_device
from src.models.lora import LoRAConfig
from src.models.transformer import Transformer
from src.parallel.setup import Parallel, pick_dtype
from src.ppo.judge import OpenedJudge
from src.settings.distillation import DistillTrainSettings
from src.settings.model import DataSettings, LossMaskSettings, ModelSettings
from src.settings.ppo import PromptSettings
from src.settings.preference import PreferenceTrainSettings
from src.settings.pretraining import PretrainSettings
from src.settings.scripts import (
    SolverTrainSettings,
    TrainSettings,
    VerifierEvaluationSettings,
    VerifierTrainSettings,
)
from src.trainer.reference import check_cache


@dataclass(frozen=True)
class Places:
    """Where a training run writes beside its model: its log, and the best model (--keep_best)."""

    logs: str
    best: str

    @classmethod
    def of(cls, log_dir: str | None, save_dir: str) -> "Places":
        """log_dir: as the settings have it."""
        return cls(log_dir or beside(save_dir, "logs"), beside(save_dir, "best"))


@dataclass(frozen=True)
class SolverInputs:
    """A solver's training data and where it starts from.

    row_notes: what a user should know of the train file's rows; mixture: of how many they are.
    """

    model: OpenedModel
    lora: LoRAConfig | None
    evaluation: SolverEvaluation
    sequences: Sequences
    row_notes: list[str]
    mixture: Mixture

    @property
    def notes(self) -> list[str]:
        """What a user should know of the rows that are read, a sentence each."""
        return self.row_notes + self.evaluation.notes

    @classmethod
    def read(cls, settings: SolverTrainSettings, parallel: Parallel) -> "SolverInputs":
        """Read everything. Raises UserError, before any work, for whatever is wrong."""
        model = open_start(settings, parallel, head="lm")
        lora = lora_of(settings.lora, model.checkpoint)
        tokenizer, max_seq_len = model.tokenizer, settings.batches.max_seq_len
        how = max_seq_len, settings.batches.strict_length, mask_of(settings.loss)
        rows = read_mixture(
            source_of(settings.data), lambda path: solver_sequences(path, tokenizer, *how)
        )
        limits = settings.evaluation.max_new_tokens, max_seq_len
        evaluation = SolverEvaluation.read(settings.evaluation, tokenizer, *limits)
        return cls(model, lora, evaluation, *rows)


@dataclass(frozen=True)
class PretrainInputs:
    """What is pre-trained on, and where it starts from."""

    model: OpenedModel
    lora: LoRAConfig | None
    evaluation: SolverEvaluation
    perplexity: Perplexity
    stream: Stream

    @property
    def mixture(self) -> Mixture:
        """How many rows an epoch has."""
        return Mixture((self.stream.rows,))

    @property
    def notes(self) -> list[str]:
        """What a user should know of what is read, a sentence each."""
        tokenizer = self.model.tokenizer
        return [
            f"{part.shards.folder}: was made with another tokenizer than {tokenizer.path}, whose "
            "ids mean the same"
            for part in self.stream.parts
            if part.shards.index["tokenizer"] != tokenizer.identity
        ] + self.evaluation.notes

    @classmethod
    def read(cls, settings: PretrainSettings, parallel: Parallel) -> "PretrainInputs":
        """Read everything. Raises UserError, before any work, for whatever is wrong."""
        model = open_start(settings, parallel, head="lm")
        lora = lora_of(settings.lora, model.checkpoint)
        tokenizer, max_seq_len = model.tokenizer, settings.batches.max_seq_len
        data, mask = settings.data, settings.data.document_mask
        part = parallel.rank, parallel.world_size
        stream = Stream.open(data.train_file, max_seq_len, mask, settings.run.seed, *part)
        perplexity = Perplexity.read(settings.evaluation, max_seq_len, mask, parallel)
        for opened in (stream, perplexity.stream):
            if opened is not None:
                check_vocabulary(opened, tokenizer, model.checkpoint.config.vocab_size, *part)
        limits = settings.evaluation.max_new_tokens, max_seq_len
        known = perplexity.metrics
        evaluation = SolverEvaluation.read(settings.evaluation, tokenizer, *limits, known)
        return cls(model, lora, evaluation, perplexity, stream)

    def evaluate(
        self,
        moment: str,
        number: int,
        model: Transformer,
        parallel: Parallel,
        log: RunLog,
        settings: PretrainSettings,
    ) -> dict[str, float]:
        """Perplexity, and a task's metrics where one was given; see `SolverEvaluation.run`."""
        metrics = self.perplexity.run(moment, number, model, parallel, log)
        how = model, self.model.tokenizer, parallel, log, settings
        return metrics | self.evaluation.run(moment, number, *how)


def check_vocabulary(
    stream: Stream, tokenizer: Tokenizer, vocab_size: int, part: int = 0, parts: int = 1
) -> None:
    """Raise UserError where a folder's ids mean other texts than the model's, or it lacks one.

    vocab_size: the model's; part, parts: of the ranks that share the reading.
    """
    for shards in (source.shards for source in stream.parts):
        if shards.index["vocabulary"] != tokenizer.vocabulary:
            raise UserError(
                f"{shards.folder}: was made with another vocabulary than that of {tokenizer.path}: "
                "ids would mean other texts; build the shards with this tokenizer"
            )
        if tokenizer.vocab_size > vocab_size:  # tokens that were added past the model's embeddings
            largest = shards.largest(part, parts)
            if largest >= vocab_size:
                raise UserError(
                    f"{shards.folder}: holds {tokenizer.text_of(largest)!r}, id {largest}, and the "
                    f"model, with {vocab_size} embeddings, lacks it; take it out of the texts, or "
                    "build the shards with --special_tokens text"
                )


@dataclass(frozen=True)
class VerifierInputs:
    """A verifier's training data and where it starts from.

    rows: comparisons, or graded responses; row_notes: what a user should know of the train file's
    rows; mixture: of how many they are.
    """

    model: OpenedModel
    lora: LoRAConfig | None
    evaluation: VerifierEvaluation
    rows: GradedData
    row_notes: list[str]
    mixture: Mixture

    @property
    def sequences(self) -> list[Sequence]:
        """All responses."""
        return [
            sequence
            for row in self.rows
            for sequence in (row.responses if isinstance(row, Comparison) else [row.sequence])
        ]

    @property
    def notes(self) -> list[str]:
        """What a user should know of the rows that are read, a sentence each."""
        return self.row_notes + self.evaluation.notes

    @classmethod
    def read(cls, settings: VerifierTrainSettings, parallel: Parallel) -> "VerifierInputs":
        """Read everything. Raises UserError, before any work, for whatever is wrong."""
        model, data = open_start(settings, parallel, head=None), settings.data
        limits = settings.batches.max_seq_len, settings.batches.strict_length
        kind, separator = settings.objective.objective, settings.objective.separator

        def rows_of(path: Named, most: int | None = None) -> tuple[GradedData, list[str]]:
            if kind == "pairwise":
                rules = PairRules(data.ranked_pairs, most, settings.run.seed)
                return comparisons(path, model.tokenizer, *limits, rules)
            return graded_rows(path, model.tokenizer, *limits, kind, separator)

        lora = lora_of(settings.lora, model.checkpoint)
        evaluation = VerifierEvaluation.read(settings.evaluation, rows_of, kind)
        rows = read_mixture(source_of(data), lambda path: rows_of(path, data.max_pairs_per_prompt))
        return cls(model, lora, evaluation, *rows)

    def save(
        self,
        model: Transformer,
        parallel: Parallel,
        evaluation: VerifierEvaluationSettings,
        log: RunLog,
        save_dir: str,
    ) -> None:
        """Write the verifier; with --normalize_scores also what its scores are scaled by."""
        notes = None
        if evaluation.normalize_scores:
            size = evaluation.eval_batch_size
            with plain(model, parallel) as (whole, division):
                mean, std = score_moments(whole, division, self.sequences, size, log)
            log.info(
                f"scores on the train file: mean {mean:.4f}, standard deviation {std:.4f}; stored "
                "with them"
            )
            notes = {SCORES_FILE: {"mean": mean, "std": std}}
        self.model.save(model, parallel, save_dir, notes)


@dataclass(frozen=True)
class PreferenceInputs:
    """What a policy learns preferences from, and where it starts.

    rows: comparisons or labelled outputs; prompts: of a run online, which has no rows; judge: what
    then scores samples; row_notes: what a user should know of the train file's rows; mixture: of
    how many they are.
    """

    model: OpenedModel
    lora: LoRAConfig | None
    evaluation: SolverEvaluation
    rows: list[Comparison] | list[Labelled]
    prompts: list[Prompt]
    judge: OpenedJudge | None
    row_notes: list[str]
    mixture: Mixture

    @property
    def notes(self) -> list[str]:
        """What a user should know of the rows that are read, a sentence each."""
        return self.row_notes + self.evaluation.notes

    @classmethod
    def read(cls, settings: PreferenceTrainSettings, parallel: Parallel) -> "PreferenceInputs":
        """Read everything. Raises UserError, before any work, for whatever is wrong."""
        model = open_start(settings, parallel, head="lm")
        lora = lora_of(settings.lora, model.checkpoint)
        tokenizer, source = model.tokenizer, source_of(settings.data)
        batches, cache = settings.batches, settings.preference.cache_reference
        if cache is not None:
            check_writable(cache, ".safetensors", settings.data.train_file)
            if Path(cache).resolve().parent == Path(settings.model.ckpt_dir).resolve():
                raise UserError(
                    f"--cache_reference {cache}: lies among the weights of --ckpt_dir, and would "
                    "make another checkpoint of it; name another folder"
                )
            check_cache(cache)
        limits = settings.generation.max_new_tokens, batches.max_seq_len
        evaluation = SolverEvaluation.read(settings.evaluation, tokenizer, *limits)
        if settings.online.online:
            judge = OpenedJudge.read(settings, settings.evaluation, tokenizer, parallel)
            prompts, notes, mixture = read_mixture(
                source, lambda path: judge.prompts(path, tokenizer, batches.max_seq_len)
            )
            return cls(model, lora, evaluation, [], prompts, judge, notes, mixture)
        data = settings.data
        rules = PairRules(data.ranked_pairs, data.max_pairs_per_prompt, settings.run.seed, True)
        limits = batches.max_seq_len, batches.strict_length
        rows: list[Comparison] | list[Labelled]
        if set(settings.preference.names) <= {"kto", "sft"}:
            rows, notes, mixture = read_mixture(
                source, lambda path: labelled(path, tokenizer, *limits, rules)
            )
        else:
            compared, notes, mixture = read_mixture(
                source, lambda path: comparisons(path, tokenizer, *limits, rules)
            )
            if "kto" in settings.preference.names:
                check_sides(compared, source)
            rows = compared
        return cls(model, lora, evaluation, rows, [], None, notes, mixture)


@dataclass(frozen=True)
class DistillationInputs:
    """What a student learns from, and where it starts.

    sequences: with outputs, where it has any to learn from; teacher: a model, or kept: its numbers;
    row_notes: what a user should know of the train file's rows; mixture: of how many they are.
    """

    model: OpenedModel
    lora: LoRAConfig | None
    evaluation: SolverEvaluation
    sequences: Sequences
    teacher: OpenedModel | None
    kept: TopK | None
    row_notes: list[str]
    mixture: Mixture

    @property
    def notes(self) -> list[str]:
        """What a user should know of the rows that are read, a sentence each."""
        return self.row_notes + self.evaluation.notes

    @classmethod
    def read(cls, settings: DistillTrainSettings, parallel: Parallel) -> "DistillationInputs":
        """Read everything. Raises UserError, before any work, for whatever is wrong."""
        model = open_start(settings, parallel, head="lm")
        lora = lora_of(settings.lora, model.checkpoint)
        tokenizer, source = model.tokenizer, source_of(settings.data)
        batches, of_teacher = settings.batches, settings.teacher
        limits = settings.generation.max_new_tokens, batches.max_seq_len
        evaluation = SolverEvaluation.read(settings.evaluation, tokenizer, *limits)
        if of_teacher.teacher_ckpt_dir is None:
            kept, notes = top_k_rows(source, tokenizer, batches.max_seq_len, batches.strict_length)
            mixture = Mixture((len(kept.sequences),))
            return cls(model, lora, evaluation, kept.sequences, None, kept, notes, mixture)
        how = batches.max_seq_len, batches.strict_length, mask_of(settings.loss)
        sequences, notes, mixture = read_mixture(
            source,
            lambda path: (
                prompt_sequences(path, tokenizer, batches.max_seq_len)
                if of_teacher.on_policy == 1
                else solver_sequences(path, tokenizer, *how)
            ),
        )
        teacher = open_model(
            ModelSettings(ckpt_dir=of_teacher.teacher_ckpt_dir), parallel, head="lm"
        )
        if teacher.tokenizer.vocabulary != tokenizer.vocabulary:
            raise UserError(
                f"--teacher_ckpt_dir {of_teacher.teacher_ckpt_dir}: {teacher.tokenizer.path} has "
                f"another vocabulary than {tokenizer.path}: ids would mean other texts; a teacher "
                "must share the student's"
            )
        degree, mp_size = of_teacher.teacher_model_parallel_size, parallel.mp_size
        if degree is not None and mp_size % degree:
            raise UserError(
                f"--teacher_model_parallel_size {degree} does not divide the {mp_size} ranks that "
                "share a model in training (--model_parallel_size)"
            )
        if degree not in (None, mp_size) and parallel.pp_size > 1:
            raise UserError(
                f"--teacher_model_parallel_size {degree}: with --pipeline_parallel_size the "
                f"teacher's stages lie on {mp_size} ranks each, as the student's do: leave it out"
            )
        if degree in (None, mp_size):  # at another degree it sees whole rows
            config = teacher.checkpoint.config
            check_heads(config, mp_size, parallel.context.size, "teacher")
        return cls(model, lora, evaluation, sequences, teacher, None, notes, mixture)


def source_of(data: DataSettings | PromptSettings) -> Source:
    """What the rows to train on are read from, with what they go through."""
    return Source(data.train_file, RowMap(data.map, data.map_workers) if data.map else None)


def mask_of(loss: LossMaskSettings) -> LossMask:
    """Which tokens the settings let a solver be trained on."""
    return LossMask(loss.loss_on, *loss.markers)


def open_start(settings: TrainSettings, parallel: Parallel, head: str | None) -> OpenedModel:
    """The model to start from, and whether what is made of it can be written."""
    if settings.run.fp8:
        check_device(parallel.device)
    model, save_dir = settings.model, settings.saving.save_dir
    places = Places.of(settings.saving.log_dir, save_dir)
    written = {"save_dir": save_dir}
    if settings.evaluation.keep_best:
        written["keep_best"] = places.best
    if save_dir:  # a dry run may have none
        check_log_dir(places.logs, model.ckpt_dir, model.adapter_dir)
        read = {
            "ckpt_dir": model.ckpt_dir,
            "adapter_dir": model.adapter_dir,
            "train_file": settings.data.train_file or None,
        }
        check_apart(written, {**read, "log_dir": places.logs})
    own_dtype = settings.run.dtype is None
    opened = open_model(model, parallel, head, own_dtype=own_dtype, seed=settings.run.seed)
    check_heads(opened.checkpoint.config, parallel.mp_size, parallel.context.size)
    check_trainable(
        settings.optimizer,
        settings.lora,
        opened.checkpoint.config,
        str(opened.checkpoint.folder),
    )
    if save_dir:
        dtype = pick_dtype(settings.run.dtype, parallel.device)
        for folder in written.values():
            check_save(folder, opened.checkpoint, dtype, own_dtype, len(written))
    return opened
