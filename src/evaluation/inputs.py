"""What the evaluation scripts read, opened and checked before any work."""

from collections import Counter
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

from src.checkpoint.save import read_score_moments
from src.data.encoding import (
    WRONG,
    Comparison,
    comparisons,
    prompts_of,
    scored_sequences,
    step_places,
)
from src.data.messages import Question
from src.data.rows import INDEX, SAMPLE, is_truncated, read_rows
from src.errors import UserError
from src.evaluation.tasks import LabelledRows, read_labels
from src.generation.journal import Journal
from src.inputs import OpenedModel, check_log_dir, check_writable, open_model
from src.models.batch import Sequence
from src.parallel.setup import Parallel
from src.settings.model import ModelSettings
from src.settings.scripts import (
    EvaluatedModelSettings,
    SolverEvaluateSettings,
    VerifierEvaluateSettings,
)


@dataclass(frozen=True)
class SolverEvaluationInputs:
    """The task's rows, and a model to answer them or texts that do.

    notes: what a user should know of the rows; journal: what an earlier run finished; truncated:
    which of the texts the token limit cut, where their file says so.
    """

    data: LabelledRows
    notes: list[str]
    model: OpenedModel | None = None
    journal: Journal | None = None
    texts: list[str] = field(default_factory=list)
    truncated: list[bool] | None = None

    @classmethod
    def read(cls, settings: SolverEvaluateSettings, parallel: Parallel) -> "SolverEvaluationInputs":
        """Read everything. Raises UserError, before any work, for whatever is wrong."""
        rows, source = settings.rows, _model_settings(settings.model)
        check_log_dir(rows.log_dir, settings.model.ckpt_dir)
        data = read_labels(rows.task, rows.label_file, rows.rule)
        if source is None:
            texts, truncated, notes = _texts(settings, data)
            return cls(data, data.rows.notes + notes, texts=texts, truncated=truncated)
        model, max_seq_len = open_model(source, parallel, "lm"), settings.batches.max_seq_len
        asked = data.instructions, model.tokenizer, max_seq_len, rows.label_file
        _, too_long = prompts_of(*asked, fate=WRONG)
        journal = Journal(Path(rows.log_dir) / "predictions.jsonl", settings, parallel)
        return cls(data, data.rows.notes + too_long, model, journal)


def _model_settings(model: EvaluatedModelSettings) -> ModelSettings | None:
    if model.ckpt_dir is None:
        return None
    return ModelSettings(**vars(model))


def _texts(
    settings: SolverEvaluateSettings, data: LabelledRows
) -> tuple[list[str], list[bool] | None, list[str]]:
    """The answers to grade, which of them were cut (None where no row says), and notes.

    Raises UserError when they are not as many as the task's rows need, or answer other ones.
    """
    file, samples = settings.rows.prediction_file, settings.generation.num_samples
    assert file is not None
    given = read_rows(file, {"output": SAMPLE}, unread=None)
    if len(given) != len(data.rows) * samples:
        raise UserError(
            f"{file} has {len(given)} rows and {settings.rows.label_file} {len(data.rows)}: "
            f"{samples} for each (--num_samples) are needed"
        )

    # In the order of the task's rows, where they tell their own.
    told = Counter(row["index"] for row in given if INDEX.accepts(row.get("index")))
    if told == dict.fromkeys(range(len(data.rows)), samples):
        given.sort(key=itemgetter("index"))
    for i, row in enumerate(given):
        asked, index = data.instructions[i // samples], row.get("index")
        elsewhere = INDEX.accepts(index) and index != i // samples
        if row.get("instruction", asked) != asked or elsewhere:
            raise UserError(
                f"{file}: row {i} (from 0) would be graded as an answer to row {i // samples} of "
                f"{settings.rows.label_file}, and says that it answers another "
                f"({_other(row, asked, index)}); give the label file that the answers are for, "
                "or leave that field out"
            )

    cut = [is_truncated(row) for row in given]
    unsaid, notes = cut.count(None), []
    if 0 < unsaid < len(cut):
        notes = [f"{unsaid} of {len(cut)} rows of {file} do not say whether they were cut"]
    texts = [row["output"] for row in given]
    return texts, None if unsaid == len(cut) else [bool(x) for x in cut], notes


def _other(row: dict, asked: Question, index: object) -> str:
    """What a prediction says of its question, for a message."""
    said = row.get("instruction", asked)
    return f'"instruction": {str(said)[:60]!r}' if said != asked else f'"index": {index!r}'


@dataclass(frozen=True)
class VerifierEvaluationInputs:
    """The verifier, and pairs to measure it on or sequences to score.

    notes: what a user should know of their rows; moments: what scores are centred and scaled by, if
    that is stored with the verifier; places: where each sequence is scored, if not at its end.
    """

    model: OpenedModel
    pairs: list[Comparison]
    sequences: list[Sequence]
    notes: list[str]
    moments: tuple[float, float] | None
    places: list[list[int]] | None

    @classmethod
    def read(
        cls, settings: VerifierEvaluateSettings, parallel: Parallel
    ) -> "VerifierEvaluationInputs":
        """Read everything. Raises UserError, before any work, for whatever is wrong."""
        rows, max_seq_len = settings.rows, settings.batches.max_seq_len
        model = open_model(settings.model, parallel, "score")
        pairs: list[Comparison] = []
        sequences: list[Sequence] = []
        notes: list[str] = []
        if rows.label_file is not None and rows.log_dir is not None:
            check_log_dir(rows.log_dir, settings.model.ckpt_dir)
            tokenizer, must_fit = model.tokenizer, rows.strict_length
            pairs, notes = comparisons(rows.label_file, tokenizer, max_seq_len, must_fit)
        elif rows.input_file is not None and rows.output_file is not None:
            check_writable(rows.output_file, ".jsonl", rows.input_file)
            sequences, notes = scored_sequences(rows.input_file, model.tokenizer, max_seq_len)
        moments, places = read_score_moments(model.checkpoint.folder), None
        if (separator := rows.separator) is not None:
            places = [step_places(model.tokenizer, s, separator) for s in sequences]
        return cls(model, pairs, sequences, notes, moments, places)
