"""How tokens are chosen, and the memory for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from src.settings.declaration import (
    MAY_CHANGE,
    Above,
    AtLeast,
    Between,
    Bounds,
    Settings,
    Unit,
    changed,
)

MaxNewTokens = Annotated[int, AtLeast(1), Unit("tokens"), "of one response, at most"]
RepetitionPenalty = Annotated[
    float,
    Above(0, 1000),
    "divides (or, if negative, multiplies) the logits of tokens that are there already",
]
# A temperature near 0 would overflow: greedy choice is exactly 0.
TEMPERATURE = Bounds(1e-3, 100, also=(0,), because=" (or 0, which takes the likeliest token)")


@dataclass(frozen=True, kw_only=True)
class SoftmaxSettings(Settings):
    """Probabilities."""

    temperature: Annotated[
        float,
        TEMPERATURE,
        "divides the logits, in sampling and in every log-probability; where tokens are only "
        "chosen, 0 takes the likeliest",
    ] = 1.0


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(SoftmaxSettings):
    """Generation."""

    max_new_tokens: MaxNewTokens = 256
    min_new_tokens: Annotated[
        int, AtLeast(0), Unit("tokens"), "before so many no response ends by itself"
    ] = 0
    top_p: Annotated[
        float,
        Bounds(0, 1, is_open=True),
        "sample from the likeliest tokens that together have this probability",
    ] = 1.0
    top_k: Annotated[int, AtLeast(0, 10**9), "sample from so many likeliest tokens; 0: all"] = 0
    min_p: Annotated[
        float, Between(0, 1), "leave out tokens less likely than this share of the likeliest"
    ] = 0.0

    @property
    def truncates(self) -> bool:
        """Whether some tokens are left out of the distribution that is sampled from."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def leaves_out(self) -> bool:
        """The same, or at some steps stop tokens alone."""
        return self.truncates or (self.temperature > 0 and self.min_new_tokens > 0)

    def problems(self) -> Iterator[str]:
        if self.min_new_tokens > self.max_new_tokens:
            yield (
                f"--min_new_tokens {self.min_new_tokens}: must be at most --max_new_tokens "
                f"{self.max_new_tokens}"
            )


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(SamplingSettings):
    """Generation."""

    kv_cache_gb: Annotated[
        float | None,
        Above(0, 1e6),
        Unit("GB"),
        MAY_CHANGE,
        "memory for keys and values per rank; when not given, half of a CPU's free memory, three "
        "quarters of a GPU's. Sequences for which it has no room wait",
    ] = None


@dataclass(frozen=True, kw_only=True)
class DecodingSettings(GenerationSettings):
    """Generation."""

    repetition_penalty: RepetitionPenalty = 1.0
    num_samples: Annotated[
        int,
        AtLeast(1),
        "responses per instruction, which differ when temperature is above 0; in an evaluation "
        "pass@k and maj@n stand beside the accuracy of all",
    ] = 1
    num_beams: Annotated[
        int,
        AtLeast(1, 1000),
        "beam search with so many beams, when above 1; then nothing is sampled",
    ] = 1
    length_penalty: Annotated[
        float,
        Between(-100, 100),
        "a beam's score is its log-probability over its length to this power",
    ] = 1.0

    @property
    def more_of_sampling(self) -> tuple[str, ...]:
        """Settings of a script that beam search has not."""
        return ()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.num_beams == 1:
            if self.length_penalty != 1:
                yield "--length_penalty: has no effect without --num_beams"
            return
        sampling = ["top_p", "top_k", "min_p", "repetition_penalty", "min_new_tokens"]
        names = changed(self, [*sampling, "num_samples", *self.more_of_sampling])
        without_effect = ["temperature"] * (self.temperature != 0) + names
        if without_effect:
            flags = ", ".join(f"--{name} {getattr(self, name)}" for name in without_effect)
            yield f"--num_beams {self.num_beams}: beam search has no {flags}"


@dataclass(frozen=True, kw_only=True)
class StoppedDecodingSettings(DecodingSettings):
    """Generation."""

    stop_strings: Annotated[
        list[str] | None, "strings that end a response, which is cut before them"
    ] = None

    @property
    def more_of_sampling(self) -> tuple[str, ...]:
        return ("stop_strings",)
