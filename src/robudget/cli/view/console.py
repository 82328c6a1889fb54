"""How the command line prints: the two consoles, tables of text, notes, durations, and the choice of JSON or text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from robudget.files import to_plain
from robudget.formats import UNKNOWN, known

# A pipe or a file has no width to wrap at: tables there are as wide as they are.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False)
_GAP = 2  # spaces between columns


def show(as_json: bool, data: Callable[[], Any], text: Callable[[], RenderableType]) -> None:
    """Print a result on stdout: as one JSON value (strict: unknown is null; UTF-8, never wrapped), or as text for a
    reader. A plain string is printed as it is."""
    if as_json:
        sys.stdout.write(json.dumps(to_plain(data()), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        out.print(view := text(), soft_wrap=isinstance(view, str), markup=False)


@dataclass(frozen=True)
class TextTable:
    """A plain table of ready-made strings; columns in `left` are aligned left, numbers right.

    Nothing in it is ever cut: where the terminal is too narrow, the rightmost columns are left out, and a line says so.
    """

    rows: Sequence[Mapping[str, str]]
    title: str | None = None
    left: Iterable[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, style="bold")
        columns = list(self.rows[0]) if self.rows else []
        widths = [max(cell_len(column), *(cell_len(row[column]) for row in self.rows)) + _GAP for column in columns]
        n = len(columns)
        while n > 1 and sum(widths[:n]) - _GAP > options.max_width:
            n -= 1
        view = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
        for column in columns[:n]:
            left = column in self.left
            view.add_column(column, justify="left" if left else "right", no_wrap=not left, overflow="fold")
        for row in self.rows:
            view.add_row(*(row[column] for column in columns[:n]))
        yield view
        if n < len(columns):
            rest = ", ".join(columns[n:])
            yield Text(f"a wider terminal (or --json) also shows: {rest}", style="dim")


def titled(title: str, rows: Sequence[Mapping[str, str]], left: Sequence[str]) -> list[RenderableType]:
    """A heading and its table, after an empty line; nothing where there is no row."""
    return [Text(""), Text(title, style="bold"), TextTable(rows, left=left)] if rows else []


def notes(lines: Iterable[str]) -> list[RenderableType]:
    return [Text(f"note: {line}", style="yellow") for line in lines]


def duration(seconds: float | None) -> str:
    """`4 s`, `3 min 20 s`, `5 h 10 min`, `16 d 3 h`; unknown for None and NaN."""
    if seconds is None or not known(float(seconds)):
        return UNKNOWN
    whole = round(seconds)
    for size, unit, next_size, next_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // next_size
            return f"{whole // size} {unit}" + (f" {rest} {next_unit}" if rest else "")
    return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s"
