"""A run's saved steps on disk: each appears whole or not at all, and is verified before it is trusted.

Every rank writes its files into `.tmp-step-N` and brings them down to the disk; their hashes are gathered; rank 0 writes the
manifest, renames the folder to `step-N`, and only then removes older ones. A folder is never written to again.
"""

import itertools
import re
import shutil
import threading
from pathlib import Path
from typing import Callable

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from src.checkpoint.manifest import MANIFEST, described, problems, read_manifest, sync, write_manifest
from src.errors import UserError
from src.parallel.setup import Parallel, agreed

PREFIX = "step-"
FINISHED = "finished.json"
Stage = Callable[[str], None]


class Steps:
    """The folder of a run's steps. Writing goes on in a thread while training does; one step at a time."""

    def __init__(self, folder: Path, keep: int, parallel: Parallel, reached: Stage = lambda stage: None) -> None:
        """keep: newest steps that stay; reached(stage) is called at each stage of writing, for tests."""
        self.folder, self.keep, self.parallel, self.reached = folder, keep, parallel, reached
        self.group = dist.new_group(backend="gloo", timeout=parallel.timeout)  # the thread's own: never between others' exchanges
        self.thread: threading.Thread | None = None
        self.failed: BaseException | None = None

    def save(self, step: int, files: dict[str, dict[str, Tensor]], facts: dict) -> None:
        """Begin to write a step. files: this rank's, name → tensors on the host, which nobody changes; facts: rank 0's, as JSON.

        Raises UserError when the one before could not be written.
        """
        self.wait()

        def work() -> None:
            try:
                self._write(step, files, facts)
            except BaseException as error:  # is raised in the main thread, by the next `wait`
                self.failed = error

        self.thread = threading.Thread(target=work, name=f"writing step {step}")
        self.thread.start()

    def wait(self) -> None:
        """Until what was begun is on the disk. Raises what went wrong, on every rank."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failed is not None:
            error, self.failed = self.failed, None
            raise error

    def _write(self, step: int, files: dict[str, dict[str, Tensor]], facts: dict) -> None:
        new, final = self.folder / f".tmp-{PREFIX}{step:08d}", self.folder / f"{PREFIX}{step:08d}"
        self._together(lambda: self._make(new, final) if self.parallel.is_main else None, new)
        self.reached("made")
        written = self._together(lambda: self._files(new, files), new)
        self.reached("written")
        if self.parallel.is_main:
            entries = {name: entry for part in written for name, entry in part.items()}
            self._together(lambda: self._publish(new, final, entries, {"step": step, **facts}), new)
        else:
            self._together(lambda: None, new)
        self.reached("published")
        if self.parallel.is_main:
            for old in list_steps(self.folder)[: -self.keep]:  # only now that the new one is whole
                shutil.rmtree(old)
        self.reached("pruned")

    def go_back_to(self, step: Path | None) -> None:
        """From now on the run goes on from `step` of this folder (None: from nothing): what lies after it is another run's, and goes

        to a folder beside. All ranks come here.
        """
        if self.parallel.is_main and self.folder.is_dir() and (step is None or step.resolve().parent == self.folder.resolve()):
            later = [other for other in self.folder.glob(f"{PREFIX}*") if step is None or other.name > step.name]
            later += [file for file in [self.folder / FINISHED] if file.is_file()]
            aside = next(p for i in itertools.count(1) if not (p := self.folder / f"aside-{i}").exists())
            for other in later:
                aside.mkdir(exist_ok=True)
                other.rename(aside / other.name)
        dist.barrier()

    def _make(self, new: Path, final: Path) -> None:
        if final.exists():
            raise UserError(f"{final}: is there already; a step is never overwritten")
        for left in self.folder.glob(f".tmp-{PREFIX}*"):  # by runs that were killed while writing
            shutil.rmtree(left, ignore_errors=True)
        new.mkdir(parents=True)

    def _files(self, new: Path, files: dict[str, dict[str, Tensor]]) -> dict[str, dict]:
        entries = {}
        for name, tensors in files.items():
            save_file(tensors, new / name)
            sync(new / name)
            entries[name] = described(new / name)
        return entries

    def _publish(self, new: Path, final: Path, entries: dict[str, dict], facts: dict) -> None:
        write_manifest(new, entries, **facts)
        self.reached("manifest")
        new.rename(final)
        self.reached("renamed")
        sync(self.folder)

    def _together(self, work: Callable, new: Path) -> list:
        """Every rank's result; if one fails, all raise, and nothing of the step stays."""
        result, problem = None, None
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        except Exception as error:  # a full disk has many names
            problem = f"{new}: writing failed ({type(error).__name__}: {str(error).splitlines()[0]}); older steps are as they were"
        everyone = [None] * self.parallel.world_size
        dist.all_gather_object(everyone, (result, problem), group=self.group)
        found = next((p for _, p in everyone if p is not None), None)
        if found is not None:
            if self.parallel.is_main:
                shutil.rmtree(new, ignore_errors=True)
            raise UserError(found)
        return [r for r, _ in everyone]


def is_step(path: Path) -> bool:
    """By its name alone."""
    return re.fullmatch(PREFIX + "[0-9]{8,}", path.name) is not None


def list_steps(folder: Path) -> list[Path]:
    """The steps that are whole, oldest first. What is called `.tmp-` never is one."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_step(path) and (path / MANIFEST).is_file())


def open_step(path: Path, parallel: Parallel) -> dict:
    """A step's manifest, once all its files are as they were written; the ranks share the hashing. Raises UserError on all of them."""

    def check() -> dict:
        manifest = read_manifest(path)
        found = problems(path, manifest, parallel.rank, parallel.world_size)
        if found:
            others = [step.name for step in list_steps(path.parent) if step != path]
            older = f"; --resume {path.parent / others[-1]} goes on from there" if others else ""
            raise UserError(found[0] + older)
        return manifest

    return agreed(check)
