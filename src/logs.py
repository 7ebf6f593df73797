"""One run's log: lines for people, JSON lines for programs, TensorBoard for curves. Rank 0 only."""

import functools
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self, TextIO

from tqdm import tqdm

from src.errors import UserError
from src.progress import Progress
from src.remote import as_given
from src.settings.config_file import to_yaml
from src.settings.declaration import Settings, flat

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PLAIN_INTERVAL_S = 60.0  # between progress lines where stderr is not a terminal
# No other variable is logged.
ENVIRONMENT = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
PACKAGES = ("torch", "transformers", "fairscale")
SETTINGS_FILE = "settings.yaml"
# hf_token, not max_new_tokens
SECRET = re.compile(r"(^|_)token$|secret|password|api_key", re.IGNORECASE)


class RunLog:
    """Context manager; on every rank but 0 each method does nothing.

    Lines go to stderr and `log_dir/name.log`, records to `log_dir/name.jsonl`, event files to
    `log_dir`, and a script's settings to `log_dir/settings.yaml`; with `log_dir` None only stderr
    is written. Logs are appended to: a resumed run keeps its past.
    """

    def __init__(
        self, log_dir: str | None, name: str, settings: Settings | dict[str, Any], rank: int
    ) -> None:
        self.log_dir, self.name, self.settings, self.rank = log_dir, name, settings, rank
        self._lines: TextIO | None = None
        self._records: TextIO | None = None
        self._bars: list[Progress] = []  # that are open, one inside another
        self._last_line = -math.inf  # when there was a line of progress

    def __enter__(self) -> Self:
        if self.rank == 0 and self.log_dir is not None:
            folder, settings = Path(self.log_dir), self.settings
            if isinstance(settings, Settings):
                settings = as_given(settings)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._lines = (folder / f"{self.name}.log").open("a", buffering=1, encoding="utf-8")
                self._records = (folder / f"{self.name}.jsonl").open(
                    "a", buffering=1, encoding="utf-8"
                )
                if isinstance(settings, Settings):
                    path = _settings_path(folder, self.name)
                    path.write_text(to_yaml(settings, f"{self.name}.py --config {path}"), "utf-8")
            except OSError as error:
                raise UserError(
                    f"cannot write the log {error.filename}: {error.strerror}"
                ) from error
            self._record(
                "start",
                settings=plain(flat(settings) if isinstance(settings, Settings) else settings),
                git=_git_revision(),
                versions={"python": sys.version.split()[0]} | {p: _version(p) for p in PACKAGES},
                environment={k: os.environ[k] for k in ENVIRONMENT if k in os.environ},
            )
        # What libraries warn of is a warning too, and on all ranks the same.
        self._showwarning = warnings.showwarning
        warnings.showwarning = self._library_warns
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        warnings.showwarning = self._showwarning
        if self._records is not None and self._lines is not None:
            outcome = f"stopped by {kind.__name__}: {error}" if kind else "finished"
            self._write(outcome)  # to the file alone: an error reaches stderr by itself
            self._record("end", outcome=outcome)
            if "_tensorboard" in vars(self):
                self._tensorboard.close()
            self._lines.close()
            self._records.close()
            self._lines = self._records = None

    @property
    def is_written(self) -> bool:
        """Whether this rank writes files beside the log now."""
        return self._records is not None

    def info(self, message: str, level: str = "info") -> None:
        """Write a line for people, and a record of it for programs."""
        if self._records is not None:
            self._record("message", level=level, message=str(message))
        self._show(message)

    def _show(self, message: str) -> None:
        if self.rank == 0:
            for line in self._write(message):
                tqdm.write(line, file=sys.stderr)  # above a bar, not through it

    def warning(self, message: str) -> None:
        """Write a line that begins with WARNING."""
        self.info(f"WARNING {message}", level="warning")

    def _library_warns(
        self, message: object, category: type, filename: str, lineno: int, *_: object, **__: object
    ) -> None:
        self.warning(f"{category.__name__}: {message} ({filename}:{lineno})")

    def scalars(self, step: int, values: dict[str, float], prefix: str = "train") -> None:
        """Record {name: number} at `step`; NaN and infinities become null in the JSON."""
        if self._records is not None:
            numbers = {f"{prefix}/{name}": float(value) for name, value in values.items()}
            self._record(
                "scalars",
                step=step,
                **{k: v if math.isfinite(v) else None for k, v in numbers.items()},
            )
            for name, number in numbers.items():
                self._tensorboard.add_scalar(name, number, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Record a text, such as a sample, at `step`."""
        if self._records is not None:
            self._record("text", step=step, name=name, text=text)
            self._tensorboard.add_text(name, text, step)

    def progress(
        self,
        total: int | None,
        description: str,
        unit: str = "it",
        initial: int = 0,
        work: float | Callable[[], float] | None = None,
        is_bound: Callable[[], bool] = lambda: False,
    ) -> Progress:
        """A `Progress` over `total` units (None: unknown), `initial` of them done.

        work, is_bound: what the time left goes by, see `Progress`. Where stderr is not a terminal
        there is a plain line once a minute at most, whatever bars are open, and one when the
        outermost ends.
        """
        style: dict[str, Any] = dict(file=sys.stderr, dynamic_ncols=True)
        if not sys.stderr.isatty():  # the bar itself draws nothing
            style = dict(file=SimpleNamespace(write=lambda text: None), mininterval=math.inf)
        bar = Progress(
            work,
            self._show_progress,
            is_bound,
            total=total,
            desc=description,
            unit=unit,
            initial=initial,
            smoothing=0,
            leave=not self._bars,
            disable=self.rank != 0,
            **style,
        )
        if self.rank == 0:
            self._bars.append(bar)
            self._show_progress(bar, ended=False)
        return bar

    def _show_progress(self, bar: Progress, ended: bool) -> None:
        """Where stderr is not a terminal, a line when it is time for one."""
        is_time = time.monotonic() - self._last_line >= PLAIN_INTERVAL_S
        if not sys.stderr.isatty() and (is_time or (ended and bar is self._bars[0])):
            self._show(str(bar))
            self._last_line = time.monotonic()
        if ended:
            self._bars.remove(bar)

    def _write(self, message: str) -> list[str]:
        lines = [
            f"{datetime.now():%Y-%m-%d %H:%M:%S} rank {self.rank} {line}"
            for line in str(message).splitlines()
        ]
        if self._lines:
            self._lines.writelines(line + "\n" for line in lines)
        return lines

    def _record(self, event: str, **fields: Any) -> None:
        assert self._records is not None
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        record = {"event": event, "time": now, "rank": self.rank, **fields}
        self._records.write(json.dumps(record, allow_nan=False) + "\n")

    @functools.cached_property
    def _tensorboard(self) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        return SummaryWriter(self.log_dir)


def plain(value: Any, name: str = "") -> Any:
    """`value` as valid JSON: secrets redacted by `name`, infinities null, other objects as text."""
    if SECRET.search(name) and value is not None:
        return "<redacted>"
    if isinstance(value, dict):
        return {str(key): plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def _settings_path(folder: Path, name: str) -> Path:
    """settings.yaml, or another name where that is not this script's."""
    path = folder / SETTINGS_FILE
    if path.exists() and not path.read_bytes().startswith(f"# {name}.py ".encode()):
        return folder / f"{name}.{SETTINGS_FILE}"
    return path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit this code is at; None outside a git checkout or without git."""
    try:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=os.path.dirname(__file__), capture_output=True
        )
    except FileNotFoundError:
        return None
    return git.stdout.decode().strip() if git.returncode == 0 else None
