"""StackExchange preferences (arXiv 2112.00861): questions with answers that readers voted on.

A row is {"question", "answers": [{"text", "pm_score", "selected"}]}, texts as HTML; pm_score is
log2(1 + votes), rounded, one more where the asker accepted the answer, and -1 below no votes.
https://huggingface.co/datasets/HuggingFaceH4/stack-exchange-preferences
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from dataset.builders.html_text import text_of
from dataset.builders.parts import BuildSettings, SkippedRow, build
from src.data.rows import NUMBER, TEXT, Kind, Rows, read_rows
from src.settings.declaration import AtLeast


@dataclass(frozen=True, kw_only=True)
class StackExchangeSettings(BuildSettings):
    """The data set."""

    min_answers: Annotated[int, AtLeast(2), "rows with fewer are left out"] = 2
    max_answers: Annotated[int, AtLeast(2), "the best of a row's answers that are kept"] = 8

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.min_answers > self.max_answers:
            yield f"--min_answers {self.min_answers}: is above --max_answers {self.max_answers}"


def stackexchange(settings: StackExchangeSettings) -> None:
    """StackExchange's answers by their votes: rankings with scores."""
    build(settings, _read, partial(_converted, settings))


def _score(answer: dict) -> Any:
    return answer.get("pm_score", answer.get("score"))


def _are_answers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(x, dict) and isinstance(x.get("text"), str) and NUMBER.accepts(_score(x))
        for x in value
    )


_ANSWERS = Kind(
    "a list of answers with text and pm_score (or score)",
    '[{"text": "...", "pm_score": 2}]',
    _are_answers,
)


def _read(source: str) -> Rows:
    return read_rows(source, {"question": TEXT, "answers": _ANSWERS}, unread=None)


def _converted(settings: StackExchangeSettings, row: dict, dropped: Counter[str]) -> dict:
    question = text_of(row["question"])
    if not TEXT.accepts(question):
        raise SkippedRow("rows whose question is no text")
    # Of a tie the answer that the asker accepted, else the first.
    by_score: dict[float, str] = {}
    for answer in sorted(row["answers"], key=lambda x: not x.get("selected")):
        text, score = text_of(answer["text"]), _score(answer)
        if not TEXT.accepts(text):
            dropped["answers that are no text"] += 1
        elif score in by_score:
            dropped["answers that tie with another of the row"] += 1
        elif text in by_score.values():
            dropped["answers that another of the row repeats"] += 1
        else:
            by_score[score] = text
    scores = sorted(by_score, reverse=True)
    if len(scores) < settings.min_answers:
        raise SkippedRow(f"rows with fewer than {settings.min_answers} answers of unlike scores")
    if len(scores) > settings.max_answers:
        dropped["answers below the best --max_answers"] += len(scores) - settings.max_answers
        scores = scores[: settings.max_answers]
    ranked = [by_score[score] for score in scores]
    return {"instruction": question, "ranked": ranked, "scores": scores}
