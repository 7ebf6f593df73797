"""Files that lie elsewhere: URLs of all protocols that fsspec knows, such as s3://, gs://, hf://.

The only place that knows of them. Data is read as a stream of ranges (`opened`); what is opened by
its path is fetched into a cache (`fetched`), and what was written to a folder is brought to its
place afterwards (`upload`). Plain paths are taken, too, and lie where they lie. A connection that
fails is tried again; what no try mends is one `UserError`.
"""

import hashlib
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from glob import has_magic, iglob
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from filelock import FileLock

from src.errors import UserError

T = TypeVar("T")
CACHE_VARIABLE = "OWN_YOUR_RLHF_CACHE"
ATTEMPTS, FIRST_WAIT_S = 6, 0.1  # of a part of a file; each wait is twice the one before
BLOCK, BLOCKS_KEPT = 4 * 2**20, 8  # bytes that are asked for at a time, and how often kept
# Of a remote file: what is another when it holds something else. The first that a store knows.
_VERSIONS = (
    *("ETag", "etag", "blob_id", "md5Hash", "Content-MD5", "mtime", "Last-Modified"),
    *("LastModified", "last_modified", "created", "sha"),
)
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
# Libraries whose errors are of the connection; others' are bugs.
_CARRIERS = {"aiohttp", "botocore", "requests", "httpx", "urllib3", "gcsfs", "huggingface_hub"}
_CARRIERS |= {"adlfs", "azure", "google"}
_IN_BUCKETS = ("s3", "s3a", "gs", "gcs")
# Written last and removed first: a folder that has it is whole.
LAST = "manifest.json"


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL; `file://` is none that anybody needs."""
    return _URL.match(str(path)) is not None


def is_web(path: str) -> bool:
    """Whether a path is a plain web address, in which ? begins a query."""
    return path.startswith(("http://", "https://"))


def cache_dir() -> Path:
    """Where what is fetched is kept: $OWN_YOUR_RLHF_CACHE, or ~/.cache/own-your-rlhf."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/own-your-rlhf").expanduser()


@dataclass(frozen=True)
class Remote:
    """A file or a folder as its store describes it; version: another when its content is."""

    url: str
    size: int | None
    version: str
    is_folder: bool


def name_of(path: str | Path) -> str:
    """The name of a file, without its folder; of a web address without its query, too."""
    text = str(path)
    return (text.partition("?")[0] if is_web(text) else text).rpartition("/")[2]


# ---- looking -------------------------------------------------------------------------------------


def is_file(path: str | Path) -> bool:
    """Whether there is a file."""
    if not is_url(path):
        return os.path.isfile(path)
    found = _described(str(path))
    return found is not None and not found.is_folder


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder."""
    if not is_url(path):
        return os.path.isdir(path)
    found = _described(str(path))
    return found is not None and found.is_folder


def names_in(folder: str | Path) -> list[str]:
    """The names of what lies in a folder, sorted; those of folders end in "/"."""
    if not is_url(folder):
        return sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(folder))
    url = str(folder).rstrip("/")
    fs, path = _store(url)
    entries = _tried(url, lambda: fs.ls(path, detail=True))
    return sorted(
        entry["name"].rstrip("/").rpartition("/")[2] + "/" * (entry["type"] == "directory")
        for entry in entries
        if entry["name"].rstrip("/") != path.rstrip("/")
    )


def has_pattern(path: str) -> bool:
    """Whether a path stands for what it matches. In a web address ? begins a query."""
    return has_magic(path.replace("?", "") if is_web(path) else path)


def matches(pattern: str) -> list[str]:
    """The files that a pattern matches, sorted; ** are folders at any depth."""
    if not is_url(pattern):
        return sorted(name for name in iglob(pattern, recursive=True) if os.path.isfile(name))
    fs, path = _store(pattern)
    found = _tried(pattern, lambda: fs.glob(path, detail=True))
    return sorted(
        fs.unstrip_protocol(name) for name, entry in found.items() if entry["type"] == "file"
    )


def size_of(path: str | Path) -> int:
    """How many bytes a file has; 0 where it is not there, or its server does not say."""
    if not is_url(path):
        return os.path.getsize(path) if os.path.isfile(path) else 0
    found = _described(str(path))
    return (found and found.size) or 0


def version_of(url: str) -> str:
    """A text that is another when a remote file holds something else. Raises UserError."""
    found = _needed(url)
    if not found.version:  # its store says none: what it holds, which takes reading it
        with opened(url) as file:
            return f"{found.size} {hashlib.file_digest(file, 'sha256').hexdigest()}"  # type: ignore[arg-type]
    return f"{found.size} {found.version}"


def _described(url: str) -> Remote | None:
    fs, path = _store(url)

    def info() -> dict[str, Any] | None:
        try:
            return fs.info(path)
        except FileNotFoundError as error:
            if isinstance(why := _cause(error), FileNotFoundError):
                return None
            raise why from error

    entry = _tried(url, info)
    return None if entry is None else _remote(url, entry)


def _remote(url: str, entry: dict[str, Any]) -> Remote:
    version = next((str(entry[key]) for key in _VERSIONS if entry.get(key)), "")
    return Remote(url, entry.get("size"), version, entry.get("type") == "directory")


def _needed(url: str) -> Remote:
    """What lies at a URL. Raises UserError where nothing does."""
    found = _described(url)
    if found is None:
        raise _missing(url)
    return found


def _missing(url: str) -> UserError:
    protocol, _, rest = url.partition("://")
    bucket = rest.partition("/")[0]
    if protocol in _IN_BUCKETS:
        fs, _ = _store(url)
        if not _tried(url, lambda: fs.exists(bucket)):
            return UserError(f"{url}: there is no bucket {bucket}, or none for these credentials")
    return UserError(f"{url}: is not there")


# ---- stores and their errors ---------------------------------------------------------------------


def _store(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises UserError where none is there."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        how = " (pip install it)" if isinstance(error, ImportError) else ""
        raise UserError(f"{url}: cannot be opened: {_first_line(error)}{how}") from error
    fs.invalidate_cache()  # what was listed once may be another thing now
    return fs, path


def _tried(url: str, action: Callable[[], T], attempts: int = 2) -> T:
    """What an action comes to; one that the connection fails is tried again.

    Raises UserError for what is refused, missing, or fails too often.
    """
    for attempt in range(attempts):
        if attempt:
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
        try:
            return action()
        except Exception as error:
            error = last = _cause(error)
            if not _is_of_connection(error):
                raise
            if isinstance(error, FileNotFoundError):
                raise _missing(url) from error
            if _is_refusal(error):
                raise UserError(
                    f"{url}: is refused: {_first_line(error)}; check the credentials, and what "
                    "they allow"
                ) from error
    raise UserError(f"{url}: cannot be reached: {_first_line(last)}") from last


def _cause(error: Exception) -> Exception:
    """What went wrong: of the web fsspec says that a file is not there, whatever fails."""
    cause = error.__cause__
    of_the_web = type(cause).__module__.partition(".")[0] == "aiohttp"
    if not of_the_web or not isinstance(cause, Exception) or getattr(cause, "status", 0) == 404:
        return error
    return cause


def _is_of_connection(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CARRIERS


def _is_refusal(error: Exception) -> bool:
    status = getattr(error, "status", None) or vars(error).get("code")
    no_credentials = "Credential" in type(error).__name__
    return isinstance(error, PermissionError) or status in (401, 403) or no_credentials


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# ---- reading -------------------------------------------------------------------------------------


def opened(path: str | Path) -> BinaryIO:
    """A file's bytes, from any place. Raises OSError of a plain path, UserError of a URL."""
    if not is_url(path):
        return open(path, "rb")
    found = _needed(str(path))
    if found.is_folder:
        raise UserError(f"{path}: is a folder, a file is needed")
    if found.size is None:
        raise UserError(f"{path}: its server does not say how long it is; download it yourself")
    return cast(BinaryIO, io.BufferedReader(_Ranges(found), BLOCK))


class _Ranges(io.RawIOBase):
    """A remote file, of which a block is asked for at a time: whatever fails is asked for again."""

    def __init__(self, remote: Remote) -> None:
        super().__init__()
        assert remote.size is not None
        self.url, self.size, self.place = remote.url, remote.size, 0
        self._fs, self._path = _store(remote.url)
        self._block = lru_cache(BLOCKS_KEPT)(self._ask)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        number, start = divmod(self.place, BLOCK)
        if self.place >= self.size:
            return 0
        data = self._block(number)[start : start + len(buffer)]
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)

    def _ask(self, number: int) -> bytes:
        return read_range(self.url, number * BLOCK, min(self.size, (number + 1) * BLOCK))


def read_range(url: str, start: int, stop: int) -> bytes:
    """A part of a remote file. Raises UserError where its server gives another."""
    fs, path = _store(url)

    def ask() -> bytes:
        data = fs.cat_file(path, start=start, end=stop)
        if len(data) < stop - start:
            raise ConnectionError(f"{len(data)} bytes came of {stop - start}")
        return data

    data = _tried(url, ask, ATTEMPTS)
    if len(data) > stop - start:
        raise UserError(f"{url}: its server gives no parts of a file; download it yourself")
    return data


# ---- fetching ------------------------------------------------------------------------------------


def fetched(url: str, beside: Iterable[str] = ()) -> Path:
    """A remote file or folder as a local one, by its own name, fetched unless the cache has it.

    beside: names of files that come along where they lie beside a file. What is at the URL is known
    by sizes and versions: what has changed is fetched anew. A fetch that was cut off goes on. Of
    several processes one fetches. Raises UserError.
    """
    url = url.rstrip("/")
    wanted = _all_of(url, beside)
    place = cache_dir() / "fetched" / _digest(url, wanted)
    partial = place.with_name(f"{place.name}.part")
    target = place / url.rpartition("/")[2]
    if place.is_dir():
        return target
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not place.is_dir():
                _fetch_all(url, beside, wanted, partial)
                partial.rename(place)
    except OSError as error:
        raise UserError(
            f"{url}: cannot be kept in {cache_dir()} (${CACHE_VARIABLE}): {error.strerror or error}"
        ) from error
    return target


def fetch_folder(url: str, target: Path) -> None:
    """Bring a remote folder to a place where nothing is yet; it appears there whole.

    A fetch that was cut off goes on, as long as the same is there. Raises UserError.
    """
    wanted = _all_of(url, ())
    partial = target.with_name(f".part-{_digest(url, wanted)}")
    try:
        _fetch_all(url, (), wanted, partial)
        (partial / url.rpartition("/")[2]).rename(target)
        partial.rmdir()
    except OSError as error:
        raise UserError(f"{url}: cannot be kept at {target}: {error.strerror or error}") from error


def _digest(url: str, wanted: dict[str, Remote]) -> str:
    """A name for what is at a URL, another when that is another."""
    key = "\n".join(f"{name} {remote.size} {remote.version}" for name, remote in wanted.items())
    return hashlib.sha256(f"{url}\n{key}".encode()).hexdigest()[:20]


def _fetch_all(url: str, beside: Iterable[str], wanted: dict[str, Remote], folder: Path) -> None:
    """Bring all of it into a folder. Raises UserError where it has changed meanwhile."""
    for name, remote in wanted.items():
        _fetch(remote, folder / name)
    if _all_of(url, beside) != wanted:
        shutil.rmtree(folder)
        raise UserError(f"{url}: was changed while it was fetched; run this again")


def _all_of(url: str, beside: Iterable[str]) -> dict[str, Remote]:
    """What is fetched for a URL: path below the place in the cache → remote file."""
    found, own = _needed(url), url.rpartition("/")[2]
    if not found.is_folder:
        parent = url.rpartition("/")[0]
        others = {name: _described(f"{parent}/{name}") for name in beside if name != own}
        return {own: found, **{name: other for name, other in others.items() if other is not None}}
    fs, path = _store(url)
    entries = _tried(url, lambda: fs.find(path, detail=True))
    if not entries:
        raise UserError(f"{url}: holds no files")
    root = path.rstrip("/")
    names = {entry: f"{own}/{entry.removeprefix(root).lstrip('/')}" for entry in sorted(entries)}
    outside = next((entry for entry, name in names.items() if ".." in name.split("/")), None)
    if outside is not None:  # a store's key may have any name
        raise UserError(f"{url}: holds {outside}, which would be kept outside of the cache")
    return {
        name: _remote(fs.unstrip_protocol(entry), entries[entry]) for entry, name in names.items()
    }


def _fetch(remote: Remote, target: Path) -> None:
    """Bring a remote file to its place, on from where an earlier try ended."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if remote.size is None:
        raise UserError(
            f"{remote.url}: its server does not say how long it is; download it yourself"
        )
    part = target.with_name(f"{target.name}.part")
    with part.open("ab") as file:
        for start in range(file.tell(), remote.size, BLOCK):
            file.write(read_range(remote.url, start, min(remote.size, start + BLOCK)))
        file.flush()
        os.fsync(file.fileno())
    # A time of change that says what the file is: the same on all machines.
    version = hashlib.sha256(remote.version.encode()).digest()
    os.utime(part, (0, int.from_bytes(version[:4])))
    part.rename(target)


# ---- writing -------------------------------------------------------------------------------------


def check_writable(url: str) -> None:
    """Raise UserError when nothing can be written to a URL, by a file that comes and goes."""
    fs, path = _store(url)
    probe = f"{path.rstrip('/')}.{os.getpid()}.probe"
    _tried(url, lambda: fs.pipe_file(probe, b"probe"))
    _tried(url, lambda: fs.rm_file(probe))


def upload(source: Path, url: str) -> None:
    """Bring a local file or folder to its URL, in place of what is there.

    The manifest of a folder goes first and comes last: a reader finds the old one whole, none, or
    the new one whole. Raises UserError.
    """
    fs, path = _store(url)
    path = path.rstrip("/")
    if source.is_file():
        _put(fs, source, path, url)
        return
    files = sorted(
        file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()
    )
    before = _tried(url, lambda: fs.find(path))
    old = {name.removeprefix(path).lstrip("/") for name in before}
    files.sort(key=lambda name: name == LAST)
    if LAST in old:
        _tried(url, lambda: fs.rm_file(f"{path}/{LAST}"))
    for name in files:
        _put(fs, source / name, f"{path}/{name}", f"{url.rstrip('/')}/{name}")
    for name in sorted(old - {*files, LAST}):
        _remove(fs, f"{path}/{name}", url)


def remove_folder(url: str) -> None:
    """Remove a remote folder and all in it, its manifest first. Raises UserError."""
    fs, path = _store(url)
    files = _tried(url, lambda: fs.find(path))
    for name in sorted(files, key=lambda name: name.rpartition("/")[2] != LAST):
        _remove(fs, name, url)


def _put(fs: Any, source: Path, path: str, url: str) -> None:
    _tried(url, lambda: fs.makedirs(path.rpartition("/")[0], exist_ok=True))
    _tried(url, lambda: fs.put_file(str(source), path), ATTEMPTS)


def _remove(fs: Any, path: str, url: str) -> None:
    _tried(url, lambda: fs.rm_file(path))
