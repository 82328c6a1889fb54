"""What the command line shows: tables, the live view of a sweep, JSON. Decides nothing and computes nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from robudget.files import to_plain
from robudget.formats import fixed, known, number
from robudget.sweep.queue import SweepState

if TYPE_CHECKING:
    from robudget.evaluation.state import Progress as EvaluationProgress
    from robudget.meter.devices import Device
    from robudget.runner import Progress

# A pipe or a file has no width to wrap at: tables there are as wide as they are.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False)


def print_json(data: Any) -> None:
    """One JSON value on stdout: strict (unknown is null), UTF-8, never wrapped."""
    sys.stdout.write(json.dumps(to_plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


@dataclass(frozen=True)
class TextTable:
    """A plain table of ready-made strings; columns in `left` are aligned left, numbers right.

    Nothing in it is ever cut: where the terminal is too narrow, the rightmost columns stay away, and a line says so.
    """

    rows: Sequence[Mapping[str, str]]
    title: str | None = None
    left: Iterable[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, style="bold")
        columns = list(self.rows[0]) if self.rows else []
        widths = [max(cell_len(column), *(cell_len(row[column]) for row in self.rows)) + _GAP for column in columns]
        shown = len(columns)
        while shown > 1 and sum(widths[:shown]) - _GAP > options.max_width:
            shown -= 1
        view = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
        for column in columns[:shown]:
            left = column in self.left
            view.add_column(column, justify="left" if left else "right", no_wrap=not left, overflow="fold")
        for row in self.rows:
            view.add_row(*(row[column] for column in columns[:shown]))
        yield view
        if shown < len(columns):
            rest = ", ".join(columns[shown:])
            yield Text(f"a wider terminal (or --json) also shows: {rest}", style="dim")


_GAP = 2


def leaderboard(table: pd.DataFrame) -> Group:
    """Runs by robust accuracy: accuracy with its interval and n, what training and evaluation took; ~ is estimated."""
    noted = bool((table.collapsed | (table.status == "failed")).any())
    ordered = table.sort_values(["aa_acc", "train_flops_exact"], ascending=[False, True], na_position="last")
    rows = []
    for rank, (_, run) in enumerate(ordered.iterrows(), 1):
        interval = f"{fixed(run.aa_acc_low)}–{fixed(run.aa_acc_high)}" if known(run.aa_acc_low) else "unknown"
        note = "failed" if run.status == "failed" else "collapsed" if run.collapsed else ""
        rows.append(
            {
                "rank": str(rank),
                "run": run.slug,
                "id": run.run_id,
                "robust %": fixed(run.aa_acc),
                "95% interval": interval,
                "clean %": fixed(run.clean_acc),
                "n": f"{run.n_eval:.0f}" if known(run.n_eval) else "unknown",
                **({"note": note} if noted else {}),
                "train FLOP": number(run.train_flops_exact),
                "train s": number(run.train_seconds),
                "train Wh": _told(run.train_energy_kwh * 1000, run.train_energy_how),
                "USD": _told(run.cost_usd, run.cost_usd_how),
                "g CO2e": _told(run.co2_kg * 1000, run.co2_kg_how),
                "eval s": number(run.eval_seconds),
                "eval Wh": _told(run.eval_energy_kwh * 1000, run.eval_energy_how),
            }
        )
    lines = [Text("~ is estimated, not measured", style="dim")] if "~" in str(rows) else []
    for told in dict.fromkeys(table.synthetic_energy_how[table.synthetic]):
        lines.append(Text(f"energy of making synthetic images, not in the sums: {told}", style="dim"))
    return Group(TextTable(rows, left=("run", "id", "note")), *lines)


def _told(value: float, how: str | None) -> str:
    shown = number(value)
    return f"~{shown}" if how == "estimated" and known(value) else shown


def bill(forecasts: Sequence[Mapping[str, Any]], total: Mapping[str, Any]) -> Group:
    """What runs will cost: a line each (the first 40) and the total, ranges in brackets."""
    shown = forecasts[:40]
    rows = [_bill_row(each["slug"], each) for each in shown]
    if len(forecasts) > 1:
        rows.append(_bill_row(f"all {len(forecasts)} runs", total))
    lines = [Text(f"on {forecasts[0]['device']}; every figure but FLOPs and parameters is estimated, [low to high]")]
    if len(forecasts) > len(shown):
        lines.append(Text(f"the first {len(shown)} of {len(forecasts)} runs; --json has them all", style="dim"))
    notes = dict.fromkeys(note for each in forecasts for note in (each["basis"], *each["notes"]))
    lines_below = [f"synthetic data, not in the sums: {told}" for told in dict.fromkeys(e["synthetic"] for e in shown)]
    lines_below = [line for line in lines_below if not line.endswith(": none")]
    shares = [100 * each["flops_not_counted_share"] for each in forecasts]
    span = " to ".join(dict.fromkeys(number(share, 2) for share in (min(shares), max(shares))))
    lines_below.append(f"FLOPs leave out {span}% of the work: normalisation, activations, sums (--json lists them)")
    return Group(
        *lines,
        TextTable(rows, left=("run",)),
        *(Text(line, style="dim") for line in lines_below),
        *(Text(f"note: {note}", style="yellow") for note in notes),
    )


def _bill_row(name: str, each: Mapping[str, Any]) -> dict[str, str]:
    def span(key: str) -> str:
        low, high = (number(each[f"{key}_{end}"], 2) for end in ("low", "high"))
        return f"{number(each[key], 2)} [{low} to {high}]"

    def time_span(key: str) -> str:
        """All three in the unit that suits the middle one."""
        middle = each[key]
        if not known(float(middle)):
            return "unknown"
        size, unit = next(((size, unit) for size, unit in _UNITS if middle >= 2 * size), (1, "s"))
        low, high = (number(each[f"{key}_{end}"] / size, 2) for end in ("low", "high"))
        return f"{number(middle / size, 2)} {unit} [{low} to {high}]"

    return {
        "run": name,
        "train FLOP": number(each["train_flops_exact"]),
        "paper's count": number(each["train_flops_paper"]),
        "train time": time_span("train_seconds"),
        "USD": span("cost_usd"),
        "kg CO2e": span("co2_kg"),
        "train kWh": span("train_energy_kwh"),
        "eval time": time_span("eval_seconds"),
    }


_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def device_table(devices: Iterable[Device]) -> TextTable:
    rows = [
        {
            "device": device.key,
            "name": device.name,
            "watts": number(device.watts),
            "peak TFLOP/s": ", ".join(f"{name} {peak / 1e12:.4g}" for name, peak in device.peak.items()),
            "memory GB": number(device.memory_gb),
            "source": device.source,
        }
        for device in devices
    ]
    return TextTable(rows, left=("device", "name", "peak TFLOP/s", "source"))


def duration(seconds: float | None) -> str:
    """`4 s`, `3 min 20 s`, `5 h 10 min`, `16 d 3 h`; unknown for None and NaN."""
    if seconds is None or not known(float(seconds)):
        return "unknown"
    whole = round(seconds)
    for size, unit, next_size, next_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // next_size
            return f"{whole // size} {unit}" + (f" {rest} {next_unit}" if rest else "")
    return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s"


class _Display:
    """Something live on a terminal, and nothing of it in a log or a pipe. A context manager."""

    def __init__(self, title: str, console: Console = err):
        self.title = title
        self.console = console
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.live:
            self.live.stop()


class RunDisplay(_Display):
    """One run: hand `update` to `run(progress=…)`. Elsewhere than on a terminal, one line per epoch and per attack."""

    def __init__(self, title: str, console: Console = err):
        super().__init__(title, console)
        self.started = time.monotonic()
        self.first: float | None = None
        self.said = ""

    def update(self, now: Progress) -> None:
        # A resumed run starts in the middle: only what was done since then tells how fast it goes.
        self.first = now.fraction if self.first is None else self.first
        passed, gained = time.monotonic() - self.started, now.fraction - self.first
        left = f"about {duration(passed * (1 - now.fraction) / gained)} left" if gained > 0.02 else ""
        if self.live:
            bar = ProgressBar(total=1.0, completed=now.fraction, width=20)
            grid = Table.grid(padding=(0, 2))
            grid.add_row(Text(self.title, style="bold"), bar, now.phase, now.note, Text(left, style="dim"))
            self.live.update(grid)
        elif now.key != self.said:
            self.said = now.key
            self.console.print(f"{self.title}: {now.phase}, {now.note}")


class EvaluationDisplay(_Display):
    """One evaluation: hand `update` to `benchmark(progress=…)`. Elsewhere than on a terminal, one line per attack."""

    said = ""

    def update(self, now: EvaluationProgress) -> None:
        note = f"{now.attack}: {now.images_done} of {now.images} images, {100 * now.robust:.1f}% robust so far"
        if self.live:
            left = "" if now.seconds_left is None else f"about {duration(now.seconds_left)} left"
            grid = Table.grid(padding=(0, 2))
            bar = ProgressBar(total=1.0, completed=now.fraction, width=20)
            grid.add_row(Text(self.title, style="bold"), bar, note, Text(left, style="dim"))
            self.live.update(grid)
        elif now.attack != self.said:
            self.said = now.attack
            self.console.print(f"{self.title}: {now.attack}, {100 * now.robust:.1f}% robust so far")


class SweepDisplay(_Display):
    """Many runs: hand `update` to `sweep(watch=…)`. One line stays for each finished run, on a terminal or not."""

    def __init__(self, title: str, console: Console = err):
        super().__init__(title, console)
        self.said: set[int] = set()

    def update(self, state: SweepState) -> None:
        for index, note in (state.finished | state.failed).items():
            if index not in self.said:
                self.said.add(index)
                line = f"[{len(state.recipes) - len(state.to_do) + len(self.said):>3}/{len(state.recipes)}] "
                line += f"{state.recipes[index].slug}  {note}"
                self.console.print(Text(line, style="red" if index in state.failed else ""))
        if self.live:
            self.live.update(self._view(state))

    def _view(self, state: SweepState) -> Group:
        head = Text(f"{self.title}: {state.done} of {len(state.recipes)} runs done", style="bold")
        if state.failed:
            head.append(f", {len(state.failed)} failed", style="red")
        left = state.seconds_left
        head.append(f" · {duration(time.monotonic() - state.started)} so far", style="dim")
        head.append(" · time left: measuring" if left is None else f" · about {duration(left)} left", style="dim")
        grid = Table.grid(padding=(0, 2))
        for index, status in state.running.items():
            bar = ProgressBar(total=1.0, completed=status.fraction, width=20)
            grid.add_row(state.recipes[index].slug, bar, status.phase, status.note)
        return Group(head, grid)
