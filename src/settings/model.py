"""Which model, tokenizer and data files, and how long rows may be."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Literal

from src.settings.declaration import CONTENT, MAY_CHANGE, ROWS, AtLeast, Settings, Unit, idle

SCORED_AT_ONCE = 2**14  # tokens, where a setting does not say

StrictLength = Annotated[
    bool, "refuse rows that are longer than --max_seq_len, in place of leaving them out"
]
SpecialTokens = Annotated[
    Literal["control", "text"],
    "what a special token such as <|im_end|> is where a row's text spells it out: the token, as in "
    "transformers (control), or ordinary text (text)",
]
ChatDate = Annotated[
    str,
    "the day, YYYY-MM-DD, that a chat template is told which writes one (Llama 3's do): fixed, so "
    "that a run is the same run tomorrow",
]


@dataclass(frozen=True, kw_only=True)
class ArchitectureSettings(Settings):
    """The model and its tokenizer."""

    model_type: Annotated[
        str | None, "a name such as llama-2-7b to check the model's sizes against"
    ] = None
    config_file: Annotated[
        str | None, CONTENT, "params.json or config.json; found beside the weights when not given"
    ] = None


@dataclass(frozen=True, kw_only=True)
class TextModelSettings(ArchitectureSettings):
    """The model and its tokenizer."""

    tokenizer_file: Annotated[
        str | None, CONTENT, "the tokenizer; found beside the weights when not given"
    ] = None
    use_chat_template: Annotated[
        bool,
        "write each instruction as a user's turn, by the checkpoint's chat template or the "
        "family's",
    ] = False
    special_tokens: SpecialTokens = "control"
    chat_date: ChatDate = "2024-07-26"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        try:
            date.fromisoformat(self.chat_date)
        except ValueError:
            yield f"--chat_date {self.chat_date}: is no day; write YYYY-MM-DD"


@dataclass(frozen=True, kw_only=True)
class AdaptedModelSettings(TextModelSettings):
    """The model and its tokenizer."""

    adapter_dir: Annotated[
        str | None,
        CONTENT,
        "a LoRA adapter in PEFT's format, added to the weights; in training with --lora_rank it "
        "is trained on",
    ] = None


@dataclass(frozen=True, kw_only=True)
class ModelSettings(AdaptedModelSettings):
    """The model and its tokenizer."""

    ckpt_dir: Annotated[str, CONTENT, "the model: shards for any degree, or a Hugging Face folder"]


@dataclass(frozen=True, kw_only=True)
class MapSettings(Settings):
    """The data."""

    map: Annotated[
        str | None,
        CONTENT,
        "FILE.py:FUNCTION, called with each row of the train file, a dict, for the row to train "
        "on, a list of several, or None, which leaves it out",
    ] = None
    map_workers: Annotated[
        int,
        AtLeast(1, 1024),
        MAY_CHANGE,
        "processes (of each rank) in which --map's function runs; its rows are the same at any "
        "number",
    ] = 1

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.map is None:
            yield from idle(self, ("map_workers",), "without --map")


@dataclass(frozen=True, kw_only=True)
class DataSettings(MapSettings):
    """The data."""

    train_file: Annotated[
        str,
        CONTENT,
        ROWS,
        "rows to train on: a file, a folder, a pattern or a data set, or several with weights, "
        "a.jsonl:0.7,b.parquet:0.3 (docs/data.md)",
    ]


def unescaped(text: str | None) -> str | None:
    r"""With line breaks and tabs for \n and \t, which a shell passes on as they are written."""
    return None if text is None else text.replace("\\n", "\n").replace("\\t", "\t")


@dataclass(frozen=True, kw_only=True)
class LossMaskSettings(Settings):
    """Which tokens of a row are trained on."""

    loss_on: Annotated[
        Literal["last", "all_assistant", "everything"],
        "the assistant's last turn, all of its turns (of a row with an output: that), or every "
        "token",
    ] = "all_assistant"
    response_template: Annotated[
        str | None,
        "what every turn of the assistant follows, as it stands in the row's text, or as ids "
        "([733, 28748]): turns are then found by it, and not by the chat template. \\n is a line "
        "break",
    ] = None
    instruction_template: Annotated[
        str | None,
        "with --response_template: what ends a turn of the assistant, where the row does not",
    ] = None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.response_template is None:
            if self.instruction_template is not None:
                yield "--instruction_template: has no effect without --response_template"
        elif self.loss_on == "everything":
            yield "--response_template: has no effect with --loss_on everything"
        for name in ("response_template", "instruction_template"):
            if getattr(self, name) == "":
                yield f"--{name}: is empty"

    @property
    def markers(self) -> list[str | tuple[int, ...] | None]:
        """The response's and the instruction's, each a text or token ids."""
        return [marker_of(self.response_template), marker_of(self.instruction_template)]


def marker_of(text: str | None) -> str | tuple[int, ...] | None:
    """A text, or the token ids that it lists in brackets."""
    ids = re.fullmatch(r"\[ *([0-9]+(?: *, *[0-9]+)*) *\]", text or "")
    return unescaped(text) if ids is None else tuple(map(int, ids[1].split(",")))


@dataclass(frozen=True, kw_only=True)
class PairDataSettings(DataSettings):
    """The data."""

    max_pairs_per_prompt: Annotated[
        int | None,
        AtLeast(1),
        "of a row's pairs (each chosen with each rejected output) so many are drawn; all when not "
        "given",
    ] = None
    ranked_pairs: Annotated[
        Literal["all", "best"],
        'of rows with "ranked" outputs: all pairs of them (all), or the best against each (best)',
    ] = "all"


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Settings):
    """Lengths and batches."""

    max_batch_size: Annotated[
        int,
        AtLeast(1),
        MAY_CHANGE,
        "sequences (of a verifier in training: rows, both sides of each) that a data-parallel rank "
        "computes at a time, at most",
    ] = 6
    max_seq_len: Annotated[
        int,
        AtLeast(2),
        Unit("tokens"),
        "of prompt and response together; training rows with more are left out and counted, "
        "prompts without room get no answer, rows to score are refused",
    ] = 1024

    @property
    def limits(self) -> tuple[int, int | None]:
        """Of what is scored at a time: sequences, and tokens (None: no limit)."""
        return self.max_batch_size, SCORED_AT_ONCE


@dataclass(frozen=True, kw_only=True)
class PackedBatchSettings(BatchSettings):
    """Lengths and batches."""

    max_tokens_per_batch: Annotated[
        int | None,
        AtLeast(1, 10**9),
        Unit("tokens"),
        MAY_CHANGE,
        "and their tokens, at most; a longer row goes alone. Optimizer steps stay the same: there "
        "are more forwards in each. When not given, on a GPU as many as fit its memory in training "
        "(the log says how many), on the CPU no limit",
    ] = None

    @property
    def limits(self) -> tuple[int, int | None]:
        """Of what is computed at a time: sequences, and tokens (None: no limit)."""
        return self.max_batch_size, self.max_tokens_per_batch


@dataclass(frozen=True, kw_only=True)
class TrainingBatchSettings(PackedBatchSettings):
    """Lengths and batches."""

    accumulation_steps: Annotated[
        int, AtLeast(1), MAY_CHANGE, "micro-batches per optimizer step"
    ] = 1
    strict_length: StrictLength = False
