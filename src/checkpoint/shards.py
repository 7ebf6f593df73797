"""Which files a model's shards lie in: one for each model-parallel rank, of each stage.

A stage's files hold that stage's layers alone. Plain shards are those of one stage, which has all.
"""

import re
from pathlib import Path
from typing import NamedTuple

from src.checkpoint.files import TensorFile
from src.checkpoint.manifest import MANIFEST, has_manifest, read_manifest
from src.checkpoint.names import module_of
from src.errors import UserError

_NAME = re.compile(
    r"consolidated(?:\.stage-(\d{1,4})-of-(\d{1,4}))?(?:\.(\d+))?\.(?:pth|safetensors)"
)
FIX = "copy the files of one split here, or split the model again"


class Place(NamedTuple):
    """Where a file belongs: of so many `stages` this `stage`, and in that this rank's."""

    stages: int = 1
    stage: int = 0
    rank: int = 0

    @classmethod
    def of(cls, path: Path) -> "Place | None":
        """A shard's by its file's name; None for any other file."""
        match = _NAME.fullmatch(path.name)
        if match is None:
            return None
        stage, stages, rank = match.groups()
        return cls(int(stages or 1), int(stage or 0), int(rank or 0))

    @property
    def file_name(self) -> str:
        """`consolidated.01.pth`, or of several stages' one `consolidated.stage-00-of-04.01.pth`."""
        stage = f"stage-{self.stage:02d}-of-{self.stages:02d}." if self.stages > 1 else ""
        return f"consolidated.{stage}{self.rank:02d}.pth"


def stages_of(path: Path) -> int:
    """Of how many stages a file holds one, by its name: 1 for whatever holds all layers."""
    place = Place.of(path)
    return place.stages if place else 1


def shard_files(folder: Path) -> dict[Place, Path]:
    """The files of a folder's shards, stage by stage; {} where it has none.

    Raises UserError when one is missing, there twice, or of another cut than the others.
    """
    files: dict[Place, Path] = {}
    for path in sorted(folder.glob("consolidated*")):
        place = Place.of(path)
        if place is None:
            continue
        if place in files:
            stage = f" of stage {place.stage}" if place.stages > 1 else ""
            raise UserError(
                f"{folder}: {files[place].name} and {path.name} are both shard "
                f"{place.rank}{stage}; remove one"
            )
        if place.stage >= place.stages:
            raise UserError(
                f"{path}: {place.stages} stages are counted from 0, there is no stage "
                f"{place.stage} among them; {FIX}"
            )
        files[place] = path
    if not files:
        return {}

    # One cut for all of them.
    first, last = min(files), max(files)
    if first.stages != last.stages:
        raise UserError(
            f"{folder}: {files[first].name} is of a split in {first.stages} "
            f"stage{'s' * (first.stages > 1)}, {files[last].name} of one in {last.stages}; "
            "remove what is not meant"
        )

    # Every rank's file of every stage.
    stages, ranks = first.stages, 1 + max(place.rank for place in files)
    places = [Place(stages, stage, rank) for stage in range(stages) for rank in range(ranks)]
    missing = [place.file_name for place in places if place not in files]
    if missing:
        have = [sum(place.stage == stage for place in files) for stage in range(stages)]
        most, least = (have.index(number) for number in (max(have), min(have)))
        unequal = f" (stage {most} has {have[most]}, stage {least} has {have[least]})"
        raise UserError(
            f"{folder}: {brief(missing)} missing; {len(files)} of {len(places)} shards are there"
            f"{unequal * (stages > 1)}; {FIX}"
        )
    return {place: files[place] for place in places}


def check_stages(folder: Path, files: dict[Place, TensorFile]) -> None:
    """Raise UserError when a tensor lies in two stages, or in another than the manifest says."""
    # Each in one stage.
    holder: dict[tuple[int, str], TensorFile] = {}
    for place, file in files.items():
        twice = [key for key in file.keys if (place.rank, key) in holder]
        if twice:
            other = holder[place.rank, twice[0]].path.name
            raise UserError(
                f"{folder}: {other} and {file.path.name} both hold {brief(twice)}, and of stages "
                f"only one can; {FIX}"
            )
        holder |= {(place.rank, key): file for key in file.keys}

    # In that of which the manifest says so, if there is one.
    if not has_manifest(folder):
        return
    written = read_manifest(folder).get("stages")
    if not isinstance(written, list) or not all(
        isinstance(modules, list) and all(isinstance(module, str) for module in modules)
        for modules in written
    ):
        raise UserError(f"{folder / MANIFEST}: its list of stages is missing or damaged; {FIX}")
    for place, file in files.items():
        if len(written) != place.stages:
            raise UserError(
                f"{file.path}: is of a split in {place.stages} stages, {MANIFEST} is of one in "
                f"{len(written)}; {FIX}"
            )
        expected, held = set(written[place.stage]), set(map(module_of, file.keys))
        lacks = [f"lacks {brief(sorted(expected - held))}"] if expected - held else []
        holds = [f"holds {brief(sorted(held - expected))}"] if held - expected else []
        if lacks or holds:
            raise UserError(
                f"{file.path}: {' and '.join(lacks + holds)}, other than {MANIFEST} says: it is "
                f"damaged, or another stage's; {FIX}"
            )


def brief(names: list[str]) -> str:
    """The first of several names, in words."""
    more = f" (and {len(names) - 4} more)" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more}"
