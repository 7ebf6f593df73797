"""A training run that can be stopped and goes on: what it needs is saved, every so many steps.

And when it is told to stop. One piece of code for the solver, the verifier and PPO. What a step
holds: weights, the optimizer's state, random state, and the facts that the trainer gives: counters,
positions, controllers.
"""

import ctypes
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from src.checkpoint.folder import check_space
from src.checkpoint.gathering import fetch, keys_of
from src.checkpoint.manifest import sync
from src.checkpoint.mirror import bring
from src.checkpoint.steps import FETCHED, FINISHED, Steps, file_of, random_file
from src.data.rows import write_json
from src.errors import Stopped, UserError
from src.logs import RunLog
from src.models.layout import TensorSpec
from src.models.places import Placement
from src.models.transformer import Transformer
from src.parallel.host import HostCopies
from src.parallel.setup import Parallel, agreed
from src.settings.training import SavingSettings
from src.trainer.earlier import FAILED, Earlier
from src.trainer.monitor import Monitor
from src.trainer.optimizer import Optimizer
from src.trainer.state import (
    SavedModel,
    bytes_of,
    counters_of,
    files_read,
    layout_facts,
    restore,
    tensors_of,
)
from src.trainer.time_limit import SLOW_DISK, TimeLimit, process_age

T = TypeVar("T")
Part = tuple[Callable[[], Any], Callable[[Any], None]]
SECOND_SIGNAL_S = 3.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Parts that begin anew, as the settings say, when one of these is another than before.
ANEW = {
    "kl_coef": ("kl_coef",),
    "ptx": ("ptx_file",),
    "best": ("keep_best", "task", "label_file"),
}


class StopSignal:
    """Whether SIGTERM has come to this rank. A second one ends what hangs.

    It knows nothing of the run: a handler outlives what a refused run lets go of.
    """

    def __init__(self) -> None:
        self.came, self.came_at = False, 0.0
        self.before = signal.signal(signal.SIGTERM, self)

    def __call__(self, *_: object) -> None:
        if not self.came:
            self.came, self.came_at = True, time.monotonic()
        elif time.monotonic() - self.came_at > SECOND_SIGNAL_S:  # a launcher's end may send two
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def unhook(self) -> None:
        signal.signal(signal.SIGTERM, self.before)


def _guarded(path: Path, read: Callable[[], T]) -> T:
    """What `read` makes of a step. Raises UserError for whatever a damaged one leads to."""
    try:
        return read()
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OSError,
        SafetensorError,
    ) as error:
        raise UserError(
            f"{path}: is damaged, or not of this run ({type(error).__name__}: {error})"
        ) from error


class Saving:
    """Where a run's steps are, when the next is due, and whether the run is to stop."""

    def __init__(
        self,
        earlier: Earlier,
        settings: SavingSettings,
        models: dict[str, tuple[Transformer, Optimizer]],
        parallel: Parallel,
        log: RunLog,
        parts: dict[str, Part] | None = None,
        tensors: dict[str, tuple[dict[str, Tensor], dict[str, TensorSpec], Parallel]] | None = None,
        at_work: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
    ) -> None:
        """models: name → (model, optimizer) of what is trained.

        tensors: others that change: name → (this rank's, how they are cut, the division that they
        lie in); parts: what else does, as JSON: name → (how to get it, how to set it), set after
        the tensors; at_work(name): around what needs the model, or the tensors, of that name on the
        device.
        """
        self.earlier, self.every, self.log = earlier, settings.save_every, log
        self.models, self.parallel, self.at_work = models, parallel, at_work
        self.parts, self.tensors = parts or {}, tensors or {}
        nodes, copies = earlier.nodes, settings.copies(earlier.nodes.count)
        mirror = self._mirror if earlier.url is not None and nodes.are_one else None
        self.steps = Steps(
            earlier.folder, settings.keep, parallel, nodes=nodes, copies=copies, mirror=mirror
        )
        self.copies = HostCopies(parallel.device)
        self.monitor = Monitor(log, parallel, settings.straggler_window)
        self.limit, self.minutes = TimeLimit(settings.max_minutes), settings.max_minutes
        self.step = 0  # the last that was taken
        self.saved = 0  # the last that was saved
        self.total = 0  # that the run will take
        self.stop_signal = StopSignal()
        # A launcher that dies takes its workers along.
        if platform.system() == "Linux" and "RANK" in os.environ:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    # --- going on ---------------------------------------------------------------------------

    def resume(self, total: int) -> int:
        """Bring back the step that was found, and return its number; 0 where there is none.

        total: the run's steps.
        """
        path, manifest = self.earlier.step, self.earlier.manifest
        last = manifest.get("step", 0)
        if self.earlier.changes and last >= total:
            new = ", ".join(map(str, self.earlier.changes))
            raise UserError(
                f"{path}: was the last of {total} steps, and nothing is left to do with what is "
                f"new ({new}); go on from an earlier one (--resume PATH), or for longer (--epochs, "
                "--iterations)"
            )
        agreed(self._check_time)
        is_first = self.earlier.nodes.is_first
        agreed(lambda: self.steps.remove_unfinished() if is_first else None)
        self._check_space(total - last)
        self._tell_nodes()
        if path is not None:
            self._bring_back(path, manifest)
            self.step, self.saved = last, last if self.steps.is_of(path) else 0
        elif is_first:
            (self.earlier.folder / FAILED).unlink(missing_ok=True)  # another run's
        for other in self.steps.go_back_to(path, manifest):
            self.log.info(
                f"{other.name} of {other.parent} is set aside: it is not of this run, or later"
            )
        if path is not None:
            self.log.info(f"goes on after step {self.step}, from {path}")
        self._tell_changes()
        self.total = total
        self.monitor.begin(self.step, total)
        self.limit.begin()
        return self.step

    def _tell_changes(self) -> None:
        earlier = self.earlier
        for change in earlier.changes:
            allowed = "--resume_changed" if change.name in earlier.named else "it had failed before"
            self.log.warning(f"goes on with another setting ({allowed}): {change}")
            self.log.text(self.step, "resume_changed", str(change))
        for name in earlier.named:
            if not earlier.has_changed(name):
                self.log.info(f"--resume_changed {name}: there is nothing that it has changed from")

    def _tell_nodes(self) -> None:
        """Say where steps go, if there may be a doubt; and what is not as it was written."""
        nodes, folder = self.earlier.nodes, self.earlier.folder
        for line in self.earlier.damage:
            self.log.warning(f"{line}; another node has it as it was written, and gives it")
        if nodes.launchers > 1 and nodes.are_one:
            self.log.info(f"{nodes.launchers} launchers share {folder}: a step lies there once")
        elif nodes.launchers > 1:
            self.log.info(
                f"{nodes.count} nodes have a {folder} of their own: each keeps its ranks' part of "
                f"a step, and each file lies on {self.steps.copies} of them (--save_copies); model "
                f"and log are on {nodes.described()[0]}"
            )

    def _bring_back(self, path: Path, manifest: dict) -> None:
        """Put back what a step holds, on all ranks together."""
        # What lies on other nodes alone comes from there, for as long as it is read.
        keys = fetched = None
        if not self.earlier.nodes.are_one:
            keys, fetched = self._fetch(path, manifest)
        agreed(lambda: self._restore(path, manifest, keys, fetched))
        if fetched is not None and self.earlier.nodes.is_first:
            shutil.rmtree(fetched, ignore_errors=True)

    def _fetch(self, path: Path, manifest: dict) -> tuple[dict[str, list[str]], Path]:
        """Let each node have the files that its ranks will read; what is in which, and where."""
        earlier = self.earlier
        nodes, held = earlier.nodes, earlier.holders
        keys = keys_of(path, manifest["files"], held, nodes)
        began, fetched = time.monotonic(), earlier.folder / f"{FETCHED}{path.name}"
        wanted = agreed(lambda: _guarded(path, lambda: self._files_read(path, manifest, keys)))
        count, size = fetch(path, fetched, wanted, manifest, held, nodes, self.parallel)
        if count:
            self.log.info(
                f"{count} files of {path.name}, {size:,} bytes, went between nodes to be read, in "
                f"{time.monotonic() - began:.1f} s"
            )
        return keys, fetched

    def _files_read(self, path: Path, manifest: dict, keys: dict[str, list[str]]) -> set[str]:
        """The files of a step that this rank reads."""
        files: set[str] = {random_file(self.parallel.dp_rank, self.parallel.pp_rank)}
        files &= manifest["files"].keys()
        for name, (model, optimizer) in self.models.items():
            self._check_holds(path, name, manifest)
            saved = SavedModel(path, name, manifest["layouts"][name], keys)
            with self.at_work(name):
                files |= files_read(model, optimizer, saved, manifest["counters"][name])
        for name, (tensors, specs, division) in self.tensors.items():
            saved = SavedModel(path, name, manifest["layouts"][name], keys)
            for key in tensors:
                files |= saved.files_of(key, specs[key], *_place_in(division))
        return files

    def _check_holds(self, path: Path, name: str, manifest: dict) -> None:
        if name not in manifest["layouts"]:
            raise UserError(f"{path}: holds no {name}: the run that saved it trained none")

    def _restore(
        self,
        path: Path,
        manifest: dict,
        keys: dict[str, list[str]] | None,
        fetched: Path | None,
    ) -> None:
        """Read this rank's part of a step. keys, fetched: see `SavedModel`."""

        def read() -> None:
            for name, (model, optimizer) in self.models.items():
                self._check_holds(path, name, manifest)
                with self.at_work(name):
                    saved = SavedModel(path, name, manifest["layouts"][name], keys, fetched)
                    restore(model, optimizer, saved, manifest["counters"][name])
            for name, (tensors, specs, division) in self.tensors.items():
                saved = SavedModel(path, name, manifest["layouts"][name], keys, fetched)
                with self.at_work(name):
                    for key, tensor in tensors.items():
                        tensor.copy_(saved.local(key, specs[key], *_place_in(division)))
            for name, (_, set_part) in self.parts.items():
                if not self.earlier.has_changed(*ANEW.get(name, ())):
                    set_part(manifest["parts"][name])
            self._restore_random([path] if fetched is None else [fetched, path])

        _guarded(path, read)

    # --- saving -----------------------------------------------------------------------------

    def after(self, step: int) -> None:
        """To be called after every step by all ranks. Saves when it is due.

        When any rank was told to stop, or has no time for another step, saves and raises Stopped.
        """
        self.step = step
        self.limit.end()
        if self.steps.longest:  # now it is known
            self.limit.longest_save = self.steps.longest
        ends = step < self.total and self.limit.is_up()  # the last step is the end anyway
        flags = torch.tensor([self.stop_signal.came, ends], device=self.parallel.device).float()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        signalled, is_late = flags.bool().tolist()
        if signalled or is_late or (self.every is not None and step % self.every == 0):
            self._save(step)
        if signalled or is_late:
            self.steps.wait()
            self.stop_signal.unhook()
            self.monitor.end("stopped")
            cause = "a signal" if signalled else f"--max_minutes {self.minutes:g}"
            raise Stopped(
                f"stopped by {cause} after step {step}, which is saved; the same command goes on "
                "from there"
            )
        self.limit.begin()

    def failed(self, setting: str, error: UserError) -> NoReturn:
        """To be called by all ranks when a setting's file has failed, before a step was taken.

        The step before is saved, and the same command goes on from it with another file: one that
        was repaired. Raises the error, which says so.
        """
        if self.step == 0:
            raise error
        if self.saved != self.step:
            self._save(self.step)
        self.steps.wait()
        if self.earlier.nodes.is_first:
            write_json(self.earlier.folder / FAILED, {"setting": setting, "after_step": self.step})
        self.monitor.end("failed")
        raise UserError(
            f"{error}\nstep {self.step} is saved: the same command goes on from there, also with a "
            f"repaired file (--{setting})"
        ) from error

    def _save(self, step: int) -> None:
        self.steps.wait()  # the copies of the step before may be in the memory for these
        p = self.parallel
        files: dict[str, dict[str, Tensor]] = {}
        counters, layouts = {}, {}
        # What has an optimizer: each rank its share.
        for name, (model, optimizer) in self.models.items():
            division = optimizer.parallel
            with self.at_work(name):
                tensors = self.copies.of(name, tensors_of(model, optimizer))
                counters[name] = division.known_to_all(counters_of(optimizer))
            if tensors:
                place = division.mp_rank, division.dp_rank, division.pp_rank
                files[file_of(name, *place)] = tensors
            layouts[name] = layout_facts(optimizer)
        # Other tensors, and the state of dropout: alike on ranks that hold the same, so one saves.
        for name, (others, _, division) in self.tensors.items():
            if division.is_member and division.dp_rank == 0:
                place = division.mp_rank, 0, division.pp_rank
                with self.at_work(name):
                    files[file_of(name, *place)] = self.copies.of(name, others)
            layouts[name] = {"mp": division.layout.tp, "dp": 1, "pp": division.layout.pp}
        if p.is_member and p.mp_rank == 0:
            files[random_file(p.dp_rank, p.pp_rank)] = self._random()
        about = {
            **self.earlier.facts,
            "layouts": layouts,
            "counters": counters,
            "parts": {name: get() for name, (get, _) in self.parts.items()},
        }
        self.steps.save(step, files, about)
        self.saved = step
        self.monitor.saved(step)

    def _mirror(self) -> None:
        """Bring the saved steps to their URL."""
        assert self.earlier.url is not None
        try:
            bring(self.earlier.folder, self.earlier.url)
        except UserError as error:
            self.log.warning(f"{error}; steps are saved here, and uploaded after the next one")

    def _random(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.parallel.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        return states

    def _check_space(self, steps_left: int) -> None:
        """Raise UserError when the steps to be saved will not fit on the disk.

        Those are --keep and one more, beside those that stay.
        """
        size = sum(bytes_of(model, optimizer) for model, optimizer in self.models.values())
        for tensors, _, division in self.tensors.values():
            if division.is_member and division.dp_rank == 0:
                size += sum(x.nbytes for x in tensors.values())
        # What a node's disk gets of it: its ranks' files, and copies of the nodes' before it.
        nodes, sizes = self.earlier.nodes, [0] * self.parallel.world_size
        dist.all_gather_object(sizes, size)
        before = [(nodes.node - i) % nodes.count for i in range(self.steps.copies)]
        needed = sum(sizes[rank] for node in before for rank in nodes.ranks(node))
        self.limit.longest_save = needed / SLOW_DISK
        if self.every is None:
            return
        staying = len(self.steps.until(self.earlier.step)[-self.steps.keep :])
        more = min(self.steps.keep + 1 - staying, steps_left // self.every)
        what = f"for {more} steps (--save_every, --keep)"
        agreed(lambda: check_space(self.earlier.folder, needed * more, what))

    def _check_time(self) -> None:
        """Raise UserError when --max_minutes has passed before the first step."""
        if self.limit.is_past():
            raise UserError(
                f"--max_minutes {self.minutes:g}: {process_age() / 60:.1f} minutes have gone into "
                "starting and loading alone, and no step would be taken: give more"
            )

    def _restore_random(self, folders: list[Path]) -> None:
        """Dropout's state; a data-parallel rank that there was none of keeps its first one."""
        name = random_file(self.parallel.dp_rank, self.parallel.pp_rank)
        file = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if file is not None:
            with safe_open(file, framework="pt") as states:
                torch.set_rng_state(states.get_tensor("cpu"))
                if self.parallel.device.type == "cuda" and "cuda" in list(states.keys()):
                    torch.cuda.set_rng_state(states.get_tensor("cuda"))

    def finish(self) -> None:
        """The run is over and its models are saved."""
        self.steps.wait()
        self.stop_signal.unhook()
        folder = self.earlier.folder
        if self.earlier.nodes.is_first and folder.is_dir():
            write_json(folder / FINISHED, {"step": self.step, **self.earlier.facts})
            sync(folder)
        self.monitor.end("finished")


def _place_in(division: Parallel) -> tuple[Placement, int]:
    """How tensors beside the models lie on a division's ranks, and where this one is in that."""
    placement = Placement(division.mp_size, pp=division.pp_size)
    return placement.held_by([division.pp_rank]), division.model_rank
