"""The settings of preference learning."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from src.settings.declaration import MAY_CHANGE, WRITTEN, Above, AtLeast, Between, Settings, idle
from src.settings.generation import GenerationSettings
from src.settings.model import PairDataSettings
from src.settings.rewards import JudgeSettings, RewardSettings
from src.settings.scripts import TrainSettings
from src.settings.training import PolicyEvaluationSettings

# As src/trainer/losses.py has them: the loss called NAME is a function there.
PAIR_LOSSES = (
    *("dpo", "ipo", "cdpo", "robust", "sppo", "hinge", "orpo", "simpo", "apo_zero", "apo_down"),
)
LOSSES = (*PAIR_LOSSES, "kto", "sft")
WITHOUT_REFERENCE = {"orpo", "simpo", "sft"}
SMOOTHED = {"cdpo", "robust"}
BETA = {"simpo": 2.0}  # SimPO's rewards are means over tokens
MOST_NOISE = 0.4999  # robust divides by 1 − 2ε


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings(Settings):
    """The preference objective."""

    loss: Annotated[
        list[str] | None,
        "dpo (when not given), ipo, cdpo, robust, sppo, hinge, orpo, simpo, apo_zero, apo_down, of "
        "pairs; or kto, of single outputs with a label, or of both sides; and beside one of them "
        "sft, of the chosen. Several, such as dpo,sft, are added",
    ] = None
    loss_weights: Annotated[list[float] | None, "one for each of --loss; 1 each when not given"] = (
        None
    )
    beta: Annotated[
        float | None,
        Above(0, 1e6),
        "how strongly the policy is held to its reference (IPO's τ, SPPO's η, ORPO's λ); 0.1, for "
        "simpo 2.0, when not given",
    ] = None
    label_smoothing: Annotated[
        float | None,
        Between(0, MOST_NOISE),
        "of cdpo and robust: the share of pairs that are the wrong way round; 0.1 when not given",
    ] = None
    gamma_beta_ratio: Annotated[
        float | None, Between(0, 1e6), "of simpo: its margin γ over β; 0.5 when not given"
    ] = None
    desirable_weight: Annotated[
        float | None, Above(0, 1e6), "of kto: the weight of good outputs; 1 when not given"
    ] = None
    undesirable_weight: Annotated[
        float | None, Above(0, 1e6), "of kto: the weight of bad outputs; 1 when not given"
    ] = None
    cache_reference: Annotated[
        str | None,
        MAY_CHANGE,
        WRITTEN,
        "a .safetensors file that keeps the reference's log-probabilities of the train file: made "
        "when it is not there, or of another model, tokenizer or data; no reference is in memory "
        "then",
    ] = None

    @property
    def names(self) -> list[str]:
        """The losses."""
        return self.loss or ["dpo"]

    @property
    def weighted(self) -> list[tuple[float, str]]:
        """(weight, name) of each."""
        return list(zip(self.loss_weights or [1.0] * len(self.names), self.names))

    @property
    def constant_beta(self) -> float:
        """β, or its default."""
        default = next((BETA[name] for name in self.names if name in BETA), 0.1)
        return default if self.beta is None else self.beta

    @property
    def has_reference(self) -> bool:
        """Whether any of them has one."""
        return not set(self.names) <= WITHOUT_REFERENCE

    def problems(self) -> Iterator[str]:
        names, given = self.names, f"--loss {','.join(self.names)}"
        if any(name not in LOSSES for name in names) or len(set(names)) != len(names):
            yield f"{given}: choose from {', '.join(LOSSES)}, each once, such as --loss dpo,sft"
        elif names == ["sft"]:
            yield f"{given}: learns nothing of the rejected; solver_train.py does that"
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            yield (
                f"--loss_weights: {len(self.loss_weights)} weights for {len(names)} losses "
                f"({','.join(names)}); give one for each"
            )
        of_beta = {name for name in names if name != "sft"}
        if self.loss_weights is not None and min(self.loss_weights) <= 0:
            yield f"--loss_weights {','.join(map(str, self.loss_weights))}: must be above 0"
        if self.beta is None and "simpo" in names and len(of_beta) > 1:
            yield f"{given}: have another β by default each; give --beta"
        for flag, owners in (
            ("label_smoothing", SMOOTHED),
            ("gamma_beta_ratio", {"simpo"}),
            ("desirable_weight", {"kto"}),
            ("undesirable_weight", {"kto"}),
        ):
            if getattr(self, flag) is not None and not owners & set(names):
                yield f"--{flag}: has no effect without {' or '.join(sorted(owners))} in --loss"
        if self.cache_reference is not None and not self.has_reference:
            yield f"--cache_reference: has no effect with {given}, which has no reference"
        if self.cache_reference is not None and not self.cache_reference.endswith(".safetensors"):
            yield f"--cache_reference {self.cache_reference}: name a .safetensors file"


@dataclass(frozen=True, kw_only=True)
class OnlineSettings(Settings):
    """Pairs of the policy's own outputs."""

    online: Annotated[
        bool,
        "the train file has prompts: at each step the policy samples --samples_per_prompt outputs "
        "of each, --reward scores them, and the best is compared with the worst. Prompts whose "
        "outputs earn the same teach nothing",
    ] = False
    samples_per_prompt: Annotated[int, AtLeast(2), "outputs of each prompt, online"] = 2


@dataclass(frozen=True, kw_only=True)
class PreferenceTrainSettings(TrainSettings):
    """All that preference_train.py knows."""

    data: PairDataSettings
    preference: PreferenceSettings = PreferenceSettings()
    online: OnlineSettings = OnlineSettings()
    rewards: RewardSettings = RewardSettings()
    judge: JudgeSettings = JudgeSettings()
    generation: GenerationSettings = GenerationSettings()
    evaluation: PolicyEvaluationSettings = PolicyEvaluationSettings()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        preference, task = self.preference, self.evaluation.task
        if not self.online.online:
            why = "without --online"
            yield from idle(self.online, ("samples_per_prompt",), why)
            yield from idle(self.rewards, self.rewards.fields(), why)
            yield from idle(self.judge, self.judge.fields(), why)
            sampling = ("temperature", "min_new_tokens", "top_p", "top_k", "min_p")
            yield from idle(self.generation, (*sampling, "kv_cache_gb"), why)
            if task and self.evaluation.label_file is None:
                yield f"--task {task}: has no effect without --label_file to measure on"
            return
        yield from idle(self.data, ("max_pairs_per_prompt", "ranked_pairs"), "with --online")
        yield from self.rewards.beside(self.generation.max_new_tokens)
        yield from idle(self.batches, ("strict_length",), "with --online")
        yield from self.judge.beside(self.rewards, is_plan=self.dry_run.dry_run)
        if preference.cache_reference is not None:
            yield "--cache_reference: has no effect with --online, where outputs are new each time"
        if "kto" in preference.names:
            yield "--loss kto: has no pairs; it does not go with --online"
        if self.generation.temperature == 0:
            yield "--temperature 0: samples would be alike; give a temperature above 0"
        if task and self.evaluation.label_file is None and "rule" not in self.rewards.names:
            yield (
                f"--task {task}: has no effect without --label_file to measure on, or rule in "
                "--reward"
            )
