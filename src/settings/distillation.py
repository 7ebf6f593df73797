"""The settings of distillation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from src.settings.declaration import (
    CONTENT,
    MAY_CHANGE,
    AtLeast,
    Between,
    Bounds,
    Settings,
    idle,
)
from src.settings.generation import GenerationSettings
from src.settings.model import LossMaskSettings
from src.settings.scripts import TrainSettings
from src.settings.training import PolicyEvaluationSettings

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}  # js has its own


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(Settings):
    """The teacher, and how far from it is measured."""

    teacher_ckpt_dir: Annotated[
        str | None,
        CONTENT,
        "a solver with the student's vocabulary, of any size and family; without it the train file "
        "is what solver_score.py --top_k_logprobs wrote with the teacher",
    ] = None
    divergence: Annotated[
        Literal["forward_kl", "reverse_kl", "js"],
        "KL(teacher ‖ student) (forward_kl), KL(student ‖ teacher) (reverse_kl), or the "
        "Jensen-Shannon divergence between, with --beta (js)",
    ] = "forward_kl"
    beta: Annotated[
        float | None,
        Bounds(0, 0.999, is_open=True),
        "of js: the teacher's share of the mixture, towards 0 like forward_kl, towards 1 like "
        "reverse_kl; 0.5 when not given",
    ] = None
    on_policy: Annotated[
        float,
        Between(0, 1),
        "share of the rows that the student answers itself, at each step anew, in place of the "
        "train file's outputs; with 1 these need not be there",
    ] = 0.0
    teacher_quantize: Annotated[
        Literal["nf4", "int8"] | None,
        "keep the linear layers of the teacher in 4 or 8 bits",
    ] = None
    teacher_model_parallel_size: Annotated[
        int | None,
        AtLeast(1),
        MAY_CHANGE,
        "ranks per teacher, a divisor of --model_parallel_size",
    ] = None
    offload_teacher: Annotated[
        bool, MAY_CHANGE, "keep the teacher in host memory while it is not needed"
    ] = False

    @property
    def is_live(self) -> bool:
        """Whether there is a model, and not its numbers alone."""
        return self.teacher_ckpt_dir is not None

    @property
    def constant_beta(self) -> float:
        """β of the divergence: 0 is the forward, 1 the reverse KL."""
        return BETAS.get(self.divergence, 0.5 if self.beta is None else self.beta)

    def problems(self) -> Iterator[str]:
        if self.beta is not None and self.divergence != "js":
            yield f"--beta {self.beta}: is js's, and --divergence is {self.divergence}"
        if not self.is_live:
            of_model = ("teacher_quantize", "teacher_model_parallel_size", "offload_teacher")
            yield from idle(self, of_model, "without --teacher_ckpt_dir")


@dataclass(frozen=True, kw_only=True)
class DistillTrainSettings(TrainSettings):
    """All that distill_train.py knows."""

    loss: LossMaskSettings = LossMaskSettings()
    teacher: TeacherSettings = TeacherSettings()
    generation: GenerationSettings = GenerationSettings()
    evaluation: PolicyEvaluationSettings = PolicyEvaluationSettings()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        generation, task = self.generation, self.evaluation.task
        if task and self.evaluation.label_file is None:
            yield f"--task {task}: has no effect without --label_file to measure on"
        teacher, is_plan = self.teacher, self.dry_run.dry_run  # which may lack folders
        if teacher.on_policy and not teacher.is_live and not is_plan:
            yield (
                f"--on_policy {teacher.on_policy}: a teacher must see the student's outputs; give "
                "--teacher_ckpt_dir"
            )
        if generation.temperature == 0:
            yield "--temperature 0: both models' logits are divided by it; give one above 0"
        if not teacher.is_live and generation.temperature != 1:
            yield (
                f"--temperature {generation.temperature}: what solver_score.py wrote is at its own "
                "--temperature; leave it out"
            )
        masks = ("loss_on", "response_template")
        if not teacher.is_live and not is_plan:
            yield from idle(self.loss, masks, "on what solver_score.py wrote")
        elif teacher.on_policy == 1:
            yield from idle(self.loss, masks, "with --on_policy 1: the student's outputs count")
        if not teacher.on_policy:
            yield from idle(
                generation, ("min_new_tokens", "top_p", "top_k", "min_p"), "without --on_policy"
            )
