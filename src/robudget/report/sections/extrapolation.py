"""How far a law carries: the forecast beyond the runs, and its error on the costliest runs when they are held out.

The page shows both in its section of laws (`laws.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from robudget.analysis import Analysis
from robudget.columns import column
from robudget.formats import fixed, interval, number, percent
from robudget.laws import Envelope, Law
from robudget.laws.form_selection import BASELINES, Holdout
from robudget.laws.price import price_limit
from robudget.report import style
from robudget.report.figure_files import Drawing
from robudget.report.style import BLUE, COLUMN, GREY, INK, LINES, MUTED, PAGE, PAPER
from robudget.report.table import fill
from robudget.report.words import Table
from robudget.tables.usable import is_percent

BANDS = ((0.95, 0.14), (0.8, 0.16), (0.5, 0.2))  # level, opacity laid over the wider ones
FAR_DECADES = 2.0  # beyond the data, that a law is drawn
LIGHTEST = 0.05  # a form of less Akaike weight is not drawn


def drawings(analysis: Analysis) -> Iterator[Drawing]:
    rows = fill(analysis.table)  # by position, as the envelope counts them
    yield Drawing("fan", "Forecast", lambda: fan_figure(analysis, rows))
    if analysis.holdouts:
        first, env = analysis.holdouts[0], analysis.envelope
        yield Drawing("holdout", "The costliest runs held out", lambda: holdout_figure(first, env, rows))


def holdout_table(hidden: Holdout, *, folded: bool) -> Table:
    rows = [
        (
            m.name,
            fixed(m.rmse, 2),
            fixed(m.bias, 2, signed=True),
            fixed(m.worst, 2),
            "–" if m.name in BASELINES else "yes" if m.beats_baseline else "no",
        )
        for m in sorted(hidden.misses, key=lambda m: m.rmse)
    ]
    return Table(
        f"Held out: the top {hidden.hidden}",
        f"{hidden.n_train} best runs fitted, {hidden.n_test} predicted, up to a factor of {10**hidden.decades:.2g} "
        f"beyond",
        ["form", "#root mean square error (points)", "#bias", "#worst", "beats the last value"],
        rows,
        folded=folded,
    )


def holdout_figure(hidden: Holdout, env: Envelope, table: pd.DataFrame) -> tuple[Figure, str]:
    """Hide the costliest best runs, fit the rest, predict: what each form and baseline predicts, and its error."""
    figure, (left, right) = style.new(PAGE, 2.5, 1, 2, width_ratios=[1.6, 1])
    visible = env.xs <= hidden.x_cut
    bars = style.best_bars(env, table)
    for mask, face in ((visible, INK), (~visible, PAPER)):
        left.errorbar(
            env.xs[mask], env.ys[mask], yerr=bars[:, mask], fmt="o", ms=3.6, mfc=face, mec=INK, ecolor=INK, mew=0.7,
            elinewidth=0.6, zorder=4,
        )  # fmt: skip
    left.plot(hidden.train_xs, hidden.train_ys, ls="", marker="o", ms=5.6, mfc="none", mec=MUTED, mew=0.6, zorder=3)
    for name, values in hidden.predictions.items():
        colour, dashes, marker = LINES[name]
        left.plot(hidden.xs, values, color=colour, ls=dashes, lw=1.1, marker=marker, ms=3.4, zorder=3)
    style.law_axes(left, env)
    edge = float(np.sqrt(hidden.x_cut * hidden.xs[0]))
    left.axvspan(edge, env.xs[-1] * 1.3, color=GREY, alpha=0.1, lw=0, zorder=0)
    left.set_xlim(right=env.xs[-1] * 1.3)
    left.set_title(f"the top {hidden.hidden} hidden")
    ranked = sorted(hidden.misses, key=lambda miss: miss.rmse, reverse=True)
    baseline = hidden.miss("last value")
    style.errors(right, [(miss.name, miss.rmse) for miss in ranked])
    if baseline is not None:
        right.axvline(baseline.rmse, color=INK, lw=0.7, ls=(0, (4, 2)), zorder=0)
    right.set_xlim(left=0)
    right.set_xlabel("RMS error on hidden runs (points)")
    right.set_title("error of each form")
    fitted = Line2D([], [], ls="", marker="o", ms=5.6, mfc="none", mec=MUTED, mew=0.6, label="fitted on")
    style.legend_above(figure, [[fitted], *([style.form_key(name)] for name in hidden.predictions)])
    caption = (
        f"The top {hidden.hidden} of {column(env.x).phrase} hidden (open points): {hidden.n_train} best runs fitted "
        f"(rings), in new bins, and {hidden.n_test} predicted, up to {10**hidden.decades:.2g} times beyond. "
        f"{hidden.sentence()} RMS: root mean square. Bars are 95% Wilson intervals."
    )
    return figure, caption


def fan_figure(analysis: Analysis, table: pd.DataFrame) -> tuple[Figure, str]:
    """Beyond the data, as far as these runs can say: bands at 50, 80 and 95% of the frontier (of the headline law where
    there is none), each form of some weight as a line, and the saturating form's ceiling with its interval."""
    law, average, env, frontier = analysis.law, analysis.average, analysis.envelope, analysis.frontier
    figure, ax = style.new(COLUMN, 2.75)
    far = FAR_DECADES if frontier is None else float(np.log10(price_limit(frontier) / env.xs[-1]))
    xs = style.log_grid(env.xs[0], env.xs[-1], max(far, 0.1))
    bands = [(frontier or law).band(xs, level) for level, _ in BANDS]
    for (low, high), (_, opacity) in zip(bands, BANDS, strict=True):
        ax.fill_between(xs, low, high, color=BLUE, alpha=opacity, lw=0)
    bars = style.best_bars(env, table)
    ends = np.concatenate([env.ys - bars[0], env.ys + bars[1]])
    bottom, top = _limits(ends, *bands[0], percent=is_percent(law.y))
    lines = [form for form in analysis.forms if form is law or (average and average.weight(form) >= LIGHTEST)]
    groups: list[list[Line2D | Patch]] = [[Patch(color=BLUE, alpha=0.35, lw=0, label="50, 80, 95% bands")]]
    for form in lines:
        colour, dashes, _ = LINES[form.name]
        groups[0] += ax.plot(xs, form.predict(xs), color=colour, ls=dashes, lw=1.1, label=form.name)
    ax.errorbar(env.xs, env.ys, yerr=bars, fmt="o", ms=3.2, color=INK, mec=PAPER, mew=0.4, elinewidth=0.7, zorder=4)
    ax.axvline(env.xs[-1], color=MUTED, lw=0.7, ls=(0, (2, 2)), zorder=0)
    ax.annotate(
        "data end", (env.xs[-1], 0), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points",
        fontsize=6, color=MUTED,
    )  # fmt: skip
    ceiling = ""
    limited = next((o for o in analysis.forms if o.form == "saturating" and np.isfinite(o.ceiling)), None)
    if limited is not None:
        ceiling = (
            f" The saturating form has its ceiling at {percent(limited.ceiling)} ({limited.level:.0%} interval "
            f"{interval(*limited.ceiling_interval)})."
        )
        if bottom < limited.ceiling <= top:
            groups[0] += _ceiling(ax, limited, float(xs[-1]), (bottom, top))
    style.law_axes(ax, env)
    ax.set_xlim(xs[0] / 1.3, xs[-1])
    ax.set_ylim(bottom, top)
    style.legend_above(figure, groups)
    source = "the frontier of all usable runs" if frontier else f"the {law.name} law"
    caption = (
        f"Drawn to {number(10**far, 2)} times the costliest of {env.n_bins} best runs ({env.n_runs} usable runs), "
        f"with bands of {source}.{ceiling} Lines are forms fitted to the same points: where they differ, the "
        f"data do not decide between them."
    )
    return figure, caption


def _ceiling(ax: Axes, law: Law, x: float, span: tuple[float, float]) -> list[Line2D | Patch]:
    """The ceiling as a line and its interval as a bar at the right edge; returns their legend entries."""
    ax.axhline(law.ceiling, color=INK, lw=0.8, ls=(0, (1, 2)))
    ends = np.clip(law.ceiling_interval, *span)
    ax.plot([x, x], ends, color=INK, lw=2.6, solid_capstyle="butt", zorder=5)
    return [
        Line2D([], [], color=INK, lw=0.8, ls=(0, (1, 2)), label=f"ceiling {law.ceiling:.1f}%"),
        Line2D([], [], color=INK, lw=2.6, solid_capstyle="butt", label=f"its {law.level:.0%} interval"),
    ]


def _limits(ys: np.ndarray, low: np.ndarray, high: np.ndarray, *, percent: bool) -> tuple[float, float]:
    spread = max(float(np.nanmax(high) - np.nanmin(ys)), 1.0)
    bottom = float(min(np.nanmin(ys), np.nanmin(low))) - 0.04 * spread
    top = float(max(np.nanmax(high), ys.max())) + 0.06 * spread
    return (max(bottom, 0.0), min(top, 100.0)) if percent else (bottom, top)
