"""Laws of what compute buys and what it costs: forms fitted to the best runs, and figures 3a, forms, 3b and 3c."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from robudget.analysis import Analysis
from robudget.columns import column
from robudget.formats import fixed, interval, number, percent, word
from robudget.laws import Law
from robudget.laws.checklist import checklist
from robudget.laws.form_selection import Average
from robudget.report import style
from robudget.report.figure_files import Drawing
from robudget.report.sections import extrapolation
from robudget.report.style import BLUE, COLUMN, GREY, INK, LINES, MANY, MUTED, PAGE, PAPER, VERMILLION
from robudget.report.table import fill, how
from robudget.report.words import Cell, Section, Table, capital, formula, span

BINNINGS = {
    "log": "equal in log", "linear": "equal", "quantile": "equally many runs", "pareto": "none: Pareto frontier",
}  # fmt: skip
SYMBOLS = {"alpha": "α", "alpha2": "α2", "gamma": "γ"}


def section(rows: pd.DataFrame, analysis: Analysis | None) -> Section:
    title = "Laws: what compute buys"
    if analysis is None:
        return Section("laws", "Laws", title, "No law was fitted to these runs.")
    lead = (
        f"{column(analysis.y).label} against {column(analysis.x).phrase}: several forms fitted to the same best runs, "
        f"weighted by AICc, and tested on held-out runs."
    )
    holdouts = [extrapolation.holdout_table(h, folded=i > 0) for i, h in enumerate(analysis.holdouts)]
    others = (costs_table, published_table, sensitivity_table, splits_table)
    tables = [forms_table(analysis), *holdouts, *(table(analysis) for table in others), *checklist_tables(analysis)]
    return Section("laws", "Laws", title, lead, [("3a", "fan"), ("holdout", "forms"), *tables, ("3b", "3c")])


def drawings(rows: pd.DataFrame, analysis: Analysis | None) -> Iterator[Drawing]:
    if analysis is None:
        return
    fitted = fill(analysis.table)  # by position, as the envelope counts them
    average, costs = analysis.average, {law.y: law for law in analysis.costs}
    yield Drawing("3a", "The best that compute bought", lambda: best_runs_figure(analysis.law, fitted))
    yield from extrapolation.drawings(analysis)
    if average is not None:
        yield Drawing("forms", "Competing forms", lambda: forms_figure(average, fitted))
    electricity = costs.get("cost_usd") or costs.get("train_energy_kwh")
    if electricity is not None:
        yield Drawing("3b", "Electricity against compute", lambda: cost_figure(electricity, fitted))
    if "co2_kg" in costs:
        yield Drawing("3c", "Carbon against compute", lambda: cost_figure(costs["co2_kg"], fitted))


# -- tables -----------------------------------------------------------------------------------------------------------


def forms_table(analysis: Analysis) -> Table:
    law, average = analysis.law, analysis.average

    def held_out_error(law: Law) -> str:
        miss = analysis.holdouts[0].miss(law.name) if analysis.holdouts else None
        return fixed(miss.rmse, 2) if miss else "not fitted"

    rows: list[Sequence[Cell]] = [
        (
            law.name,
            (formula(law.formula), ", ".join(f"{SYMBOLS.get(k, k)} = {number(v)}" for k, v in law.params.items())),
            (number(law.alpha), span(law.alpha_interval)),
            (percent(law.ceiling), interval(*law.ceiling_interval)) if math.isfinite(law.ceiling) else "none",
            fixed(law.rmse, 2),
            fixed(average.weight(law) if average else None, 2),
            held_out_error(law),
        )
        for law in analysis.forms
    ]
    return Table(
        "Competing forms",
        f"{law.n_bins} best runs of {law.n_runs}; {law.level:.0%} intervals from {law.resamples:,} bootstrap resamples",
        ["form", "formula", "#α", "#ceiling", "#misfit (points)", "#Akaike weight", "#held-out error (points)"],
        rows,
        note=" ".join(f"{capital(w)}." for w in dict.fromkeys(w for o in analysis.forms for w in o.warnings)),
    )


def costs_table(analysis: Analysis) -> Table:
    rows = [
        (column(w.y).axis, number(w.C), (number(w.alpha), span(w.alpha_interval, 3)), fixed(w.r2, 2), str(w.n_runs))
        for w, _ in analysis.clocks
    ]
    same = [
        f"{column(name).write(value)} of {column(name).phrase} per {column(law.y).unit} of {column(law.y).phrase}"
        for law, constants in analysis.clocks
        for name, value in constants.items()
    ]
    return Table(
        "What compute costs",
        f"Power laws over {column(analysis.x).phrase}, on every run",
        ["cost", "#C", "#α", "#R²", "#runs"],
        rows,
        note=f"The same law times a constant, of every run alike: {'; '.join(same)}." if same else "",
    )


def published_table(analysis: Analysis) -> Table:
    rows = [
        (
            column(w.y).label,
            number(w.C, 4),
            (number(w.alpha), span(w.alpha_interval)),
            fixed(w.r2, 2),
            str(w.n_bins),
            str(w.n_runs),
        )
        for w in analysis.published
    ]
    return Table(
        "The paper's own laws",
        "From its published columns: x is one GPU's share of the run, in TFLOP",
        ["result", "#C", "#α", "#R²", "#points", "#runs"],
        rows,
    )


def sensitivity_table(analysis: Analysis) -> Table:
    rows = [
        (
            BINNINGS.get(b.how, b.how),
            "–" if b.how == "pareto" else str(b.bins),
            str(b.n_bins),
            number(b.C),
            number(b.alpha),
            fixed(b.rmse, 2),
            column(analysis.x).write(b.next_point) if math.isfinite(b.next_point) else "cannot say",
        )
        for b in analysis.sensitivity
    ]
    law = analysis.frontier
    if law is not None and analysis.prices:
        first = analysis.prices[0]
        price = column(first.x).write(first.value) if first.reachable else "cannot say"
        rows.append(("none: frontier of all runs", "–", str(law.n_runs), "–", number(law.alpha), "–", price))
    return Table(
        "Does the binning matter?",
        "The power law under other binnings, and what one point more than the best run costs by two forms",
        ["bins", "#asked for", "#best runs", "#C", "#α", "#misfit (points)", "#next point"],
        rows,
        note="A Pareto frontier rises by construction: it cannot give an exponent of 0 or below.",
        folded=True,
    )


def splits_table(analysis: Analysis) -> Table:
    rows: list[Sequence[Cell]] = []
    for s in analysis.splits:
        what = f"{column(s.feature).phrase}: {column(s.feature).level(s.level)}"
        if s.within:
            what += f"; {column(s.within[0]).phrase}: {column(s.within[0]).level(s.within[1])}"
        if s.law is None:
            rows.append((what, str(s.n_runs), "–", "–", "–", s.reason))
            continue
        paper = number(s.law.alpha), span(s.law.alpha_interval)
        mine: Cell = "–"
        if s.frontier is not None:
            mine = number(s.frontier.alpha), span(s.frontier.alpha_interval)
        rows.append((what, str(s.n_runs), mine, number(s.law.C), paper, "; ".join(s.law.warnings)))
    return Table(
        "Laws of parts of the table",
        "Exponents of the runs that share one choice: by the frontier of all of them, and by the best run of each bin",
        ["runs with", "#runs", "#α, frontier", "#C", "#α, bins", "remark"],
        rows,
        note=" ".join(f"{capital(c.sentence())}." for c in analysis.comparisons),
        folded=True,
    )


def checklist_tables(analysis: Analysis) -> list[Table]:
    """What a report of a law must say: of the headline and its frontier, of every clock, and of the paper's laws."""
    laws = [analysis.law, *(law for law, _ in analysis.clocks), *analysis.published]
    return [
        Table(
            f"Reporting checklist: {column(law.y).phrase} against {column(law.x).phrase}",
            "What (Mis)Fitting (arXiv 2502.18969) asks of a report of a law, filled in; `robudget fit --checklist`",
            ["question", "answer"],
            list(checklist(law, analysis.frontier if law is analysis.law else None, law is analysis.law).items()),
            folded=True,
        )
        for law in laws
    ]


# -- figures ----------------------------------------------------------------------------------------------------------


def best_runs_figure(law: Law, table: pd.DataFrame) -> tuple[Figure, str]:
    """Figure 3a: the best run per bin with its Wilson interval, the runs behind it, the law and its band."""
    env = law.envelope
    figure, ax = style.new(COLUMN, 2.45)
    raster = len(env.points.x) > MANY
    ax.scatter(env.points.x, env.points.y, s=5, c=GREY, alpha=0.45, linewidths=0, rasterized=raster)
    xs = style.log_grid(env.xs[0], env.xs[-1])
    low, high = law.band(xs)
    ax.fill_between(xs, low, high, color=VERMILLION, alpha=0.16, lw=0)
    ax.plot(xs, law.predict(xs), color=VERMILLION, lw=1.4)
    bars = style.best_bars(env, table)
    ax.errorbar(env.xs, env.ys, yerr=bars, fmt="o", ms=3.6, color=BLUE, mec=PAPER, mew=0.4, elinewidth=0.7, zorder=4)
    below = _zoom(ax, env.points.y, env.ys - bars[0], env.ys + bars[1]) if env.best == "max" else 0
    style.law_axes(ax, env)
    style.legend_above(
        figure,
        [
            [
                style.key("o", BLUE, f"best per bin ({env.n_bins})"),
                style.key("o", GREY, f"usable run ({env.n_runs})", 2.6),
            ],
            [Line2D([], [], color=VERMILLION, lw=1.4, label=equation(law)), _band(VERMILLION, 0.16, _alpha(law))],
        ],
    )
    caption = (
        f"Best run in each of {env.n_bins} bins of {column(law.x).phrase} and the {law.name} law fitted to "
        f"them ({formula(law.formula)}; α = {number(law.alpha)}, {law.level:.0%} interval "
        f"{interval(*law.alpha_interval, 4)}, bootstrap over runs, {law.resamples:,} resamples; "
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


def _alpha(law: Law) -> str:
    low, high = law.alpha_interval
    return rf"$\alpha$ {law.level:.0%}: [{number(low, 2)}, {number(high, 2)}]"


def _band(colour: str, opacity: float, label: str) -> Patch:
    return Patch(color=colour, alpha=opacity, lw=0, label=label)


def forms_figure(average: Average, table: pd.DataFrame) -> tuple[Figure, str]:
    """Competing forms on one envelope: their curves, and how well each fits with its Akaike weight."""
    env = average.laws[0].envelope
    figure, (left, right) = style.new(PAGE, 2.5, 1, 2, width_ratios=[1.6, 1])
    xs = style.log_grid(env.xs[0], env.xs[-1])
    for law in average.laws:
        colour, dashes, _ = LINES[law.name]
        left.plot(xs, law.predict(xs), color=colour, ls=dashes, lw=1.2)
    bars = style.best_bars(env, table)
    left.errorbar(env.xs, env.ys, yerr=bars, fmt="o", ms=3.2, color=INK, mec=PAPER, mew=0.4, elinewidth=0.6, zorder=4)
    style.law_axes(left, env)
    left.set_title("fits")
    ranked = sorted(zip(average.laws, average.weights, strict=True), key=lambda pair: pair[0].rmse, reverse=True)
    style.errors(right, [(law.name, law.rmse) for law, _ in ranked])
    for at, (_, weight) in enumerate(ranked):
        right.annotate(
            f"w = {weight:.2f}", (1, at), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=6.3,
            color=MUTED,
        )  # fmt: skip
    right.set_xlim(0, 1.5 * max(law.rmse for law, _ in ranked))
    right.set_xlabel("RMS error on the best runs (points)")
    right.set_title("misfit and Akaike weight")
    style.legend_above(figure, [[style.form_key(law.name)] for law in average.laws])
    caption = (
        f"{len(average.laws)} forms fitted to the same {env.n_bins} best runs of {env.n_runs} usable ones. Right: root "
        f"mean square error, and the Akaike weight w (AICc), which penalises each form for its parameters."
    )
    return figure, caption


def cost_figure(law: Law, table: pd.DataFrame) -> tuple[Figure, str]:
    """Figures 3b and 3c: what runs cost against their compute, on log axes, with the law."""
    env = law.envelope
    figure, ax = style.new(COLUMN, 2.3)
    rows = table.iloc[env.points.rows]
    losses: list[Line2D | Patch] = []
    for value, (colour, marker) in style.encode("loss", rows["loss"]).items():
        mine = (rows["loss"].map(word) == value).to_numpy()
        ax.scatter(
            env.points.x[mine], env.points.y[mine], s=9, marker=marker, c=colour, alpha=0.6, linewidths=0,
            rasterized=len(rows) > MANY,
        )  # fmt: skip
        losses.append(style.key(marker, colour, column("loss").level(value), 3.4))
    xs = style.log_grid(env.points.x.min(), env.points.x.max())
    low, high = law.band(xs)
    ax.fill_between(xs, low, high, color=INK, alpha=0.14, lw=0)
    ax.plot(xs, law.predict(xs), color=INK, lw=1.1)
    style.law_axes(ax, env)
    style.log_y(ax)
    style.grid(ax, "both")
    numbers: list[Line2D | Patch] = [
        Line2D([], [], color=INK, lw=1.1, label=equation(law)),
        _band(INK, 0.14, _alpha(law)),
    ]
    style.legend_above(figure, [losses, numbers])
    caption = (
        f"{column(law.y).label} ({how(table, law.y)}) of {env.n_runs} runs against {column(law.x).phrase}: "
        f"α = {number(law.alpha)} ({law.level:.0%} interval {interval(*law.alpha_interval, 3)}, bootstrap over "
        f"runs), R² = {law.r2:.2f} in log-log."
    )
    return figure, caption
