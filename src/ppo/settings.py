"""The knobs of one PPO run, by the names of the script's flags; what they mean: `docs/ppo.md`."""

from dataclasses import dataclass, fields
from typing import Literal

from src.errors import UserError
from src.ppo.advantages import GROUPED
from src.ppo.rewards import NAMES, compiled

Advantage = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++"]
SHAPING = ("reward_norm", "reward_scale", "reward_bias", "reward_clip")
LOSS_LEVELS = {"grpo": "sequence", "dr_grpo": "constant"}  # of the papers; "token" otherwise


@dataclass(frozen=True)
class PPOSettings:
    """Ranges are checked on construction, and flags that would change nothing are refused."""

    max_batch_size: int
    max_buffer_size: int
    max_tokens_per_batch: int | None = None
    seed: int = 0
    samples_per_prompt: int = 1
    advantage: Advantage = "gae"
    mini_batches: int = 4
    ppo_epochs: int = 4
    gamma: float = 1.0
    lam: float = 0.95
    lam_critic: float | None = None
    whiten: bool | None = None
    cliprange: float = 0.2
    cliprange_high: float | None = None
    dual_clip: float | None = None
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    loss_level: Literal["token", "sequence", "constant"] | None = None
    kl: Literal["k1", "k2", "k3"] | None = None
    target_kl: float | None = None
    critic_warmup: int = 0
    update: Literal["together", "in_turn"] = "together"
    value_norm: bool = False
    reward_norm: bool = False
    reward_scale: float = 1.0
    reward_bias: float = 0.0
    reward_clip: float | None = None
    filter_rounds: int = 0
    truncated: Literal["bootstrap", "zero", "penalty"] = "bootstrap"
    truncation_penalty: float = 1.0
    replay_mask: bool = False
    ref_ema: float | None = None
    ptx_coef: float = 0.0

    @classmethod
    def of(cls, settings: dict) -> "PPOSettings":
        """From the script's flags, which have the same names."""
        return cls(**{field.name: settings[field.name] for field in fields(cls)})

    @property
    def has_value(self) -> bool:
        """Whether the advantages need a value model."""
        return self.advantage == "gae"

    @property
    def is_grouped(self) -> bool:
        """Whether the advantages compare the samples of one prompt."""
        return self.advantage in GROUPED

    @property
    def whitens(self) -> bool:
        """Advantages are whitened over the whole batch, but for those that groups give: these have their own scale."""
        return not self.is_grouped if self.whiten is None else self.whiten

    @property
    def level(self) -> str:
        return self.loss_level or LOSS_LEVELS.get(self.advantage, "token")

    @property
    def kl_kind(self) -> str:
        """k1: in the reward; k2, k3: as a loss. By default as the papers have it."""
        return self.kl or ("k3" if self.advantage in ("grpo", "dr_grpo") else "k1")

    def shaping(self) -> dict:
        """What is done to the rewards, where it is not the default."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in SHAPING and getattr(self, f.name) != f.default
        }

    def __post_init__(self) -> None:
        problems = [
            *self._ranges(),
            *(
                f"--{flag} {getattr(self, flag)}: has no effect with {why}"
                for flag, why in self._idle()
            ),
        ]
        if problems:
            raise UserError("\n  ".join(problems))

    def _ranges(self) -> list[str]:
        counts = (
            "max_batch_size",
            "max_buffer_size",
            "mini_batches",
            "ppo_epochs",
            "samples_per_prompt",
        )
        found = [
            f"--{name} {getattr(self, name)}: must be 1 or more"
            for name in counts
            if getattr(self, name) < 1
        ]
        if self.mini_batches > self.max_buffer_size:
            found.append(
                f"--mini_batches {self.mini_batches} cannot be cut from --max_buffer_size {self.max_buffer_size} rollouts"
            )
        elif not found and self.max_buffer_size % self.samples_per_prompt:
            found.append(
                f"--max_buffer_size {self.max_buffer_size} is no multiple of --samples_per_prompt {self.samples_per_prompt}"
            )
        for name in ("gamma", "lam", "lam_critic"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                found.append(f"--{name} {value}: must lie in [0, 1]")
        for name in ("cliprange", "cliprange_high", "cliprange_value", "target_kl", "reward_clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append(f"--{name} {value}: must be above 0")
        if self.dual_clip is not None and self.dual_clip <= 1:
            found.append(
                f"--dual_clip {self.dual_clip}: must be above 1, the ratio that nothing has changed"
            )
        if self.ref_ema is not None and not 0 <= self.ref_ema < 1:
            found.append(
                f"--ref_ema {self.ref_ema}: must lie in [0, 1); 1 would leave the reference where it is"
            )
        if self.is_grouped and self.samples_per_prompt < 2:
            found.append(
                f"--samples_per_prompt {self.samples_per_prompt}: --advantage {self.advantage} compares samples of one "
                "prompt and needs 2 or more"
            )
        if self.filter_rounds and self.samples_per_prompt < 2:
            found.append(
                f"--filter_rounds {self.filter_rounds}: compares the rewards of one prompt's samples; give "
                "--samples_per_prompt 2 or more"
            )
        return found

    def _idle(self) -> list[tuple[str, str]]:
        """Flags that were changed and would do nothing, each with the reason."""
        default = {field.name: field.default for field in fields(self)}
        groups = {
            f"--advantage {self.advantage}, which has no value model": (
                not self.has_value,
                (
                    "lam",
                    "lam_critic",
                    "cliprange_value",
                    "vf_coef",
                    "critic_warmup",
                    "update",
                    "value_norm",
                ),
            ),
            f"--advantage {self.advantage}, which gives a response one advantage": (
                self.is_grouped,
                ("gamma",),
            ),
            "--truncated other than penalty": (
                self.truncated != "penalty",
                ("truncation_penalty",),
            ),
        }
        return [
            (name, why)
            for why, (applies, names) in groups.items()
            for name in names
            if applies and getattr(self, name) != default[name]
        ]


def check_flags_together(settings: dict) -> None:
    """Raise UserError, naming all of them, for flags of PPO that contradict each other or would change nothing."""
    s, wrong = settings, []
    rewards = s["reward"] or ["verifier"]
    unknown = [name for name in rewards if name not in NAMES]
    if unknown or len(set(rewards)) != len(rewards):
        wrong.append(
            f"--reward {','.join(rewards)}: choose from {', '.join(NAMES)}, each once, such as --reward verifier,rule"
        )
    if s["reward_weights"] is not None and len(s["reward_weights"]) != len(rewards):
        wrong.append(
            f"--reward_weights: {len(s['reward_weights'])} weights for {len(rewards)} rewards ({','.join(rewards)}); give one for each"
        )
    needs = {
        "verifier": "reward_model_ckpt_dir",
        "file": "reward_file",
        "format": "format_pattern",
        "overlong": "overlong_margin",
    }
    for name, flag in needs.items():
        if name in rewards and s[flag] is None:
            other = "; without a verifier: --reward rule" if name == "verifier" else ""
            wrong.append(f"--reward {','.join(rewards)} needs --{flag}{other}")
        if name not in rewards and s[flag] is not None:
            wrong.append(f"--{flag}: has no effect without {name} in --reward")
    if s["format_pattern"] is not None:
        compiled(s["format_pattern"])
    if s["overlong_margin"] is not None and not 0 < s["overlong_margin"] <= s["max_new_tokens"]:
        wrong.append(
            f"--overlong_margin {s['overlong_margin']}: must lie in [1, --max_new_tokens {s['max_new_tokens']}]"
        )
    if s["advantage"] == "gae":
        wrong += [
            f"--advantage gae needs --{f}"
            for f in ("critic_ckpt_dir", "critic_save_dir")
            if s[f] is None
        ]
    else:
        idle = [
            f
            for f in ("critic_ckpt_dir", "critic_save_dir", "critic_model_parallel_size")
            if s[f] is not None
        ]
        wrong += [
            f"--{f}: has no effect with --advantage {s['advantage']}, which has no value model"
            for f in idle
        ]
    if s["temperature"] == 0:
        wrong.append("--temperature 0: PPO learns from samples; give a temperature above 0")
    if (s["ptx_coef"] > 0) != (s["ptx_file"] is not None):
        wrong.append(
            f"--ptx_coef {s['ptx_coef']} --ptx_file {s['ptx_file']}: the mix needs both; give both or neither"
        )
    if s["ptx_batch_size"] is not None and s["ptx_file"] is None:
        wrong.append("--ptx_batch_size: has no effect without --ptx_file")
    left_out = s["top_k"] > 0 or s["top_p"] < 1 or s["min_p"] > 0 or s["min_new_tokens"] > 0
    if s["replay_mask"] and not left_out:
        wrong.append(
            "--replay_mask: nothing is left out of sampling; it goes with --top_k, --top_p, --min_p or --min_new_tokens"
        )
    if s["replay_mask"] and s["rollout_model_parallel_size"] is not None:
        wrong.append(
            "--replay_mask: masks are cut like the vocabulary in training; leave --rollout_model_parallel_size out"
        )
    if s["shared_trunk"]:
        if s["lora_rank"] == -1:
            wrong.append("--shared_trunk: the roles are adapters on one trunk; give --lora_rank")
        for flag in (
            "critic_model_parallel_size",
            "reward_model_parallel_size",
            "ref_ema",
            "reward_tokenizer_file",
        ):
            if s[flag] is not None:
                wrong.append(
                    f"--{flag}: does not go with --shared_trunk, where there is one frozen trunk for all roles"
                )
    if s["ref_ema"] is not None and s["quantize"]:
        wrong.append(
            f"--ref_ema {s['ref_ema']}: a moving reference cannot be quantised; leave --quantize out"
        )
    if s["reward_model_ckpt_dir"] is None:
        wrong += [
            f"--{f}: has no effect without --reward_model_ckpt_dir"
            for f in ("reward_model_parallel_size", "reward_tokenizer_file")
            if s[f] is not None
        ]
    if wrong:
        raise UserError("\n  ".join(wrong))
