"""What an earlier run of the same command left, looked for before any model is loaded."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from src.checkpoint.files import read_json
from src.checkpoint.folder import beside
from src.checkpoint.manifest import MANIFEST, has_manifest, read_manifest
from src.checkpoint.steps import FINISHED, is_step, number_of, open_step, step_facts
from src.errors import Finished, UserError
from src.identity import Change, differences, identity
from src.parallel.setup import Parallel, agreed, stop
from src.settings.declaration import FIXED, declared, defaults
from src.settings.ppo import PPOTrainSettings
from src.settings.scripts import TrainSettings

FAILED = "failed.json"  # which setting's file failed, and after which step


@dataclass(frozen=True)
class Earlier:
    """The step to go on from, if there is one, and by what this run is known.

    folder: of the run's steps; record: the settings by which a later run is known to be the same;
    step: the one to go on from; manifest: that step's; changes: what of the settings is another
    than in that step, and may be; named: settings that may be (--resume_changed).
    """

    folder: Path
    record: dict[str, Any]
    step: Path | None
    manifest: dict[str, Any]
    changes: list[Change]
    named: list[str]

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
        step, when the step is damaged or was saved by a run with other settings that may not be
        others; Finished when this very run has been done and its model is there.
        """
        folder = Path(beside(save_dirs[0], "state"))
        named = settings.saving.named

        def look() -> tuple[dict[str, Any], str | None, list[Change], str | None]:
            # Rank 0 looks for all: another rank may see the folder of a moment later.
            if not parallel.is_main:
                return {}, None, [], None
            try:
                record = identity(settings, **more)
                step = _chosen(settings.saving.resume, folder)
                _check_writable(folder)
                allowed = {*named, *_repaired(folder, step)}
                goes_on = settings.saving.resume == "auto" and (folder / FINISHED).exists()
                if goes_on and all(map(_is_there, save_dirs)):
                    number, done = _finished(folder / FINISHED)
                    again = f"this run finished after step {number}"
                    if not _changes(folder / FINISHED, done, record, settings, allowed):
                        return record, None, [], f"{again}; --resume none runs it again"
                    if step is None:
                        raise UserError(
                            f"{folder}: {again} and kept no step to go on from (--save_every); "
                            "begin another run from its model"
                        )
                changes = []
                if step is not None:
                    before = step_facts(step)["settings"]
                    changes = _changes(step, before, record, settings, allowed)
            except OSError as error:
                raise UserError(
                    f"{error.filename or folder}: cannot be read: {error.strerror}"
                ) from None
            return record, None if step is None else str(step), changes, None

        record, *rest = agreed(look)
        outcome: list[Any] = rest
        dist.broadcast_object_list(outcome, src=0)
        step, changes, finished = outcome
        if finished:
            stop()
            raise Finished(finished)
        if step is None:
            return cls(folder, record, None, {}, [], named)
        manifest = open_step(Path(step), parallel)
        if not isinstance(manifest.get("changes", []), list):
            raise UserError(f"{step}: changes is {str(manifest['changes'])[:40]}: damaged")
        return cls(folder, record, Path(step), manifest, changes, named)

    @property
    def facts(self) -> dict[str, Any]:
        """By what the run is known from here on, and what has become another on the way to it."""
        past = self.manifest.get("changes", [])
        after = self.manifest.get("step", 0)
        new = [{"after_step": after, **asdict(change)} for change in self.changes]
        return {"settings": self.record, "changes": past + new}

    def has_changed(self, *names: str) -> bool:
        """Whether one of the named settings is another than in the step that is gone on from."""
        return any(change.name in names for change in self.changes)


def _finished(file: Path) -> tuple[int, object]:
    """The last step of a run that is done, and its settings. Raises UserError for damage."""
    done = read_json(file)
    if type(done.get("step")) is not int:
        raise UserError(
            f"{file}: step is {done.get('step')}: damaged; remove it, or give --resume none"
        )
    return done["step"], done.get("settings")


def _repaired(folder: Path, step: Path | None) -> list[str]:
    """The setting whose file failed after `step`, if that ended the run: it must be another now."""
    file = folder / FAILED
    if step is None or step.resolve().parent != folder.resolve() or not file.is_file():
        return []
    failed = read_json(file)
    return [str(failed.get("setting"))] if failed.get("after_step") == number_of(step) else []


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


def _changes(
    path: Path,
    before: object,
    now: dict[str, Any],
    settings: TrainSettings | PPOTrainSettings,
    allowed: set[str],
) -> list[Change]:
    """What is another than in the record `before`, which lies at a path.

    Raises UserError for a setting that is not allowed to be.
    """
    script = type(settings)
    changes = differences(before, now, defaults(script))
    refused = [change for change in changes if change.name not in allowed]
    if refused:
        known = declared(script)
        fixed = [c.name for c in changes if c.name not in known or FIXED in known[c.name].marks]
        advice = (
            f"or, to go on with what is new, --resume_changed {','.join(c.name for c in changes)}"
        )
        if fixed:
            advice = f"no run can go on with another {', '.join(fixed)}"
        raise UserError(
            f"{path}: belongs to a run with other settings ({', '.join(map(str, refused))}); give "
            f"these, --resume none, or another folder to save to; {advice}"
        )
    return changes
