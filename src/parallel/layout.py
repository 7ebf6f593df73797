"""A layout as a value: by what degrees a model is divided, and on which of the run's ranks."""

import re
from dataclasses import dataclass, replace

from src.errors import UserError

EXAMPLE = "'dp2 pp2 tp2', 'tp4 sp', 'dp8 zero3' or 'tp2 on 0-3'"


@dataclass(frozen=True)
class Layout:
    """dp · cp · pp · tp ranks from number `first` on, in this order: neighbours share tensors.

    tp: ranks that share each tensor, and with `sp` the tokens between products; pp: ranks of a
    pipeline, each with vp stages; cp: models that divide the tokens of the same rows; dp: how many
    have rows of their own; zero: what the models share of each other's state (--zero).
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    sp: bool = False
    cp: int = 1
    zero: int = 1
    vp: int = 1
    first: int = 0

    @property
    def model_size(self) -> int:
        """Ranks of a model."""
        return self.pp * self.tp

    @property
    def models(self) -> int:
        """Models, those that divide the tokens of the same rows counted each."""
        return self.dp * self.cp

    @property
    def size(self) -> int:
        return self.models * self.model_size

    @property
    def ranks(self) -> range:
        """The ranks of the run that it takes."""
        return range(self.first, self.first + self.size)

    def is_like(self, other: "Layout") -> bool:
        """Whether the same ranks make up the same models and stages, whatever else they share."""
        degrees = [(x.dp, x.cp, x.pp, x.tp, x.first) for x in (self, other)]
        return degrees[0] == degrees[1]

    def overlaps(self, other: "Layout") -> bool:
        """Whether a rank is in both."""
        return max(self.first, other.first) < min(self.ranks.stop, other.ranks.stop)

    def __str__(self) -> str:
        """As `parsed` reads it, ranks and all."""
        degrees = {"dp": self.dp, "cp": self.cp, "pp": self.pp, "vp": self.vp, "tp": self.tp}
        words = [f"{name}{n}" for name, n in degrees.items() if n > 1 or name in ("dp", "tp")]
        words += ["sp"] * self.sp + [f"zero{self.zero}"] * (self.zero != 1)
        last = self.ranks.stop - 1
        return " ".join([*words, "on", f"{self.first}-{last}" if last > self.first else f"{last}"])

    @property
    def described(self) -> str:
        """In words, for the log and the dry run."""
        stages = f"{self.pp} stages × " if self.pp > 1 else ""
        context = f"{self.cp} context-parallel × " if self.cp > 1 else ""
        return f"ranks: {self.tp} model-parallel × {stages}{context}{self.dp} data-parallel"

    @classmethod
    def parsed(cls, text: str, world_size: int, flag: str, zero: int = 1) -> "Layout":
        """The layout that a text such as "dp2 pp2 tp2 on 0-7" says.

        A degree that is not named is 1, but dp: as many as there are ranks for. Without "on" it
        takes all ranks. flag: where the text stands, for messages; zero: where it names none.
        Raises UserError for a text that says none, and for degrees that do not make up the ranks.
        """
        head = f"{flag} '{text}'"
        degrees, _, named = text.partition(" on ")
        ranks = _ranks(named.strip(), head, world_size) if named else range(world_size)
        given: dict[str, int] = {}
        for word in degrees.split():
            match = re.fullmatch(r"(dp|cp|pp|vp|tp)([1-9][0-9]{0,5})|(zero)([0-3])|(sp)", word)
            if match is None:
                raise UserError(f"{head}: {word!r} is no degree; write {EXAMPLE}")
            name, number = [*filter(None, match.groups()), "1"][:2]
            if name in given:
                raise UserError(f"{head}: says {name} twice")
            given[name] = int(number)
        if not given:
            raise UserError(f"{head}: names no degree; write {EXAMPLE}")
        layout = cls(**{"zero": zero, **given, "sp": "sp" in given, "first": ranks.start})  # type: ignore[arg-type]
        if "dp" not in given and len(ranks) % layout.size == 0:
            layout = replace(layout, dp=len(ranks) // layout.size)
        if layout.size != len(ranks):
            raise UserError(
                f"{head}: makes up {layout.size} ranks, and it is to take {len(ranks)} "
                f"({ranks.start}-{ranks.stop - 1}): give degrees whose product is that, or say "
                "which ranks ('… on 0-3')"
            )
        return layout


def _ranks(text: str, head: str, world_size: int) -> range:
    """The ranks of "0-3", or of "3" alone."""
    match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", text)
    if match is None:
        raise UserError(f"{head}: {text!r} are no ranks; write {EXAMPLE}")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < world_size:
        raise UserError(
            f"{head}: the run has ranks 0 to {world_size - 1}; {text} are not among them"
        )
    return range(first, last + 1)
