"""The answer of a study on disk: a page of text with its table, the runs it stands on, and its figure."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from robudget import __version__
from robudget.answers import Answer
from robudget.files import replace, write_text
from robudget.report import style
from robudget.report.figure_files import FigureFile, save
from robudget.report.style import COLUMN, CYCLE, MARKERS

# Of the runs that are written beside the answer.
SHOWN = (
    "run_id", "slug", "status", "dataset", "eps", "model", "base", "loss", "steps", "synthetic_fraction",
    "synthetic_amount", "seed", "n_eval", "aa_acc", "aa_acc_low", "aa_acc_high", "aa_acc_how", "clean_acc", "val_acc",
    "collapsed", "images_seen", "train_flops_exact", "train_seconds", "train_energy_kwh", "train_energy_how",
)  # fmt: skip
MANY = 60  # runs of a group, of which more are drawn small


def write_answer(
    answer: Answer, runs: pd.DataFrame, folder: Path, *, name: str, question: str, asked: int, environment: str
) -> FigureFile:
    """Write `name`.md, `name`.csv and the figure into `folder`. `runs`: those of the study that are done, of `asked` in
    all; `environment`: where they ran, in words. Overwrites what an earlier answer left."""
    write_text(folder / f"{name}.md", page(answer, runs, name, question, asked, environment))
    columns = [column for column in SHOWN if column in runs.columns]
    replace(folder / f"{name}.csv", lambda path: runs[columns].to_csv(path, index=False, float_format="%.6g"))
    with style.settings():
        figure, ax = style.new(COLUMN, 2.6)
        for i, (group, part) in enumerate(answer.points.groupby("group", sort=False)):
            colour, marker = CYCLE[i % len(CYCLE)], MARKERS[i % len(MARKERS)]
            size = 3.5 if len(part) <= MANY else 1.8
            ax.plot(part.x, part.y, marker, color=colour, label=str(group), ms=size, ls="")
            if (line := answer.lines.get(str(group))) is not None:
                ax.plot(line.x, line.y, color=colour)
                ax.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, lw=0)
        ax.set_xlabel(answer.x)
        ax.set_ylabel(answer.y)
        style.log_x(ax)
        style.grid(ax)
        style.legend_above(figure, [ax.get_legend_handles_labels()[0]])
        return save(figure, folder, name, title=question, caption=answer.sentence)


def page(answer: Answer, runs: pd.DataFrame, name: str, question: str, asked: int, environment: str) -> str:
    """Markdown: question, what was run, answer, what it stands on, what was left out."""
    today = datetime.date.today().isoformat()
    images = sorted({int(n) for n in runs.get("n_eval", pd.Series(dtype=float)).dropna()})
    judged = f", judged on {' or '.join(map(str, images))} test images each" if images else ""
    lines = [
        f"# {name}: {question}",
        "",
        f"{len(runs)} of the study's {asked} runs{judged}; robudget {__version__}, {environment}; written {today}.",
        "",
        f"**{answer.verdict}.** {answer.sentence}",
        "",
        *markdown_table(answer.rows),
        *(f"- {note}" for note in answer.notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table whose first row names the columns; none where there is no row."""
    if not rows:
        return []
    head = list(rows[0])
    cells = [[_cell(row[column]) for column in head] for row in rows]
    return [_row(head), _row(["---"] * len(head)), *(_row(line) for line in cells), ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "unknown"
    return str(value)


def environment_of(paths: Sequence[Path]) -> str:
    """Where runs were made, by the first of their folders that says so."""
    for path in paths:
        try:
            said = json.loads((path / "environment.json").read_text("utf-8"))
            device, threads = f"{said['device']} ({said['cpu_capability']})", f"threads: {said['threads']}"
            return f"torch {said['packages']['torch']}, {device}, {threads} of {said['cores']} cores"
        except (OSError, ValueError, KeyError):
            continue
    return "an environment that is not known"
