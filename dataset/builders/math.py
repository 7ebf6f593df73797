r"""MATH (arXiv 2103.03874): problems of competitions, with solutions whose answer is boxed.

The official folder has a file for each, train/SUBJECT/NUMBER.json and test/…, {"problem", "level",
"type", "solution"}; others hold the same rows in one file.
https://github.com/hendrycks/math
"""

import json
from collections import Counter
from pathlib import Path

from dataset.builders.parts import BuildSettings, SkippedRow, build
from src.data.rows import TEXT, Rows, read_rows
from src.errors import UserError
from src.evaluation import math

FIELDS = {"problem": TEXT, "solution": TEXT}


def competition_math(settings: BuildSettings) -> None:
    """MATH's problems: instruction, output, and the boxed answer as label."""
    folder = Path(settings.source)
    if settings.test_source is None and (folder / "train").is_dir():
        parts = {part: str(folder / part) for part in ("train", "test") if (folder / part).is_dir()}
        build(settings, _read_folder, _converted, parts)
    else:
        build(settings, lambda source: read_rows(source, FIELDS, unread=None), _converted)


def _read_folder(folder: str) -> Rows:
    """The rows of a folder of the official form, a file each. Raises UserError, with its name."""
    files = sorted(Path(folder).glob("*/*.json"), key=_place)
    if not files:
        raise UserError(f"{folder}: holds no SUBJECT/NUMBER.json, as the official folder does")
    rows = []
    for file in files:
        try:
            row = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read as JSON: {error}") from None
        for field, kind in FIELDS.items():
            if not isinstance(row, dict) or not kind.accepts(row.get(field)):
                raise UserError(f'{file}: expected an object with "{field}", {kind.words}')
        rows.append(row)
    return Rows(rows, [], [str(file) for file in files])


def _place(file: Path) -> tuple[str, int, str]:
    """By subject, and then by number."""
    return file.parent.name, int(file.stem) if file.stem.isdecimal() else 0, file.stem


def _converted(row: dict, _: Counter[str]) -> dict:
    answer = math.boxed(row["solution"])
    if answer is None or math.boxed_answer(row["solution"]) is None:
        raise SkippedRow("rows whose solution boxes no answer")
    return {"instruction": row["problem"], "output": row["solution"], "label": answer}
