"""A training run that can be stopped and goes on: every so many steps, and when it is told to stop, all that it needs is saved.

One piece of code for the solver, the verifier and PPO. What a step holds: weights, the optimizer's state, random state, and the facts
that the trainer gives: counters, positions, controllers.
"""

import ctypes
import os
import platform
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from src.checkpoint.files import read_json
from src.checkpoint.folder import beside, check_space
from src.checkpoint.manifest import MANIFEST, has_manifest, read_manifest, sync
from src.checkpoint.steps import (
    FINISHED,
    Steps,
    file_of,
    is_step,
    number_of,
    open_step,
    random_file,
    step_facts,
)
from src.data.rows import write_json
from src.errors import Finished, Stopped, UserError
from src.identity import differences, identity
from src.logs import RunLog
from src.models.layout import TensorSpec
from src.models.transformer import Transformer
from src.parallel.setup import Parallel, agreed, stop
from src.trainer.optimizer import Optimizer
from src.trainer.state import SavedModel, bytes_of, counters_of, restore, tensors_of

Part = tuple[Callable[[], Any], Callable[[Any], None]]
SECOND_SIGNAL_S = 3.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Flags that change where, how fast or how visibly a run trains, not what it learns.
FREE = {
    *(
        "save_dir",
        "actor_save_dir",
        "critic_save_dir",
        "log_dir",
        "dump_rollouts",
        "log_samples",
        "profile",
    ),
    *(
        "save_every",
        "keep",
        "resume",
        "timeout",
        "zero",
        "offload",
        "update",
        "kv_cache_gb",
        "checkpoint_activations",
        "compile",
    ),
    *(
        "model_parallel_size",
        "rollout_model_parallel_size",
        "critic_model_parallel_size",
        "reward_model_parallel_size",
    ),
    *(
        "rollout_batch_size",
        "eval_batch_size",
        "max_batch_size",
        "accumulation_steps",
        "max_tokens_per_batch",
    ),
}


@dataclass(frozen=True)
class Earlier:
    """What an earlier run of the same command left, as found before any work."""

    folder: Path  # of the run's steps
    settings: dict  # by which a later run is known to be the same
    step: Path | None  # the one to go on from
    manifest: dict  # that step's

    @classmethod
    def find(cls, settings: dict, save_dirs: list[str | None], parallel: Parallel) -> "Earlier":
        """Look, on all ranks together. settings: the script's flags; save_dirs: where the models go, the first one's name is that of the

        steps' folder, too. A step's hashes are compared, by all ranks.

        Raises UserError when --resume names no step, when the step is damaged or was saved by a run with other settings; Finished when
        this very run has been done and its model is there.
        """
        folder = Path(beside(save_dirs[0], "state"))

        def look() -> tuple[dict, str | None, str | None]:
            if (
                not parallel.is_main
            ):  # rank 0 looks for all: another rank may see the folder of a moment later
                return {}, None, None
            try:
                own, step = identity(settings, FREE), _chosen(settings["resume"], folder)
                _check_writable(folder)
                if (
                    settings["resume"] == "auto"
                    and (folder / FINISHED).exists()
                    and all(map(_is_there, filter(None, save_dirs)))
                ):
                    done = read_json(folder / FINISHED)
                    if type(done.get("step")) is not int:
                        raise UserError(
                            f"{folder / FINISHED}: step is {done.get('step')}: damaged; remove it, or give --resume none"
                        )
                    _check_same(folder / FINISHED, done.get("settings"), own)
                    return (
                        own,
                        None,
                        f"this run finished after step {done.get('step')}; --resume none runs it again",
                    )
                if step is not None:
                    _check_same(step, step_facts(step)["settings"], own)
            except OSError as error:
                raise UserError(
                    f"{error.filename or folder}: cannot be read: {error.strerror}"
                ) from None
            return own, None if step is None else str(step), None

        own, *found = agreed(look)
        dist.broadcast_object_list(found, src=0)
        step, finished = found
        if finished:
            stop()
            raise Finished(finished)
        return (
            cls(folder, own, Path(step), open_step(Path(step), parallel))
            if step
            else cls(folder, own, None, {})
        )


def _chosen(resume: str, folder: Path) -> Path | None:
    if resume == "none":
        return None
    if (
        resume == "auto"
    ):  # a step that lost its manifest is damaged, too: an older one is for the user to choose
        steps = (
            [path for path in folder.iterdir() if is_step(path) and path.is_dir()]
            if folder.is_dir()
            else []
        )
        return max((path for path in steps if any(path.iterdir())), key=number_of, default=None)
    path = Path(resume)
    if not (is_step(path) and (path / MANIFEST).is_file()):
        raise UserError(
            f"--resume {resume}: is no saved step; they are called step-… and lie in {folder}"
        )
    return path


def _check_writable(folder: Path) -> None:
    """Raise UserError when steps could not be saved to a folder."""
    place = next(
        place
        for place in (folder, *folder.absolute().parents)
        if place.exists() or place.is_symlink()
    )
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(
            f"{folder}: {place} is not a folder that can be written to; the run's steps are saved there"
        )


def _is_there(save_dir: str) -> bool:
    """Whether a model was saved to a folder, and its files have their sizes."""
    folder = Path(save_dir)
    try:
        return has_manifest(folder) and all(
            (folder / n).stat().st_size == f["size"]
            for n, f in read_manifest(folder)["files"].items()
        )
    except (UserError, FileNotFoundError):
        return False


def _check_same(path: Path, before: object, now: dict) -> None:
    changed = differences(before, now)
    if changed:
        raise UserError(
            f"{path}: belongs to a run with other settings ({', '.join(changed)}); give these, --resume none, or another folder to save to"
        )


class Saving:
    """Where a run's steps are, when the next is due, and whether the run is to stop."""

    def __init__(
        self,
        earlier: Earlier,
        settings: dict,
        models: dict[str, tuple[Transformer, Optimizer]],
        parallel: Parallel,
        log: RunLog,
        parts: dict[str, Part] | None = None,
        tensors: dict[str, tuple[dict[str, Tensor], dict[str, TensorSpec]]] | None = None,
        at_work: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
    ) -> None:
        """models: name → (model, optimizer) of what is trained; tensors: others that change: name → (this rank's, how they are cut);

        parts: what else does, as JSON: name → (how to get it, how to set it), set after the tensors; at_work(name): around what needs
        the model, or the tensors, of that name on the device.
        """
        self.earlier, self.every, self.parallel, self.log = (
            earlier,
            settings["save_every"],
            parallel,
            log,
        )
        self.models, self.parts, self.tensors, self.at_work = (
            models,
            parts or {},
            tensors or {},
            at_work,
        )
        self.steps = Steps(earlier.folder, settings["keep"], parallel)
        self.told, self.step = False, 0  # told to stop, on this rank; the last step that was taken
        self.before = signal.signal(signal.SIGTERM, self._on_signal)
        if (
            platform.system() == "Linux" and "RANK" in os.environ
        ):  # a launcher that dies takes its workers along
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def _on_signal(self, *_) -> None:
        if not self.told:
            self.told, self.told_at = True, time.monotonic()
        elif (
            time.monotonic() - self.told_at > SECOND_SIGNAL_S
        ):  # a second one ends what hangs; a launcher's end may send two at once
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    # --- going on ---------------------------------------------------------------------------------------------------

    def resume(self, total: int) -> int:
        """Bring back the step that was found, and return its number; 0 where there is none. total: the run's steps."""
        path, manifest = self.earlier.step, self.earlier.manifest
        agreed(lambda: self.steps.remove_unfinished() if self.parallel.is_main else None)
        self._check_space(total - manifest.get("step", 0))
        if path is not None:
            agreed(lambda: self._bring_back(path, manifest))
            self.step = manifest["step"]
        for other in self.steps.go_back_to(path):
            self.log.info(
                f"{other.name} of {other.parent} is set aside: it is not of this run, or later"
            )
        if path is not None:
            self.log.info(f"goes on after step {self.step}, from {path}")
        return self.step

    def _bring_back(self, path: Path, manifest: dict) -> None:
        try:
            for name, (model, optimizer) in self.models.items():
                with self.at_work(name):
                    restore(
                        model,
                        optimizer,
                        SavedModel(path, name, manifest["layouts"][name]),
                        manifest["counters"][name],
                    )
            for name, (tensors, specs) in self.tensors.items():
                saved = SavedModel(path, name, manifest["layouts"][name])
                with self.at_work(name):
                    for key, tensor in tensors.items():
                        tensor.copy_(
                            saved.local(
                                key, specs[key], self.parallel.mp_rank, self.parallel.mp_size
                            )
                        )
            for name, (_, put) in self.parts.items():
                put(manifest["parts"][name])
            self._restore_random(path)
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

    # --- saving -----------------------------------------------------------------------------------------------------

    def after(self, step: int) -> None:
        """To be called after every step by all ranks. Saves when it is due; when any rank was told to stop, saves and raises Stopped."""
        self.step = step
        told = torch.tensor(float(self.told), device=self.parallel.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        stop = bool(told)
        if stop or (self.every is not None and step % self.every == 0):
            self._save(step)
        if stop:
            self.steps.wait()
            signal.signal(signal.SIGTERM, self.before)
            raise Stopped(
                f"stopped by a signal after step {step}, which is saved; the same command goes on from there"
            )

    def _save(self, step: int) -> None:
        p, files, counters = self.parallel, {}, {}
        for name, (model, optimizer) in self.models.items():
            with self.at_work(name):
                tensors, counters[name] = tensors_of(model, optimizer), counters_of(optimizer)
            if tensors:
                files[file_of(name, optimizer.parallel.mp_rank, optimizer.parallel.dp_rank)] = (
                    tensors
                )
        if p.dp_rank == 0:
            for name, (tensors, _) in self.tensors.items():
                with self.at_work(name):
                    files[file_of(name, p.mp_rank, 0)] = {
                        k: x.detach().to(device="cpu", copy=True) for k, x in tensors.items()
                    }
        if p.mp_rank == 0:
            files[random_file(p.dp_rank)] = self._random()
        about = {
            "settings": self.earlier.settings,
            "layouts": {
                **{
                    name: {"mp": o.parallel.mp_size, "dp": o.parallel.dp_size}
                    for name, (_, o) in self.models.items()
                },
                **{name: {"mp": p.mp_size, "dp": 1} for name in self.tensors},
            },
            "counters": counters,
            "parts": {name: get() for name, (get, _) in self.parts.items()},
        }
        self.steps.save(step, files, about)

    def _random(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        return states | (
            {"cuda": torch.cuda.get_rng_state()} if self.parallel.device.type == "cuda" else {}
        )

    def _check_space(self, steps_left: int) -> None:
        """Raise UserError when the steps to be saved will not fit on the disk: --keep and one more, beside those that stay."""
        if self.every is None:
            return
        more = min(
            self.steps.keep + 1 - len(self.steps.until(self.earlier.step)[-self.steps.keep :]),
            steps_left // self.every,
        )
        size = sum(bytes_of(model, optimizer) for model, optimizer in self.models.values())
        if self.parallel.dp_rank == 0:
            size += sum(x.nbytes for tensors, _ in self.tensors.values() for x in tensors.values())
        total = torch.tensor(size, device=self.parallel.device)
        dist.all_reduce(total)
        agreed(
            lambda: check_space(
                self.earlier.folder, int(total) * more, f"for {more} steps (--save_every, --keep)"
            )
        )

    def _restore_random(self, path: Path) -> None:
        """Dropout's state; a data-parallel rank that there was none of keeps the one that it began with."""
        file = path / random_file(self.parallel.dp_rank)
        if file.is_file():
            with safe_open(file, framework="pt") as states:
                torch.set_rng_state(states.get_tensor("cpu"))
                if self.parallel.device.type == "cuda" and "cuda" in states.keys():
                    torch.cuda.set_rng_state(states.get_tensor("cuda"))

    def finish(self) -> None:
        """The run is over and its models are saved."""
        self.steps.wait()
        signal.signal(signal.SIGTERM, self.before)
        folder = self.earlier.folder
        if self.parallel.is_main and folder.is_dir():
            write_json(folder / FINISHED, {"step": self.step, "settings": self.earlier.settings})
            sync(folder)
