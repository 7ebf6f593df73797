"""A run's saved steps on disk: each appears whole or not at all, and is verified before use.

Every rank writes its files into `.tmp-step-N` and brings them down to the disk; their hashes are
gathered; the first rank writes the manifest, renames the folder to `step-N`, and only then removes
older ones. A folder is never written to again.

Where nodes do not share the folder each does so on its own disk, and files also go to others'
(`copies`). No node renames before the manifest is on all disks: so a step that one node has renamed
is whole on all, and the others need only rename it (`gathering.py`).
"""

import itertools
import re
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from src.checkpoint.files import save_tensors
from src.checkpoint.manifest import (
    MANIFEST,
    described,
    identity_of,
    problem,
    read_manifest,
    sync,
    write_manifest,
)
from src.checkpoint.nodes import Nodes
from src.checkpoint.sending import Transfer, send_files
from src.errors import UserError
from src.parallel.setup import Parallel, agreed

PREFIX = "step-"
REMOVED = ".removed-"  # before the name of a step that is being removed
FETCHED = ".fetched-"  # before a step's name: files of it that came from other nodes to be read
FINISHED = "finished.json"
Stage = Callable[[str], None]


class Steps:
    """The folder of a run's steps.

    Writing goes on in a thread while training does; one step at a time.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        parallel: Parallel,
        reached: Stage = lambda stage: None,
        nodes: Nodes | None = None,
        copies: int = 1,
        mirror: Callable[[], None] | None = None,
    ) -> None:
        """keep: newest steps that stay; reached(stage): called at each stage, for the tests.

        nodes: that have the folder each; copies: nodes that a file is to lie on; mirror: called by
        each node's first rank when a step is whole and older ones are gone; given on all, or none.
        """
        self.mirror = mirror
        self.folder, self.keep, self.parallel, self.reached = folder, keep, parallel, reached
        self.nodes = Nodes.one(parallel) if nodes is None else nodes
        self.copies = min(copies, self.nodes.count)
        # The thread's own: never between others' exchanges.
        self.group = dist.new_group(backend="gloo", timeout=parallel.timeout)
        self.thread: threading.Thread | None = None
        self.failed: BaseException | None = None
        self.longest = 0.0  # seconds that writing a step has taken at most

    def save(self, step: int, files: dict[str, dict[str, Tensor]], facts: dict) -> None:
        """Begin to write a step.

        files: this rank's, name → tensors on the host, which nobody changes; facts: rank 0's, as
        JSON. Raises UserError when the step before could not be written.
        """
        self.wait()
        began = time.monotonic()

        def work() -> None:
            try:
                self._write(step, files, facts)
                self.longest = max(self.longest, time.monotonic() - began)
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
        """Write a step from beginning to end, in the thread.

        The ranks meet after each stage, so that none goes on where another has failed.
        """
        temporary = self.folder / f".tmp-{PREFIX}{step:08d}"
        final = self.folder / f"{PREFIX}{step:08d}"

        def begin() -> dict | None:
            self._of_node(self._make, temporary, final)
            return facts if self.parallel.is_main else None

        about = {"step": step, **self._together(begin, temporary)[0]}  # alike on all nodes
        self.reached("made")
        written = self._together(lambda: self._files(temporary, files), temporary)
        self.reached("written")
        entries = {name: entry for part in written for name, entry in part.items()}
        if not self.nodes.are_one:
            entries, transfers = self._copies(written)
            self._together(
                lambda: send_files(transfers, temporary, temporary, self.group), temporary
            )
            self.reached("copied")
            about |= {"nodes": self.nodes.described(), "node": self.nodes.node}
        self._together(
            lambda: self._of_node(write_manifest, temporary, entries, **about), temporary
        )
        self.reached("manifest")
        self._together(lambda: self._of_node(self._publish, temporary, final), temporary, True)
        self.reached("published")
        self._together(lambda: self._of_node(self._prune), temporary, True)
        self.reached("pruned")
        if self.mirror is not None:
            self._together(partial(self._of_node, self.mirror), temporary, True)

    def _of_node(self, work: Callable, *arguments: Any, **more: Any) -> None:
        """What one rank does for all that share its folder."""
        if self.nodes.is_first:
            work(*arguments, **more)

    def _copies(self, written: list[dict[str, dict]]) -> tuple[dict[str, dict], list[Transfer]]:
        """The manifest's entries, with the nodes of each file, and what must be sent for that.

        written: each rank's entries. A file goes to the nodes after its own: to the rank there that
        has the same place among its node's.
        """
        nodes, transfers, entries = self.nodes, [], {}
        for rank, of_rank in enumerate(written):
            own = nodes.of_rank[rank]
            holders = [(own + i) % nodes.count for i in range(self.copies)]
            place = nodes.ranks(own).index(rank)
            for name, entry in of_rank.items():
                entries[name] = {**entry, "nodes": sorted(holders)}
                for node in holders[1:]:
                    ranks = nodes.ranks(node)
                    transfers.append(Transfer(name, rank, ranks[place % len(ranks)], entry))
        return entries, transfers

    def go_back_to(self, step: Path | None, manifest: dict | None = None) -> list[Path]:
        """From now on the run goes on from `step` (None: from nothing); move aside what it leaves.

        What lies after the step in this folder, all of it when the step is of another folder, is
        another run's, and goes to a new folder `aside-N`; so does a step of that number that is
        another than the manifest is of. All ranks come here, and each node's first is told what
        went there.
        """
        later: list[Path] = []
        if self.nodes.is_first and self.folder.is_dir():
            ours = self.until(step)
            if step in ours and manifest is not None and not _is_same(step, manifest):
                ours.remove(step)
            later = [
                other for other in self.folder.iterdir() if is_step(other) and other not in ours
            ]
            later += [file for file in [self.folder / FINISHED] if file.exists()]
            numbered = (self.folder / f"aside-{number}" for number in itertools.count(1))
            aside = next(path for path in numbered if not path.exists())
            for path in later:
                aside.mkdir(exist_ok=True)
                path.rename(aside / path.name)
        dist.barrier()
        return later

    def is_of(self, step: Path) -> bool:
        """Whether a step is one of this folder's, wherever it lies by now."""
        return step.resolve().parent == self.folder.resolve()

    def until(self, step: Path | None) -> list[Path]:
        """The steps of this folder up to `step`; none when that is None or another run's."""
        if step is None or not self.is_of(step):
            return []
        return [other for other in list_steps(self.folder) if number_of(other) <= number_of(step)]

    def remove_unfinished(self) -> None:
        """What runs left that were killed while writing. Each node's first rank comes here."""
        for kind in (".tmp-", REMOVED, FETCHED):
            for unfinished in self.folder.glob(f"{kind}{PREFIX}*"):
                _remove(unfinished)

    def _prune(self) -> None:
        """Remove the steps that are older than the newest `keep`."""
        for old in list_steps(self.folder)[: -self.keep]:  # only now that the new one is whole
            _remove(old)

    def _make(self, temporary: Path, final: Path) -> None:
        """The folder that all ranks write into."""
        if final.exists():
            raise UserError(f"{final}: is there already; a step is never overwritten")
        self.remove_unfinished()
        temporary.mkdir(parents=True)

    def _files(self, temporary: Path, files: dict[str, dict[str, Tensor]]) -> dict[str, dict]:
        """Write this rank's files, down to the disk; the manifest's entries of them."""
        entries = {}
        for name, tensors in files.items():
            save_tensors(tensors, temporary / name)
            sync(temporary / name)
            entries[name] = described(temporary / name)
        return entries

    def _publish(self, temporary: Path, final: Path) -> None:
        temporary.rename(final)
        self.reached("renamed")
        sync(self.folder)

    def _together(self, work: Callable, temporary: Path, decided: bool = False) -> list:
        """Every rank's result; if one fails, all raise, and nothing of the step stays.

        decided: but what is there on several nodes, of which one may have renamed its part already.
        """
        result, problem = None, None
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        except Exception as error:  # a full disk has many names
            problem = (
                f"{temporary}: writing failed "
                f"({type(error).__name__}: {str(error).splitlines()[0]}); "
                "older steps are as they were"
            )
        outcomes: list[tuple[Any, str | None]] = [(None, None)] * self.parallel.world_size
        dist.all_gather_object(outcomes, (result, problem), group=self.group)
        first_problem = next((problem for _, problem in outcomes if problem is not None), None)
        if first_problem is not None:
            if self.nodes.is_first and not (decided and not self.nodes.are_one):
                shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(first_problem)
        return [result for result, _ in outcomes]


def _remove(path: Path) -> None:
    """A folder, a file or a link. Raises UserError."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return
        if is_step(path):  # one of which a part is gone is none
            path = path.rename(path.with_name(f"{REMOVED}{path.name}"))
        shutil.rmtree(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be removed: {error.strerror or error}") from None


def file_of(name: str, mp_rank: int, dp_rank: int, pp_rank: int = 0) -> str:
    """Where a rank's tensors of the model of that name are, in a step's folder."""
    stage = f".pp-{pp_rank:02d}" if pp_rank else ""
    return f"{name}{stage}.mp-{mp_rank:02d}.dp-{dp_rank:02d}.safetensors"


def random_file(dp_rank: int, pp_rank: int = 0) -> str:
    stage = f".pp-{pp_rank:02d}" if pp_rank else ""
    return f"random{stage}.dp-{dp_rank:02d}.safetensors"


def _is_same(step: Path, manifest: dict) -> bool:
    return identity_of(read_manifest(step)) == identity_of(manifest)


def is_step(path: Path) -> bool:
    """By its name alone."""
    return re.fullmatch(PREFIX + "[0-9]{8,}", path.name) is not None


def number_of(step: Path) -> int:
    """A step's number, by its name."""
    return int(step.name.removeprefix(PREFIX))


def list_steps(folder: Path) -> list[Path]:
    """The steps that are whole, oldest first. What is called `.tmp-` never is one."""
    if not folder.is_dir():
        return []
    return sorted(
        (p for p in folder.iterdir() if is_step(p) and (p / MANIFEST).is_file()), key=number_of
    )


# What the manifest of a step holds beside its files.
FACTS = {"step": int, "settings": dict, "layouts": dict, "counters": dict, "parts": dict}
MOST_RANKS = 10**5  # so that a damaged number of ranks is refused, not counted up to


def step_facts(step: Path) -> dict:
    """The manifest of a training run's step.

    Raises UserError when that is not a step's of that number, or names too few files.
    """
    manifest, path = read_manifest(step), step / MANIFEST
    for name, expected_type in FACTS.items():
        if type(manifest.get(name)) is not expected_type:
            raise UserError(
                f"{path}: {name} is {str(manifest.get(name))[:40]}: "
                "not written by a training run, or damaged"
            )
    if manifest["step"] != number_of(step):
        raise UserError(f"{path}: is of step {manifest['step']}; its folder was renamed")
    # The layouts tell which files there must be: of each model a file of every mp rank, at least.
    expected = {random_file(0)}
    for name, layout in manifest["layouts"].items():
        degrees = [None]
        if isinstance(layout, dict):
            degrees = [layout.get("mp"), layout.get("dp"), layout.get("pp", 1)]
        if any(type(degree) is not int or not 0 < degree < MOST_RANKS for degree in degrees):
            raise UserError(f"{path}: the layout of {name} is {str(layout)[:60]}: damaged")
        stages = range(layout.get("pp", 1))
        expected |= {file_of(name, r, 0, stage) for r in range(layout["mp"]) for stage in stages}
    for name, counters in manifest["counters"].items():
        if not isinstance(counters, dict) or not all(
            type(count) in (int, float) for count in counters.values()
        ):
            raise UserError(f"{path}: the counters of {name} are {str(counters)[:60]}: damaged")
    unnamed = {file.name for file in step.glob("*.safetensors")} - manifest["files"].keys()
    for name in sorted(unnamed | (expected - manifest["files"].keys())):
        raise UserError(f"{path}: names no {name}: damaged")
    return manifest


def open_step(path: Path, parallel: Parallel, nodes: Nodes | None = None) -> dict:
    """A step's manifest, once all its files are as they were written.

    Ranks of a node share the hashing. Raises UserError on all of them.
    """
    manifest = agreed(lambda: read_manifest(path))
    holders(path, manifest, Nodes.one(parallel) if nodes is None else nodes)
    return manifest


def holders(path: Path, manifest: dict, nodes: Nodes) -> tuple[dict[str, list[int]], list[str]]:
    """The nodes that have each of a step's files as it was written, and what is damaged, in lines.

    A collective of all ranks; each node's share the hashing of what it has. Raises UserError for
    what no node has: the file is named, and the nodes that had it.
    """
    part, parts = nodes.part
    looked_at = sorted(name for name in manifest["files"] if (path / name).exists())[part::parts]
    wrong = {name: problem(path, manifest, name) for name in looked_at}
    every: list[Any] = [None] * len(nodes.of_rank)
    dist.all_gather_object(every, wrong)
    have: dict[str, list[int]] = {name: [] for name in manifest["files"]}
    for rank, of_rank in enumerate(every):
        for name in (name for name, line in of_rank.items() if line is None):
            have[name].append(nodes.of_rank[rank])
    damage = {name: line for of_rank in every for name, line in of_rank.items() if line is not None}
    missing = sorted(name for name, of in have.items() if not of)
    if missing:
        others = [step.name for step in list_steps(path.parent) if step != path]
        advice = f"; --resume {path.parent / others[-1]} goes on from there" if others else ""
        line = next((damage[name] for name in missing if name in damage), None)
        raise UserError((line or _not_here(path, manifest, missing)) + advice)
    return have, list(damage.values())


def _not_here(path: Path, manifest: dict, missing: list[str]) -> str:
    """That files are missing, and who had them."""
    if "nodes" not in manifest:
        return f"{path / missing[0]}: missing"
    had = sorted({node for name in missing for node in manifest["files"][name]["nodes"]})
    named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
    nodes = " and ".join(manifest["nodes"][node] for node in had)
    return (
        f"{path}: {len(missing)} of {len(manifest['files'])} files are on none of the nodes of "
        f"this run: {named}; they were on {nodes}. Bring back a node that had them, or its folder"
    )
