"""Which script knows which settings, and with which defaults. (PPO's: src/settings/ppo.py.)"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from src.settings.declaration import (
    CONTENT,
    MAY_CHANGE,
    ROWS,
    WRITTEN,
    AtLeast,
    Bounds,
    Settings,
    Unit,
    idle,
)
from src.settings.generation import (
    MaxNewTokens,
    SoftmaxSettings,
    StoppedDecodingSettings,
)
from src.settings.model import (
    AdaptedModelSettings,
    ArchitectureSettings,
    BatchSettings,
    DataSettings,
    LossMaskSettings,
    ModelSettings,
    PairDataSettings,
    StrictLength,
    TrainingBatchSettings,
    unescaped,
)
from src.settings.rewards import BestOfSettings, JudgeSettings, RewardSettings
from src.settings.run import DryRunSettings, RunSettings, TrainingRunSettings
from src.settings.training import (
    DropoutLoRASettings,
    EvaluationSettings,
    ModelSavingSettings,
    OptimizerSettings,
    Quantize,
    Rule,
    TaskEvaluationSettings,
    idle_fp8,
    not_on_cpu,
    unshareable,
)

# --- Training -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """What the scripts that train on rows have in common."""

    model: ModelSettings
    data: DataSettings
    batches: TrainingBatchSettings = TrainingBatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    lora: DropoutLoRASettings = DropoutLoRASettings()
    run: TrainingRunSettings = TrainingRunSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    saving: ModelSavingSettings
    dry_run: DryRunSettings = DryRunSettings()

    @classmethod
    def may_lack_required(cls, values: Mapping[str, Any]) -> bool:
        return values.get("dry_run") is True

    def problems(self) -> Iterator[str]:
        yield from self.saving.unchangeable(type(self))
        yield from idle_fp8(self.run, self.lora)
        yield from unshareable(self.run, self.lora)
        yield from not_on_cpu(self.run, self.optimizer)


@dataclass(frozen=True, kw_only=True)
class SolverEvaluationSettings(TaskEvaluationSettings):
    """Evaluation before the first step, and after each epoch or as --eval_every says."""

    max_new_tokens: MaxNewTokens = 256


@dataclass(frozen=True, kw_only=True)
class SolverTrainSettings(TrainSettings):
    """All that solver_train.py knows."""

    loss: LossMaskSettings = LossMaskSettings()
    evaluation: SolverEvaluationSettings = SolverEvaluationSettings()


@dataclass(frozen=True, kw_only=True)
class VerifierEvaluationSettings(EvaluationSettings):
    """Evaluation before the first step, and after each epoch or as --eval_every says."""

    task: Annotated[str | None, "what the evaluation is called in the log and in TensorBoard"] = (
        None
    )
    label_file: Annotated[
        str | None,
        CONTENT,
        ROWS,
        "held-out rows like the train file's; the share of pairs that the verifier ranks right is "
        "measured",
    ] = None
    normalize_scores: Annotated[
        bool,
        "after training, measure the mean and the standard deviation of the scores of the train "
        "file's outputs, and store them with the verifier: PPO's reward and verifier_evaluate.py's "
        "scores are then centred and scaled by them",
    ] = False


@dataclass(frozen=True, kw_only=True)
class VerifierObjectiveSettings(Settings):
    """What the verifier learns."""

    objective: Annotated[
        Literal["pairwise", "pointwise", "classification"],
        "to rank the better output higher (pairwise), a score (pointwise), or the log odds of a "
        "label, true or false (classification)",
    ] = "pairwise"
    step_separator: Annotated[
        str | None,
        "with pointwise and classification: what ends a step of an output, such as a line break; "
        "each step has a score or a label, and is judged where it ends. \\n is a line break",
    ] = None

    @property
    def separator(self) -> str | None:
        """What ends a step."""
        return unescaped(self.step_separator)

    def problems(self) -> Iterator[str]:
        if self.step_separator is not None and self.objective == "pairwise":
            yield "--step_separator: has no effect with --objective pairwise"
        if self.step_separator == "":
            yield "--step_separator: is empty"


@dataclass(frozen=True, kw_only=True)
class VerifierTrainSettings(TrainSettings):
    """All that verifier_train.py knows."""

    data: PairDataSettings
    objective: VerifierObjectiveSettings = VerifierObjectiveSettings()
    evaluation: VerifierEvaluationSettings = VerifierEvaluationSettings(eval_batch_size=64)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        kind = self.objective.objective
        if kind != "pairwise":
            names = ("max_pairs_per_prompt", "ranked_pairs")
            yield from idle(self.data, names, f"with --objective {kind}")


# --- Using a model --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MemoryDryRunSettings(DryRunSettings):
    """Dry run."""

    dry_run: Annotated[
        bool,
        MAY_CHANGE,
        "only print what each rank would hold on the device and in host memory; --model_type alone "
        "is enough",
    ] = False


@dataclass(frozen=True, kw_only=True)
class PlannedSettings(Settings):
    """What the scripts that generate have in common."""

    @classmethod
    def may_lack_required(cls, values: Mapping[str, Any]) -> bool:
        return values.get("dry_run") is True


@dataclass(frozen=True, kw_only=True)
class WeightSettings(Settings):
    """The weights in memory."""

    quantize: Quantize = None
    offload_params: Annotated[
        bool,
        MAY_CHANGE,
        "keep the layers' weights in host memory, for a model larger than the device's: they come "
        "one layer after the other, each while the one before it is computed. Many sequences at a "
        "time (--max_batch_size) hide that; results are the same",
    ] = False


@dataclass(frozen=True, kw_only=True)
class OutputSettings(Settings):
    """Rows in and out."""

    input_file: Annotated[
        str,
        CONTENT,
        ROWS,
        'rows with "instruction" (for scores also "output"): a file, a folder, a pattern or a data '
        "set (docs/data.md)",
    ]
    output_file: Annotated[str, MAY_CHANGE, WRITTEN, ".jsonl to write"]


@dataclass(frozen=True, kw_only=True)
class GenerationRowSettings(OutputSettings):
    """Rows in and out."""

    max_rows: Annotated[int | None, AtLeast(1), "only the first rows of the input"] = None


@dataclass(frozen=True, kw_only=True)
class SolverGenerateSettings(PlannedSettings):
    """All that solver_generate.py knows."""

    model: ModelSettings
    rows: GenerationRowSettings
    batches: BatchSettings = BatchSettings(max_batch_size=384)
    generation: StoppedDecodingSettings = StoppedDecodingSettings(temperature=0.0)
    best_of: BestOfSettings = BestOfSettings()
    judge: JudgeSettings = JudgeSettings()
    weights: WeightSettings = WeightSettings()
    run: RunSettings = RunSettings()
    dry_run: MemoryDryRunSettings = MemoryDryRunSettings()

    @property
    def rewards(self) -> RewardSettings:
        """What the samples are scored by."""
        return self.best_of.rewards

    def problems(self) -> Iterator[str]:
        if self.best_of.best_of is None:
            yield from idle(self.judge, self.judge.fields(), "without --best_of")
            return
        yield from self.judge.beside(self.rewards, "best_of")
        generation = self.generation
        if generation.num_samples == 1 or generation.temperature == 0:
            yield (
                f"--best_of {self.best_of.best_of} --num_samples {generation.num_samples} "
                f"--temperature {generation.temperature}: there is nothing to choose from; give "
                "more samples, and a temperature above 0"
            )


@dataclass(frozen=True, kw_only=True)
class ScoreOutputSettings(OutputSettings):
    """Rows in and out."""

    top_k_logprobs: Annotated[
        int,
        AtLeast(0, 10**5),
        "also write so many of the likeliest tokens at each place, with their log-probabilities: "
        "what distill_train.py takes in place of a teacher",
    ] = 0


@dataclass(frozen=True, kw_only=True)
class SolverScoreSettings(Settings):
    """All that solver_score.py knows."""

    model: ModelSettings
    rows: ScoreOutputSettings
    batches: BatchSettings = BatchSettings(max_batch_size=64)
    softmax: SoftmaxSettings = SoftmaxSettings()
    weights: WeightSettings = WeightSettings()
    run: RunSettings = RunSettings()

    def problems(self) -> Iterator[str]:
        if self.softmax.temperature == 0:
            yield (
                "--temperature 0: the log-probabilities of a greedy choice are 0 or minus "
                "infinity; give one above 0"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluatedModelSettings(AdaptedModelSettings):
    """The model and its tokenizer."""

    ckpt_dir: Annotated[
        str | None, CONTENT, "the solver: shards for any degree, or a Hugging Face folder"
    ] = None


@dataclass(frozen=True, kw_only=True)
class TaskRowSettings(Settings):
    """The task and the results."""

    task: Annotated[str, "what to evaluate on: GSM8K or MATH"]
    rule: Rule = None
    label_file: Annotated[
        str,
        CONTENT,
        ROWS,
        'the task\'s rows: "instruction" and "label", as dataset/build.py writes them, or the '
        'official files\': "question" and "answer" (GSM8K), "problem" and "solution" or "answer" '
        "(MATH, MATH-500)",
    ]
    log_dir: Annotated[str, MAY_CHANGE, WRITTEN, "for results.json and predictions.jsonl"]
    prediction_file: Annotated[
        str | None, CONTENT, ROWS, 'texts to grade, {"output"} per row, in place of a model\'s'
    ] = None


@dataclass(frozen=True, kw_only=True)
class SolverEvaluateSettings(PlannedSettings):
    """All that solver_evaluate.py knows."""

    rows: TaskRowSettings
    model: EvaluatedModelSettings = EvaluatedModelSettings()
    batches: BatchSettings = BatchSettings(max_batch_size=384)
    generation: StoppedDecodingSettings = StoppedDecodingSettings(temperature=0.0)
    weights: WeightSettings = WeightSettings()
    run: RunSettings = RunSettings()
    dry_run: MemoryDryRunSettings = MemoryDryRunSettings()

    def problems(self) -> Iterator[str]:
        grades = self.rows.prediction_file is not None
        generates = self.model.ckpt_dir is not None or (self.dry_run.dry_run and not grades)
        if generates == grades:
            yield (
                "give --ckpt_dir to generate answers, or --prediction_file to grade existing ones: "
                "one of the two"
            )
        if grades:
            with_model = ("quantize", "offload_params")
            yield from idle(self.weights, with_model, "with --prediction_file, without a model")
            yield from idle(self.dry_run, ("dry_run",), "with --prediction_file, without a model")


@dataclass(frozen=True, kw_only=True)
class PairOrRowSettings(Settings):
    """Pairs to measure, or rows to score."""

    label_file: Annotated[
        str | None, CONTENT, ROWS, "pairs to measure the accuracy on; needs --log_dir"
    ] = None
    log_dir: Annotated[
        str | None, MAY_CHANGE, WRITTEN, "for results.json and predictions.jsonl"
    ] = None
    input_file: Annotated[str | None, CONTENT, ROWS, "rows to score; needs --output_file"] = None
    output_file: Annotated[str | None, MAY_CHANGE, WRITTEN, ".jsonl to write"] = None
    strict_length: StrictLength = False
    step_separator: Annotated[
        str | None,
        "score each step of the rows' outputs: what ends one, as in training",
    ] = None

    @property
    def separator(self) -> str | None:
        """What ends a step."""
        return unescaped(self.step_separator)

    def problems(self) -> Iterator[str]:
        if self.step_separator is not None and self.input_file is None:
            yield "--step_separator: has no effect without --input_file"
        measure, score = (self.label_file, self.log_dir), (self.input_file, self.output_file)
        half = any(None in pair and pair != (None, None) for pair in (measure, score))
        if (None in measure) == (None in score) or half:
            yield (
                "give --label_file with --log_dir to measure, or --input_file with --output_file "
                "to score"
            )


@dataclass(frozen=True, kw_only=True)
class VerifierEvaluateSettings(Settings):
    """All that verifier_evaluate.py knows."""

    model: ModelSettings
    rows: PairOrRowSettings = PairOrRowSettings()
    batches: BatchSettings = BatchSettings(max_batch_size=64)
    weights: WeightSettings = WeightSettings()
    run: RunSettings = RunSettings()


# --- Checkpoints ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ShardSettings(Settings):
    """The shards."""

    ckpt_file: Annotated[
        str | None, CONTENT, "the checkpoint: a folder or a single file, .gguf among them"
    ] = None
    adapter_dir: Annotated[
        str | None, CONTENT, "a LoRA adapter in PEFT's format to add to the weights"
    ] = None
    save_path: Annotated[
        str | None,
        MAY_CHANGE,
        WRITTEN,
        "the folder to write; replaced as a whole when it already holds a checkpoint",
    ] = None
    n: Annotated[
        int,
        Bounds(1, 10_000, because=": at least one shard is needed"),
        "how many shards in all, one per model-parallel rank (of each stage): any number",
    ] = 8
    stages: Annotated[
        int,
        Bounds(1, 10_000),
        "write the layers in so many stages, as a pipeline cuts them, of --n / --stages shards "
        "each: a file holds one stage's layers alone. Read at any layout, like other shards",
    ] = 1
    dry_run: Annotated[
        bool,
        "only print the names, shapes and bytes of each rank; needs no weights: --model_type or "
        "--config_file will do",
    ] = False
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        "to write in; each tensor's own when not given, fp32 for quantised ones of a GGUF file. "
        "What a dry run counts bytes in; bf16 without a checkpoint",
    ] = None

    def problems(self) -> Iterator[str]:
        if self.n % self.stages:
            yield (
                f"--n {self.n} --stages {self.stages}: every stage has as many shards, and --n is "
                f"all of theirs; give a multiple of {self.stages} as --n, or another --stages"
            )
        if self.adapter_dir is not None and self.ckpt_file is None:
            yield "--adapter_dir: has no effect without --ckpt_file"
        if not self.dry_run and (self.ckpt_file is None or self.save_path is None):
            yield "--ckpt_file and --save_path are needed (but for --dry_run)"


@dataclass(frozen=True, kw_only=True)
class CheckpointSplitSettings(Settings):
    """All that checkpoint_split.py knows."""

    shards: ShardSettings = ShardSettings()
    model: ArchitectureSettings = ArchitectureSettings()


@dataclass(frozen=True, kw_only=True)
class MergedFolderSettings(Settings):
    """The folder."""

    save_dir: Annotated[
        str,
        MAY_CHANGE,
        WRITTEN,
        "the folder to write; replaced as a whole when it already holds a checkpoint",
    ]
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        "to write in; the checkpoint's own when not given",
    ] = None


@dataclass(frozen=True, kw_only=True)
class CheckpointMergeSettings(Settings):
    """All that checkpoint_merge.py knows."""

    model: ModelSettings
    folder: MergedFolderSettings


@dataclass(frozen=True, kw_only=True)
class InspectedModelSettings(AdaptedModelSettings):
    """The tokenizer."""

    ckpt_dir: Annotated[
        str | None, CONTENT, "the model whose tokenizer and chat template read the rows"
    ] = None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.ckpt_dir is None:
            if self.tokenizer_file is None:
                yield "--ckpt_dir or --tokenizer_file: tokens are counted; give one of the two"
            names = ("config_file", "adapter_dir")
            yield from idle(self, names, "without --ckpt_dir")


@dataclass(frozen=True, kw_only=True)
class InspectionSettings(Settings):
    """What is shown."""

    kind: Annotated[
        Literal["auto", "solver", "verifier", "prompts"],
        "whose trainer reads the rows: solver_train.py and distill_train.py (solver), "
        "verifier_train.py and preference_train.py (verifier), ppo_train.py (prompts); auto: as "
        "the first row looks",
    ] = "auto"
    max_seq_len: Annotated[
        int, AtLeast(2), Unit("tokens"), "what it would leave out is counted, and of others"
    ] = 1024
    examples: Annotated[int, AtLeast(0, 1000), "rows to show, from all over the file"] = 3
    out: Annotated[str | None, WRITTEN, "also write a page, a .html file"] = None


@dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    """All that dataset/inspect.py knows."""

    model: InspectedModelSettings = InspectedModelSettings()
    data: DataSettings
    loss: LossMaskSettings = LossMaskSettings()
    shown: InspectionSettings = InspectionSettings()

    def problems(self) -> Iterator[str]:
        if self.shown.kind in ("verifier", "prompts"):
            names = ("loss_on", "response_template", "instruction_template")
            yield from idle(self.loss, names, f"with --kind {self.shown.kind}")
