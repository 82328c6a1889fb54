"""The price of the next point: what targets cost by the frontier, and what the planner opens with."""

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
from robudget.laws import Price
from robudget.laws.price import price_of
from robudget.report import style
from robudget.report.figure_files import Drawing
from robudget.report.style import BLUE, COLUMN, MUTED, PAPER
from robudget.report.words import Cell, Section, Table, price_interval

NEXT_POINTS = 5  # further points of accuracy that are priced


def section(rows: pd.DataFrame, analysis: Analysis | None) -> Section:
    if analysis is None or not analysis.prices:
        lead, tables = "No law says what a further point would cost; the planner below lists what the runs cost.", []
    else:
        first, cost = analysis.prices[0], column(analysis.prices[0].x)
        lead = (
            f"One point more than the best run: {first.sentence()}. The costliest run took "
            f"{cost.write(float(analysis.envelope.points.x.max()))}. Better data, another loss or fewer collapsed runs "
            f"may cost less than more compute: see what drives robustness."
        )
        tables = [prices_table(analysis)]
    return Section("price", "The next point", "The price of the next point", lead, [("price",), *tables])


def drawings(rows: pd.DataFrame, analysis: Analysis | None) -> Iterator[Drawing]:
    if analysis is not None:
        yield Drawing("price", "The price of the next point", lambda: price_figure(analysis))


def prices_table(analysis: Analysis) -> Table:
    """What round targets cost by the frontier, in every unit that the table has a law of cost for."""
    first, largest = analysis.prices[0], float(analysis.envelope.points.x.max())
    units = [law.y for law in analysis.costs if law.y in first.costs]
    rows: list[Sequence[Cell]] = []
    for price in analysis.prices:
        beyond = percent(100 * price.p_beyond, 0)
        if price.reachable:
            cost = (column(price.x).write(price.value), price_interval(price))
            others = [column(name).write(price.costs[name][0]) for name in units]
            rows.append((f"{price.target:g}%", cost, f"×{number(price.value / largest, 2)}", *others, beyond))
        else:
            limits = [f"more than {column(name).write(price.limits[name])}" for name in units]
            cost = (f"more than {column(price.x).write(price.limit)}", price_interval(price))
            rows.append((f"{price.target:g}%", cost, "–", *limits, beyond))
    heads = [f"#{column(name).short}" for name in units]
    return Table(
        "What a target costs",
        f"By the frontier of all usable runs, {first.level:.0%} intervals; other units by the laws of cost",
        ["target", f"#{column(analysis.x).short}", "#of the costliest run", *heads, "#beyond, of the draws"],
        rows,
        note=f"Prices are given up to {column(first.x).write(first.limit)}, twice as many decades beyond the runs as "
        "the frontier was tested; beyond, these runs cannot say.",
    )  # fmt: skip


def price_figure(analysis: Analysis) -> tuple[Figure, str] | None:
    """What each further point of accuracy costs by the frontier: targets along x, the cost of each with its interval
    along y. None where none has a price."""
    env, law = analysis.envelope, analysis.frontier
    if env.best != "max" or law is None:
        return None
    start, largest = math.floor(float(env.ys.max())) - 1, float(env.points.x.max())
    targets = [t for t in range(start, start + NEXT_POINTS + 2) if 0 < t < 100]
    prices = [price_of(law, float(t), analysis.table, {}) for t in targets]
    finite = [price.value for price in prices if price.reachable]
    if not finite:
        return None
    first = prices[0]
    figure, ax = style.new(COLUMN, 2.5)
    top, bottom = first.limit * 10, min(*(p.low for p in prices), largest) / 5
    style.log_y(ax)
    for price in prices:
        _price(ax, price, (bottom, top))
    ax.axhline(largest, color=MUTED, lw=0.8, ls=(0, (2, 2)), zorder=0)
    ax.axhline(first.limit, color=MUTED, lw=0.8, zorder=0)
    ax.set_ylim(bottom, top)
    style.log_y(ax)
    ax.set_xticks(targets)
    ax.set_xlabel(f"target {column(first.y).label} (%)")
    ax.set_ylabel(column(first.x).axis)
    style.grid(ax)
    keys = [style.key("o", BLUE, "price", 3.8), style.key("o", BLUE, "more than that", 3.4, fill=PAPER)]
    lines = [
        Line2D([], [], color=MUTED, lw=0.8, ls=(0, (2, 2)), label="costliest run"),
        Line2D([], [], color=MUTED, lw=0.8, label="as far as these runs can say"),
    ]
    style.legend_above(figure, [keys, lines])
    caption = (
        f"{column(first.x).label} at which the frontier of {env.n_runs} runs reaches a target accuracy, with "
        f"its {first.level:.0%} interval; arrows: the interval goes beyond the upper line, twice as many decades "
        f"beyond the runs as the frontier was tested; open marks: the price does."
    )
    return figure, caption


def _price(ax: Axes, price: Price, span: tuple[float, float]) -> None:
    """One target: its price, with an arrowhead where the interval ends beyond what can be said."""
    bottom, _ = span
    low, high = max(min(price.low, price.limit), bottom), min(price.high, price.limit)
    ax.plot([price.target, price.target], [low, high], color=BLUE, lw=0.9)
    if price.high > price.limit:
        ax.plot(price.target, high, marker="^", ms=2.8, color=BLUE, clip_on=False)
    if price.reachable:
        ax.plot(price.target, price.value, marker="o", ms=4, color=BLUE, ls="", mec=PAPER, mew=0.4, zorder=3)
    else:
        ax.plot(price.target, price.limit, marker="o", ms=3.6, mfc=PAPER, mec=BLUE, ls="", zorder=3)


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
