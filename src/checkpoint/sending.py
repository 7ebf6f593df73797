"""Files that go from one node's disk to another's, over the process group.

A piece at a time on both ends, all ranks at once: nobody holds a whole file in memory.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from src.checkpoint.manifest import sync
from src.errors import UserError
from src.parallel.setup import Parallel

PIECE_BYTES = 2**24
Piece = tuple["Transfer", int, int]  # and its bytes, from and to


@dataclass(frozen=True, eq=False)
class Transfer:
    """A file that one rank reads and another writes; entry: the manifest's of it."""

    name: str
    source: int
    target: int
    entry: dict

    def pieces(self) -> Iterator[Piece]:
        """An empty file is one piece of nothing."""
        size = self.entry["size"]
        for start in range(0, max(size, 1), PIECE_BYTES):
            yield self, start, min(start + PIECE_BYTES, size)


@contextmanager
def host_group(parallel: Parallel) -> Iterator[dist.ProcessGroup]:
    """A group of all ranks for what lies in host memory, for a while; a collective."""
    group = dist.new_group(backend="gloo", timeout=parallel.timeout)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def send_files(
    transfers: list[Transfer], source: Path, target: Path, group: dist.ProcessGroup
) -> int:
    """Carry out transfers, the same list on all ranks. Returns the bytes that came to this rank.

    source, target: this rank's folders that it reads from and writes to. What came is on the disk,
    and as the manifest says: UserError on all ranks else, once all are through.
    """
    rank = dist.get_rank()
    streams: dict[tuple[int, int], list[Piece]] = {}
    for transfer in transfers:
        streams.setdefault((transfer.source, transfer.target), []).extend(transfer.pieces())
    own = {ends: pieces for ends, pieces in streams.items() if rank in ends}
    problems: list[str] = []
    hashes = {t: hashlib.sha256() for t in transfers if t.target == rank}

    # Round by round the next piece of each stream: both ends know how many there are. An end that
    # fails goes on, so that the other does not wait for it.
    for turn in range(max(map(len, own.values()), default=0)):
        pieces = {ends: of[turn] for ends, of in own.items() if turn < len(of)}
        buffers = {ends: bytearray(stop - start) for ends, (_, start, stop) in pieces.items()}
        for ends, piece in pieces.items():
            if ends[0] == rank:
                _read(piece, source, buffers[ends], problems)
        works = []
        for ends in (ends for ends in pieces if buffers[ends]):
            numbers = torch.frombuffer(buffers[ends], dtype=torch.uint8)
            sends = ends[0] == rank
            go, other = (dist.isend, ends[1]) if sends else (dist.irecv, ends[0])
            works.append(go(numbers, other, group=group))
        for work in works:
            assert work is not None  # it is, on a rank of the group
            work.wait()
        for ends, piece in pieces.items():
            if ends[1] == rank:
                hashes[piece[0]].update(buffers[ends])
                _write(piece, target, buffers[ends], problems)
    differ = [
        f"{target / transfer.name}: came otherwise from rank {transfer.source} than the manifest "
        "says: damaged there, or on the way"
        for transfer, hashed in hashes.items()
        if hashed.hexdigest() != transfer.entry["sha256"]
    ]
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, (problems, differ), group=group)
    # What a disk refused comes first: other bytes follow from it.
    lines = [line for of_rank in every for line in of_rank[0]]
    lines += [line for of_rank in every for line in of_rank[1]]
    if lines:
        raise UserError(lines[0])
    return sum(transfer.entry["size"] for transfer in hashes)


def _read(piece: Piece, folder: Path, buffer: bytearray, problems: list[str]) -> None:
    transfer, start, _ = piece
    try:
        with (folder / transfer.name).open("rb") as file:
            file.seek(start)
            file.readinto(buffer)
    except OSError as error:
        problems.append(f"{folder / transfer.name}: cannot be read: {error.strerror}")


def _write(piece: Piece, folder: Path, buffer: bytearray, problems: list[str]) -> None:
    transfer, start, stop = piece
    path = folder / transfer.name
    if problems:
        return
    try:
        with path.open("ab" if start else "wb") as file:
            file.write(buffer)
        if stop == transfer.entry["size"]:
            sync(path)
    except OSError as error:
        problems.append(f"{path}: cannot be written: {error.strerror}")
