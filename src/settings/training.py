"""How weights are trained: the optimizer, adapters, and what a training run leaves."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from src.settings.declaration import (
    CONTENT,
    FIXED,
    MAY_CHANGE,
    ROWS,
    WRITTEN,
    Above,
    AtLeast,
    Between,
    Bounds,
    Settings,
    Unit,
    declared,
)
from src.settings.parsing import nearest
from src.settings.run import TrainingRunSettings

Quantize = Annotated[
    Literal["nf4", "int8"] | None,
    "keep the linear layers' weights in 4 or 8 bits; in training that needs --lora_rank, whose "
    "adapter is not quantised",
]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """The optimizer and its schedule."""

    optimizer: Annotated[
        Literal["adamw", "adamw8bit", "muon"],
        FIXED,
        "adamw; adamw8bit, which keeps its two averages in 8 bits each; or muon, which makes the "
        "updates of matrices orthogonal (adapters' too) and keeps one average of them, beside "
        "AdamW for embedding, output, routers, norms and biases",
    ] = "adamw"
    lr: Annotated[float, Above(0), "the highest learning rate (of PPO's policy)"] = 1e-5
    epochs: Annotated[int, AtLeast(1), "passes over the train file"] = 1
    warmup: Annotated[
        float, Between(0, 0.999999), "share of the steps in which the learning rate rises"
    ] = 0.03
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], "how the learning rate falls afterwards"
    ] = "cosine"
    weight_decay: Annotated[float, Between(0, 1e6), "AdamW's, on matrices"] = 0.0
    beta1: Annotated[float, Between(0, 0.999999), "AdamW's decay of the gradient's mean"] = 0.9
    beta2: Annotated[
        float,
        Between(0, 0.999999),
        "AdamW's decay of the squared gradient's mean; lower adapts faster",
    ] = 0.999
    max_grad_norm: Annotated[float, Above(0), "a model's gradient is scaled down to this norm"] = (
        1.0
    )
    max_skipped_steps: Annotated[
        int,
        AtLeast(1, 10**9),
        "stop after so many steps in a row whose gradient norm was not finite; each is skipped, "
        "and counted",
    ] = 30
    freeze_layers: Annotated[
        int,
        AtLeast(0, 10**4),
        FIXED,
        "train neither the embedding nor this many layers from the bottom",
    ] = 0
    router_aux_loss_coef: Annotated[
        float | None,
        Between(0, 1e3),
        "weight of the experts' load-balancing loss; the model's own when not given",
    ] = None


@dataclass(frozen=True, kw_only=True)
class LoRASettings(Settings):
    """Adapters (LoRA)."""

    lora_rank: Annotated[
        int,
        Bounds(1, 10**5, also=(-1,), because=" (or -1, to train all weights)"),
        FIXED,
        "rank of the adapter; -1 trains all weights",
    ] = -1
    lora_alpha: Annotated[
        float | None,
        Above(0),
        "the adapter's output is scaled by lora_alpha / lora_rank; 16 when not given",
    ] = None
    lora_targets: Annotated[
        list[str] | None,
        FIXED,
        "layers to adapt, of wq,wk,wv,wo,w1,w2,w3; all when not given (with experts: attention's)",
    ] = None
    quantize: Quantize = None

    @property
    def dropout(self) -> float | None:
        """The share of inputs that an adapter drops in training, where that can be set."""
        return None

    @property
    def is_on(self) -> bool:
        """Whether an adapter is trained, and the weights are not."""
        return self.lora_rank != -1

    def problems(self) -> Iterator[str]:
        if self.is_on:
            return
        only_with_rank = ("lora_dropout", "lora_targets", "lora_alpha")
        without_effect = [name for name in only_with_rank if getattr(self, name, None)]
        if without_effect:
            flags = ", ".join(f"--{name}" for name in without_effect)
            yield f"{flags}: has no effect without --lora_rank"
        if self.quantize:
            yield (
                f"--quantize {self.quantize}: quantised weights cannot be trained; give "
                "--lora_rank too"
            )


def idle_fp8(run: TrainingRunSettings, lora: LoRASettings) -> Iterator[str]:
    """What is wrong with --fp8 beside weights that are kept in fewer bits."""
    if run.fp8 and lora.quantize:
        yield (
            f"--fp8: has no effect with --quantize {lora.quantize}, whose layers compute in bf16; "
            "give one of the two"
        )


def not_on_cpu(run: TrainingRunSettings, optimizer: OptimizerSettings) -> Iterator[str]:
    """What is wrong with an update on the CPU."""
    if run.cpu_adam and optimizer.optimizer == "muon":
        yield (
            "--cpu_adam: does not go with --optimizer muon, whose products of matrices are the "
            "device's; give --offload_optimizer alone, or --optimizer adamw"
        )


def unshareable(run: TrainingRunSettings, lora: LoRASettings) -> Iterator[str]:
    """What is wrong with weights that data-parallel ranks are to share."""
    if run.zero >= 2 and lora.quantize:
        yield (
            f"--zero {run.zero}: does not go with --quantize {lora.quantize}, whose codes are not "
            "shared; give --zero 1, or no --quantize"
        )


@dataclass(frozen=True, kw_only=True)
class DropoutLoRASettings(LoRASettings):
    """Adapters (LoRA)."""

    lora_dropout: Annotated[
        float | None,
        Between(0, 0.999),
        "share of the adapter's inputs that are dropped in training",
    ] = None

    @property
    def dropout(self) -> float | None:
        return self.lora_dropout


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Settings):
    """Evaluation before the first step, and after each epoch or as --eval_every says."""

    asked_by: ClassVar[str] = "--label_file"
    task: Annotated[
        str | None,
        "what to evaluate on, such as GSM8K or MATH; in PPO also whose rule is applied in the "
        "reward (GSM8K's when not given)",
    ] = None
    label_file: Annotated[str | None, CONTENT, ROWS, "the task's rows"] = None
    eval_every: Annotated[
        int | None,
        AtLeast(1, 10**9),
        Unit("steps"),
        "evaluate every so many steps (PPO: iterations); after each epoch when not given",
    ] = None
    keep_best: Annotated[
        str | None,
        "a metric of the evaluation, such as accuracy: the model is also saved, to SAVE_DIR-best, "
        "whenever it is higher than ever (PPO: ACTOR_SAVE_DIR-best)",
    ] = None
    eval_batch_size: Annotated[
        int, AtLeast(1), MAY_CHANGE, "sequences that an evaluation computes at a time, at most"
    ] = 384

    @property
    def is_asked(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.label_file is not None

    def problems(self) -> Iterator[str]:
        if self.is_asked:
            return
        if self.eval_every is not None:
            yield f"--eval_every {self.eval_every}: has no effect without {self.asked_by}"
        if self.keep_best is not None:
            yield (
                f"--keep_best {self.keep_best}: the evaluation is not asked for: give "
                f"{self.asked_by} (and --task, of a solver)"
            )


Rule = Annotated[
    str | None,
    "which of the task's rules is the accuracy, and in PPO the reward: official, strict_match, "
    "flexible_extract or numeric of GSM8K; boxed, numeric, loose or symbolic of MATH; each task's "
    "first when not given",
]


@dataclass(frozen=True, kw_only=True)
class RuledEvaluationSettings(EvaluationSettings):
    """Evaluation before the first step, and after each epoch or as --eval_every says."""

    rule: Rule = None

    def problems(self) -> Iterator[str]:
        if self.rule is not None and self.task is None:
            yield f"--rule {self.rule}: has no effect without --task"
        yield from super().problems()


@dataclass(frozen=True, kw_only=True)
class TaskEvaluationSettings(RuledEvaluationSettings):
    """Evaluation before the first step, and after each epoch or as --eval_every says."""

    def problems(self) -> Iterator[str]:
        if (self.task is None) != (self.label_file is None):
            yield (
                f"--task {self.task} --label_file {self.label_file}: evaluation needs both; give "
                "both or neither"
            )
        yield from super().problems()


@dataclass(frozen=True, kw_only=True)
class PolicyEvaluationSettings(RuledEvaluationSettings):
    """Evaluation before the first step, and after each epoch or as --eval_every says."""

    def problems(self) -> Iterator[str]:
        if self.task is None and self.label_file is not None:
            yield f"--label_file {self.label_file}: evaluation needs --task, too"
        yield from super().problems()


@dataclass(frozen=True, kw_only=True)
class SavingSettings(Settings):
    """Saving and going on."""

    save_every: Annotated[
        int | None,
        AtLeast(1, 10**9),
        Unit("steps"),
        MAY_CHANGE,
        "keep what is needed to go on, in SAVE_DIR-state (PPO: ACTOR_SAVE_DIR-state), every so "
        "many steps (PPO: iterations); without it only when SIGTERM or --max_minutes ends the run",
    ] = None
    keep: Annotated[int, AtLeast(1, 10**9), MAY_CHANGE, "so many of the newest of these stay"] = 2
    save_copies: Annotated[
        int | None,
        AtLeast(1, 10**4),
        Unit("nodes"),
        MAY_CHANGE,
        "where nodes share no folder: let each file of a step lie on so many of them, so that the "
        "run goes on without one that is lost; 2 when not given. 1: each keeps its own files alone",
    ] = None
    resume: Annotated[
        str,
        MAY_CHANGE,
        "auto goes on from the newest there, if the run is the same (a finished one says so); none "
        "begins anew; or the path of one of them",
    ] = "auto"
    resume_changed: Annotated[
        list[str] | None,
        MAY_CHANGE,
        "settings, such as lr,reward_file, that may differ from those of the run that is gone on "
        "from: the new ones hold from there on, and the log says so. All others must be as they "
        "were",
    ] = None
    max_minutes: Annotated[
        float | None,
        Above(0, 10**7),
        Unit("minutes"),
        MAY_CHANGE,
        "save and end with exit code 75 before the process is so old, as the longest step and the "
        "longest save so far tell: for jobs that are ended at a limit. The same command goes on",
    ] = None
    straggler_window: Annotated[
        int | None,
        AtLeast(2, 10**6),
        Unit("steps"),
        MAY_CHANGE,
        "compare the ranks' phases over so many steps (PPO: iterations), and name in the log the "
        "rank that takes a quarter longer than the others, if there is one; none: do not",
    ] = 50
    log_dir: Annotated[
        str | None,
        MAY_CHANGE,
        WRITTEN,
        "for the log, TensorBoard events and evaluation results; SAVE_DIR-logs (PPO: "
        "ACTOR_SAVE_DIR-logs) when not given",
    ] = None

    def problems(self) -> Iterator[str]:
        if self.resume_changed is not None and self.resume == "none":
            names = ",".join(self.resume_changed)
            yield f"--resume_changed {names}: has no effect with --resume none, which begins anew"

    def copies(self, nodes: int) -> int:
        """How many nodes a file of a step is to lie on. nodes: that share no folder."""
        return min(nodes, self.save_copies or 2)

    @property
    def named(self) -> list[str]:
        """The names in resume_changed, without the blanks of "lr, seed"."""
        return [name.strip() for name in self.resume_changed or []]

    def unchangeable(self, script: type[Settings]) -> Iterator[str]:
        """What is wrong with the names in resume_changed. script: whose settings they are."""
        settings = declared(script)
        for name in self.named:
            if name not in settings:
                near = nearest(name, settings)
                yield f"--resume_changed {name}: there is no such setting{near}"
            elif FIXED in settings[name].marks:
                yield f"--resume_changed {name}: it {FIXED.value}; give --resume none"


@dataclass(frozen=True, kw_only=True)
class ModelSavingSettings(SavingSettings):
    """Saving and going on."""

    save_dir: Annotated[
        str,
        MAY_CHANGE,
        WRITTEN,
        "the folder for the trained model; replaced as a whole when it already holds a checkpoint",
    ]
    profile: Annotated[
        bool,
        MAY_CHANGE,
        "write a trace of steps 4 and 5 for https://ui.perfetto.dev to the log folder, one file "
        "per rank",
    ] = False
