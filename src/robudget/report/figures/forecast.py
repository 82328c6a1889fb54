"""Figures that look beyond the data: the forecast fan, and the price of the next point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from robudget.laws import Law, Reach
from robudget.laws.form_selection import Average
from robudget.report import labels
from robudget.report.figures import style
from robudget.report.figures.laws import LINES, best_bars, stretch
from robudget.report.figures.style import BLUE, COLUMN, INK, MUTED, PAPER
from robudget.report.labels import quantity
from robudget.tables.usable import is_percent

FAN = ((0.95, 0.14), (0.8, 0.16), (0.5, 0.2))  # level, opacity laid over the wider ones
FAR = 2.0  # decades beyond the data that a forecast is drawn for
LIGHTEST = 0.05  # a form of less Akaike weight is not drawn
BEYOND = 1e6  # times the largest run: a price farther out is drawn as if never reached, and the legend says so


def fan(law: Law, forms: Sequence[Law], average: Average | None, table: pd.DataFrame) -> tuple[Figure, str]:
    """Beyond the data: bands at 50, 80 and 95% of all forms weighed together (of the headline law where there is no
    average), each form that weighs something as a line, and the saturating form's ceiling with its interval."""
    env = law.envelope
    figure, ax = style.new(COLUMN, 2.75)
    xs = stretch(env.xs[0], env.xs[-1], FAR)
    speaker = average or law
    bands = [speaker.band(xs, level) for level, _ in FAN]
    for (low, high), (_, opacity) in zip(bands, FAN, strict=True):
        ax.fill_between(xs, low, high, color=BLUE, alpha=opacity, lw=0)
    bars = best_bars(env, table)
    seen = np.concatenate([env.ys - bars[0], env.ys + bars[1]])
    bottom, top = _room(seen, *bands[0], percent=is_percent(law.y))
    weights = {o.name: w for o, w in zip(average.laws, average.weights, strict=True)} if average else {}
    lines = [o for o in forms if o.name == law.name or weights.get(o.name, 0) >= LIGHTEST]
    for form in lines:
        tint, dashes, _ = LINES[form.name]
        ax.plot(xs, form.predict(xs), color=tint, ls=dashes, lw=1.1)
    ax.errorbar(env.xs, env.ys, yerr=bars, fmt="o", ms=3.2, color=INK, mec=PAPER, mew=0.4, elinewidth=0.7, zorder=4)
    ax.axvline(env.xs[-1], color=MUTED, lw=0.7, ls=(0, (2, 2)), zorder=0)
    ax.annotate(
        "data end", (env.xs[-1], 0), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points",
        fontsize=6, color=MUTED,
    )  # fmt: skip
    groups: list[list[Line2D | Patch]] = [[Patch(color=BLUE, alpha=0.35, lw=0, label="50, 80, 95% bands")]]
    for form in lines:
        tint, dashes, _ = LINES[form.name]
        groups[-1].append(Line2D([], [], color=tint, ls=dashes, lw=1.1, label=form.name))
    ceiling = ""
    limited = next((o for o in forms if o.form == "saturating" and np.isfinite(o.ceiling)), None)
    if limited is not None:
        ends = labels.interval(*limited.ceiling_interval)
        at = labels.percent(limited.ceiling)
        ceiling = f" The saturating form has its ceiling at {at} ({limited.level:.0%} interval {ends})."
        if bottom < limited.ceiling <= top:
            groups[0] += _ceiling(ax, limited, float(xs[-1]), (bottom, top))
    style.log_x(ax)
    ax.set_xlim(xs[0] / 1.3, xs[-1])
    ax.set_ylim(bottom, top)
    ax.set_xlabel(quantity(law.x).axis)
    ax.set_ylabel(quantity(law.y).axis)
    style.grid(ax)
    style.legend_above(figure, groups)
    whose = "all forms weighed together" if average else f"the {law.name} law"
    caption = (
        f"Carried {10**FAR:,.0f} times beyond the costliest of {env.n_bins} best runs ({env.n_runs} usable runs), with "
        f"bootstrap bands of {whose}.{ceiling} Forms fitted to the same points are lines: where they part, the data do "
        f"not decide."
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


def _room(ys: np.ndarray, low: np.ndarray, high: np.ndarray, *, percent: bool) -> tuple[float, float]:
    spread = max(float(np.nanmax(high) - np.nanmin(ys)), 1.0)
    bottom = float(min(np.nanmin(ys), np.nanmin(low))) - 0.04 * spread
    top = float(max(np.nanmax(high), ys.max())) + 0.06 * spread
    return (max(bottom, 0.0), min(top, 100.0)) if percent else (bottom, top)


def price(names: Sequence[str], reaches: Sequence[Sequence[Reach]], largest: float) -> tuple[Figure, str] | None:
    """What each further point of accuracy costs: one series a law (`names`), targets along x, cost at target with its
    interval along y, `largest` = the costliest best run. None where no law says anything finite within sight."""
    if not any(reaches):
        return None
    finite = [r.value for series in reaches for r in series if r.reachable and r.value < largest * BEYOND]
    if not finite:
        return None
    first = reaches[0][0]
    figure, ax = style.new(COLUMN, 2.5)
    top, bottom = max(*finite, largest) * 30, min(*finite, largest) / 5
    style.log_y(ax)
    for i, (name, series) in enumerate(zip(names, reaches, strict=True)):
        colour, _, marker = LINES.get(name, (INK, "-", "o"))
        shift = (i - (len(names) - 1) / 2) * 0.5 / max(len(names), 3)
        for reach in series:
            _reach(ax, reach, reach.target + shift, (bottom, top), colour, marker)
    ax.axhline(largest, color=MUTED, lw=0.8, ls=(0, (2, 2)), zorder=0)
    ax.set_ylim(bottom, top)
    style.log_y(ax)
    ax.set_xticks(sorted({r.target for series in reaches for r in series}))
    ax.set_xlabel(f"target {quantity(first.y).label} (%)")
    ax.set_ylabel(quantity(first.x).axis)
    style.grid(ax)
    keys: list[Line2D | Patch] = []
    for name in names:
        colour, _, marker = LINES.get(name, (INK, "-", "o"))
        keys.append(Line2D([], [], marker=marker, color=colour, ls="", ms=3.8, label=name))
    keys.append(Line2D([], [], marker="o", mfc=PAPER, mec=INK, ls="", ms=3.4, label="farther, or never"))
    line = Line2D([], [], color=MUTED, lw=0.8, ls=(0, (2, 2)), label="largest best run")
    style.legend_above(figure, [keys[:2], keys[2:], [line]])
    caption = (
        f"{quantity(first.x).label} at which each law reaches a target accuracy, with its {first.level:.0%} bootstrap "
        f"interval; arrows: the interval goes on; open marks at the top: more than a million times the largest run, or "
        f"never."
    )
    return figure, caption


def _reach(ax: Axes, reach: Reach, at: float, span: tuple[float, float], colour: str, marker: str) -> None:
    """One target of one law: its cost, with the interval cut at the axis by arrowheads; an open mark if it has none."""
    bottom, top = span
    if not reach.value <= top:
        ax.plot(at, 0.965, marker=marker, ms=3.6, mfc=PAPER, mec=colour, ls="", transform=ax.get_xaxis_transform())
        return
    low, high = max(reach.low, bottom), min(reach.high, top)
    ax.plot([at, at], [low, high], color=colour, lw=0.9)
    for end, cut, arrow in ((low, reach.low < bottom, "v"), (high, reach.high > top, "^")):
        if cut:
            ax.plot(at, end, marker=arrow, ms=2.8, color=colour, clip_on=False)
    ax.plot(at, reach.value, marker=marker, ms=4, color=colour, ls="", mec=PAPER, mew=0.4, zorder=3)
