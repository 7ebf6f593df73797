"""The process in which `mapping.py` calls a user's function: rows in, rows out, on lines of JSON.

It is run by its path, `map_worker.py FILE FUNCTION`, and imports nothing of this project. It reads
`[number of the first row, [row, ...]]` and writes `[[row, ...], ...]`, what each row has become,
or `{"row": place in the list, "why": text}` for one that the function fails on, until its input
ends.
"""

import importlib.util
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

AT_MOST = 60  # characters of a value in a message


class Refused(Exception):
    """What the function returned is no row; says what it is."""


def main() -> None:
    """Answer until the input ends, which it does when the parent is gone, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # What the function prints is none of the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    path, name = sys.argv[1:]
    try:
        function = loaded(path, name)
    except (Exception, SystemExit) as error:
        print(json.dumps(f"{path} cannot be run: {told(error, path)}"), file=answers, flush=True)
        return
    if not callable(function):
        print(json.dumps(f"{path} has no function {name}"), file=answers, flush=True)
        return
    print("true", file=answers, flush=True)  # ready
    for line in sys.stdin:
        first, rows = json.loads(line)
        print(answer(function, first, rows, path), file=answers, flush=True)


def loaded(path: str, name: str) -> Any:
    """What a file calls by that name; None when nothing."""
    spec = importlib.util.spec_from_file_location(f"map_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    # Its neighbours can be imported, as of a script; last, so that they hide no installed module.
    sys.path.append(str(Path(path).resolve().parent))
    spec.loader.exec_module(module)
    return getattr(module, name, None)


def answer(function: Callable[[dict], Any], first: int, rows: list[dict], path: str) -> str:
    """The line for some rows."""
    found: list[list[dict]] = []
    for place, row in enumerate(rows):
        seed_all(first + place)
        try:
            found.append(checked(function(row)))
        except Refused as refused:
            return json.dumps({"row": place, "why": str(refused)})
        except (Exception, SystemExit) as error:
            return json.dumps({"row": place, "why": told(error, path, row)})
    return json.dumps(found)


def seed_all(number: int) -> None:
    """Draws depend on the row's number, not on which process has it."""
    random.seed(number)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number % 2**32)


def checked(result: Any) -> list[dict]:
    """The rows that a row has become. Raises `Refused`."""
    rows = [] if result is None else result if isinstance(result, list) else [result]
    for row in rows:
        if not isinstance(row, dict):
            what = f"{type(row).__name__} {str(row)[:AT_MOST]!r}"
            raise Refused(f"returned {what}; a row is a dict: return one, a list of them, or None")
        try:
            json.dumps(row, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise Refused(f"returned a row that JSON cannot hold: {error}") from None
    return rows


def told(error: BaseException, path: str, row: dict | None = None) -> str:
    """What was raised and where, and for a field that the row has not, what it has."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).resolve() == Path(path).resolve()]
    place = "".join(f" ({frame.filename}:{frame.lineno})" for frame in own[-1:])
    text = f"{type(error).__name__}: {error}{place}"
    if isinstance(error, KeyError) and row is not None and error.args[0] not in row:
        text += f"; the row has {', '.join(row) or 'no fields'}"
    return text


if __name__ == "__main__":
    main()
