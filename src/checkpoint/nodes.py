"""Which ranks see the same folder: all of them, or those of a node each.

That is found out by trying, so that one command does with a shared file system and without one.
"""

import os
import platform
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from src.errors import UserError
from src.parallel.setup import Parallel, agreed


@dataclass(frozen=True)
class Nodes:
    """The nodes of a run, as far as a folder is concerned: ranks of one see the same files in it.

    names: of the nodes, in the order of their first ranks; of_rank: each rank's node; rank: this
    process's; launchers: how many there are, whatever they see.
    """

    names: tuple[str, ...]
    of_rank: tuple[int, ...]
    rank: int
    launchers: int = 1

    @classmethod
    def one(cls, parallel: Parallel, launchers: int = 1) -> "Nodes":
        """All ranks see the same."""
        return cls((platform.node(),), (0,) * parallel.world_size, parallel.rank, launchers)

    @classmethod
    def find(cls, folder: Path, parallel: Parallel) -> "Nodes":
        """Look, on all ranks together; the folder need not be there yet.

        Each launcher's first rank makes a file that nobody has looked for before, in what there is
        of the folder's path, and all ranks look for all of these by their names: a network file
        system may show an older list of a folder's files, but asks about names that it does not
        know. Raises UserError where a file cannot be made.
        """
        if parallel.world_size <= int(os.environ.get("LOCAL_WORLD_SIZE", parallel.world_size)):
            return cls.one(parallel)
        parents = [folder.absolute(), *folder.absolute().parents]
        above = next(i for i, place in enumerate(parents) if place.is_dir())
        token = None
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            token = above, f".probe-{uuid.uuid4().hex}"

        def make() -> None:
            try:
                if token is not None:
                    (parents[above] / token[1]).touch()
            except OSError as error:
                raise UserError(f"{parents[above]}: cannot be written to: {error}") from None

        try:
            agreed(make)
            tokens: list[Any] = [None] * parallel.world_size
            dist.all_gather_object(tokens, token)
            made = [t for t in tokens if t is not None]
            seen = [(levels, name) for levels, name in made if _is_in(parents, levels, name)]
            every: list[Any] = [None] * parallel.world_size
            dist.all_gather_object(every, (seen, platform.node()))  # before one is removed
        finally:
            if token is not None:
                (parents[above] / token[1]).unlink(missing_ok=True)
        blind = [rank for rank, (seen, _) in enumerate(every) if not seen]
        if blind:
            raise UserError(
                f"{folder}: rank {blind[0]} on {every[blind[0]][1]} does not see what its own "
                "launcher's first rank writes there; ranks of a node need one file system"
            )
        kinds = list(dict.fromkeys(tuple(seen) for seen, _ in every))
        of_rank = tuple(kinds.index(tuple(seen)) for seen, _ in every)
        hosts = [every[of_rank.index(node)][1] for node in range(len(kinds))]
        return cls(tuple(hosts), of_rank, parallel.rank, len(made))

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def are_one(self) -> bool:
        """Whether all ranks see the same."""
        return self.count == 1

    @property
    def node(self) -> int:
        """This rank's."""
        return self.of_rank[self.rank]

    def ranks(self, node: int) -> list[int]:
        """A node's ranks."""
        return [rank for rank, of in enumerate(self.of_rank) if of == node]

    def first(self, node: int) -> int:
        """The rank that does for a node what one must do."""
        return self.of_rank.index(node)

    @property
    def is_first(self) -> bool:
        """Whether this rank is its node's first."""
        return self.rank == self.first(self.node)

    @property
    def part(self) -> tuple[int, int]:
        """This rank's number among its node's, and how many these are."""
        ranks = self.ranks(self.node)
        return ranks.index(self.rank), len(ranks)

    def described(self) -> list[str]:
        """Each node in words, for the manifest and messages."""
        return [f"node {number} ({name})" for number, name in enumerate(self.names)]


def _is_in(parents: list[Path], levels: int, name: str) -> bool:
    """Whether a file is so many levels above the folder whose path `parents` are."""
    return levels < len(parents) and (parents[levels] / name).exists()
