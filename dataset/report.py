"""What dataset/inspect.py found, as lines for a terminal and as a page for a browser."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO

from src.data.inspection import QUANTILES, Example, Inspection, Token, histogram, quantile
from src.models.batch import Sequence

PAGE = Path(__file__).with_name("report.html.jinja")
SHOWN = 10  # rows that are named of a kind; the others are counted
BAR_WIDTH = 50  # characters
LONGEST = 1000  # tokens of a response that a terminal shows; the page shows all
BLOCKS = " ▏▎▍▌▋▊▉█"  # none to eight eighths
LIMITS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Table:
    """Rows of cells below a head; but for the first column cells are numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Bar:
    """A bin of the histogram: its bounds, [start, stop), and how many lengths are in it."""

    start: int
    stop: int
    count: int
    share: float  # of the fullest bin


@dataclass(frozen=True)
class Named:
    """Rows that are named; count: of all of them."""

    title: str
    lines: list[str]
    count: int


@dataclass(frozen=True)
class Report:
    """All that there is to say of a file. source: as the user calls it."""

    source: str
    found: Inspection
    max_seq_len: int
    n_examples: int

    @property
    def examples(self) -> list[Example]:
        """The rows that are shown."""
        return self.found.spread(self.n_examples)

    @property
    def tables(self) -> list[Table]:
        """The counts."""
        if not self.found.examples:
            return []
        return [self._counts(), self._quantiles(), self._too_long()]

    def _counts(self) -> Table:
        found = self.found
        counts = {
            "rows": len(found.examples),
            "responses": len(found.sequences) if found.kind != "prompts" else 0,
            "tokens": sum(found.lengths),
            "trained tokens": sum(found.trained),
            "turns": found.roles.total(),
            **{f"  of role {role}": n for role, n in found.roles.most_common()},
            **{f"  calls of tool {name}": n for name, n in found.tools.most_common()},
        }
        return Table(f"{self.source}: {found.kind}", ["", "n"], [*_cells(counts.items())])

    def _quantiles(self) -> Table:
        found = self.found
        measured = {
            "sequence": found.lengths,
            "prompt": [sequence.prompt_length for sequence in found.sequences],
            "trained": found.trained,
        }
        rows = (
            (name, sum(values) / len(values), *(quantile(values, share) for share in QUANTILES))
            for name, values in measured.items()
        )
        head = ["", "mean", *(_share_name(share) for share in QUANTILES)]
        return Table("tokens", head, [*_cells(rows)])

    def _too_long(self) -> Table:
        sizes, longest = self.found.sizes, max(self.found.sizes)
        limits = {limit for limit in LIMITS if limit < 2 * longest} | {self.max_seq_len, longest}
        rows = (
            (
                f"{limit:,}" + " (given)" * (limit == self.max_seq_len),
                self.found.too_long(limit),
                f"{self.found.too_long(limit) / len(sizes):.1%}",
            )
            for limit in sorted(limits)
        )
        what = {"solver": "responses", "verifier": "rows", "prompts": "prompts"}[self.found.kind]
        return Table("left out", ["--max_seq_len", what, "share"], [*_cells(rows)])

    @property
    def bars(self) -> list[Bar]:
        """The histogram of the sequences' lengths."""
        bins = histogram(self.found.lengths) if self.found.examples else []
        most = max((count for *_, count in bins), default=1)
        return [Bar(start, stop, count, count / most) for start, stop, count in bins]

    @property
    def named(self) -> list[Named]:
        """Rows that a user should look at."""
        again = {
            "rows that say what another says": self.found.again(of_prompts=False),
            "prompts that come again": self.found.again(of_prompts=True),
        }
        lists = {
            "rows that a trainer refuses": self.found.broken,
            **{title: [f"{a} = {b}" for a, b in pairs] for title, pairs in again.items()},
            "notes": self.found.notes,
        }
        return [Named(title, lines[:SHOWN], len(lines)) for title, lines in lists.items() if lines]


def _share_name(share: float) -> str:
    return {0: "least", 0.5: "median", 1: "most"}.get(share, f"{share:.0%}")


def _cells(rows: Iterable[tuple]) -> Iterator[list[str]]:
    for row in rows:
        yield [x if isinstance(x, str) else f"{x:,.1f}" if isinstance(x, float) else f"{x:,}"
               for x in row]  # fmt: skip


def visible(text: str) -> str:
    r"""A text with what does not print, but for line breaks, as Python spells it: \t, \x1b.

    So that no row can move a terminal's cursor, or turn the order of a page's letters round.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


Tokens = Callable[[Sequence], list[Token]]


# ---- A terminal ----------------------------------------------------------------------------------


def takes_colour(file: IO[str]) -> bool:
    """Whether what is written to a file may be coloured: https://no-color.org."""
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def lines_of(report: Report, tokens_of: Tokens, in_colour: bool) -> Iterator[str]:
    """The report for a terminal. tokens_of: a sequence's tokens."""
    for table in report.tables:
        yield from _table_lines(table)
    if report.bars:
        yield from _histogram_lines(report.bars)
    for named in report.named:
        yield f"{named.title}: {named.count:,}"
        yield from (f"  {visible(line)}" for line in named.lines)
        if named.count > len(named.lines):
            yield f"  ... and {named.count - len(named.lines):,} more"
        yield ""
    trained = "\x1b[42;30mtrained on\x1b[0m" if in_colour else "[[trained on]]"
    for example in report.examples:
        yield f"example {example.place}  ({trained})"
        for response in example.responses:
            tokens = tokens_of(response.sequence)
            trained_on = sum(token.is_trained for token in tokens)
            yield f"  {response.name}: {len(tokens):,} tokens, {trained_on:,} trained on"
            text = _coloured(tokens[:LONGEST]) if in_colour else _bracketed(tokens[:LONGEST])
            yield from (f"    {line}" for line in text.split("\n"))
            if len(tokens) > LONGEST:
                yield f"    ... and {len(tokens) - LONGEST:,} tokens more"
        yield ""


def _table_lines(table: Table) -> Iterator[str]:
    yield table.title
    rows = [table.head, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(others, widths[1:]))]
        yield "  " + "  ".join(cells).rstrip()
    yield ""


def _histogram_lines(bars: list[Bar]) -> Iterator[str]:
    yield "tokens of a sequence"
    width = max(len(f"{bar.stop - 1:,}") for bar in bars)
    for bar in bars:
        eighths = round(8 * BAR_WIDTH * bar.share) or bool(bar.count)
        block = BLOCKS[8] * (eighths // 8) + BLOCKS[eighths % 8].strip()
        yield f"  {bar.start:>{width},}-{bar.stop - 1:<{width},} {block} {bar.count:,}"
    yield ""


def _bracketed(tokens: list[Token]) -> str:
    """In brackets what is trained on."""
    parts = []
    for is_trained, run in groupby(tokens, key=lambda token: token.is_trained):
        text = visible("".join(token.text for token in run))
        parts.append(f"[[{text}]]" if is_trained else text)
    return "".join(parts)


def _coloured(tokens: list[Token]) -> str:
    """Trained tokens on green, special ones bold; codes end with each line."""
    parts = []
    for marks, run in groupby(tokens, key=lambda token: (token.is_trained, token.is_special)):
        codes = ";".join(code for code, is_on in zip(("42;30", "1"), marks) if is_on)
        lines = visible("".join(token.text for token in run)).split("\n")
        parts.append("\n".join(f"\x1b[{codes}m{x}\x1b[0m" if codes and x else x for x in lines))
    return "".join(parts)


# ---- A page --------------------------------------------------------------------------------------


def page_of(report: Report, tokens_of: Tokens) -> str:
    """The report as one file of HTML, which loads nothing. tokens_of: a sequence's tokens."""
    from jinja2 import Environment, StrictUndefined

    # Whatever a row holds is escaped.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    page = environment.from_string(PAGE.read_text(encoding="utf-8"))
    return page.render(report=report, tokens_of=tokens_of)
