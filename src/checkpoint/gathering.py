"""Steps whose files lie on several nodes' disks: which there are, and their files for who reads.

Nodes come and go between runs. What counts is what the nodes that are here have, all together.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from src.checkpoint.manifest import MANIFEST, identity_of, read_manifest, sync
from src.checkpoint.nodes import Nodes
from src.checkpoint.sending import Transfer, host_group, send_files
from src.checkpoint.steps import is_step, number_of, step_facts
from src.errors import UserError
from src.parallel.setup import Parallel, agreed


def newest(folder: Path, nodes: Nodes) -> Path | None:
    """The newest step that any node has; a collective of all ranks.

    One that lost its manifest counts, too: it is damaged, and an older one is for the user to
    choose. Raises UserError for a folder that cannot be read.
    """

    def look() -> list[str]:
        try:
            paths = folder.iterdir() if nodes.is_first and folder.is_dir() else iter(())
            steps = [path for path in paths if is_step(path) and path.is_dir()]
            return [path.name for path in steps if any(path.iterdir())]
        except OSError as error:
            place = error.filename or folder
            raise UserError(f"{place}: cannot be read: {error.strerror}") from None

    names = _of_all(agreed(look), nodes)
    found = {Path(name) for of_rank in names for name in of_rank}
    return folder / max(found, key=number_of).name if found else None


def complete(step: Path, nodes: Nodes) -> int | None:
    """Finish what a crash left half done of a step; the first rank of a node that has it, or None.

    A collective of all ranks. Nodes rename a step only when its manifest is on all their disks: if
    one has done so, the others do it now. Nodes that have another step of that number (they went on
    alone) are left as they are: the one that most nodes have counts.
    """
    unfinished = step.parent / f".tmp-{step.name}"
    own: tuple[str | None, str | None, bool] = None, None, False
    if nodes.is_first:
        own = _identity(step), _identity(unfinished), step.is_dir()
    every = _of_all(own, nodes)
    published = [identity for identity, _, _ in every if identity is not None]
    if not published:  # but for one that lost its manifest, which whoever reads it will say
        return next((rank for rank, (*_, is_there) in enumerate(every) if is_there), None)
    chosen = max(sorted(set(published)), key=published.count)

    def rename() -> None:
        if own == (None, chosen, False):
            try:
                unfinished.rename(step)
                sync(step.parent)
            except OSError as error:
                raise UserError(f"{unfinished}: cannot be renamed: {error.strerror}") from None

    agreed(rename)
    return next(rank for rank, (identity, *_) in enumerate(every) if identity == chosen)


def _of_all(own: Any, nodes: Nodes) -> list[Any]:
    """What every rank says."""
    every: list[Any] = [None] * len(nodes.of_rank)
    dist.all_gather_object(every, own)
    return every


def _identity(folder: Path) -> str | None:
    """Of a folder's manifest; None where there is none, or a damaged one."""
    try:
        return identity_of(read_manifest(folder)) if (folder / MANIFEST).is_file() else None
    except UserError:
        return None


def facts_of(step: Path, reader: int, parallel: Parallel) -> dict[str, Any]:
    """A step's manifest on all ranks, read and checked by one. Raises UserError on all."""
    outcome: list[Any] = [agreed(lambda: step_facts(step) if parallel.rank == reader else None)]
    dist.broadcast_object_list(outcome, src=reader)
    return outcome[0]


def keys_of(
    step: Path, names: Iterable[str], holders: dict[str, list[int]], nodes: Nodes
) -> dict[str, list[str]]:
    """The tensors in each file of a step, which a rank of a node that has it reads; a collective.

    Raises UserError for a file that cannot be read.
    """

    def read() -> dict[str, list[str]]:
        return {
            name: _keys_in(step / name)
            for name in names
            if nodes.rank == nodes.first(holders[name][0])
        }

    every = _of_all(agreed(read), nodes)
    return {name: keys for of_rank in every for name, keys in of_rank.items()}


def _keys_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged ({error})") from None


def fetch(
    step: Path,
    target: Path,
    wanted: set[str],
    manifest: dict[str, Any],
    holders: dict[str, list[int]],
    nodes: Nodes,
    parallel: Parallel,
) -> tuple[int, int]:
    """Bring each node the files that its ranks want and that it has not; a collective of all ranks.

    They come over the process group into the folder `target`; of the nodes that have a file, and
    their ranks, each sends some. Returns how many files went between nodes, and their bytes.
    """
    every = _of_all(wanted, nodes)
    transfers: list[Transfer] = []
    for node in range(nodes.count):
        ranks = nodes.ranks(node)
        names = sorted(set().union(*(every[rank] for rank in ranks)))
        absent = [name for name in names if node not in holders[name]]
        for turn, name in enumerate(absent):
            source = nodes.ranks(holders[name][(node + turn) % len(holders[name])])
            sender, receiver = source[turn % len(source)], ranks[turn % len(ranks)]
            transfers.append(Transfer(name, sender, receiver, manifest["files"][name]))
    if transfers:
        receives = {nodes.of_rank[transfer.target] for transfer in transfers}

        def make() -> None:
            if nodes.is_first and nodes.node in receives:
                target.mkdir(parents=True)

        agreed(make)
        with host_group(parallel) as group:
            send_files(transfers, step, target, group)
    return len(transfers), sum(transfer.entry["size"] for transfer in transfers)
