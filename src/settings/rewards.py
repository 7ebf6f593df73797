"""What a sampled response is judged by."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from src.settings.declaration import CONTENT, MAY_CHANGE, AtLeast, Settings, Unit, idle
from src.settings.training import Rule

# The reward called NAME is made by src/ppo/rewards/NAME.py.
REWARDS = ("verifier", "rule", "file", "format", "length", "overlong")


@dataclass(frozen=True, kw_only=True)
class RewardSettings(Settings):
    """What a response earns."""

    reward: Annotated[
        list[str] | None,
        "one or several of verifier (its score), rule (1 for a right answer), file "
        "(--reward_file), format (1 where --format_pattern matches), length (share of "
        "max_new_tokens), overlong (0 to -1, see --overlong_margin); verifier when not given",
    ] = None
    reward_weights: Annotated[
        list[float] | None, "one for each of --reward; 1 each when not given"
    ] = None
    reward_file: Annotated[
        str | None,
        CONTENT,
        "FILE.py:FUNCTION, called as function(prompts, responses, rows), lists of the same length, "
        "for a list of numbers (None: no opinion); may be async. Called once before training, with "
        "three made-up answers",
    ] = None
    format_pattern: Annotated[str | None, "a regular expression to be found in the response"] = None
    overlong_margin: Annotated[
        int | None,
        AtLeast(1, 10**9),
        Unit("tokens"),
        "the last so many before max_new_tokens cost up to 1, in a line",
    ] = None

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """The names of the settings."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @property
    def names(self) -> list[str]:
        """The components of the reward."""
        return self.reward or ["verifier"]

    @property
    def weights(self) -> list[float]:
        """One for each of `names`."""
        return self.reward_weights or [1.0] * len(self.names)

    def problems(self) -> Iterator[str]:
        names = self.names
        if any(name not in REWARDS for name in names) or len(set(names)) != len(names):
            yield (
                f"--reward {','.join(names)}: choose from {', '.join(REWARDS)}, each once, such as "
                "--reward verifier,rule"
            )
        if self.reward_weights is not None and len(self.reward_weights) != len(names):
            yield (
                f"--reward_weights: {len(self.reward_weights)} weights for {len(names)} rewards "
                f"({','.join(names)}); give one for each"
            )
        for name, flag in (
            ("file", "reward_file"),
            ("format", "format_pattern"),
            ("overlong", "overlong_margin"),
        ):
            if name in names and getattr(self, flag) is None:
                yield f"--reward {','.join(names)} needs --{flag}"
            if name not in names and getattr(self, flag) is not None:
                yield f"--{flag}: has no effect without {name} in --reward"
        if self.format_pattern is not None:
            try:
                re.compile(self.format_pattern)
            except re.error as error:
                yield f"--format_pattern {self.format_pattern}: is no regular expression ({error})"

    def beside(self, max_new_tokens: int) -> Iterator[str]:
        """What is wrong with these beside the longest response."""
        margin = self.overlong_margin
        if margin is not None and margin > max_new_tokens:
            yield f"--overlong_margin {margin}: must lie in [1, --max_new_tokens {max_new_tokens}]"


@dataclass(frozen=True, kw_only=True)
class BestOfSettings(Settings):
    """Keeping the best samples."""

    best_of: Annotated[
        Literal["rule", "verifier", "file"] | None,
        MAY_CHANGE,
        "score each row's --num_samples by the task's rule, by --reward_model_ckpt_dir or by "
        "--reward_file, and write what --keep says",
    ] = None
    keep: Annotated[
        Literal["best", "right"],
        MAY_CHANGE,
        "of each row's samples the one with the highest score (best), or all that are right by the "
        "rule (right), no text twice. Never one that was cut at the limit, nor a wrong one by rule",
    ] = "best"
    reward_file: Annotated[
        str | None, CONTENT, "FILE.py:FUNCTION, called as PPO's --reward_file is"
    ] = None
    task: Annotated[str | None, "whose rule is applied; GSM8K's when not given"] = None
    rule: Rule = None

    @property
    def rewards(self) -> RewardSettings:
        """The same as a reward."""
        return RewardSettings(reward=[self.best_of or "rule"], reward_file=self.reward_file)

    def problems(self) -> Iterator[str]:
        if self.best_of is None:
            names = ("keep", "reward_file", "task", "rule")
            yield from idle(self, names, "without --best_of")
            return
        if self.best_of != "rule":
            yield from idle(self, ("keep", "task", "rule"), f"with --best_of {self.best_of}")
        if self.best_of == "file" and self.reward_file is None:
            yield "--best_of file needs --reward_file"
        if self.best_of != "file" and self.reward_file is not None:
            yield f"--reward_file: has no effect with --best_of {self.best_of}"


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(Settings):
    """The verifier that scores samples."""

    reward_model_ckpt_dir: Annotated[
        str | None,
        CONTENT,
        "the verifier; with another tokenizer than the solver's it reads the texts",
    ] = None
    reward_tokenizer_file: Annotated[
        str | None,
        CONTENT,
        "the verifier's tokenizer; found in its folder, or the solver's, when not given",
    ] = None

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """The names of the settings."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def beside(
        self, rewards: RewardSettings, flag: str = "reward", is_plan: bool = False
    ) -> Iterator[str]:
        """What is wrong with these beside the rewards.

        flag: what names the rewards; is_plan: files may be missing.
        """
        names = rewards.names
        if "verifier" in names and self.reward_model_ckpt_dir is None and not is_plan:
            yield (
                f"--{flag} {','.join(names)} needs --reward_model_ckpt_dir; without a verifier: "
                f"--{flag} rule"
            )
        if "verifier" not in names and self.reward_model_ckpt_dir is not None:
            yield f"--reward_model_ckpt_dir: has no effect without verifier in --{flag}"
        if self.reward_tokenizer_file is not None and self.reward_model_ckpt_dir is None:
            yield "--reward_tokenizer_file: has no effect without --reward_model_ckpt_dir"
