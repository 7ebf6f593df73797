"""No Robots: conversations that people wrote.

A row is {"prompt", "prompt_id", "messages": [{"role", "content"}], "category"}.
https://huggingface.co/datasets/HuggingFaceH4/no_robots
"""

from collections import Counter

from dataset.builders.parts import MESSAGES, BuildSettings, build, plain_messages
from src.data.rows import Rows, read_rows


def no_robots(settings: BuildSettings) -> None:
    """No Robots' conversations: messages to learn from."""
    build(settings, _read, _converted)


def _read(source: str) -> Rows:
    return read_rows(source, {"messages": MESSAGES}, unread=None)


def _converted(row: dict, _: Counter[str]) -> dict:
    return {"messages": plain_messages(row["messages"])}
