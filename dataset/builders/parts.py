"""What the builders share: where published rows come from, which are left out, what is held out."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

from src import storage
from src.data.messages import ROLES
from src.data.rows import TEXT, Kind, Rows, write_json, write_jsonl
from src.data.sources import files_in, files_of
from src.errors import UserError
from src.settings.declaration import WRITTEN, Between, Settings

TEST_SHARE = 0.05
_SHARD = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?$")  # train-00000-of-00003


@dataclass(frozen=True, kw_only=True)
class BuildSettings(Settings):
    """The data set."""

    source: Annotated[
        str,
        "the rows as they are published: a file, a folder, a pattern or a data set of the hub "
        "(OWNER/NAME, /CONFIG, @SPLIT). A folder's files train* and test* are these parts",
    ]
    test_source: Annotated[str | None, "the rows to hold out, likewise"] = None
    test_share: Annotated[
        float | None,
        Between(0, 0.9),
        f"share of the prompts to hold out where the source has no test part; {TEST_SHARE} when "
        "not given",
    ] = None
    save_dir: Annotated[str, WRITTEN, "the folder to write train and test files in"]
    format: Annotated[Literal["json", "jsonl"], "of the files"] = "json"
    seed: Annotated[int, "of what is held out"] = 0

    def problems(self) -> Iterator[str]:
        if self.test_source is not None and self.test_share is not None:
            yield f"--test_share {self.test_share}: has no effect with --test_source"


class SkippedRow(Exception):
    """Why a row is not taken: a few words that a count goes before."""


Read = Callable[[str], Rows]
# From a row, and a count of what is left out of rows by reasons, to the row that is written.
Convert = Callable[[dict, Counter[str]], dict]


def build(
    settings: BuildSettings, read: Read, convert: Convert, parts: dict[str, str] | None = None
) -> None:
    """Read each part, convert its rows, and write train and test files; say what was left out.

    parts: from "train" and perhaps "test" to what is read; as the settings have it when not given.
    Raises UserError for a row that is not of the published form, and where none is left.
    """
    if parts is None:
        parts = parts_of(settings)
        read_files = {Path(file).resolve() for text in parts.values() for file in files_of(text)}
        for part in ("train", "test"):
            file = _written(settings, part)
            if file.resolve() in read_files:
                raise UserError(
                    f"--save_dir {settings.save_dir}: {file.name} there is read and would be "
                    "overwritten; name another folder"
                )
    if "test" in parts and settings.test_share is not None:
        raise UserError(
            f"--test_share {settings.test_share}: has no effect, since {settings.source} has a "
            "test part; leave it out"
        )
    built = {part: _converted(source, read, convert) for part, source in parts.items()}
    if "test" not in built:
        share = TEST_SHARE if settings.test_share is None else settings.test_share
        built = held_out(built["train"], share, settings.seed)
    write = write_json if settings.format == "json" else write_jsonl
    for part, rows in built.items():
        file = _written(settings, part)
        write(file, rows)
        print(f"{file}: {len(rows):,} rows")


def _written(settings: BuildSettings, part: str) -> Path:
    return Path(settings.save_dir) / f"{part}.{settings.format}"


def parts_of(settings: BuildSettings) -> dict[str, str]:
    """What is read for "train", and for "test" where there is such.

    Raises UserError for a folder of which it is not clear what is what.
    """
    source = settings.source
    if settings.test_source is not None:
        return {"train": source, "test": settings.test_source}
    if not storage.is_folder(source):
        return {"train": source}
    files: dict[str, list[str]] = {}
    for file in files_in(source):
        name = storage.name_of(file).partition(".")[0]
        files.setdefault(_SHARD.sub("", name), []).append(file)
    if not any(name.startswith(("train", "test")) for name in files):
        return {"train": source}
    if not files.keys() <= {"train", "test"} or "train" not in files:
        raise UserError(
            f"{source}: holds {', '.join(sorted(files))}; say which are learned from and which are "
            f"held out: --source '{source}/train*' --test_source '{source}/test*'"
        )
    return {name: ",".join(files[name]) for name in ("train", "test") if name in files}


def _converted(source: str, read: Read, convert: Convert) -> list[dict]:
    rows = read(source)
    built, reasons, within = list[dict](), Counter[str](), Counter[str]()
    for place, row in zip(rows.places, rows):
        try:
            built.append(convert(row, within))
        except SkippedRow as why:
            reasons[str(why)] += 1
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    print(f"{source}: {len(rows):,} rows")
    for reason, count in (*reasons.most_common(), *within.most_common()):
        print(f"  left out: {count:,} {reason}")
    if not built:
        all_reasons = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise UserError(f"{source}: no row is left of {len(rows)}: {all_reasons}")
    return built


def held_out(rows: list[dict], share: float, seed: int) -> dict[str, list[dict]]:
    """The rows to train on and those to hold out, all rows of a prompt on one side."""
    keys = [asked(row) for row in rows]
    prompts = list(dict.fromkeys(keys))
    n = int(share * len(prompts))
    if share and not n:
        print(
            f"  held out: none, {share:g} of {len(prompts)} prompts is less than one (--test_share)"
        )
    held = {*random.Random(f"{seed}/held out").sample(prompts, n)}
    sides = {
        "train": [row for key, row in zip(keys, rows) if key not in held],
        "test": [row for key, row in zip(keys, rows) if key in held],
    }
    return {part: side for part, side in sides.items() if side}


def asked(row: dict) -> str:
    """What a row that was built asks, as one text: of a conversation all up to an answer."""
    value = row.get("instruction") or row.get("prompt")
    if value is None:
        roles = [message["role"] for message in row["messages"]]
        value = row["messages"][: roles.index("assistant")]
    return json.dumps(value)


# ---- Conversations -------------------------------------------------------------------------------


def _are_messages(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(x, dict) and x.get("role") in ROLES and isinstance(x.get("content"), str)
            for x in value
        )
    )


MESSAGES = Kind(
    "a list of messages with role and content",
    '[{"role": "user", "content": "..."}]',
    _are_messages,
)


def plain_messages(messages: list[dict]) -> list[dict]:
    """Messages with nothing but role and content. Raises SkippedRow where they end in no answer."""
    if not all(TEXT.accepts(message["content"]) for message in messages):
        raise SkippedRow("rows with a turn that is blank or holds a NUL")
    if messages[-1]["role"] != "assistant":
        raise SkippedRow("rows that do not end with the assistant's turn")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def compared(chosen: list[dict], rejected: list[dict]) -> dict[str, list[dict]]:
    """{"prompt", "chosen", "rejected"} of two conversations: what they share up to a question.

    Raises SkippedRow where that is nothing, or they do not differ.
    """
    chosen, rejected = plain_messages(chosen), plain_messages(rejected)
    if chosen == rejected:
        raise SkippedRow("rows whose sides say the same")
    same = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected))
    prompt = [message for message, _ in same]
    while prompt and prompt[-1]["role"] != "user":
        prompt.pop()
    if not prompt:
        raise SkippedRow("rows whose sides share no question")
    n = len(prompt)
    return {"prompt": prompt, "chosen": chosen[n:], "rejected": rejected[n:]}
