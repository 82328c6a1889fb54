"""Figures of laws on their data: best runs and law (3a), cost against compute (3b, 3c), competing forms, hold-outs."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from robudget.laws import Envelope, Law
from robudget.laws.form_selection import Average, Holdout
from robudget.report import labels
from robudget.report.figures import style
from robudget.report.figures.runs import MANY, wilson_bars
from robudget.report.figures.style import (
    BLUE,
    COLUMN,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PAGE,
    PAPER,
    PURPLE,
    SKY,
    VERMILLION,
    Dashes,
)
from robudget.report.labels import number, phrase, quantity

# Each contender keeps its colour, dashes and marker wherever it is drawn.
LINES: dict[str, tuple[str, Dashes, str]] = {
    "power": (VERMILLION, "-", "o"),
    "saturating": (BLUE, (0, (5, 1.5)), "s"),
    "shifted": (GREEN, (0, (5, 1, 1, 1)), "^"),
    "m4": (PURPLE, (0, (3, 1, 1, 1, 1, 1)), "D"),
    "broken": (ORANGE, (0, (1.5, 1)), "v"),
    "power on error": (SKY, (0, (7, 2)), "P"),
    "power on logit": (GREY, (0, (2, 1)), "X"),
    "last value": (INK, (0, (4, 2)), "*"),
    "mean": (MUTED, (0, (1, 1.5)), "d"),
}


def equation(law: Law) -> str:
    """The law with its numbers, in mathtext: `y = 36.8·x^0.011`."""
    p = {name: _tex(value) for name, value in law.params.items()}
    left = {"value": "y", "error": r"100 - y", "logit": r"y/(100 - y)"}[law.on]
    if law.form == "power":
        return rf"${left} = {p['C']}\,x^{{{p['alpha']}}}$"
    if law.form == "saturating" and law.on == "value":
        return rf"${left} = {p['E']} - {p['A']}\,x^{{-{p['alpha']}}}$"
    return law.formula


def _tex(value: float) -> str:
    text = number(value)
    if "×10" in text:
        mantissa, power = f"{value:.2e}".split("e")
        return rf"{mantissa}\cdot 10^{{{int(power)}}}"
    return text.replace(",", "{,}")


def stretch(low: float, high: float, decades: float = 0.0) -> np.ndarray:
    """80 points from `low` to so many decades above `high`, even in log."""
    return np.geomspace(low, high * 10**decades, 80)


def best_bars(env: Envelope, table: pd.DataFrame) -> np.ndarray:
    """The Wilson bars of the envelope's runs, (2, m); none for a y that has no interval."""
    return wilson_bars(table.iloc[env.rows]) if env.y == "aa_acc" else np.zeros((2, env.n_bins))


def best_runs(law: Law, table: pd.DataFrame) -> tuple[Figure, str]:
    """Figure 3a: the best run per bin with its Wilson interval, the runs behind it, the law and its band."""
    env = law.envelope
    figure, ax = style.new(COLUMN, 2.45)
    raster = len(env.points.x) > MANY
    ax.scatter(env.points.x, env.points.y, s=5, c=GREY, alpha=0.45, linewidths=0, rasterized=raster)
    xs = stretch(env.xs[0], env.xs[-1])
    low, high = law.band(xs)
    ax.fill_between(xs, low, high, color=VERMILLION, alpha=0.16, lw=0)
    ax.plot(xs, law.predict(xs), color=VERMILLION, lw=1.4)
    bars = best_bars(env, table)
    ax.errorbar(env.xs, env.ys, yerr=bars, fmt="o", ms=3.6, color=BLUE, mec=PAPER, mew=0.4, elinewidth=0.7, zorder=4)
    below = _zoom(ax, env.points.y, env.ys - bars[0], env.ys + bars[1]) if env.best == "max" else 0
    _axes(ax, env)
    style.legend_above(
        figure,
        [
            [_dot(BLUE, f"best per bin ({env.n_bins})"), _dot(GREY, f"usable run ({env.n_runs})", 2.6)],
            [Line2D([], [], color=VERMILLION, lw=1.4, label=equation(law)), _band(VERMILLION, 0.16, _alpha(law))],
        ],
    )
    caption = (
        f"Best run in each of {env.n_bins} bins of {phrase(law.x)} and the {law.name} law fitted to "
        f"them ({labels.formula(law.formula)}; α = {number(law.alpha)}, {law.level:.0%} interval "
        f"{labels.interval(*law.alpha_interval, 4)}, bootstrap over runs, {law.resamples:,} resamples; "
        f"R² = {law.r2:.2f}). {env.counts.sentence()}. Bars are 95% Wilson intervals of each run."
    )
    if below:
        caption += f" {below} usable runs lie below the axis."
    return figure, caption


def _zoom(ax: Axes, ys: np.ndarray, low: np.ndarray, high: np.ndarray) -> int:
    """Show the best runs with as much room below them as they span; return how many runs fall off."""
    span = max(float(high.max() - low.min()), 1.0)
    bottom = max(float(low.min()) - span, 0.0)
    if bottom <= ys.min():
        return 0
    ax.set_ylim(bottom, float(high.max()) + 0.15 * span)
    return int((ys < bottom).sum())


def cost(law: Law, table: pd.DataFrame, how: str) -> tuple[Figure, str]:
    """Figures 3b and 3c: what runs cost against their compute, on log axes, with the law; `how` it was obtained."""
    env = law.envelope
    figure, ax = style.new(COLUMN, 2.3)
    rows = table.iloc[env.points.rows]
    shown = []
    for value, (colour, marker) in style.encode("loss", rows["loss"]).items():
        mine = (rows["loss"].map(labels.word) == value).to_numpy()
        ax.scatter(
            env.points.x[mine], env.points.y[mine], s=9, marker=marker, c=colour, alpha=0.6, linewidths=0,
            rasterized=len(rows) > MANY,
        )  # fmt: skip
        shown.append(_dot(colour, labels.choice("loss", value), 3.4, marker))
    xs = stretch(env.points.x.min(), env.points.x.max())
    low, high = law.band(xs)
    ax.fill_between(xs, low, high, color=INK, alpha=0.14, lw=0)
    ax.plot(xs, law.predict(xs), color=INK, lw=1.1)
    _axes(ax, env)
    style.log_y(ax)
    style.grid(ax, "both")
    numbers: list[Line2D | Patch] = [
        Line2D([], [], color=INK, lw=1.1, label=equation(law)),
        _band(INK, 0.14, _alpha(law)),
    ]
    style.legend_above(figure, [shown, numbers])
    caption = (
        f"{quantity(law.y).label} ({how}) of {env.n_runs} runs against {phrase(law.x)}: "
        f"α = {number(law.alpha)} ({law.level:.0%} interval {labels.interval(*law.alpha_interval, 3)}, bootstrap over "
        f"runs), R² = {law.r2:.2f} in log-log."
    )
    return figure, caption


def forms(average: Average, table: pd.DataFrame) -> tuple[Figure, str]:
    """Competing forms on one envelope: their curves, and how well each fits with its Akaike weight."""
    env = average.laws[0].envelope
    figure, (left, right) = style.new(PAGE, 2.5, 1, 2, width_ratios=[1.6, 1])
    xs = stretch(env.xs[0], env.xs[-1])
    for law in average.laws:
        colour, dashes, _ = LINES[law.name]
        left.plot(xs, law.predict(xs), color=colour, ls=dashes, lw=1.2)
    bars = best_bars(env, table)
    left.errorbar(env.xs, env.ys, yerr=bars, fmt="o", ms=3.2, color=INK, mec=PAPER, mew=0.4, elinewidth=0.6, zorder=4)
    _axes(left, env)
    left.set_title("fits")
    ranked = sorted(zip(average.laws, average.weights, strict=True), key=lambda pair: pair[0].rmse, reverse=True)
    for at, (law, weight) in enumerate(ranked):
        colour, _, marker = LINES[law.name]
        right.plot([0, law.rmse], [at, at], color=style.GRID, lw=1.2, zorder=1)
        right.plot(law.rmse, at, marker=marker, color=colour, ls="", ms=4.5, clip_on=False)
        right.annotate(
            f"w = {weight:.2f}", (1, at), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=6.3,
            color=MUTED,
        )  # fmt: skip
    right.set_yticks(range(len(ranked)), [law.name for law, _ in ranked])
    right.set_xlim(0, 1.5 * max(law.rmse for law, _ in ranked))
    right.set_ylim(-0.6, len(ranked) - 0.4)
    right.tick_params(axis="y", length=0)
    right.set_xlabel("RMS miss on the best runs (points)")
    right.set_title("misfit and Akaike weight")
    style.legend_above(figure, [[_line(law.name)] for law in average.laws])
    caption = (
        f"{len(average.laws)} forms fitted to the same {env.n_bins} best runs of {env.n_runs} usable ones. Right: root "
        f"mean square miss, and the Akaike weight w (AICc), which charges each form for its parameters."
    )
    return figure, caption


def holdout(hidden: Holdout, env: Envelope, table: pd.DataFrame) -> tuple[Figure, str]:
    """Hide the costliest best runs, fit the rest, predict: where each contender lands, and by how much it misses."""
    figure, (left, right) = style.new(PAGE, 2.5, 1, 2, width_ratios=[1.6, 1])
    seen = env.xs <= hidden.x_cut
    bars = best_bars(env, table)
    for mask, face in ((seen, INK), (~seen, PAPER)):
        left.errorbar(
            env.xs[mask], env.ys[mask], yerr=bars[:, mask], fmt="o", ms=3.6, mfc=face, mec=INK, ecolor=INK, mew=0.7,
            elinewidth=0.6, zorder=4,
        )  # fmt: skip
    left.plot(hidden.train_xs, hidden.train_ys, ls="", marker="o", ms=5.6, mfc="none", mec=MUTED, mew=0.6, zorder=3)
    for name, values in hidden.predictions.items():
        colour, dashes, marker = LINES[name]
        left.plot(hidden.xs, values, color=colour, ls=dashes, lw=1.1, marker=marker, ms=3.4, zorder=3)
    _axes(left, env)
    edge = float(np.sqrt(hidden.x_cut * hidden.xs[0]))
    left.axvspan(edge, env.xs[-1] * 1.3, color=GREY, alpha=0.1, lw=0, zorder=0)
    left.set_xlim(right=env.xs[-1] * 1.3)
    left.set_title(f"the top {hidden.hidden} hidden")
    ranked = sorted(hidden.misses, key=lambda miss: miss.rmse, reverse=True)
    baseline = hidden.miss("last value")
    for at, miss in enumerate(ranked):
        colour, _, marker = LINES[miss.name]
        right.plot([0, miss.rmse], [at, at], color=style.GRID, lw=1.2, zorder=1)
        right.plot(miss.rmse, at, marker=marker, color=colour, ls="", ms=4.5, clip_on=False)
    if baseline is not None:
        right.axvline(baseline.rmse, color=INK, lw=0.7, ls=(0, (4, 2)), zorder=0)
    right.set_yticks(range(len(ranked)), [miss.name for miss in ranked])
    right.set_ylim(-0.6, len(ranked) - 0.4)
    right.set_xlim(left=0)
    right.tick_params(axis="y", length=0)
    right.set_xlabel("RMS miss on hidden runs (points)")
    right.set_title("who misses by how much")
    fitted = Line2D([], [], ls="", marker="o", ms=5.6, mfc="none", mec=MUTED, mew=0.6, label="fitted on")
    style.legend_above(figure, [[fitted], *([_line(name)] for name in hidden.predictions)])
    caption = (
        f"The top {hidden.hidden} of {phrase(env.x)} hidden (open points): {hidden.n_train} best runs fitted (rings), "
        f"in bins made anew for what is left, and {hidden.n_test} predicted, up to {10**hidden.decades:.2g} times "
        f"beyond. "
        f"{hidden.sentence()} RMS: root mean square. Bars are 95% Wilson intervals."
    )
    return figure, caption


def _axes(ax: Axes, env: Envelope) -> None:
    style.log_x(ax)
    ax.set_xlabel(quantity(env.x).axis)
    ax.set_ylabel(quantity(env.y).axis)
    style.grid(ax)


def _dot(colour: str, label: str, size: float = 3.6, marker: str = "o") -> Line2D:
    return Line2D([], [], marker=marker, color=colour, ls="", ms=size, label=label)


def _band(colour: str, opacity: float, label: str) -> Patch:
    return Patch(color=colour, alpha=opacity, lw=0, label=label)


def _line(name: str) -> Line2D:
    colour, dashes, _ = LINES[name]
    return Line2D([], [], color=colour, ls=dashes, lw=1.2, label=name)


def _alpha(law: Law) -> str:
    low, high = law.alpha_interval
    return rf"$\alpha$ {law.level:.0%}: [{number(low, 2)}, {number(high, 2)}]"
