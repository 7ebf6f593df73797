"""UltraFeedback (arXiv 2310.01377): answers of several models, rated by another.

Rows are the original's, {"instruction", "completions": [{"response", "overall_score",
"annotations": {aspect: {"Rating"}}}]}, or those of its binarised forms, {"chosen", "rejected"} of
messages with "score_chosen" and "score_rejected".
https://huggingface.co/datasets/openbmb/UltraFeedback
https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from dataset.builders.parts import MESSAGES, BuildSettings, SkippedRow, build, compared
from src.data.rows import NUMBER, TEXT, Kind, Rows, form_of, read_rows

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


@dataclass(frozen=True, kw_only=True)
class UltraFeedbackSettings(BuildSettings):
    """The data set."""

    score: Annotated[
        Literal["aspects", "overall"],
        "what the original's answers are ranked by: the mean of their ratings by "
        f"{', '.join(ASPECTS)} (aspects), or their overall_score, which of some answers is high "
        "where the critique beside it is not (overall)",
    ] = "aspects"


def ultrafeedback(settings: UltraFeedbackSettings) -> None:
    """UltraFeedback's ratings: rankings with scores, or of its binarised forms comparisons."""
    build(settings, _read, partial(_converted, settings.score))


def _are_completions(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(x, dict) and isinstance(x.get("response"), str) for x in value
    )


_COMPLETIONS = Kind(
    "a list of completions with a response", '[{"response": "..."}]', _are_completions
)


def _read(source: str) -> Rows:
    if form_of(source, ("completions", "chosen")) == "chosen":
        scores = {"score_chosen": NUMBER, "score_rejected": NUMBER}
        return read_rows(source, {"chosen": MESSAGES, "rejected": MESSAGES}, scores, unread=None)
    return read_rows(source, {"instruction": TEXT, "completions": _COMPLETIONS}, unread=None)


def _converted(score: str, row: dict, dropped: Counter[str]) -> dict:
    return _ranked(score, row, dropped) if "completions" in row else _binarised(row)


def _ranked(score: str, row: dict, dropped: Counter[str]) -> dict:
    scores: dict[str, float] = {}
    for completion in row["completions"]:
        text, rating = completion["response"], _rating(score, completion)
        if not TEXT.accepts(text):
            dropped["answers that are blank or hold a NUL"] += 1
        elif rating is None:
            dropped[f"answers without a rating ({score})"] += 1
        elif text in scores:
            dropped["answers that another of the row repeats"] += 1
        else:
            scores[text] = rating
    if len({*scores.values()}) < 2:
        raise SkippedRow("rows without two answers of unlike ratings")
    ranked = sorted(scores, key=lambda text: -scores[text])
    return {
        "instruction": row["instruction"],
        "ranked": ranked,
        "scores": [scores[text] for text in ranked],
    }


def _rating(score: str, completion: dict) -> float | None:
    """A completion's rating; None where it has none, or one that is no number, such as N/A."""
    if score == "overall":
        overall = completion.get("overall_score")
        return overall if NUMBER.accepts(overall) else None
    annotations = completion.get("annotations") or {}
    try:
        ratings = [float(annotations[aspect]["Rating"]) for aspect in ASPECTS]
    except (KeyError, TypeError, ValueError):
        return None
    mean = sum(ratings) / len(ratings)
    return mean if NUMBER.accepts(mean) else None


def _binarised(row: dict) -> dict:
    chosen, rejected = row.get("score_chosen"), row.get("score_rejected")
    if chosen is not None and rejected is not None and chosen <= rejected:
        raise SkippedRow("rows whose chosen side is not scored higher")
    sides = compared(row["chosen"], row["rejected"])
    if any(len(messages) > 1 for messages in sides.values()):
        return dict(sides)
    # One question and its answers are texts: they need no chat template.
    texts = {name: messages[0]["content"] for name, messages in sides.items()}
    return {"instruction": texts.pop("prompt")} | texts
