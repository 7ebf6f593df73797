"""From text to typed values: what a flag's text, or a scalar in a YAML file, stands for.

Types are str, int, float, bool, `Literal[...]`, `list[...]` (comma separated) and `... | None`.
"""

import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Flags of old that other ones took the place of.
REPLACED = {
    "rollout_model_parallel_size": "--actor_gen 'tpN'",
    "critic_model_parallel_size": "--critic_train 'tpN'",
    "reward_model_parallel_size": "--rew_inf 'tpN'",
}


def parser(kind: Any) -> Callable[[str], Any]:
    """A function from text to a value of `kind`; it raises ValueError for what stands for none.

    Its name is what `--help` shows. Raises TypeError when no text can stand for the type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    parse: Any
    if kind in _SCALARS:
        parse, shown = functools.partial(_SCALARS[kind]), kind.__name__
    elif origin is typing.Literal:
        choices = {str(value): value for value in args}
        parse, shown = functools.partial(_choose, choices), " | ".join(choices)
    elif origin is list and args[0] in (str, int, float):
        name = args[0].__name__
        parse, shown = functools.partial(_split, _SCALARS[args[0]]), f"{name},{name},..."
    elif origin in (typing.Union, types.UnionType) and len(args) == 2 and type(None) in args:
        inner = parser(next(a for a in args if a is not type(None)))
        parse, shown = functools.partial(_or_none, inner), f"{inner.__qualname__} | None"
    else:
        raise TypeError(f"a command line flag cannot have the type {kind}")
    parse.__qualname__ = shown
    return parse


def is_bool(kind: Any) -> bool:
    """Whether a flag of this type may stand without a value."""
    return kind is bool or bool in typing.get_args(kind)


def item_kind(kind: Any) -> Any:
    """The type of a list's items, None for what is no list."""
    for candidate in (kind, *typing.get_args(kind)):
        if typing.get_origin(candidate) is list:
            return typing.get_args(candidate)[0]
    return None


def nearest(word: str, words: Iterable[object], prefix: str = "") -> str:
    """ "; did you mean X?" for the word that is most like it, "" when none is."""
    if word in REPLACED:
        return f"; it is {REPLACED[word]} now"
    close = difflib.get_close_matches(word, [str(w) for w in words], n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _parse_bool(text: str) -> bool:
    meaning = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return meaning[text.lower()]
    except KeyError:
        raise ValueError(f"must be true or false (or 1, 0, yes, no), got {text!r}") from None


def _parse_int(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", text):
        raise ValueError(f"must be an integer, got {text!r}")
    return int(text)


def _parse_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"must be a number, got {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {text!r}")
    return value


def _choose(choices: Mapping[str, Any], text: str) -> Any:
    if text not in choices:
        known = ", ".join(choices)
        raise ValueError(f"must be one of {known}; got {text!r}" + nearest(text, choices))
    return choices[text]


def _split(parse: Callable[[str], Any], text: str) -> list[Any]:
    # A stop string may begin with a blank.
    items = [item if parse is str else item.strip() for item in text.split(",")]
    if "" in items:
        raise ValueError(f"must be a comma separated list without empty items, got {text!r}")
    return [parse(item) for item in items]


def _or_none(parse: Callable[[str], Any], text: str) -> Any:
    return None if text in ("None", "none") else parse(text)


_SCALARS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: _parse_int,
    float: _parse_float,
    bool: _parse_bool,
}
