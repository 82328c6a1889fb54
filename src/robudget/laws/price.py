"""What a target accuracy costs: one price, fitted once in FLOP by the frontier and converted by the table's cost laws.

Three rules, all ours. The price of a target at or below an observed accuracy is never above the cost of the cheapest
run that was observed there. A price farther beyond the costliest run than twice the distance over which the frontier
was put to the test is not given: the answer is "more than that; these runs cannot say". And every unit says the same,
because the other units are conversions: reachable in FLOP is reachable in dollars.

    prices = price(table, [60.0, 65.0])             # a Price for each target
    prices[0].value, prices[0].low, prices[0].high  # in `x`: FLOP where the table knows it; inf: these runs cannot say
    prices[0].costs["cost_usd"]                     # (value, low, high) in every other known unit
    prices[0].sentence("cost_usd")                  # the answer in words, in that unit
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from robudget.columns import COSTS, column
from robudget.errors import InputError
from robudget.files import fields
from robudget.laws.fit import fit_power_law
from robudget.laws.frontier import LEVEL, Frontier, fit_frontier
from robudget.laws.law import Law
from robudget.tables.read import as_table
from robudget.tables.usable import Points, is_error, numbers_of

BEYOND_TESTED = 2.0  # times the tested distance, in decades, that a price may lie beyond the costliest run
COST_RESAMPLES = 200
SAME_CLOCK = 1e-4  # relative spread of a ratio of costs below which one is the other times a constant
FEWEST_COSTS = 3  # known values from which a cost is converted
Span = tuple[float, float, float]  # value, low, high
Verdict = Literal["observed", "within", "beyond", "cannot say"]


@dataclass(frozen=True)
class Observed:
    """A run that was observed at or beyond a target: its id (its row where the table has none), what it cost in x, its
    accuracy, the standard deviation of its evaluation in points (0: unknown), and its bill in every known cost."""

    run: str
    x: float
    y: float
    noise: float
    costs: dict[str, float]

    def sentence(self, name: str) -> str:
        """`paper-055 was measured at 60.0 ± 0.5 for $7.10`."""
        noise = f" ± {self.noise:.1f}" if self.noise else ""
        bill = f" for {column(name).write(self.costs[name])}" if name in self.costs else ""
        return f"{self.run} was measured at {self.y:.1f}{noise}{bill}"


@dataclass(frozen=True)
class Price:
    """What `target` of the column `y` costs in the column `x`.

    `value` is the median over the frontier's draws, at most the cost of `observed` (the cheapest run observed at or
    beyond the target; None where none was); inf where it lies beyond `limit`, the farthest x that these runs can speak
    of. `low` and `high` are the interval's ends, inf likewise. `p_beyond` is the share of the draws that do not reach
    the target up to `limit`; `value` is inf where it is above a half and no run was observed there. `decades` is how
    far beyond the costliest run `value` lies (0 within). `verdict` says what the price stands on: a run `observed`
    there, the frontier `within` the runs or `beyond` them, or `cannot say`. `costs` are value, low and high in every
    other known cost column, by the table's power laws of cost over x.
    """

    x: str
    y: str
    target: float
    value: float
    low: float
    high: float
    level: float
    verdict: Verdict
    limit: float
    p_beyond: float
    decades: float
    observed: Observed | None
    costs: dict[str, Span]
    limits: dict[str, float]  # `limit` in the other cost columns
    cheapest: float  # x of the cheapest run, below which no price is given

    @property
    def reachable(self) -> bool:
        """Whether a price can be given; False says "these runs cannot say", not "never"."""
        return math.isfinite(self.value)

    def span(self, name: str | None = None) -> Span:
        """Value, low and high in the column `name`, or in `x`. NaN where that cost is unknown."""
        if name is None or name == self.x:
            return self.value, self.low, self.high
        return self.costs.get(name, (math.nan, math.nan, math.nan))

    def sentence(self, name: str | None = None, also: str | None = None) -> str:
        """The answer in words, in the unit of a cost column (default: x), and in that of another one."""
        unit = column(name if name is not None and name in self.costs else self.x)
        value, low, high = self.span(unit.name)
        limit = self.limits.get(unit.name, self.limit)
        goal = column(self.y).write(self.target)
        if not self.reachable:
            share = f"{self.p_beyond:.0%} of the frontier's draws do not reach it there"
            early = f"; the earliest 2.5% reach it at {unit.write(low)}" if math.isfinite(low) else ""
            return f"{goal} costs more than {unit.write(limit)}; these runs cannot say how much more ({share}{early})"
        top = unit.write(high) if math.isfinite(high) else f"more than {unit.write(limit)}"
        more = ""
        if also in self.costs and also != unit.name:
            more = f", about {column(also).write(self.costs[also][0])} by the table's law of {column(also).phrase}"
        text, ends = f"{goal} costs {unit.write(value)}", f"{unit.write(low)} to {top}"
        if self.value <= (1 + 1e-9) * self.cheapest:
            text, ends = f"{goal} costs no more than the cheapest run's {unit.write(value)}", f"to {top}"
        text += f" ({self.level:.0%}: {ends})"
        if self.observed is not None:
            return f"{text}{more}; {self.observed.sentence(unit.name)}"
        return text + (f", {self.decades:.1f} decades beyond the runs" if self.decades >= 0.05 else "") + more

    def to_dict(self) -> dict[str, Any]:
        return fields(self) | {"reachable": self.reachable}


def price(
    source: pd.DataFrame | str | Path, targets: Sequence[float], *, x: str | None = None, y: str = "aa_acc",
    frontier: Frontier | None = None, level: float = LEVEL, seed: int = 0,
) -> tuple[Price, ...]:  # fmt: skip
    """The price of each target (percent), cheapest recipes assumed: see the file's first lines.

    `x=None` takes training FLOP, or the first cost that the table knows. `frontier` is one already fitted to the table
    (its x, y and level are taken). Raises InputError for a target outside (0, 100) or a table without a frontier.
    """
    frame = as_table(source)
    for target in targets:
        if not 0 < target < 100:
            raise InputError(f"target = {target:g} for {y} (allowed: more than 0 and less than 100, in percent)")
    law = frontier or fit_frontier(frame, x or priced_in(frame), y, level=level, seed=seed)
    laws = cost_laws(frame, law.x, seed=seed)
    return tuple(price_of(law, float(target), frame, laws) for target in targets)


def priced_in(frame: pd.DataFrame) -> str:
    """The column that prices are fitted in: the first cost column known of FEWEST_COSTS runs, FLOP before the rest."""
    known = (c for c in COSTS if c in frame.columns and (numbers_of(frame, c) > 0).sum() >= FEWEST_COSTS)
    return next(known, "train_flops_exact")


def next_target(runs: Points, gain: float = 1.0) -> float:
    """One point better than the best run; short of 100 (of 0, for an error)."""
    if is_error(runs.y_name):
        return float(max(round(runs.y.min() - gain, 1), 0.1))
    return float(min(round(runs.y.max() + gain, 1), 99.9))


def cost_laws(frame: pd.DataFrame, x: str, *, seed: int = 0) -> dict[str, Law]:
    """Power laws over `x`, on every run, of the other cost columns that FEWEST_COSTS runs know."""
    out = {}
    for name in COSTS:
        if name == x or name not in frame.columns or (numbers_of(frame, name) > 0).sum() < FEWEST_COSTS:
            continue
        out[name] = fit_power_law(frame, x, name, resamples=COST_RESAMPLES, seed=seed)
    return out


def same_clock(laws: Sequence[Law]) -> tuple[tuple[Law, dict[str, float]], ...]:
    """Laws of costs over one x, those that are one quantity times constants as one: the first such law, and how many
    units of each other column one of its own is. Energy from wall time, dollars and carbon from energy are such."""
    out: list[tuple[Law, dict[str, float]]] = []
    for law in laws:
        values, rows = law.envelope.points.y, law.envelope.points.rows
        for first, constants in out:
            mine = first.envelope.points
            if first.x == law.x and np.array_equal(mine.rows, rows):
                ratio = values / mine.y
                middle = float(np.median(ratio))
                if float(np.abs(ratio / middle - 1).max()) < SAME_CLOCK:
                    constants[law.y] = middle
                    break
        else:
            out.append((law, {}))
    return tuple(out)


def price_limit(law: Frontier) -> float:
    """The farthest x that prices may lie at: BEYOND_TESTED times the tested distance beyond the costliest run."""
    return float(law.x_range[1] * 10 ** (BEYOND_TESTED * law.tested))


def price_of(law: Frontier, target: float, frame: pd.DataFrame, laws: Mapping[str, Law]) -> Price:
    """One target's price by a frontier of the table `frame` and the laws of its costs."""
    largest = law.x_range[1]
    limit = price_limit(law)
    draws = law.costs(target)
    draws = np.where(draws > limit, np.inf, draws)
    low, value, high = (float(v) for v in law.interval(draws))
    observed, sure = _observed(law, target, frame)
    if observed is not None:
        value = min(value, observed.x)
    if sure is not None:
        high = min(high, sure.x)
    low, high = law.x_range[0] if law.open else min(low, value), max(high, value)
    verdict: Verdict = "observed" if observed is not None else "cannot say" if math.isinf(value) else "within"
    decades = max(0.0, math.log10(value / largest))
    if verdict == "within" and decades > 0:
        verdict = "beyond"
    costs = {name: tuple(_convert(one, v) for v in (value, low, high)) for name, one in laws.items()}
    return Price(
        law.x, law.y, target, value, low, high, law.level, verdict, limit, law.share(np.isinf(draws)), decades,
        observed, {name: (v[0], v[1], v[2]) for name, v in costs.items()},
        {name: _convert(one, limit) for name, one in laws.items()}, law.x_range[0],
    )  # fmt: skip


def _convert(law: Law, x: float) -> float:
    return float(law.predict(x)) if math.isfinite(x) else x


def _observed(law: Frontier, target: float, frame: pd.DataFrame) -> tuple[Observed | None, Observed | None]:
    """The cheapest run observed at or beyond the target, and the cheapest that is there even if its evaluation was
    lucky by two standard deviations."""
    runs = law.points
    sign = -1.0 if is_error(law.y) else 1.0
    lead = sign * (runs.y - target)
    out: list[Observed | None] = []
    for there in (lead >= 0, lead >= 1.96 * runs.noise):
        if not there.any():
            out.append(None)
            continue
        i = int(np.flatnonzero(there)[np.argmin(runs.x[there])])
        row = int(runs.rows[i])
        name = str(frame["run_id"].iloc[row]) if "run_id" in frame.columns else f"row {row}"
        bill = {law.x: float(runs.x[i])}
        bill |= {c: float(numbers_of(frame, c)[row]) for c in COSTS if c in frame.columns}
        bill = {c: value for c, value in bill.items() if math.isfinite(value)}
        out.append(Observed(name, float(runs.x[i]), float(runs.y[i]), float(runs.noise[i]), bill))
    return out[0], out[1]
