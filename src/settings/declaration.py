"""What a setting is: declared once, as a field of a small frozen dataclass.

    @dataclass(frozen=True, kw_only=True)
    class Optimizer(Settings):
        lr: Annotated[float, Above(0), "the highest learning rate"] = 1e-5

A script's settings are a dataclass of such groups. From these declarations come the flags and
`--help`, the checks of types and bounds, the typed object that the code receives, what `--config`
takes and `settings.yaml` holds, and what makes a run the same run. Rules between settings stand in
the `problems` of the class that they are about.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, TypeVar

from src.errors import UserError
from src.settings.parsing import parser

S = TypeVar("S", bound="Settings")
REQUIRED: Any = dataclasses.MISSING  # the default of a setting that has none
NONSENSE = 10**4  # an upper bound from here on only keeps nonsense out


class Mark(Enum):
    """What resuming a run must know of a setting."""

    MAY_CHANGE = "changes where, how fast or how visibly a run goes, not what comes out"
    CONTENT = "names a file or folder: what it holds counts, not where it lies"
    ROWS = "names rows: a file, a folder, a data set or several (src/data/sources.py)"
    WRITTEN = "names what the script writes"
    FIXED = "decides what a saved step holds, so that no run can go on from it with another"


MAY_CHANGE, FIXED = Mark.MAY_CHANGE, Mark.FIXED
CONTENT, ROWS, WRITTEN = Mark.CONTENT, Mark.ROWS, Mark.WRITTEN


@dataclass(frozen=True)
class Bounds:
    """Numbers from `low` to `high`.

    is_open: without `low` itself; also: others that are taken; because: words after the bounds.
    """

    low: float
    high: float
    is_open: bool = False
    also: tuple[float, ...] = ()
    because: str = ""

    def __contains__(self, value: float) -> bool:
        inside = self.low < value if self.is_open else self.low <= value
        return value in self.also or (inside and value <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.is_open else 'at least'} {self.low:g}"
        return f"{low} and at most {self.high:g}{self.because}"

    def brief(self) -> str:
        """For `--help`: without a limit that only keeps nonsense out."""
        low = f"{'above' if self.is_open else 'from'} {self.low:g}"
        return low + (f" to {self.high:g}" if self.high < NONSENSE else "")


def AtLeast(low: float, high: float = 10**7) -> Bounds:
    """`low` or more."""
    return Bounds(low, high)


def Above(low: float, high: float = 1e9) -> Bounds:
    """More than `low`."""
    return Bounds(low, high, is_open=True)


def Between(low: float, high: float) -> Bounds:
    """From `low` to `high`, both included."""
    return Bounds(low, high)


class Choices(tuple[str, ...]):
    """The values that a text may have, as `Literal` would say, for names that stand in a table."""

    def __new__(cls, *names: str) -> "Choices":
        return super().__new__(cls, names)


@dataclass(frozen=True)
class Unit:
    """What a number counts, such as tokens."""

    name: str


@dataclass(frozen=True)
class Settings:
    """A group of settings, or the groups that make up a script's settings."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings together, a message each."""
        yield from ()

    @classmethod
    def may_lack_required(cls, values: Mapping[str, Any]) -> bool:
        """Whether required settings may be left out by these values; they are "" then."""
        return False


@dataclass(frozen=True)
class Setting:
    """One setting, read from its declaration."""

    name: str
    kind: Any  # its type, without what annotates it
    default: Any = REQUIRED
    help: str = ""
    bounds: Bounds | None = None
    unit: str = ""
    marks: frozenset[Mark] = frozenset()
    group: str = ""  # the first line of its class's docstring
    parse: Callable[[str], Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parse", parser(self.kind))

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    @property
    def is_path(self) -> bool:
        """Whether it names a file or folder."""
        return CONTENT in self.marks or self.name.endswith(("_dir", "_file", "_path"))

    def out_of_bounds(self, value: Any) -> str | None:
        """What the value must be, when it is something else."""
        if value == "" and (self.is_required or self.is_path):
            return "is empty"  # a variable of the shell that is not set
        if self.bounds is None or value is None or value in self.bounds:
            return None
        return f"must be {self.bounds}"


_known: dict[type[Settings], Mapping[str, Setting]] = {}


def declared(cls: type[Settings]) -> Mapping[str, Setting]:
    """Every setting of a group or a script by its name, in the order of declaration.

    A group in a script may have a default instance: its values are the script's defaults.
    Raises TypeError for what no command line can hold, and when two groups have one name.
    """
    if cls in _known:
        return _known[cls]
    settings: dict[str, Setting] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for declaration in dataclasses.fields(cls):
        hint = hints[declaration.name]
        if _is_group(hint):
            group = declared(hint)
            if declaration.default is not REQUIRED:
                group = {
                    name: dataclasses.replace(setting, default=getattr(declaration.default, name))
                    for name, setting in group.items()
                }
        else:
            group = {declaration.name: _setting(cls, declaration.name, hint, declaration.default)}
        for name, setting in group.items():
            if name in settings:
                raise TypeError(f"{cls.__name__}: {name} is declared by two groups")
            settings[name] = setting
    _known[cls] = settings
    return settings


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Settings)


def _setting(cls: type[Settings], name: str, hint: Any, default: Any) -> Setting:
    kind, notes = hint, list[Any]()
    if typing.get_origin(hint) is typing.Annotated:
        kind, *notes = typing.get_args(hint)
    choices = next((note for note in notes if isinstance(note, Choices)), None)
    if choices is not None:
        kind = Literal[choices]
    return Setting(
        name,
        kind,
        default,
        help=next((note for note in notes if isinstance(note, str)), ""),
        bounds=next((note for note in notes if isinstance(note, Bounds)), None),
        unit=next((note.name for note in notes if isinstance(note, Unit)), ""),
        marks=frozenset(note for note in notes if isinstance(note, Mark)),
        group=(inspect.getdoc(cls) or "").partition("\n")[0].rstrip("."),
    )


def find_problems(
    cls: type[Settings], values: Mapping[str, Any], labels: Mapping[str, str] | None = None
) -> list[str]:
    """All that is wrong with flat values, a message each; what is missing gets its default.

    That is required settings that are missing, values out of bounds, and broken rules. labels: what
    each given value is called in messages, its flag by default; a label without a value stands for
    one that could not be read, which is somebody else's to say.
    """
    labels = labels or {}
    settings, good, problems = declared(cls), dict(values), []
    may_lack = cls.may_lack_required(values)
    lacks = any(name not in values for name in labels)
    for name, setting in settings.items():
        wrong = setting.out_of_bounds(values.get(name))
        if wrong:
            shown = f"{labels.get(name, f'--{name}')} {values[name]}".rstrip()
            problems.append(f"{shown}: {wrong}")
            del good[name]
            lacks |= setting.is_required
        elif setting.is_required and name not in {*values, *labels} and not may_lack:
            problems.append(f"--{name}: required, but not given")
            lacks = True
    if not lacks:  # rules are about values that can be
        impossible = [f"--{name} " for name in values.keys() - good.keys()]
        rules = all_problems(_complete(cls, good))
        problems += [text for text in rules if not any(flag in text for flag in impossible)]
    return problems


def build(cls: type[S], values: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> S:
    """The settings of a script (or one group) from flat values; what is missing gets its default.

    Raises UserError for all that `find_problems` finds.
    """
    unknown = values.keys() - declared(cls).keys()
    if unknown:
        raise TypeError(f"{cls.__name__} has no {', '.join(sorted(unknown))}")
    problems = find_problems(cls, values, labels)
    if problems:
        raise UserError("\n  ".join(problems))
    return _complete(cls, values)


def _complete(cls: type[S], values: Mapping[str, Any]) -> S:
    missing = dict.fromkeys((name for name, s in declared(cls).items() if s.is_required), "")
    return _assembled(cls, {**missing, **defaults(cls), **values})


def _assembled(cls: type[S], values: Mapping[str, Any]) -> S:
    hints = typing.get_type_hints(cls)
    parts = {
        f.name: _assembled(hints[f.name], values) if _is_group(hints[f.name]) else values[f.name]
        for f in dataclasses.fields(cls)
    }
    return cls(**parts)


def all_problems(settings: Settings) -> Iterator[str]:
    """Of every group, and then of the groups together."""
    for f in dataclasses.fields(settings):
        part = getattr(settings, f.name)
        if isinstance(part, Settings):
            yield from all_problems(part)
    yield from settings.problems()


def check(settings: Settings) -> None:
    """Raise UserError for what is wrong with settings that were put together by hand."""
    values, problems = flat(settings), []
    for name, setting in declared(type(settings)).items():
        wrong = setting.out_of_bounds(values[name])
        problems += [f"--{name} {values[name]}: {wrong}"] if wrong else []
    problems += all_problems(settings)
    if problems:
        raise UserError("\n  ".join(problems))


def flat(settings: Settings) -> dict[str, Any]:
    """Every setting's value by its name, in the order of declaration."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        part = getattr(settings, f.name)
        values |= flat(part) if isinstance(part, Settings) else {f.name: part}
    return values


def by_group(settings: Mapping[str, Setting]) -> dict[str, list[Setting]]:
    """Settings under their groups' headings, the required ones first."""
    groups: dict[str, list[Setting]] = {}
    for setting in sorted(settings.values(), key=lambda setting: not setting.is_required):
        groups.setdefault(setting.group, []).append(setting)
    order = list(dict.fromkeys(setting.group for setting in settings.values()))
    return {heading: groups[heading] for heading in order}


def defaults(cls: type[Settings]) -> dict[str, Any]:
    """The value of each setting that has one without being given."""
    return {name: s.default for name, s in declared(cls).items() if not s.is_required}


def of_function(function: Callable[..., Any]) -> type[Settings]:
    """A class of settings that are a function's parameters, declared like fields.

    Raises TypeError for a parameter without a name or an annotation.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    for p in parameters:
        if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) or p.name not in hints:
            raise TypeError(f"{function.__name__}({p}): every parameter needs a name and a type")
    return dataclasses.make_dataclass(
        function.__name__,
        [
            (p.name, hints[p.name], field(default=REQUIRED if p.default is p.empty else p.default))
            for p in parameters
        ],
        bases=(Settings,),
        namespace={"__doc__": "Flags."},
        frozen=True,
        kw_only=True,
    )


def changed(settings: Settings, names: Iterable[str]) -> list[str]:
    """Those of a group's named settings that do not have its class's default."""
    defaults = {f.name: f.default for f in dataclasses.fields(settings)}
    return [name for name in names if getattr(settings, name) != defaults[name]]


def idle(settings: Settings, names: Iterable[str], why: str) -> Iterator[str]:
    """A message for each of the named settings that was changed and has no effect."""
    for name in changed(settings, names):
        yield f"--{name} {getattr(settings, name)}: has no effect {why}"
