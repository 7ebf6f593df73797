"""The settings of policy optimisation; what each does to the numbers: docs/ppo.md."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

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
    Choices,
    Settings,
    Unit,
    idle,
)
from src.settings.generation import GenerationSettings
from src.settings.model import MapSettings, PackedBatchSettings, TextModelSettings
from src.settings.rewards import RewardSettings
from src.settings.run import DryRunSettings, TrainingRunSettings
from src.settings.training import (
    LoRASettings,
    OptimizerSettings,
    PolicyEvaluationSettings,
    SavingSettings,
    idle_fp8,
    not_on_cpu,
    unshareable,
)


@dataclass(frozen=True)
class AdvantageKind:
    """What goes with a way of computing advantages, where a flag does not say it.

    needs_value: there is a value model; is_grouped: each prompt's samples are compared; level, kl:
    what the papers take for --loss_level and --kl.
    """

    needs_value: bool = False
    is_grouped: bool = False
    level: str = "token"
    kl: str = "k1"


ADVANTAGES = {
    "gae": AdvantageKind(needs_value=True),
    "grpo": AdvantageKind(is_grouped=True, level="sequence", kl="k3"),
    "dr_grpo": AdvantageKind(is_grouped=True, level="constant", kl="k3"),
    "rloo": AdvantageKind(is_grouped=True),
    "reinforce++": AdvantageKind(),
}
SHAPING = ("reward_norm", "reward_scale", "reward_bias", "reward_clip")


@dataclass(frozen=True, kw_only=True)
class RoleSettings(TextModelSettings):
    """The roles' models, and the actor's tokenizer."""

    actor_ckpt_dir: Annotated[str, CONTENT, "the solver to start from; also the reference"]
    actor_save_dir: Annotated[
        str,
        MAY_CHANGE,
        WRITTEN,
        "the folder for the trained policy; replaced as a whole when it already holds a checkpoint",
    ]
    critic_ckpt_dir: Annotated[
        str | None,
        CONTENT,
        "what the value model starts from: the verifier, usually; for --advantage gae",
    ] = None
    critic_save_dir: Annotated[
        str | None, MAY_CHANGE, WRITTEN, "the folder for the trained value model"
    ] = None
    reward_model_ckpt_dir: Annotated[
        str | None,
        CONTENT,
        "the verifier whose scores are the reward; with another tokenizer than the actor's it "
        "reads the texts",
    ] = None
    reward_tokenizer_file: Annotated[
        str | None,
        CONTENT,
        "the verifier's tokenizer; found in its folder, or the actor's, when not given",
    ] = None
    shared_trunk: Annotated[
        bool,
        FIXED,
        "one frozen trunk, the actor's, for all roles: value and reward are adapters and heads on "
        "it. Their folders hold such adapters (verifier_train.py --lora_rank, from the actor's "
        "weights); a critic_ckpt_dir that is the actor's starts anew",
    ] = False
    offload: Annotated[
        bool,
        MAY_CHANGE,
        "keep each role, and its optimizer, in host memory while it is not needed",
    ] = False

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.reward_model_ckpt_dir is None:
            names = ("reward_tokenizer_file",)
            yield from idle_flags(self, names, "without --reward_model_ckpt_dir")


@dataclass(frozen=True, kw_only=True)
class LayoutSettings(Settings):
    """How each role lies on the ranks in each phase.

    Such as 'dp2 pp2 tp2' or 'tp2 on 0-3' (docs/parallelism.md).
    """

    actor_train: Annotated[
        str | None,
        MAY_CHANGE,
        "the policy while it learns and is scored: dp, pp, vp, tp, sp, zero, and which ranks; what "
        "--model_parallel_size, --pipeline_parallel_size, --zero and the like say when not given",
    ] = None
    actor_gen: Annotated[
        str | None,
        MAY_CHANGE,
        "the policy while it generates (dp, tp, ranks): its weights change hands in memory; each "
        "model on the ranks that it is trained on when not given",
    ] = None
    critic_train: Annotated[
        str | None, MAY_CHANGE, "the value model while it learns; as the policy when not given"
    ] = None
    critic_inf: Annotated[
        str | None,
        MAY_CHANGE,
        "and while it gives values (dp, pp, tp, ranks); as while it learns when not given",
    ] = None
    ref_inf: Annotated[
        str | None,
        MAY_CHANGE,
        "the reference; as the policy when not given. On other ranks than --rew_inf's both score "
        "at the same time",
    ] = None
    rew_inf: Annotated[str | None, MAY_CHANGE, "the reward model; as the policy when not given"] = (
        None
    )


def idle_flags(settings: Settings, names: tuple[str, ...], why: str) -> Iterator[str]:
    """A message for each of the named settings that is given and has no effect."""
    for name in names:
        if getattr(settings, name) is not None:
            yield f"--{name}: has no effect {why}"


@dataclass(frozen=True, kw_only=True)
class PromptSettings(MapSettings):
    """The data."""

    train_file: Annotated[
        str,
        CONTENT,
        ROWS,
        'prompts, rows with "instruction", and "label" for a rule: as --train_file of '
        "solver_train.py",
    ]


@dataclass(frozen=True, kw_only=True)
class ShapedRewardSettings(RewardSettings):
    """What a response earns."""

    reward_norm: Annotated[
        bool,
        "centre and scale the sum of the rewards by the mean and standard deviation of all so far",
    ] = False
    reward_scale: Annotated[float, Above(0), "then it is multiplied by this,"] = 1.0
    reward_bias: Annotated[float, Between(-1e9, 1e9), "this is added,"] = 0.0
    reward_clip: Annotated[float | None, Above(0), "and it is clipped to ± this"] = None
    truncated: Annotated[
        Literal["bootstrap", "zero", "penalty"],
        "what follows a response cut at max_new_tokens: its value (bootstrap), nothing (zero), or "
        "nothing and a penalty on its score; without a value model bootstrap is zero",
    ] = "bootstrap"
    truncation_penalty: Annotated[float, Between(0, 1e6), "that penalty"] = 1.0

    def shaping(self) -> dict[str, Any]:
        """What is done to the sum of the rewards, where it is not the default."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in SHAPING}
        return {name: value for name, value in values.items() if value != defaults[name]}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.truncated != "penalty":
            yield from idle(self, ("truncation_penalty",), "with --truncated other than penalty")


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Settings):
    """Rollouts."""

    samples_per_prompt: Annotated[int, AtLeast(1), "rollouts of each prompt"] = 1
    max_buffer_size: Annotated[int, AtLeast(1), "rollouts per iteration, over all ranks"] = 96
    rollout_batch_size: Annotated[
        int, AtLeast(1), MAY_CHANGE, "sequences generated at a time, at most"
    ] = 384
    filter_rounds: Annotated[
        int,
        AtLeast(0, 10**6),
        "leave out prompts whose samples all earn the same, and generate for others up to so many "
        "times in all to fill the buffer; 0 keeps everything",
    ] = 0
    replay_mask: Annotated[
        bool,
        "take log-probabilities over the tokens that sampling had left, in the update too; else "
        "over all",
    ] = False
    dump_rollouts: Annotated[
        str | None,
        MAY_CHANGE,
        WRITTEN,
        "a folder for one Parquet file per iteration: texts, tokens, log-probabilities, values, "
        "rewards, advantages",
    ] = None
    log_samples: Annotated[
        int,
        AtLeast(0, 10**6),
        MAY_CHANGE,
        "responses of each iteration that are logged as text, with their rewards",
    ] = 2

    def problems(self) -> Iterator[str]:
        if self.max_buffer_size % self.samples_per_prompt:
            yield (
                f"--max_buffer_size {self.max_buffer_size} is no multiple of --samples_per_prompt "
                f"{self.samples_per_prompt}"
            )
        if self.filter_rounds and self.samples_per_prompt < 2:
            yield (
                f"--filter_rounds {self.filter_rounds}: compares the rewards of one prompt's "
                "samples; give --samples_per_prompt 2 or more"
            )


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings(Settings):
    """Advantages and returns."""

    advantage: Annotated[
        str,
        Choices(*ADVANTAGES),
        "gae (PPO with a value model); or without one: grpo, dr_grpo, rloo (each prompt's samples "
        "are compared), reinforce++ (rewards to go)",
    ] = "gae"
    gamma: Annotated[float, Between(0, 1), "discount"] = 1.0
    lam: Annotated[float, Between(0, 1), "of generalised advantage estimation"] = 0.95
    lam_critic: Annotated[
        float | None,
        Between(0, 1),
        "of the returns that the value model learns; lam when not given",
    ] = None
    whiten: Annotated[
        bool | None,
        "centre and scale the advantages over the whole batch; when not given, for gae and "
        "reinforce++",
    ] = None
    value_norm: Annotated[
        bool,
        "let the value model learn returns centred and scaled by their running mean and standard "
        "deviation",
    ] = False

    @property
    def kind(self) -> AdvantageKind:
        """What goes with it."""
        return ADVANTAGES[self.advantage]

    @property
    def has_value(self) -> bool:
        """Whether the advantages need a value model."""
        return self.kind.needs_value

    @property
    def is_grouped(self) -> bool:
        """Whether the advantages compare the samples of one prompt."""
        return self.kind.is_grouped

    @property
    def whitens(self) -> bool:
        """Whether the whole batch is whitened: groups' advantages have a scale of their own."""
        return not self.is_grouped if self.whiten is None else self.whiten

    def problems(self) -> Iterator[str]:
        if not self.has_value:
            yield from idle(self, ("lam", "lam_critic", "value_norm"), f"with {self.no_value}")
        if self.is_grouped:
            why = f"with --advantage {self.advantage}, which gives a response one advantage"
            yield from idle(self, ("gamma",), why)

    @property
    def no_value(self) -> str:
        """What messages say where there is no value model."""
        return f"--advantage {self.advantage}, which has no value model"


@dataclass(frozen=True, kw_only=True)
class UpdateSettings(Settings):
    """Updates of policy and value model."""

    ppo_epochs: Annotated[int, AtLeast(1), "passes over each buffer of rollouts"] = 4
    mini_batches: Annotated[int, AtLeast(1), "optimizer steps per pass"] = 4
    critic_warmup: Annotated[
        int, AtLeast(0, 10**6), Unit("iterations"), "in which only the value model learns"
    ] = 0
    update: Annotated[
        Literal["together", "in_turn"],
        MAY_CHANGE,
        "policy and value step by step (together), or first all of the policy's steps (in_turn): "
        "with --offload one at a time",
    ] = "together"
    cliprange: Annotated[float, Above(0, 1e6), "the probability ratio is clipped to 1 ± this"] = 0.2
    cliprange_high: Annotated[
        float | None, Above(0), 'the upper side, where it is another ("clip-higher")'
    ] = None
    dual_clip: Annotated[
        float | None,
        Bounds(1, 1e9, is_open=True, because=", the ratio that nothing has changed being 1"),
        "for a negative advantage the loss is at most this times its size",
    ] = None
    cliprange_value: Annotated[
        float, Above(0, 1e6), "values are clipped to the old ones ± this"
    ] = 0.2
    vf_coef: Annotated[
        float,
        Between(0, 1e6),
        "weight of the value loss (the value model has its own optimizer: it acts through clipping "
        "and Adam's ε)",
    ] = 0.1
    entropy_coef: Annotated[float, Between(0, 1e6), "weight of the entropy bonus"] = 0.0
    loss_level: Annotated[
        Literal["token", "sequence", "constant"] | None,
        "the mean over all tokens (token), over responses of their tokens' means (sequence), or of "
        "their tokens' sums over max_new_tokens (constant); when not given sequence for grpo, "
        "constant for dr_grpo, else token",
    ] = None
    target_kl: Annotated[
        float | None,
        Above(0),
        "end the policy's steps of an iteration once a step's approxkl is above this",
    ] = None


@dataclass(frozen=True, kw_only=True)
class PenaltySettings(Settings):
    """The KL penalty and its reference."""

    kl: Annotated[
        Literal["k1", "k2", "k3"] | None,
        "the penalty in the reward (k1), or as a loss (k2, k3); when not given k3 for grpo and "
        "dr_grpo, else k1",
    ] = None
    kl_coef: Annotated[
        float | None,
        Between(0, 1e6),
        "its weight; 0.05, or where the actor's own PPO run left off, when not given; 0: no "
        "reference is loaded",
    ] = None
    kl_target: Annotated[
        float | None, Above(0), Unit("nats per response"), "steer kl_coef towards this KL"
    ] = None
    kl_horizon: Annotated[float, Above(0), Unit("responses"), "how slowly"] = 10000.0
    ref_ema: Annotated[
        float | None,
        Between(0, 0.9999999),
        FIXED,
        "after each iteration reference = this × reference + the rest × policy; without it the "
        "reference stays",
    ] = None


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings(Settings):
    """Supervised rows to go on training on, beside the rewards."""

    ptx_file: Annotated[
        str | None,
        CONTENT,
        ROWS,
        'rows with "instruction" and "output"; or texts: folders of shards, as pretrain.py takes '
        "them (a, or a:0.7,b:0.3), in rows of --max_seq_len tokens",
    ] = None
    ptx_coef: Annotated[float, Between(0, 1e6), "the weight of their loss"] = 0.0
    ptx_batch_size: Annotated[
        int | None,
        AtLeast(1, 10**9),
        "so many in each of the policy's steps; as many as rollouts when not given",
    ] = None

    def problems(self) -> Iterator[str]:
        if (self.ptx_coef > 0) != (self.ptx_file is not None):
            yield (
                f"--ptx_coef {self.ptx_coef} --ptx_file {self.ptx_file}: the mix needs both; give "
                "both or neither"
            )
        if self.ptx_batch_size is not None and self.ptx_file is None:
            yield "--ptx_batch_size: has no effect without --ptx_file"


@dataclass(frozen=True, kw_only=True)
class PolicyOptimizerSettings(OptimizerSettings):
    """The optimizers and their schedule."""

    critic_lr: Annotated[float, Above(0), "the value model's highest learning rate"] = 5e-6
    iterations: Annotated[int | None, AtLeast(1), "stop after this many, whatever the epochs"] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class PPOSettings(Settings):
    """What one iteration needs to know."""

    rewards: ShapedRewardSettings = ShapedRewardSettings()
    rollouts: RolloutSettings = RolloutSettings()
    advantages: AdvantageSettings = AdvantageSettings()
    updates: UpdateSettings = UpdateSettings()
    penalty: PenaltySettings = PenaltySettings()
    pretraining: PretrainingSettings = PretrainingSettings()
    batches: PackedBatchSettings = PackedBatchSettings()
    generation: GenerationSettings = GenerationSettings()
    run: TrainingRunSettings = TrainingRunSettings()

    @property
    def level(self) -> str:
        """Over what the policy's loss is averaged."""
        return self.updates.loss_level or self.advantages.kind.level

    @property
    def kl_kind(self) -> str:
        """k1: in the reward; k2, k3: as a loss. By default as the papers have it."""
        return self.penalty.kl or self.advantages.kind.kl

    def problems(self) -> Iterator[str]:
        rollouts, updates, advantages = self.rollouts, self.updates, self.advantages
        if updates.mini_batches > rollouts.max_buffer_size:
            yield (
                f"--mini_batches {updates.mini_batches} cannot be cut from --max_buffer_size "
                f"{rollouts.max_buffer_size} rollouts"
            )
        if advantages.is_grouped and rollouts.samples_per_prompt < 2:
            yield (
                f"--samples_per_prompt {rollouts.samples_per_prompt}: --advantage "
                f"{advantages.advantage} compares samples of one prompt and needs 2 or more"
            )
        if not advantages.has_value:
            names = ("cliprange_value", "vf_coef", "critic_warmup", "update")
            yield from idle(updates, names, f"with {advantages.no_value}")
        generation = self.generation
        yield from self.rewards.beside(generation.max_new_tokens)
        if generation.temperature == 0:
            yield "--temperature 0: PPO learns from samples; give a temperature above 0"
        if rollouts.replay_mask and not generation.leaves_out:
            yield (
                "--replay_mask: nothing is left out of sampling; it goes with --top_k, --top_p, "
                "--min_p or --min_new_tokens"
            )


@dataclass(frozen=True, kw_only=True)
class PPOTrainSettings(PPOSettings):
    """All that ppo_train.py knows."""

    roles: RoleSettings
    prompts: PromptSettings
    layouts: LayoutSettings = LayoutSettings()
    optimizer: PolicyOptimizerSettings = PolicyOptimizerSettings(
        lr=1e-6, warmup=0.0, schedule="constant"
    )
    lora: LoRASettings = LoRASettings()
    evaluation: PolicyEvaluationSettings = PolicyEvaluationSettings()
    saving: SavingSettings = SavingSettings()
    dry_run: DryRunSettings = DryRunSettings()

    @classmethod
    def may_lack_required(cls, values: Mapping[str, Any]) -> bool:
        return values.get("dry_run") is True

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.saving.unchangeable(type(self))
        yield from idle_fp8(self.run, self.lora)
        yield from unshareable(self.run, self.lora)
        yield from not_on_cpu(self.run, self.optimizer)
        if self.run.context_parallel_size > 1:
            yield (
                f"--context_parallel_size {self.run.context_parallel_size}: is for training on "
                "rows; each rank of ppo_train.py learns from rollouts of its own, whole: leave it "
                "out"
            )
        roles, names = self.roles, self.rewards.names
        is_plan = self.dry_run.dry_run  # which may lack files
        if "verifier" in names and roles.reward_model_ckpt_dir is None and not is_plan:
            yield (
                f"--reward {','.join(names)} needs --reward_model_ckpt_dir; without a verifier: "
                "--reward rule"
            )
        if "verifier" not in names and roles.reward_model_ckpt_dir is not None:
            yield "--reward_model_ckpt_dir: has no effect without verifier in --reward"
        evaluation = self.evaluation
        if evaluation.task and evaluation.label_file is None and "rule" not in names:
            yield (
                f"--task {evaluation.task}: has no effect without --label_file to measure on, or "
                "rule in --reward"
            )
        advantages = self.advantages
        if advantages.has_value:
            for flag in ("critic_ckpt_dir", "critic_save_dir"):
                if getattr(roles, flag) is None and not is_plan:
                    yield f"--advantage gae needs --{flag}"
        else:
            of_value = ("critic_ckpt_dir", "critic_save_dir")
            yield from idle_flags(roles, of_value, f"with {advantages.no_value}")
            of_value = ("critic_train", "critic_inf")
            yield from idle_flags(self.layouts, of_value, f"with {advantages.no_value}")
        if "verifier" not in names:
            why = "without verifier in --reward"
            yield from idle_flags(self.layouts, ("rew_inf",), why)
        yield from self._layout_problems()
        run = self.run
        if self.rollouts.replay_mask and (run.zero >= 2 or run.pipeline_parallel_size > 1):
            flag = f"--zero {run.zero}" if run.zero >= 2 else "--pipeline_parallel_size"
            yield (
                f"--replay_mask: masks are cut like the vocabulary in training, and with {flag} "
                "rollouts are made by a copy that lies otherwise; leave one of the two out"
            )
        if roles.shared_trunk:
            yield from self._shared_trunk_problems()
        if self.penalty.ref_ema is not None and self.lora.quantize:
            yield (
                f"--ref_ema {self.penalty.ref_ema}: a moving reference cannot be quantised; leave "
                "--quantize out"
            )

    def _layout_problems(self) -> Iterator[str]:
        layouts, run, default = self.layouts, self.run, TrainingRunSettings()
        if layouts.actor_train is not None:
            names = ("model_parallel_size", "pipeline_parallel_size", "stages_per_rank")
            for name in (*names, "zero", "sequence_parallel"):
                value = getattr(run, name)
                if value != getattr(default, name):
                    yield (
                        f"--{name} {value}: --actor_train '{layouts.actor_train}' says how the "
                        "policy is divided; give one of the two"
                    )
        if self.rollouts.replay_mask:
            for name in ("actor_gen", "ref_inf"):
                if getattr(layouts, name) is not None:
                    yield (
                        "--replay_mask: masks are cut like the vocabulary in training; leave "
                        f"--{name} out"
                    )

    def _shared_trunk_problems(self) -> Iterator[str]:
        if not self.lora.is_on:
            yield "--shared_trunk: the roles are adapters on one trunk; give --lora_rank"
        if self.run.zero >= 2:
            yield (
                f"--shared_trunk: does not go with --zero {self.run.zero}, which puts together the "
                "weights of one model at a time; give --zero 1, or no --shared_trunk"
            )
        given = {
            "critic_train": self.layouts.critic_train,
            "critic_inf": self.layouts.critic_inf,
            "ref_inf": self.layouts.ref_inf,
            "rew_inf": self.layouts.rew_inf,
            "ref_ema": self.penalty.ref_ema,
            "reward_tokenizer_file": self.roles.reward_tokenizer_file,
        }
        for flag, value in given.items():
            if value is not None:
                yield (
                    f"--{flag}: does not go with --shared_trunk, where there is one frozen trunk "
                    "for all roles"
                )
