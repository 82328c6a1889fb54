"""What to train: the best recipes within a budget, or the cheapest way to a target accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robudget.errors import InputError
from robudget.laws.costs import COSTS, CostModel
from robudget.laws.features import rows_of
from robudget.laws.plain import fields
from robudget.laws.predictor import Predictor, Rows
from robudget.laws.select import where
from robudget.laws.table import as_table
from robudget.laws.units import Budget, parse_budget

MOST_CANDIDATES = 20_000


@dataclass(frozen=True)
class Option:
    """One recipe: its `choices` (feature → value), predicted accuracy in percent with interval, and its cost in all
    units.

    `costs` maps the table's cost columns to whole-run totals (NaN: unknown); `ran` is the run_id if the table holds
    this very recipe, whose cost is then the real one.
    """

    choices: dict[str, Any]
    aa_acc: float
    low: float
    high: float
    p_collapse: float
    costs: dict[str, float]
    ran: str | None
    nearest: tuple[tuple[str, float, float], ...]

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


@dataclass(frozen=True)
class Lever:
    """Changing one choice of the best option: `gain` in points, `cost_ratio` of the budget's column (1 = free)."""

    feature: str
    value: Any
    gain: float
    cost_ratio: float
    p_collapse: float


@dataclass(frozen=True)
class Plan:
    """`options` best first (by accuracy within a budget, by cost for a target); empty if nothing fits, which
    `warnings` say.

    `column` is the cost the plan counts in. `next_point` is the cheapest option predicted a point better than the best
    one, if any; `levers` are single changes to the best option, the most points first.
    """

    budget: Budget | None
    target: float | None
    column: str
    options: tuple[Option, ...]
    next_point: Option | None
    levers: tuple[Lever, ...]
    n_candidates: int
    warnings: tuple[str, ...] = ()
    predictor: Predictor = field(repr=False, kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


def plan(
    source: pd.DataFrame | str | Path,
    budget: str | Budget | None = None,
    target: float | None = None,
    *,
    candidates: Rows | None = None,
    column: str | None = None,
    choose: dict[str, Any] | None = None,
    top: int = 10,
    predictor: Predictor | None = None,
    seed: int = 0,
) -> Plan:
    """Rank recipes by predicted robust accuracy within `budget`, or find the cheapest ways to `target` percent.

    `candidates` are the recipes to choose from (recipes, or rows of a table); without them, every combination of the
    choices found in the table, and step counts between them. `choose` fixes choices, e.g. {"synthetic": False}.
    Raises InputError for a budget that cannot be read, a target outside (0, 100), or neither of the two.
    """
    spend = parse_budget(budget) if isinstance(budget, str) else budget
    if (spend is None) == (target is None):
        raise InputError("a plan needs a budget (e.g. 50usd) or a target (e.g. 65), and not both")
    if target is not None and not 0 < target < 100:
        raise InputError(f"target = {target:g} (allowed: more than 0 and less than 100, in percent)")
    table = as_table(source)
    model = predictor or Predictor.fit(table, seed=seed)
    counted = column or (spend.column if spend else _default_column(table))
    costs = {name: CostModel.fit(table, name) for name in COSTS}
    if costs.get(counted) is None:
        known = ", ".join(name for name, cost in costs.items() if cost)
        raise InputError(f"the table says nothing of {counted!r} (known costs: {known or 'none'})")
    rows = grid(model) if candidates is None else rows_of(candidates, table)
    options = _options(where(rows, choose).reset_index(drop=True), model, costs)
    price = np.array([o.costs[counted] for o in options])
    accuracy = np.array([o.aa_acc for o in options])
    warnings = []
    if spend is not None:
        fits = np.flatnonzero(price <= spend.amount)
        order = fits[np.lexsort((price[fits], -accuracy[fits]))]
        if not len(order):
            warnings.append(f"no recipe fits {spend.text}: the cheapest costs {np.nanmin(price):.3g} {counted}")
    else:
        reach = np.flatnonzero((accuracy >= target) & ~np.isnan(price))
        order = reach[np.argsort(price[reach], kind="stable")]
        if not len(order):
            warnings.append(f"no recipe is predicted to reach {target:g}%: the best reaches {accuracy.max():.1f}%")
    best = options[order[0]] if len(order) else None
    return Plan(
        spend, target, counted, tuple(options[i] for i in order[:top]),
        _next(options, price, accuracy, best), _levers(options, best, counted), len(options), tuple(warnings),
        predictor=model,
    )  # fmt: skip


def grid(model: Predictor) -> pd.DataFrame:
    """Every combination of the choices in the predictor's table; columns that vary only with one follow it."""
    table, columns = model.table, model.features.columns
    levels = []
    for c in columns:
        values = sorted(set(table[c.name].dropna()))
        if c.name == "steps":
            values = list(range(int(values[0]), int(values[-1]) + 1))
        levels.append(values)
    if np.prod([len(v) for v in levels], dtype=float) > MOST_CANDIDATES:
        raise InputError(
            f"the table's choices make more than {MOST_CANDIDATES} recipes: give candidates (a study's grid)"
        )
    rows = pd.DataFrame(list(product(*levels)), columns=[c.name for c in columns])
    for c in columns:
        followers = [a for a in c.aliases if a in table.columns]
        if followers:
            known = table.drop_duplicates(c.name).set_index(c.name)[followers]
            rows = rows.join(known, on=c.name)
    constant = [name for name in table.columns if name not in rows.columns and table[name].nunique(dropna=False) == 1]
    for name in constant:
        rows[name] = table[name].iloc[0]
    return rows


def _options(rows: pd.DataFrame, model: Predictor, costs: dict[str, CostModel | None]) -> list[Option]:
    predictions = model.predict(rows)
    prices = {name: cost.predict(rows) for name, cost in costs.items() if cost}
    names = [c.name for c in model.features.columns]
    out = []
    for i, (prediction, choices) in enumerate(zip(predictions, rows[names].to_dict("records"), strict=True)):
        run_id, _, distance = prediction.nearest[0]
        out.append(Option(
            {str(k): v for k, v in choices.items()}, prediction.aa_acc, prediction.low, prediction.high,
            prediction.p_collapse, {name: float(values[i]) for name, values in prices.items()},
            run_id if distance == 0 else None, prediction.nearest,
        ))  # fmt: skip
    return out


def _next(options: list[Option], price: Any, accuracy: Any, best: Option | None) -> Option | None:
    if best is None:
        return None
    better = np.flatnonzero((accuracy >= best.aa_acc + 1) & ~np.isnan(price))
    return options[better[np.argmin(price[better])]] if len(better) else None


def _levers(options: list[Option], best: Option | None, counted: str) -> tuple[Lever, ...]:
    if best is None:
        return ()
    out = []
    for option in options:
        changed = [k for k, v in option.choices.items() if v != best.choices[k]]
        if len(changed) == 1:
            out.append(Lever(
                changed[0], option.choices[changed[0]], option.aa_acc - best.aa_acc,
                option.costs[counted] / best.costs[counted], option.p_collapse,
            ))  # fmt: skip
    return tuple(sorted(out, key=lambda lever: -lever.gain))


def _default_column(table: pd.DataFrame) -> str:
    return next((name for name in ("cost_usd", "train_flops_exact") if name in table.columns), "train_flops_exact")
