"""What an earlier run of the same command left, looked for before any model is loaded."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from src.checkpoint.files import read_json
from src.checkpoint.folder import beside
from src.checkpoint.manifest import MANIFEST, has_manifest, read_manifest
from src.checkpoint.steps import FINISHED, is_step, number_of, open_step, step_facts
from src.errors import Finished, UserError
from src.identity import differences, identity
from src.parallel.setup import Parallel, agreed, stop
from src.settings.declaration import defaults
from src.settings.ppo import PPOTrainSettings
from src.settings.scripts import TrainSettings


@dataclass(frozen=True)
class Earlier:
    """The step to go on from, if there is one, and by what this run is known.

    folder: of the run's steps; record: the settings by which a later run is known to be the same;
    step: the one to go on from; manifest: that step's.
    """

    folder: Path
    record: dict[str, Any]
    step: Path | None
    manifest: dict[str, Any]

    @classmethod
    def find(
        cls,
        settings: TrainSettings | PPOTrainSettings,
        save_dirs: list[str],
        parallel: Parallel,
        **more: Any,
    ) -> "Earlier":
        """Look, on all ranks together. A step's hashes are compared, by all ranks.

        save_dirs: where the models go; the first one's name is that of the steps' folder, too;
        more: what the run is known by beside its settings. Raises UserError when --resume names no
        step, when the step is damaged or was saved by a run with other settings; Finished when this
        very run has been done and its model is there.
        """
        folder = Path(beside(save_dirs[0], "state"))

        def look() -> tuple[dict[str, Any], str | None, str | None]:
            # Rank 0 looks for all: another rank may see the folder of a moment later.
            if not parallel.is_main:
                return {}, None, None
            try:
                record = identity(settings, **more)
                step = _chosen(settings.saving.resume, folder)
                _check_writable(folder)
                known = defaults(type(settings))
                goes_on = settings.saving.resume == "auto" and (folder / FINISHED).exists()
                if goes_on and all(map(_is_there, save_dirs)):
                    return record, None, _finished(folder / FINISHED, record, known)
                if step is not None:
                    _check_same(step, step_facts(step)["settings"], record, known)
            except OSError as error:
                raise UserError(
                    f"{error.filename or folder}: cannot be read: {error.strerror}"
                ) from None
            return record, None if step is None else str(step), None

        record, *outcome = agreed(look)
        dist.broadcast_object_list(outcome, src=0)
        step, finished = outcome
        if finished:
            stop()
            raise Finished(finished)
        if step is None:
            return cls(folder, record, None, {})
        return cls(folder, record, Path(step), open_step(Path(step), parallel))


def _finished(file: Path, record: dict[str, Any], known: dict[str, Any]) -> str:
    """What to say of a run that is done. Raises UserError when it was another."""
    done = read_json(file)
    if type(done.get("step")) is not int:
        raise UserError(
            f"{file}: step is {done.get('step')}: damaged; remove it, or give --resume none"
        )
    _check_same(file, done.get("settings"), record, known)
    return f"this run finished after step {done.get('step')}; --resume none runs it again"


def _chosen(resume: str, folder: Path) -> Path | None:
    if resume == "none":
        return None
    if resume == "auto":
        # A step that lost its manifest is damaged, too: an older one is for the user to choose.
        paths = folder.iterdir() if folder.is_dir() else iter(())
        steps = [path for path in paths if is_step(path) and path.is_dir()]
        return max((path for path in steps if any(path.iterdir())), key=number_of, default=None)
    path = Path(resume)
    if not (is_step(path) and (path / MANIFEST).is_file()):
        raise UserError(
            f"--resume {resume}: is no saved step; they are called step-… and lie in {folder}"
        )
    return path


def _check_writable(folder: Path) -> None:
    """Raise UserError when steps could not be saved to a folder."""
    places = (folder, *folder.absolute().parents)
    place = next(place for place in places if place.exists() or place.is_symlink())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(
            f"{folder}: {place} is not a folder that can be written to; the run's steps are saved "
            "there"
        )


def _is_there(save_dir: str) -> bool:
    """Whether a model was saved to a folder, and its files have their sizes."""
    folder = Path(save_dir)
    try:
        return has_manifest(folder) and all(
            (folder / name).stat().st_size == file["size"]
            for name, file in read_manifest(folder)["files"].items()
        )
    except (UserError, FileNotFoundError):
        return False


def _check_same(path: Path, before: object, now: dict[str, Any], known: dict[str, Any]) -> None:
    changes = differences(before, now, known)
    if changes:
        raise UserError(
            f"{path}: belongs to a run with other settings ({', '.join(changes)}); give these, "
            "--resume none, or another folder to save to"
        )
