r"""HH-RLHF (arXiv 2204.05862): two transcripts of which people chose one.

A row is {"chosen", "rejected"}, each "\n\nHuman: …\n\nAssistant: …" up to an answer.
https://huggingface.co/datasets/Anthropic/hh-rlhf
"""

import re
from collections import Counter

from dataset.builders.parts import BuildSettings, SkippedRow, build, compared
from src.data.rows import TEXT, Rows, read_rows
from src.errors import UserError

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh(settings: BuildSettings) -> None:
    """HH-RLHF's transcripts: comparisons of messages."""
    build(settings, _read, _converted)


def _read(source: str) -> Rows:
    return read_rows(source, {"chosen": TEXT, "rejected": TEXT}, unread=None)


def _converted(row: dict, _: Counter[str]) -> dict:
    chosen, rejected = (_messages(row[field], field) for field in ("chosen", "rejected"))
    return compared(chosen, rejected)


def _messages(transcript: str, field: str) -> list[dict]:
    before, *turns = _TURN.split("\n\n" + transcript.lstrip())
    if before.strip() or not turns:
        raise UserError(
            f'field "{field}": is {transcript[:40]!r}, expected a transcript, '
            r"'\n\nHuman: ...\n\nAssistant: ...'"
        )
    messages = [
        {"role": _ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(turns[::2], turns[1::2])
    ]
    if any(m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(messages)):
        raise SkippedRow("rows in which human and assistant do not take turns")
    return messages
