"""A run of distillation put together from its settings, its inputs and its loaded student."""

from dataclasses import replace

import torch
from torch import Tensor

from src.checkpoint.load import load_model
from src.checkpoint.source import Checkpoint
from src.models.config import ModelConfig
from src.models.layout import tensor_table
from src.models.transformer import Transformer
from src.parallel.setup import Parallel, agreed
from src.ppo.roles import Role, Stage
from src.settings.distillation import DistillTrainSettings
from src.trainer.distillation import (
    Distance,
    DistillationObjective,
    KeptTeacher,
    LiveTeacher,
    Teacher,
)
from src.trainer.fit import rows_per_step
from src.trainer.inputs import DistillationInputs
from src.trainer.sampling import sampler


def make_objective(
    settings: DistillTrainSettings,
    inputs: DistillationInputs,
    student: Transformer,
    dtype: torch.dtype,
    parallel: Parallel,
) -> DistillationObjective:
    """What is minimised, with its teacher."""
    of_teacher, batches = settings.teacher, settings.batches
    distance = Distance(of_teacher.constant_beta, settings.generation.temperature)
    teacher: Teacher
    if inputs.kept is not None:
        kept = inputs.kept
        distance = replace(distance, temperature=kept.temperature)
        teacher = KeptTeacher(kept.ids, kept.logprobs, distance, parallel.device)
    else:
        assert inputs.teacher is not None
        checkpoint = inputs.teacher.checkpoint
        teacher = load_teacher(settings, checkpoint, student.config, distance, dtype, parallel)
    sample = None
    if of_teacher.on_policy:
        at_once, limit = settings.evaluation.eval_batch_size, batches.max_seq_len
        options = settings.generation, at_once, limit, settings.run.seed, parallel
        sample = sampler(student, inputs.model.tokenizer, *options)
    rows = rows_per_step(batches, parallel.data_size)
    return DistillationObjective(
        inputs.sequences,
        teacher,
        parallel,
        sample,
        of_teacher.on_policy,
        rows,
        settings.run.seed,
    )


def load_teacher(
    settings: DistillTrainSettings,
    checkpoint: Checkpoint,
    student: ModelConfig,
    distance: Distance,
    dtype: torch.dtype,
    parallel: Parallel,
) -> LiveTeacher:
    """The trunk at the teacher's own degree; of the output layer what the student's ranks need."""
    of_teacher = settings.teacher
    degree, division = of_teacher.teacher_model_parallel_size, parallel
    if degree not in (None, parallel.mp_size):
        division = parallel.divided(degree)
    head = agreed(lambda: output_rows(checkpoint, student, dtype, parallel))
    trunk = load_model(checkpoint, division, dtype, "trunk", 0, of_teacher.teacher_quantize)
    stage = Stage(of_teacher.offload_teacher, parallel.device)
    stage.add(Role("teacher", trunk.eval().requires_grad_(False), division))
    return LiveTeacher(stage, head, distance, parallel)


def output_rows(
    checkpoint: Checkpoint, student: ModelConfig, dtype: torch.dtype, parallel: Parallel
) -> Tensor:
    """The output layer's rows of this rank's part of the student's vocabulary.

    A teacher may have more rows than the student, or fewer: ids past its own stay 0, and have no
    text. Nothing where the student's head is not: in a pipeline before the last stage. →
    [vocabulary / n, dim].
    """
    tied = student.tie_word_embeddings
    spec = tensor_table(student)["tok_embeddings.weight" if tied else "output.weight"]
    start, stop = spec.local_range(parallel.mp_rank, parallel.mp_size)
    teacher = checkpoint.config
    name = "tok_embeddings.weight" if teacher.tie_word_embeddings else "output.weight"
    start, stop = (min(i, teacher.vocab_size) for i in (start, stop))
    size = spec.local_shape(parallel.mp_size)[0]
    if parallel.pp_rank < parallel.pp_size - 1:
        start = stop = size = 0
    rows = torch.zeros(size, teacher.dim, dtype=dtype, device=parallel.device)
    rows[: stop - start] = checkpoint.read(name, 0, start, stop).to(rows)
    return rows
