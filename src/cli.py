"""Runs a script's function from the command line: Fire, with every flag checked beforehand.

    def main(settings: SolverTraining): ...
    if __name__ == "__main__":
        run(main)                                    # train.py --lr 1e-6 --nouse_cache
        run({"split": split, "merge": merge})        # checkpoint.py split --input_dir ...

The function takes one `Settings` object, or declares its settings as parameters (for small tools).
Flags are `--name value`, `--name=value`, and for bools also `--name` and `--noname`; `--config
FILE` reads more of them from YAML. A value may begin with one hyphen (`--lora_rank -1`); one that
begins with two needs the `=` form. What text stands for which value: `src/settings/parsing.py`.
"""

import inspect
import json
import os
import re
import select
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import fire

from src.errors import STOPPED, Finished, Stopped, UserError
from src.remote import local
from src.settings.declaration import (
    Setting,
    Settings,
    build,
    declared,
    find_problems,
    flat,
    of_function,
)
from src.settings.help import help_text
from src.settings.parsing import is_bool, nearest

ALLOCATOR_SETTINGS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
BARRIER_TIMEOUT_S = 60.0
ROLL_CALL_S = 3.0
STORE_S = 10.0  # for a connection to the rendezvous store: its machine is there, or lost itself
UNREAD = 128 + 13  # as a shell names the end by SIGPIPE
# What collectives say when a rank does not come.
LOST = re.compile(r"timed out|connection (closed|reset)", re.IGNORECASE)

Target = Callable[..., Any]


def run(target: Target | dict[str, Target]) -> None:
    """Run `target`, a function or a dict from subcommand to function, with the flags in `sys.argv`.

    Exits with 0 after `--help`, 2 on a `UserError` (a wrong command line is one), 75 when it was
    told to stop and has saved, 130 on Ctrl-C, 141 when nobody reads what it says any more
    (`| head`). Any other exception is a bug and keeps its traceback. Returns None; the function's
    result is dropped.
    """
    # Tensors in large pages, where the kernel gives them: PyTorch looks once, when it first
    # allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # A GPU's memory in segments that grow: packed batches of ever new lengths would leave gaps that
    # nothing fits into. PyTorch reads either name, the first before the second.
    if not ALLOCATOR_SETTINGS & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    try:
        _run(target, os.path.basename(sys.argv[0]), sys.argv[1:])
        sys.stdout.flush()
        return
    except UserError as error:
        code, message = 2, str(error)
    except Stopped as stopped:
        code, message = STOPPED, str(stopped)
    except Finished as finished:
        code, message = 0, str(finished)
    except KeyboardInterrupt:
        if _rank() == 0:
            _say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        if not _unread():
            raise
        _say_no_more()
        sys.exit(UNREAD)
    except RuntimeError as error:
        if LOST.search(str(error)) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            _name_the_lost()
        raise
    # Here the exception is gone, and with it the frames that held on to process groups.
    if code == 2:
        _report(message)
    elif _rank() == 0:
        _say(message)
    _leave_groups()
    if code:
        sys.exit(code)


def _run(target: Target | dict[str, Target], name: str, arguments: list[str]) -> None:
    # A subcommand comes first.
    if isinstance(target, dict):
        command, *rest = arguments or [""]
        if command in ("-h", "--help"):
            _show_help(_about_commands(target), name, {})
        if command not in target:
            raise UserError(
                f"the first argument must be one of {', '.join(target)}; got {command or 'nothing'}"
                + nearest(command, target)
                + f"\n(`{name} --help` says more)"
            )
        target, name, arguments = target[command], f"{name} {command}", rest

    kind, takes_object = _settings_of(target)
    settings = declared(kind)
    if "--help" in arguments or "-h" in arguments:
        _show_help(_about(target), name, settings)

    # Values by name, from the command line over those from a file; and all that is wrong with them.
    values, labels, problems = _read(arguments, settings)
    problems += find_problems(kind, values, labels)
    if problems:
        head = [f"{len(problems)} problems on the command line"] if len(problems) > 1 else []
        raise UserError("\n  ".join(head + problems) + f"\n(`{name} --help` lists the flags)")

    def component(**given: Any) -> None:  # Fire would print a result, or call it if it can
        with local(build(kind, given, labels)) as built:
            target(built) if takes_object else target(**flat(built))

    # One canonical token for each flag: nothing is left for Fire to guess.
    fire.decorators.SetParseFns(**dict.fromkeys(values, json.loads))(component)
    command_line = [f"--{flag}={json.dumps(value)}" for flag, value in values.items()]
    fire.Fire(component, command=command_line, name=name)


def _settings_of(function: Target) -> tuple[type[Settings], bool]:
    """The class of a function's settings, and whether it takes an object of it."""
    hints = typing.get_type_hints(function)
    hints.pop("return", None)
    kinds = list(hints.values())
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Settings):
        return kinds[0], True
    return of_function(function), False


def _read(
    arguments: list[str], settings: Mapping[str, Setting]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Typed values, what each is called in messages, and what is wrong."""
    texts, problems = _read_flags(arguments, settings)
    path = texts.pop("config", None)
    values: dict[str, Any] = {}
    labels: dict[str, str] = {}
    if path is not None:
        from src.settings.config_file import read_config  # YAML is only needed for this

        values, labels, wrong = read_config(path, settings)
        problems += wrong
    for name, text in texts.items():
        labels[name] = f"--{name}"
        values.pop(name, None)
        try:
            if text is not None:  # None: what is wrong is among the problems already
                values[name] = settings[name].parse(text)
        except ValueError as error:
            problems.append(f"--{name}: {error}")
    return values, labels, problems


def _read_flags(
    arguments: list[str], settings: Mapping[str, Setting]
) -> tuple[dict[str, str | None], list[str]]:
    """Split the command line into {flag: text} and a list of problems; None: already among them."""
    given: dict[str, str | None] = {}
    problems: list[str] = []
    known = {*settings, "config"}
    bools = [name for name, setting in settings.items() if is_bool(setting.kind)]
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            problems.append(f"{token!r}: positional arguments are not taken, write --name value")
            continue
        spelling, equals, value = token[2:].partition("=")
        name, text = spelling.replace("-", "_"), value if equals else None
        negated = name not in known and name.startswith("no") and name[2:] in bools
        if negated:
            name, text = name[2:], None if equals else "false"
            if equals:
                problems.append(f"--{spelling}: takes no value, write --{name}=false")
        elif not equals:
            text = "true" if name in bools else None
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif text is None and name in known:
                problems.append(
                    f"--{name}: no value given (one that begins with -- needs --{name}=VALUE)"
                )
        if name not in known:
            names = [*settings, "config", *("no" + flag for flag in bools)]
            problems.append(f"--{spelling}: unknown flag" + nearest(name, names, prefix="--"))
        elif name in given:
            problems.append(f"--{name}: given twice")
        else:
            given[name] = text
    return given, problems


# --- Help -----------------------------------------------------------------------------------------


def _about(function: Target) -> str:
    """What a script says of itself, and its function."""
    script = sys.modules.get(function.__module__)
    texts = [getattr(script, "__doc__", None), inspect.getdoc(function)]
    return "\n\n".join(text.strip() for text in texts if text)


def _about_commands(commands: dict[str, Target]) -> str:
    first = next(iter(commands.values()))
    script = getattr(sys.modules.get(first.__module__), "__doc__", None) or ""
    lines = [
        f"  {name}: {(inspect.getdoc(f) or '').splitlines()[0]}" for name, f in commands.items()
    ]
    return "\n".join([script.strip(), "", "COMMANDS, each with a --help of its own:", *lines])


def _show_help(about: str, name: str, settings: Mapping[str, Setting]) -> NoReturn:
    if _rank() == 0:
        print(help_text(name, about, settings), flush=True)
    sys.exit(0)


# --- Ending ---------------------------------------------------------------------------------------


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:  # the exit code still tells
        _say_no_more()


def _unread() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more."""
    outputs = select.poll()
    for descriptor in (1, 2):
        outputs.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in outputs.poll(0))


def _say_no_more() -> None:
    """Let what is still written vanish: Python would complain of it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)


def _report(message: str) -> None:
    """Name an error. Rank 0 speaks for all; a rank that failed without it speaks for itself."""
    rank, world_size = _rank(), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        _say(f"error: {message}")
    if world_size > 1 and not _rank_zero_spoke(rank, world_size) and rank != 0:
        _say(f"error: rank {rank}: {message}")


def _leave_groups() -> None:
    """End the threads of the process groups, if there are any, while Python still runs.

    One that lets go of a tensor while Python shuts down ends the process with SIGABRT.
    """
    if setup := sys.modules.get("src.parallel.setup"):
        setup.leave()


def _name_the_lost() -> None:
    """After a collective in which ranks were missing: say which. (NCCL's: `roll_call.py`.)

    Whoever is here says so in the rendezvous store, and the first names the others.
    """
    from datetime import timedelta

    from torch.distributed import DistError, PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from src.parallel.roll_call import lost as message_of

    rank, world_size = _rank(), int(os.environ["WORLD_SIZE"])
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=STORE_S)))
        store = PrefixStore("roll_call", store)
        store.set(str(rank), "here")
        try:
            store.wait([str(other) for other in range(world_size)], timedelta(seconds=ROLL_CALL_S))
        except DistError:  # the time-out: some are not here
            lost = [other for other in range(world_size) if not store.check([str(other)])]
            if lost and rank == min(set(range(world_size)) - set(lost)):
                _say(message_of(lost, world_size))
    except (DistError, ValueError) as error:
        _say(
            "error: a rank did not come to what all ranks do together, and who cannot be told: the "
            f"machine of the rendezvous does not answer ({str(error).splitlines()[0]})"
        )


def _rank_zero_spoke(rank: int, world_size: int) -> bool:
    """Wait for rank 0's message, and on rank 0 for the others to have seen it.

    False after the timeout. torchrun kills every rank at the first exit that is not zero, so nobody
    may leave before rank 0 has spoken. The ranks meet in the rendezvous store, not in a collective:
    some of them may be inside a collective of the same group, which a barrier would be taken for
    part of.
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
    except (DistError, ValueError):  # time-out, rank 0 already gone, or no address at all
        return False
    return True
