"""Figures of laws: the envelope and its law (3a), costs against compute (3b, 3c), the forecast fan, and the price of
the next point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from robudget.laws import Law, Reach
from robudget.report import labels, style
from robudget.report.figures_runs import MANY, wilson_bars
from robudget.report.labels import number, quantity
from robudget.report.style import BLUE, COLUMN, GREEN, GREY, INK, MUTED, ORANGE, PAPER, PURPLE, VERMILLION

FAN = ((0.95, 0.14), (0.8, 0.16), (0.5, 0.2))  # level, opacity laid over the wider ones
FORM_STYLES = {
    "power": (VERMILLION, "-"),
    "saturating": (BLUE, "--"),
    "shifted": (GREEN, "-."),
    "m4": (PURPLE, (0, (3, 1, 1, 1, 1, 1))),
    "broken": (ORANGE, ":"),
}
BEYOND = 1e6  # times the largest run: a price farther out is drawn as unreachable, and its figure says so
FAR = 2.0  # decades beyond the data that a forecast is drawn for


def equation(law: Law) -> str:
    """The law with its numbers, in mathtext: `y = 36.8·x^0.011`."""
    p = {name: _tex(value) for name, value in law.params.items()}
    if law.form == "power":
        return rf"$y = {p['C']}\,x^{{{p['alpha']}}}$"
    if law.form == "saturating":
        return rf"$y = {p['E']} - {p['A']}\,x^{{-{p['alpha']}}}$"
    if law.form == "shifted":
        return rf"$y = {p['E']} - {p['A']}\,(x + {p['x0']})^{{-{p['alpha']}}}$"
    return law.formula


def _tex(value: float) -> str:
    text = number(value)
    if "×10" in text:
        mantissa, power = f"{value:.2e}".split("e")
        return rf"{mantissa}\cdot 10^{{{int(power)}}}"
    return text.replace(",", "{,}")


def stretch(low: float, high: float, decades: float = 0.0, n: int = 200) -> np.ndarray:
    return np.geomspace(low, high * 10**decades, n)


def best_runs(law: Law, table: pd.DataFrame) -> tuple[Figure, str]:
    """Figure 3a: the best run per bin with its Wilson interval, the runs behind it, the law and its band."""
    env = law.envelope
    figure, ax = style.new(COLUMN, 2.45)
    used = table.iloc[env.points.rows]
    ax.scatter(env.points.x, env.points.y, s=5, c=GREY, alpha=0.45, linewidths=0, rasterized=len(used) > MANY)
    top = table.iloc[env.rows]
    xs = stretch(env.xs[0], env.xs[-1])
    low, high = law.band(xs)
    ax.fill_between(xs, low, high, color=VERMILLION, alpha=0.16, lw=0)
    ax.plot(xs, law.predict(xs), color=VERMILLION, lw=1.4)
    bars = wilson_bars(top) if law.y == "aa_acc" else np.zeros((2, len(top)))
    ax.errorbar(
        env.xs, env.ys, yerr=bars, fmt="o", ms=3.6, color=BLUE, mec=PAPER, mew=0.4, elinewidth=0.7, zorder=4
    )  # fmt: skip
    below = _zoom(ax, env.points.y, env.ys - bars[0], env.ys + bars[1]) if env.best == "max" else 0
    style.log_x(ax)
    ax.set_xlabel(quantity(law.x).axis)
    ax.set_ylabel(quantity(law.y).axis)
    style.grid(ax)
    style.legend_above(figure, [
        [_dot(BLUE, f"best per bin ({env.n_bins})"), _dot(GREY, f"usable run ({env.n_runs})", 2.6)],
        [Line2D([], [], color=VERMILLION, lw=1.4, label=equation(law)), Patch(color=VERMILLION, alpha=0.16, lw=0, label=_alpha(law))],
    ])  # fmt: skip
    caption = (
        f"Best run in each of {env.n_bins} bins of {quantity(law.x).name.lower()} and the {law.form} law fitted to them "
        f"({law.formula}; α = {number(law.alpha)}, {law.level:.0%} interval {labels.interval(*law.alpha_interval, 4)}, "
        f"bootstrap over runs, {law.resamples:,} resamples; R² = {law.r2:.2f}). {env.counts.sentence().capitalize()}. "
        f"Bars are 95% Wilson intervals of each run."
    )
    if below:
        caption += f" {below} usable runs lie below the axis."
    return figure, caption


def _zoom(ax: Axes, ys: np.ndarray, low: np.ndarray, high: np.ndarray) -> int:
    """Show the best runs with as much room below them as they span; return how many runs fall off."""
    span = max(float(high.max() - low.min()), 1.0)
    bottom = max(float(low.min()) - span, 0.0)
    if bottom > ys.min():
        ax.set_ylim(bottom, float(high.max()) + 0.15 * span)
        return int((ys < bottom).sum())
    return 0


def cost(law: Law, table: pd.DataFrame, how: str) -> tuple[Figure, str]:
    """Figures 3b and 3c: what runs cost against their compute, on log axes, with the law; `how` it was obtained."""
    env = law.envelope
    figure, ax = style.new(COLUMN, 2.3)
    rows = table.iloc[env.points.rows]
    for value, (colour, marker) in style.encode("loss", rows["loss"]).items():
        mine = (rows["loss"].map(labels.word) == value).to_numpy()
        ax.scatter(
            env.points.x[mine], env.points.y[mine], s=9, marker=marker, c=colour, alpha=0.6, linewidths=0,
            label={"at": "AT", "trades": "TRADES", "mart": "MART"}.get(value, value), rasterized=len(rows) > MANY,
        )  # fmt: skip
    xs = stretch(env.points.x.min(), env.points.x.max())
    low, high = law.band(xs)
    ax.fill_between(xs, low, high, color=INK, alpha=0.14, lw=0)
    ax.plot(xs, law.predict(xs), color=INK, lw=1.1)
    style.log_x(ax)
    style.log_y(ax)
    ax.set_xlabel(quantity(law.x).axis)
    ax.set_ylabel(quantity(law.y).axis)
    style.grid(ax, "both")
    numbers = [
        Line2D([], [], color=INK, lw=1.1, label=equation(law)),
        Patch(color=INK, alpha=0.14, lw=0, label=_alpha(law)),
    ]
    style.legend_above(figure, [ax.get_legend_handles_labels()[0], numbers])
    caption = (
        f"{quantity(law.y).name} ({how}) of {env.n_runs} runs against {quantity(law.x).name.lower()}: α = {number(law.alpha)} "
        f"({law.level:.0%} interval {labels.interval(*law.alpha_interval, 3)}, bootstrap over runs), R² = {law.r2:.2f} in log-log."
    )
    return figure, caption


def fan(law: Law, others: Sequence[Law], table: pd.DataFrame) -> tuple[Figure, str]:
    """The law beyond its data: bands at 50, 80 and 95%, the ceiling with its interval, and the other forms as lines."""
    env = law.envelope
    figure, ax = style.new(COLUMN, 2.6)
    colour = FORM_STYLES[law.form][0]
    xs = stretch(env.xs[0], env.xs[-1], FAR)
    for level, opacity in FAN:
        low, high = law.band(xs, level)
        ax.fill_between(xs, low, high, color=colour, alpha=opacity, lw=0)
    bottom, up = _room(env.ys, *law.band(xs, 0.95), percent=law.y.endswith(("_acc", "_error")))
    for other in others:
        tint, dashes = FORM_STYLES[other.form]
        ax.plot(xs, other.predict(xs), color=tint, ls=dashes, lw=0.9)
    ax.plot(xs, law.predict(xs), color=colour, lw=1.5)
    top = table.iloc[env.rows]
    bars = wilson_bars(top) if law.y == "aa_acc" else np.zeros((2, len(top)))
    ax.errorbar(env.xs, env.ys, yerr=bars, fmt="o", ms=3.2, color=INK, mec=PAPER, mew=0.4, elinewidth=0.7, zorder=4)
    ax.axvline(env.xs[-1], color=MUTED, lw=0.7, ls=(0, (2, 2)), zorder=0)
    ax.annotate(
        "data end", (env.xs[-1], 0), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points",
        fontsize=6, color=MUTED,
    )  # fmt: skip
    handles = [
        [Line2D([], [], color=colour, lw=1.5, label=f"{law.form} law"), Patch(color=colour, alpha=0.35, lw=0, label="50, 80, 95% bands")],
        [Line2D([], [], color=FORM_STYLES[o.form][0], ls=FORM_STYLES[o.form][1], lw=0.9, label=o.form) for o in others],
    ]  # fmt: skip
    if np.isfinite(law.ceiling) and law.ceiling <= up:
        ax.axhline(law.ceiling, color=INK, lw=0.8, ls=(0, (5, 2)))
        low, high = (min(max(end, bottom), up) for end in law.ceiling_interval)
        ax.plot([xs[-1]] * 2, [low, high], color=INK, lw=2.4, solid_capstyle="butt", zorder=5)
        handles.append(
            [
                Line2D([], [], color=INK, lw=0.8, ls=(0, (5, 2)), label=f"ceiling {law.ceiling:.1f}%"),
                Line2D([], [], color=INK, lw=2.4, solid_capstyle="butt", label=f"its {law.level:.0%} interval"),
            ]
        )
    style.log_x(ax)
    ax.set_xlim(xs[0] / 1.3, xs[-1])
    ax.set_ylim(bottom, up)
    ax.set_xlabel(quantity(law.x).axis)
    ax.set_ylabel(quantity(law.y).axis)
    style.grid(ax)
    style.legend_above(figure, handles)
    ceiling = (
        f" Its ceiling is {labels.percent(law.ceiling)} ({law.level:.0%} interval {labels.interval(*law.ceiling_interval)})."
        if np.isfinite(law.ceiling)
        else " It has no ceiling."
    )
    caption = (
        f"The {law.form} law carried {10**FAR:,.0f} times beyond the costliest of its {env.n_bins} best runs ({env.n_runs} usable "
        f"runs), with bootstrap bands of the law itself.{ceiling} Other forms fitted to the same points are lines: where they part, "
        f"the data do not decide."
    )
    return figure, caption


def price(laws: Sequence[Law], reaches: Sequence[Sequence[Reach]]) -> tuple[Figure, str] | None:
    """What each further point of accuracy costs: one series a law, targets along x, cost at target with its interval
    along y, unreachable targets as arrows at the top. None where no law says anything finite."""
    largest = max(law.envelope.xs[-1] for law in laws)
    finite = [r.value for series in reaches for r in series if r.reachable and r.value < largest * BEYOND]
    if not finite:
        return None
    figure, ax = style.new(COLUMN, 2.5)
    top, bottom = max(*finite, largest) * 30, min(*finite, largest) / 30
    for i, (law, series) in enumerate(zip(laws, reaches, strict=True)):
        colour, marker = FORM_STYLES[law.form][0], style.MARKERS[i % len(style.MARKERS)]
        shift = (i - (len(laws) - 1) / 2) * 0.16
        for reach in series:
            _reach(ax, reach, reach.target + shift, (bottom, top), colour, marker)
    ax.axhline(largest, color=MUTED, lw=0.7, ls=(0, (2, 2)))
    ax.annotate(
        "largest best run", (1, largest), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
        fontsize=6, color=MUTED, ha="right",
    )  # fmt: skip
    style.log_y(ax)
    ax.set_ylim(bottom, top)
    ax.set_xlabel(f"target {quantity(laws[0].y).name} (%)")
    ax.set_ylabel(quantity(laws[0].x).axis)
    style.grid(ax)
    handles = [[_dot(FORM_STYLES[law.form][0], f"{law.form} law", 3.6, style.MARKERS[i])] for i, law in enumerate(laws)]
    handles.append([Line2D([], [], marker="o", mfc=PAPER, mec=INK, ls="", ms=3.4, label="farther, or never")])
    style.legend_above(figure, handles)
    level = f"{laws[0].level:.0%}"
    caption = (
        f"{quantity(laws[0].x).name} at which each law reaches a target accuracy, with its {level} bootstrap interval; arrows: the interval "
        f"goes on; open marks at the top: more than a million times the largest run, or never."
    )
    return figure, caption


def _reach(ax: Axes, reach: Reach, at: float, span: tuple[float, float], colour: str, marker: str) -> None:
    """One target of one law: its cost with the interval cut at the axis (arrowheads), or an open mark where there is none."""
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


def _room(ys: np.ndarray, low: np.ndarray, high: np.ndarray, *, percent: bool) -> tuple[float, float]:
    span = max(float(np.nanmax(high) - np.nanmin(ys)), 1.0)
    bottom, top = float(min(np.nanmin(ys), np.nanmin(low))) - 0.06 * span, float(np.nanmax(high)) + 0.06 * span
    return (max(bottom, 0.0), min(top, 100.0)) if percent else (bottom, top)


def _dot(colour: str, label: str, size: float = 3.6, marker: str = "o") -> Line2D:
    return Line2D([], [], marker=marker, color=colour, ls="", ms=size, label=label)


def _alpha(law: Law) -> str:
    low, high = law.alpha_interval
    return rf"$\alpha$ {law.level:.0%}: [{number(low, 2)}, {number(high, 2)}]"
