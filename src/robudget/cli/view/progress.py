"""Live progress of a run, an evaluation or a sweep by rich: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from robudget.cli.view.console import duration, err

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

    def update(self, state: SweepState) -> None:
        n = len(state.recipes)
        for index, note in (state.finished | state.failed).items():
            ended = n - len(state.to_do) + len(self._logged | {index})
            line = f"[{ended:>3}/{n}] {state.recipes[index].slug}  {note}"
            self._log(index, line, "red" if index in state.failed else "")
        for ended_key in self._tasks.keys() - state.running.keys() - {None}:
            self._bars.remove_task(self._tasks.pop(ended_key))
        failed = f", {len(state.failed)} failed" if state.failed else ""
        note = f"{state.done} of {n} runs done{failed}, {duration(time.monotonic() - self._started)} so far"
        self._show(self.title, state.done / n, note, seconds_left=state.seconds_left)
        for index, run in state.running.items():
            note = f"{run.phase}  {run.note}"
            self._show(state.recipes[index].slug, run.fraction, note, index, seconds_left=None)
