"""Runs a script's function from the command line: Fire, with every flag checked before anything runs.

    if __name__ == "__main__":
        run(train)                                   # train.py --lr 1e-6 --nouse_cache
        run({"split": split, "merge": merge})        # checkpoint.py split --input_dir ...

Flags are `--name value`, `--name=value`, and for bools also `--name` and `--noname`. Types come from
the annotations: str, int, float, bool, `Literal[...]`, `list[...]` (comma separated), `... | None`.
A value may begin with one hyphen (`--lora_rank -1`); one that begins with two needs the `=` form.
"""

import difflib
import functools
import inspect
import math
import os
import re
import sys
import types
import typing

import fire
from fire import helptext, trace

from src.errors import STOPPED, Finished, Stopped, UserError

BARRIER_TIMEOUT_S = 60.0
ROLL_CALL_S = 3.0
LOST = re.compile(
    r"timed out|connection (closed|reset)", re.IGNORECASE
)  # what collectives say when a rank does not come


def run(target):
    """Run `target`, a function or a dict from subcommand to function, with the flags in `sys.argv`.

    Exits with 0 after `--help`, 2 on a `UserError` (a wrong command line is one), 75 when it was told to stop and has saved, 130 on Ctrl-C.
    Any other exception is a bug and keeps its traceback. Returns None; the function's result is dropped.
    """
    # Tensors in large pages, where the kernel gives them: PyTorch looks once, when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        _run(target, os.path.basename(sys.argv[0]), sys.argv[1:])
    except UserError as error:
        _fail(str(error))
    except Stopped as stopped:
        if _rank() == 0:
            _say(str(stopped))
        sys.exit(STOPPED)
    except Finished as finished:
        if _rank() == 0:
            _say(str(finished))
    except KeyboardInterrupt:
        if _rank() == 0:
            _say("interrupted")
        sys.exit(130)
    except RuntimeError as error:
        if LOST.search(str(error)) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            _name_the_lost()
        raise


def _run(target, name, arguments):
    if isinstance(target, dict):
        command, *rest = arguments or [""]
        if command in ("-h", "--help"):
            _show_help(target, name)
        if command not in target:
            raise UserError(
                f"the first argument must be one of {', '.join(target)}; got {command or 'nothing'}"
                + _nearest(command, target)
                + f"\n(`{name} --help` says more)"
            )
        target, name, arguments = target[command], f"{name} {command}", rest

    parsers = _parsers(target)
    component = _fire_component(target, parsers)
    if "--help" in arguments or "-h" in arguments:
        _show_help(component, name)

    given, problems = _read_flags(arguments, parsers)
    for flag, text in given.items():
        try:
            if text is not None:
                parsers[flag](text)
        except ValueError as error:
            problems.append(f"--{flag}: {error}")
    required = [
        p.name for p in inspect.signature(target).parameters.values() if p.default is p.empty
    ]
    problems += [f"--{flag}: required, but not given" for flag in required if flag not in given]
    if problems:
        head = [f"{len(problems)} problems on the command line"] if len(problems) > 1 else []
        raise UserError("\n  ".join(head + problems) + f"\n(`{name} --help` lists the flags)")

    # One canonical token for each flag: nothing is left for Fire to guess.
    fire.decorators.SetParseFns(**parsers)(
        component
    )  # only now: --help would list the mark it leaves
    fire.Fire(component, command=[f"--{flag}={text}" for flag, text in given.items()], name=name)


def _read_flags(arguments, parsers):
    """Split the command line into {flag: text} and a list of problems; text None: already among them."""
    given, problems = {}, []
    bools = [name for name, parse in parsers.items() if parse.is_bool]
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            problems.append(f"{token!r}: positional arguments are not taken, write --name value")
            continue
        spelling, equals, text = token[2:].partition("=")
        name = spelling.replace("-", "_")
        negated = name not in parsers and name.startswith("no") and name[2:] in bools
        if negated:
            name, text = name[2:], None if equals else "false"
            if equals:
                problems.append(f"--{spelling}: takes no value, write --{name}=false")
        elif not equals:
            text = "true" if name in bools else None
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif text is None and name in parsers:
                problems.append(
                    f"--{name}: no value given (one that begins with -- needs --{name}=VALUE)"
                )
        if name not in parsers:
            names = [*parsers, *("no" + flag for flag in bools)]
            problems.append(f"--{spelling}: unknown flag" + _nearest(name, names, prefix="--"))
        elif name in given:
            problems.append(f"--{name}: given twice")
        else:
            given[name] = text
    return given, problems


def _nearest(word, words, prefix=""):
    close = difflib.get_close_matches(word, [str(w) for w in words], n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


# --- From text to typed values -----------------------------------------------------------------------


def _parsers(function):
    """{parameter: its parse function}; TypeError where the script's own signature cannot be a command line."""
    hints = typing.get_type_hints(function)
    parsers = {}
    for p in inspect.signature(function).parameters.values():
        if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) or p.name not in hints:
            raise TypeError(
                f"{function.__name__}({p}): every parameter needs a name and an annotation"
            )
        parsers[p.name] = _parser(hints[p.name])
    return parsers


def _parser(kind):
    """A function from text to a value of `kind`, ValueError otherwise; its name is what --help shows."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in _SCALARS:
        parse, shown = functools.partial(_SCALARS[kind]), kind.__name__
    elif origin is typing.Literal:
        choices = {str(value): value for value in args}
        parse, shown = functools.partial(_choose, choices), " | ".join(choices)
    elif origin is list and args[0] in (str, int, float):
        parse, shown = (
            functools.partial(_split, _SCALARS[args[0]]),
            f"{args[0].__name__},{args[0].__name__},...",
        )
    elif origin in (typing.Union, types.UnionType) and len(args) == 2 and type(None) in args:
        inner = _parser(next(a for a in args if a is not type(None)))
        parse, shown = functools.partial(_or_none, inner), f"{inner.__qualname__} | None"
    else:
        raise TypeError(f"a command line flag cannot have the type {kind}")
    parse.__qualname__ = shown
    parse.is_bool = kind is bool or bool in args
    return parse


def _parse_bool(text):
    try:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
            text.lower()
        ]
    except KeyError:
        raise ValueError(f"must be true or false (or 1, 0, yes, no), got {text!r}") from None


def _parse_int(text):
    if not re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", text):
        raise ValueError(f"must be an integer, got {text!r}")
    return int(text)


def _parse_float(text):
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"must be a number, got {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {text!r}")
    return value


def _choose(choices, text):
    if text not in choices:
        raise ValueError(
            f"must be one of {', '.join(choices)}; got {text!r}" + _nearest(text, choices)
        )
    return choices[text]


def _split(parse, text):
    items = [
        item if parse is str else item.strip() for item in text.split(",")
    ]  # a stop string may begin with a blank
    if "" in items:
        raise ValueError(f"must be a comma separated list without empty items, got {text!r}")
    return [parse(item) for item in items]


def _or_none(parse, text):
    return None if text in ("None", "none") else parse(text)


_SCALARS = {str: str, int: _parse_int, float: _parse_float, bool: _parse_bool}


# --- Fire --------------------------------------------------------------------------------------------


def _fire_component(function, parsers):
    """`function` as Fire should see it: keyword-only, our names for the types, returning nothing."""

    @functools.wraps(function)
    def component(**settings):
        function(**settings)  # Fire would print the result, or call it if it can

    signature = inspect.signature(function)
    component.__signature__ = signature.replace(
        return_annotation=signature.empty,
        parameters=[
            p.replace(kind=p.KEYWORD_ONLY, annotation=parsers[p.name])
            for p in signature.parameters.values()
        ],
    )
    return component


def _show_help(component, name):
    if _rank() == 0:
        text = helptext.HelpText(component, trace=trace.FireTrace(component, name=name))
        print(re.sub(r"-\w, (?=--)", "", text))  # Fire offers one-letter flags; we take none
    sys.exit(0)


# --- Ending ------------------------------------------------------------------------------------------


def _rank():
    return int(os.environ.get("RANK", 0))


def _say(line):
    print(line, file=sys.stderr, flush=True)


def _fail(message):
    """Exit with 2; rank 0 speaks for all, and a rank that failed without rank 0 speaks for itself."""
    rank, world_size = _rank(), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        _say(f"error: {message}")
    if world_size > 1 and not _rank_zero_spoke(rank, world_size) and rank != 0:
        _say(f"error: rank {rank}: {message}")
    sys.exit(2)


def _name_the_lost():
    """After a collective in which ranks were missing: whoever is here says so in the rendezvous store, and the first names the others."""
    from datetime import timedelta

    from torch.distributed import DistError, PrefixStore
    from torch.distributed.rendezvous import rendezvous

    rank, world_size = _rank(), int(os.environ["WORLD_SIZE"])
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=BARRIER_TIMEOUT_S)))
        store = PrefixStore("roll_call", store)
        store.set(str(rank), "here")
        try:
            store.wait([str(other) for other in range(world_size)], timedelta(seconds=ROLL_CALL_S))
        except DistError:  # the time-out: some are not here
            lost = [other for other in range(world_size) if not store.check([str(other)])]
            if lost and rank == min(set(range(world_size)) - set(lost)):
                ranks = f"rank{'s' * (len(lost) > 1)} {', '.join(map(str, lost))} of {world_size}"
                _say(
                    f"error: {ranks} did not come to what all ranks do together (--timeout): hanging, or gone"
                )
    except (DistError, ValueError) as error:
        _say(
            f"error: a rank did not come to what all ranks do together, and who cannot be told ({error})"
        )


def _rank_zero_spoke(rank, world_size):
    """Wait for rank 0's message, and on rank 0 for the others to have seen it; False after the timeout.

    torchrun kills every rank at the first exit that is not zero, so nobody may leave before rank 0 has
    spoken. The ranks meet in the rendezvous store, not in a collective: some of them may be inside a
    collective of the same group, which a barrier would be taken for part of.
    """
    from datetime import timedelta

    from torch.distributed import DistError, PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=BARRIER_TIMEOUT_S)))
        store = PrefixStore("user_error", store)
        if rank == 0:
            store.set("0", "spoke")
            store.wait([str(other) for other in range(1, world_size)])
        else:
            store.wait(["0"])
            store.set(str(rank), "heard")
    except (
        DistError,
        ValueError,
    ):  # time-out, rank 0 already gone, or no rendezvous address at all
        return False
    return True
