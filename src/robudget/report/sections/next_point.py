"""The price of the next point: what targets cost by each form and by their average, and what the planner opens with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robudget.analysis import Analysis
from robudget.columns import COSTS, column
from robudget.formats import known, number, percent
from robudget.laws import Law, Reach
from robudget.laws.form_selection import Average
from robudget.report import style
from robudget.report.figure_files import Drawing
from robudget.report.style import COLUMN, INK, LINES, MUTED, PAPER
from robudget.report.words import AVERAGE, Cell, Section, Table, reach_interval
from robudget.tables.usable import is_percent

NEXT_POINTS = 5  # further points of accuracy that are priced
DRAWN_FORMS = ("power", "saturating")
FARTHEST = 1e6  # times the largest run: a price above is drawn as if never reached, and the legend says so


def section(rows: pd.DataFrame, analysis: Analysis | None) -> Section:
    if analysis is None or not analysis.reaches:
        lead, tables = "No law says what a further point would cost; the planner below lists what the runs cost.", []
    else:
        first, cost = analysis.reaches[0], column(analysis.reaches[0].x)
        price = f"is priced at {cost.write(first.value)} {reach_interval(first)}"
        lead = (
            f"One point more than the best run, {first.target:g}%, {price if first.reachable else 'is unreachable'}; "
            f"the largest best run took {cost.write(float(analysis.envelope.xs[-1]))}. Better data, "
            f"another loss or fewer collapsed runs may cost less than more compute: see what drives robustness."
        )
        tables = [prices_table(analysis)]
    return Section("price", "The next point", "The price of the next point", lead, [("price",), *tables])


def drawings(rows: pd.DataFrame, analysis: Analysis | None) -> Iterator[Drawing]:
    if analysis is not None:
        yield Drawing("price", "The price of the next point", lambda: price_figure(analysis))


def prices_table(analysis: Analysis) -> Table:
    """What round targets cost, by all forms together, in every unit that the table has a law of cost for."""
    largest, known_costs = float(analysis.envelope.xs[-1]), analysis.costs
    rows: list[Sequence[Cell]] = []
    for reach in analysis.reaches:
        never = percent(100 * reach.p_unreachable, 0)
        if reach.reachable:
            price = (column(reach.x).write(reach.value), reach_interval(reach))
            others = [column(law.y).write(float(law.predict(reach.value))) for law in known_costs]
            rows.append((f"{reach.target:g}%", price, f"×{number(reach.value / largest, 2)}", *others, never))
        else:
            rows.append(
                (f"{reach.target:g}%", ("unreachable", reach_interval(reach)), "–", *("–" for _ in known_costs), never)
            )
    heads = [f"#{column(law.y).short}" for law in known_costs]
    return Table(
        "What a target costs",
        f"By the {AVERAGE} of all forms, {analysis.reaches[0].level:.0%} intervals; other units by the laws of cost",
        ["target", f"#{column(analysis.x).short}", "#of the largest best run", *heads, "#never, in resamples"],
        rows,
        note="A price far beyond the largest run is an extrapolation, whatever its interval.",
    )  # fmt: skip


def price_figure(analysis: Analysis) -> tuple[Figure, str] | None:
    """What each further point of accuracy costs by the headline's form, the saturating form and the average: targets
    along x, the cost of each with its interval along y. None where no law reaches any of them at a finite cost that
    can be drawn."""
    env = analysis.envelope
    if env.best != "max" or not is_percent(env.y):
        return None
    start, largest = math.floor(float(env.ys.max())) + 1, float(env.xs[-1])
    targets = [t for t in range(start, start + NEXT_POINTS) if t < 100]
    laws: dict[str, Law | Average] = {law.name: law for law in analysis.forms if law.name in DRAWN_FORMS}
    if analysis.average is not None:
        laws[AVERAGE] = analysis.average
    reaches = {name: [law.cost_at(t) for t in targets] for name, law in laws.items()}
    finite = [r.value for series in reaches.values() for r in series if r.reachable and r.value < largest * FARTHEST]
    if not finite:
        return None
    first = next(iter(reaches.values()))[0]
    figure, ax = style.new(COLUMN, 2.5)
    top, bottom = max(*finite, largest) * 30, min(*finite, largest) / 5
    style.log_y(ax)
    keys: list[Line2D] = []
    for i, (name, series) in enumerate(reaches.items()):
        colour, _, marker = LINES.get(name, (INK, "-", "o"))
        keys.append(style.key(marker, colour, name, 3.8))
        shift = (i - (len(reaches) - 1) / 2) * 0.5 / max(len(reaches), 3)
        for reach in series:
            _reach(ax, reach, reach.target + shift, (bottom, top), colour, marker)
    ax.axhline(largest, color=MUTED, lw=0.8, ls=(0, (2, 2)), zorder=0)
    ax.set_ylim(bottom, top)
    style.log_y(ax)
    ax.set_xticks(targets)
    ax.set_xlabel(f"target {column(first.y).label} (%)")
    ax.set_ylabel(column(first.x).axis)
    style.grid(ax)
    keys.append(style.key("o", INK, "farther, or never", 3.4, fill=PAPER))
    line = Line2D([], [], color=MUTED, lw=0.8, ls=(0, (2, 2)), label="largest best run")
    style.legend_above(figure, [keys[:2], keys[2:], [line]])
    caption = (
        f"{column(first.x).label} at which each law reaches a target accuracy, with its {first.level:.0%} bootstrap "
        f"interval; arrows: the interval goes beyond the axis; open marks at the top: more than a million times the "
        f"largest run, or never."
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


def planner(rows: pd.DataFrame) -> dict[str, Any]:
    """The planner's units, those of `robudget plan --budget`, and what it opens with: the median run's cost in the
    first unit that gives it at most five digits, money before the others."""
    costs = sorted((c for c in COSTS if rows[c].notna().any()), key=lambda c: column(c).unit != "$")
    units = [(c, size, unit) for c in costs for size, unit in _units(c).items()]
    middles = {unit: float(rows[unit[0]].median()) / unit[1] for unit in units}
    start = next((unit for unit, middle in middles.items() if 0.1 <= middle < 1e5), None)
    target = float(rows["aa_acc"].median())
    return {
        "units": units, "start": start, "amount": f"{float(f'{middles[start]:.2g}'):g}" if start else "",
        "target": f"{target:.0f}" if known(target) else "",
        "costs": [{"column": c, "label": column(c).phrase} for c in costs],
    }  # fmt: skip


def _units(name: str) -> dict[float, str]:
    """Size → name of the units in which a budget of this cost can be given, without other spellings."""
    budget = column(name).budget
    return {size: next(unit for unit, its_size in budget if its_size == size) for _, size in budget}
