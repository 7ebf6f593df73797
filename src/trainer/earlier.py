"""What an earlier run of the same command left, looked for before any model is loaded."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from src.checkpoint.folder import beside
from src.checkpoint.gathering import complete, facts_of, newest
from src.checkpoint.json_file import read_json
from src.checkpoint.manifest import MANIFEST, has_manifest, read_manifest
from src.checkpoint.mirror import bring_back
from src.checkpoint.nodes import Nodes
from src.checkpoint.steps import FINISHED, holders, is_step, number_of
from src.errors import Finished, UserError
from src.identity import Change, differences, identity
from src.parallel.setup import Parallel, agreed, stop
from src.remote import url_of
from src.settings.declaration import FIXED, declared, defaults
from src.settings.ppo import PPOTrainSettings
from src.settings.scripts import TrainSettings

T = TypeVar("T")
FAILED = "failed.json"  # which setting's file failed, and after which step


@dataclass(frozen=True)
class Earlier:
    """The step to go on from, if there is one, and by what this run is known.

    folder: of the run's steps; record: the settings by which a later run is known to be the same;
    step: the one to go on from; manifest: that step's; changes: what of the settings is another
    than in that step, and may be; named: settings that may be (--resume_changed); nodes: that have
    the folder each; holders: the nodes that have each of the step's files; damage: what of these
    is damaged on a node, and whole on another; url: of the steps, where models go to one.
    """

    folder: Path
    record: dict[str, Any]
    step: Path | None
    manifest: dict[str, Any]
    changes: list[Change]
    named: list[str]
    nodes: Nodes
    holders: dict[str, list[int]] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)
    url: str | None = None

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
        named, resume = settings.saving.named, settings.saving.resume

        # By what the run is known, and what the nodes that are here have of its steps.
        record = _told(lambda: identity(settings, **more), parallel)
        agreed(lambda: _check_writable(folder))
        url = url_of(save_dirs[0])
        if url is not None:
            url = f"{url.rstrip('/')}-state"
            if resume == "auto":
                agreed(partial(bring_back, folder, url))
        nodes = Nodes.find(folder, parallel)
        _check_alike(record, partial(identity, settings, **more), nodes)
        step, reader = _chosen(resume, folder, nodes)
        allowed = _told(lambda: {*named, *_repaired(folder, step)}, parallel)

        def finished() -> str | None:
            """What to say of a run that is done."""
            goes_on = resume == "auto" and (folder / FINISHED).exists()
            if not (goes_on and all(map(_is_there, save_dirs))):
                return None
            number, done = _finished(folder / FINISHED)
            again = f"this run finished after step {number}"
            if not _changes(folder / FINISHED, done, record, settings, allowed):
                return f"{again}; --resume none runs it again"
            if step is None:
                raise UserError(
                    f"{folder}: {again} and kept no step to go on from (--save_every); "
                    "begin another run from its model"
                )
            return None

        ending = _told(finished, parallel)
        if ending is not None:
            stop()
            raise Finished(ending)
        if step is None or reader is None:
            return cls(folder, record, None, {}, [], named, nodes, url=url)

        # The step's settings are this run's, and its files are whole.
        manifest = facts_of(step, reader, parallel)
        before = manifest["settings"]
        changes = _told(lambda: _changes(step, before, record, settings, allowed), parallel)
        held, damage = holders(step, manifest, nodes)
        if not isinstance(manifest.get("changes", []), list):
            raise UserError(f"{step}: changes is {str(manifest['changes'])[:40]}: damaged")
        return cls(folder, record, step, manifest, changes, named, nodes, held, damage, url)

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


def _told(find: Callable[[], T], parallel: Parallel) -> T:
    """What rank 0 finds, on all ranks: another may see the folder of a moment later.

    Raises UserError on all where rank 0 does.
    """

    def on_main() -> T | None:
        try:
            return find() if parallel.is_main else None
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None

    outcome: list[Any] = [agreed(on_main)]
    dist.broadcast_object_list(outcome, src=0)
    return outcome[0]


def _check_alike(
    record: dict[str, Any], identity_here: Callable[[], dict[str, Any]], nodes: Nodes
) -> None:
    """Raise UserError where a node was given something else than rank 0's.

    Folders of weights without a manifest are passed over: they are known by times, which copies
    have of their own.
    """

    def check() -> None:
        if nodes.are_one or not nodes.is_first:
            return
        for change in differences(record, identity_here(), {}):
            path = Path(change.now["path"]) if isinstance(change.now, dict) else None
            if path is not None and path.is_dir() and not has_manifest(path):
                continue
            here, first = nodes.described()[nodes.node], nodes.described()[nodes.of_rank[0]]
            raise UserError(
                f"{first} and {here} do not run the same: {change}; give all nodes the same "
                "settings and files"
            )

    agreed(check)


def _chosen(resume: str, folder: Path, nodes: Nodes) -> tuple[Path | None, int | None]:
    """The step to go on from, and a rank that can read its manifest; a collective of all ranks."""
    if resume == "none":
        return None, None
    if resume == "auto":
        step = newest(folder, nodes)
        return step, None if step is None else complete(step, nodes)
    path = Path(resume)
    every: list[Any] = [None] * len(nodes.of_rank)
    dist.all_gather_object(every, is_step(path) and (path / MANIFEST).is_file())
    if not any(every):
        raise UserError(
            f"--resume {resume}: is no saved step; they are called step-… and lie in {folder}"
        )
    return path, complete(path, nodes)


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
