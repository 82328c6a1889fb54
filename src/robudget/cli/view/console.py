"""How the command line prints: the two consoles, JSON or text, tables, notes, durations; and live progress by rich."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
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


if TYPE_CHECKING:
    from robudget.evaluation.state import Progress as EvaluationProgress
    from robudget.runner import Progress as RunProgress
    from robudget.sweep.queue import SweepState


class _TimeLeft(ProgressColumn):
    """`about 3 min 20 s left`: as the work itself says, else by the mean speed since the first update (a resumed run
    starts in the middle)."""

    def render(self, task: Task) -> Text:
        seconds = task.fields.get("seconds_left", task.time_remaining)
        return Text("" if seconds is None else f"about {duration(seconds)} left", style="dim")


class _Display:
    """Bars on a terminal, which go when it ends; in a log or a pipe only the lines that `_log` prints. A context
    manager."""

    def __init__(self, title: str, console: Console = err):
        self.title, self.console = title, console
        self._bars = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(20),
            TextColumn("{task.fields[note]}", markup=False),
            _TimeLeft(),
            console=console,
            refresh_per_second=4,
            speed_estimate_period=float("inf"),
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[Hashable, TaskID] = {}
        self._logged: set[Hashable] = set()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def _show(self, name: str, fraction: float, note: str, key: Hashable = None, **fields: Any) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(name, total=1.0, note=note)
        self._bars.update(self._tasks[key], description=name, completed=fraction, note=note, **fields)

    def _log(self, key: Hashable, line: str, style: str = "") -> None:
        """Print a line that stays, once for each key."""
        if key not in self._logged:
            self._logged.add(key)
            self.console.print(Text(line, style=style))


class RunDisplay(_Display):
    """One run: hand `update` to `run(progress=…)`. Elsewhere than on a terminal, one line per epoch and per attack."""

    def update(self, now: RunProgress) -> None:
        self._show(self.title, now.fraction, f"{now.phase}  {now.note}")
        if not self.console.is_terminal:
            self._log(now.key, f"{self.title}: {now.phase}, {now.note}")


class EvaluationDisplay(_Display):
    """One evaluation: hand `update` to `benchmark(progress=…)`. Elsewhere than on a terminal, one line per attack."""

    def update(self, now: EvaluationProgress) -> None:
        robust = f"{100 * now.robust:.1f}% robust so far"
        note = f"{now.attack}: {now.images_done} of {now.images} images, {robust}"
        self._show(self.title, now.fraction, note, seconds_left=now.seconds_left)
        if not self.console.is_terminal:
            self._log(now.attack, f"{self.title}: {now.attack}, {robust}")


class SweepDisplay(_Display):
    """Many runs: hand `update` to `sweep(watch=…)`. One line stays for each finished run, on a terminal or not."""

    def __init__(self, title: str, console: Console = err):
        super().__init__(title, console)
        self._started = time.monotonic()
        self._began = self._waits = False

    def update(self, state: SweepState) -> None:
        n = len(state.recipes)
        if not self._began and not self.console.is_terminal:  # the first run may end in hours
            self.console.print(f"{self.title}: {len(state.to_do)} of {n} runs to do")
        self._began = True
        before = n - len(state.to_do) - len(state.left_out)
        for ended in (state.finished, state.failed, state.ended_early):
            for index in ended.keys() - self._logged:
                line = f"[{before + len(self._logged) + 1:>3}/{n}] {state.recipes[index].slug}  {ended[index]}"
                self._log(index, line, "red" if ended is state.failed else "")
        for ended_key in self._tasks.keys() - state.running.keys() - {None}:
            self._bars.remove_task(self._tasks.pop(ended_key))
        failed = f", {len(state.failed)} failed" if state.failed else ""
        failed += f", {state.early} ended early" if state.early else ""
        failed += f", {len(state.elsewhere)} in work elsewhere" if state.elsewhere else ""
        waits = bool(state.elsewhere) and not state.running
        if waits and not self._waits and not self.console.is_terminal:
            index, owner = next(iter(state.elsewhere.items()))
            more = f" and {len(state.elsewhere) - 1} more" if len(state.elsewhere) > 1 else ""
            self.console.print(f"waiting for {state.recipes[index].slug}, which {owner} works on{more}")
        self._waits = waits
        note = f"{state.done} of {n} runs done{failed}, {duration(time.monotonic() - self._started)} so far"
        self._show(self.title, state.done / n, note, seconds_left=state.seconds_left)
        for index, run in state.running.items():
            note = f"{run.phase}  {run.note}"
            self._show(state.recipes[index].slug, run.fraction, note, index, seconds_left=None)
