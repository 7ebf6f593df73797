"""Settings in YAML: what `--config` reads, and the `settings.yaml` that a run leaves.

A file's keys are the flags' names, side by side. A scalar means what it would mean as a flag's
text; lists and null are YAML's own.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from src.errors import UserError
from src.settings.declaration import Setting, Settings, by_group, declared, flat
from src.settings.parsing import item_kind, nearest, parser

NULL, TAGS = "tag:yaml.org,2002:null", "tag:yaml.org,2002:"
LARGEST_BYTES = 2**20


def read_config(
    path: str, settings: Mapping[str, Setting]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """A file's values, what each is called in messages (file, line, name), and what is wrong.

    Raises UserError when the file cannot be read or is no YAML mapping.
    """
    values: dict[str, Any] = {}
    labels: dict[str, str] = {}
    problems: list[str] = []
    for key, node in _entries(path):
        name, label = key.value, f"{path}:{key.start_mark.line + 1}: {key.value}"
        if not isinstance(key, yaml.ScalarNode) or name not in settings:
            near = nearest(name, settings) if isinstance(name, str) else ""
            problems.append(f"{label}: unknown setting{near}")
        elif name in labels:
            problems.append(f"{label}: given twice")
        else:
            labels[name] = label
            try:
                values[name] = _value(settings[name], node)
            except ValueError as error:
                problems.append(f"{label}: {error}")
    return values, labels, problems


def _entries(path: str) -> Iterator[tuple[Any, Any]]:
    """(key, value) of the file's mapping as YAML nodes, which know their lines."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(LARGEST_BYTES + 1)
        if len(data) > LARGEST_BYTES:
            raise UserError(f"--config {path}: is larger than {LARGEST_BYTES:,} bytes: no settings")
        root = yaml.compose(data.decode("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: is not UTF-8 text ({error.reason})") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or type(error).__name__
        raise UserError(f"--config {path}{line}: is not YAML: {reason}") from None
    if root is None:  # an empty file
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path}: holds no settings; write NAME: VALUE in each line")
    yield from root.value


def _value(setting: Setting, node: Any) -> Any:
    """What a YAML node says of a setting. Raises ValueError for what it cannot be."""
    if not node.tag.startswith(TAGS):
        raise ValueError(f"the tag {node.tag} is not taken: write a plain value")
    if isinstance(node, yaml.MappingNode):
        raise ValueError(
            f"must be {setting.parse.__qualname__}, got a group: keys stand side by side"
        )
    if isinstance(node, yaml.SequenceNode):
        kind = item_kind(setting.kind)
        if kind is None:
            raise ValueError(f"must be {setting.parse.__qualname__}, got a list")
        if not node.value:
            raise ValueError("is an empty list; write null")
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            raise ValueError(f"must be a list of {kind.__name__}, got a list of more than that")
        for item in node.value:
            if item.tag == NULL or not item.tag.startswith(TAGS):
                raise ValueError(f"must be a list of {kind.__name__}, got {item.value!r} in it")
        return [_text(parser(kind), item) for item in node.value]
    if node.tag == NULL:
        if setting.parse.__qualname__.endswith("| None"):
            return None
        raise ValueError(f"must be {setting.parse.__qualname__}, got null")
    return _text(setting.parse, node)


def _text(parse: Callable[[str], Any], node: Any) -> Any:
    if "\0" in node.value:
        raise ValueError("holds a NUL character")
    return parse(node.value)


def to_yaml(settings: Settings, head: str) -> str:
    """All settings as a file that `read_config` takes, by groups. head: a comment at the top."""
    values, lines = flat(settings), [f"# {head}"]
    for heading, members in by_group(declared(type(settings))).items():
        lines += ["", f"# {heading}"]
        lines += [f"{setting.name}: {_scalar(values[setting.name])}" for setting in members]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """A value, or a list of them, as YAML in a mapping."""
    plain = list(value) if isinstance(value, tuple) else value
    # Line breaks of any kind are written as escapes: YAML would fold them.
    texts = [text for text in (plain if isinstance(plain, list) else [plain]) if type(text) is str]
    style = '"' if any(not text.isprintable() for text in texts) else None
    text = yaml.safe_dump(
        plain,
        default_flow_style=True,
        default_style=style,
        allow_unicode=True,
        width=float("inf"),
    )
    return text.removesuffix("\n").removesuffix("\n...")
