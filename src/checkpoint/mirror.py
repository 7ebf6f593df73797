"""A run's saved steps at a URL, where its model goes to one: any machine goes on from there.

A step is uploaded once it is whole here, its manifest last; what the folder here has lost is then
removed there. So the URL has what the folder has, whenever the connection allowed it.
"""

from pathlib import Path

from filelock import FileLock

from src import storage
from src.checkpoint.manifest import MANIFEST
from src.checkpoint.steps import PREFIX, list_steps, number_of


def bring_back(folder: Path, url: str) -> None:
    """Fetch the newest whole step that is at the URL, unless the folder has one as new.

    Each process of a machine may come here: one fetches. Raises UserError.
    """
    if not storage.is_folder(url):
        return
    names = [name.rstrip("/") for name in storage.names_in(url) if name.startswith(PREFIX)]
    whole = (name for name in sorted(names, reverse=True) if _is_whole(f"{url}/{name}"))
    newest = next(whole, None)
    if newest is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        here = list_steps(folder)
        if not here or number_of(here[-1]) < number_of(folder / newest):
            storage.fetch_folder(f"{url}/{newest}", folder / newest)


def bring(folder: Path, url: str) -> None:
    """Make the URL have the folder's steps, and no others. Raises UserError."""
    steps = {step.name: step for step in list_steps(folder)}
    there = set()
    if storage.is_folder(url):
        there = {name.rstrip("/") for name in storage.names_in(url) if name.startswith(PREFIX)}
    for name, step in steps.items():
        if not _is_same(step, f"{url}/{name}"):
            storage.upload(step, f"{url}/{name}")
    for name in there - steps.keys():
        storage.remove_folder(f"{url}/{name}")


def _is_whole(url: str) -> bool:
    return storage.is_file(f"{url}/{MANIFEST}")


def _is_same(step: Path, url: str) -> bool:
    if not _is_whole(url):
        return False
    with storage.opened(f"{url}/{MANIFEST}") as file:
        return file.read() == (step / MANIFEST).read_bytes()
