"""Settings that name URLs, as the local paths that scripts work with.

What is read by its path is fetched into the cache (src/storage.py) beforehand. What is written goes
to a folder beside the cache, the same one for the same URL, and is uploaded by the first rank when
the script has done: models, logs and results. A run's saved steps (SAVE_DIR-state) are uploaded as
they are saved (src/checkpoint/mirror.py). Rows are read where they lie.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from src import storage
from src.errors import Stopped, UserError
from src.settings.declaration import ROWS, WRITTEN, Setting, Settings, build, declared, flat

S = TypeVar("S", bound=Settings)
# What belongs to a folder OUT and is uploaded with it, as OUT-logs.
_WITH_IT = ("", "-logs", "-best")

_given: dict[str, str] = {}  # from local paths to the URLs that they stand for


@contextmanager
def local(settings: S) -> Iterator[S]:
    """The settings with local paths in place of URLs; afterwards what was written is uploaded.

    Also when the run was told to stop, but not when it failed. Raises UserError, before any work,
    for what cannot be fetched or written to.
    """
    known, values = declared(type(settings)), flat(settings)
    remote = {
        name: value
        for name, value in values.items()
        if isinstance(value, str) and storage.is_url(value) and _is_place(known[name])
    }
    if not remote:
        yield settings
        return
    written = {name: url for name, url in remote.items() if WRITTEN in known[name].marks}
    for name, url in remote.items():
        try:
            values[name] = str(_staged(url)) if name in written else _fetched(url)
        except UserError as error:
            raise UserError(f"--{name} {error}") from error
        _given[values[name]] = url
    began = time.time() - 1  # file systems' clocks are coarse
    try:
        yield build(type(settings), values)
    except Stopped:
        _upload(written, values, began)
        raise
    _upload(written, values, began)


def as_given(settings: S) -> S:
    """The settings with the URLs that their local paths stand for."""
    values = flat(settings)
    urls = {name: _given[value] for name, value in values.items() if _is_known(value)}
    return build(type(settings), values | urls) if urls else settings


def url_of(path: str) -> str | None:
    """The URL that a local path stands for; None where it stands for itself."""
    return _given.get(path)


def _is_known(value: Any) -> bool:
    return isinstance(value, str) and value in _given


def _is_place(setting: Setting) -> bool:
    return (setting.is_path or WRITTEN in setting.marks) and ROWS not in setting.marks


def _fetched(url: str) -> str:
    """A URL's local path; of FILE.py:FUNCTION with the function behind it."""
    from src.checkpoint.folder import NOTES  # what a script reads beside a file, such as a template

    file, colon, function = url.rpartition(":")
    if file.endswith(".py") and function.isidentifier():
        return f"{storage.fetched(file)}{colon}{function}"
    return str(storage.fetched(url, NOTES))


def _staged(url: str) -> Path:
    """Where what is meant for a URL is written."""
    storage.check_writable(url)
    url = url.rstrip("/")
    place = hashlib.sha256(url.encode()).hexdigest()[:20]
    folder = storage.cache_dir() / "written" / place
    folder.mkdir(parents=True, exist_ok=True)
    return folder / url.rpartition("/")[2]


def _upload(written: dict[str, str], values: dict[str, Any], began: float) -> None:
    """Bring what was written since `began` to its URLs."""
    if os.environ.get("RANK", "0") != "0":
        return
    for name, url in written.items():
        for ending in _WITH_IT:
            source = Path(values[name] + ending)
            if source.exists() and _last_written(source) >= began:
                storage.upload(source, url.rstrip("/") + ending)


def _last_written(path: Path) -> float:
    return max(file.stat().st_mtime for file in (path, *path.rglob("*")))
