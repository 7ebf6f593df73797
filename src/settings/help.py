"""`--help`: every setting under its group, with type, default, unit and bounds."""

import textwrap
from collections.abc import Mapping

from src.settings.declaration import Setting, by_group

WIDTH = 100


def help_text(name: str, about: str, settings: Mapping[str, Setting]) -> str:
    """The whole page. name: the script's; about: what it says of itself."""
    lines = [name, "", about.strip(), ""]
    for heading, members in by_group(settings).items():
        lines.append(heading)
        for setting in members:
            lines += _described(setting)
        lines.append("")
    lines += [
        "Config file",
        "  --config FILE.yaml",
        "      settings by the same names; flags win. A run's settings.yaml is one.",
    ]
    return "\n".join(lines)


def _described(setting: Setting) -> list[str]:
    """A line of facts, and the help indented below it."""
    facts = ["required" if setting.is_required else f"default {setting.default}"]
    facts += [setting.unit] if setting.unit else []
    facts += [setting.bounds.brief()] if setting.bounds else []
    head = f"  --{setting.name}  {setting.parse.__qualname__} ({', '.join(facts)})"
    indent = " " * 6
    return [
        head,
        *textwrap.wrap(setting.help, WIDTH, initial_indent=indent, subsequent_indent=indent),
    ]
