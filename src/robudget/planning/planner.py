"""What to train: the best recipes within a budget, or the cheapest way to a target accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget.columns import COLUMNS, COSTS, NONE_IF_MISSING, column
from robudget.errors import InputError, unknown
from robudget.files import fields
from robudget.laws.envelope import envelope_of
from robudget.laws.fit import auto_bins
from robudget.laws.form_selection import average, fit_forms
from robudget.laws.law import Reach
from robudget.planning.cost_model import Budget, CostModel, Span, difference, parse_budget
from robudget.prediction.features import rows_of
from robudget.prediction.predictor import Predictor, Rows
from robudget.tables.read import as_table
from robudget.tables.usable import Floats, level_of, numbers_of, points, select_rows

COST_SDS = 1.645  # standard deviations of a 90% interval, the predictor's level
LAW_RESAMPLES = 500
SAME_UNIT = 1e-4  # relative spread of a ratio of costs below which one is the other in another unit
MOST_CANDIDATES = 20_000
# Choices that only go together: a flag or loss, and the number that it switches on.
TOGETHER = tuple((c.switch, c.name) for c in COLUMNS.values() if c.switch)


@dataclass(frozen=True)
class Option:
    """One recipe: its `choices` (feature → value), predicted accuracy in percent with interval, and its cost in all
    units.

    `costs` maps the table's cost columns to whole-run totals (NaN: unknown) and `cost_intervals` to their 90%
    intervals, from the scatter of the runs. `p_reach` is the probability of reaching the plan's target (NaN for a
    budget). `ran` is the run_id if the table holds this very recipe; `nearest` are the real runs most like it:
    (run_id, aa_acc, distance). `outside` names the choices beyond what the table has tried: no run supports them.
    """

    choices: dict[str, Any]
    aa_acc: float
    low: float
    high: float
    p_collapse: float
    p_reach: float
    costs: dict[str, float]
    cost_intervals: dict[str, tuple[float, float]]
    ran: str | None
    nearest: tuple[tuple[str, float, float], ...]
    outside: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


@dataclass(frozen=True)
class Lever:
    """Changing one choice of the best option: `gain` in points and `cost_ratio` in the plan's column (1 = free).

    `spends` says whether the choice buys compute (size, steps, epochs) or something else (data, loss, activation)."""

    feature: str
    value: Any
    gain: float
    cost_ratio: float
    p_collapse: float
    spends: bool


@dataclass(frozen=True)
class Plan:
    """`options` best first (by accuracy within a budget, by cost for a target); empty if nothing fits, as `warnings`
    say.

    `column` is the cost the plan counts in. `best` is the first option, or, where no recipe reaches the target, the one
    of the highest accuracy. `next_point` is the cheapest recipe predicted a point better than `best`, if any, and
    `marginal` what it costs more, in all units. `reaches` are what the law of the best runs, averaged over forms, says
    of the target, or of one more point than the best run's: the price of buying it with compute alone, in `column`
    first and then in every other unit (empty where the table holds no law). `levers` are single changes to the best
    option, the most points first, and `instead` says in a sentence what helps more than compute.
    """

    budget: Budget | None
    target: float | None
    column: str
    options: tuple[Option, ...]
    best: Option | None
    next_point: Option | None
    marginal: dict[str, Span]
    reaches: tuple[Reach, ...]
    levers: tuple[Lever, ...]
    instead: str
    n_candidates: int
    warnings: tuple[str, ...] = ()
    predictor: Predictor = field(repr=False, kw_only=True)

    @property
    def reach(self) -> Reach | None:
        """What the law says, in the plan's own unit."""
        return self.reaches[0] if self.reaches else None

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


def plan(
    source: pd.DataFrame | str | Path,
    budget: str | Budget | None = None,
    target: float | None = None,
    *,
    candidates: Rows | None = None,
    column: str | None = None,
    choose: Mapping[str, Any] | None = None,
    top: int = 10,
    predictor: Predictor | None = None,
    seed: int = 0,
) -> Plan:
    """Rank recipes by predicted robust accuracy within `budget`, or find the cheapest ways to `target` percent.

    `candidates` are the recipes to choose from (recipes, or rows of a table); without them, every sensible combination
    of the choices found in the table, and step counts between them. `choose` fixes choices, e.g. {"synthetic": False};
    `column` is the cost to count a target in (dollars where known, else FLOPs). Raises InputError for a budget that
    cannot be read, a target outside (0, 100), neither of the two, or a cost that the table does not know.
    """
    spend = parse_budget(budget) if isinstance(budget, str) else budget
    if (spend is None) == (target is None):
        raise InputError("a plan needs a budget (e.g. 50usd) or a target (e.g. 65), and not both")
    if target is not None and not 0 < target < 100:
        raise InputError(f"target = {target:g} (allowed: more than 0 and less than 100, in percent)")
    table = as_table(source)
    model = predictor or Predictor.fit(table, seed=seed)
    models = {name: CostModel.fit(table, name) for name in COSTS}
    costs = {name: model for name, model in models.items() if model is not None}
    counted = column or (spend.column if spend else next((n for n in ("cost_usd", *costs) if n in costs), "cost_usd"))
    if counted not in costs:
        raise _not_known(counted, costs)
    recipes = candidate_recipes(model) if candidates is None else rows_of(candidates, table)
    rows = select_rows(recipes, choose).reset_index(drop=True)
    options = _options(rows, model, costs, target)
    price = np.array([o.costs[counted] for o in options])
    accuracy = np.array([o.aa_acc for o in options])
    warnings = list(table.attrs.get("notes", ()))
    if spend is not None:
        fits = np.flatnonzero(price <= spend.amount)
        order = fits[np.lexsort((price[fits], -accuracy[fits]))]
        if not len(order):
            warnings.append(_nothing_fits(spend, price, counted))
    else:
        reaching = np.flatnonzero((accuracy >= (target or 0)) & ~np.isnan(price))
        order = reaching[np.argsort(price[reaching], kind="stable")]
        if not len(order):
            warnings.append(
                f"no recipe made of the table's choices is predicted to reach {target:g}%: the best reaches "
                f"{accuracy.max():.1f}%"
            )
    # Where nothing reaches the target, what is nearest to it still shows which levers there are.
    best = options[order[0]] if len(order) else (options[int(accuracy.argmax())] if target is not None else None)
    if best is not None and best.outside:
        warnings.append(
            f"the table never tried the first one's {', '.join(best.outside)}: no run supports its prediction"
        )
    next_point = _next_point(options, price, accuracy, best)
    reaches = _reaches(table, counted, [name for name in costs if name != counted], target, seed, warnings)
    levers = _levers(options, best, counted)
    scatter = {name: cost.scatter for name, cost in costs.items()}
    marginal = difference(best.costs, next_point.costs, scatter, COST_SDS) if best and next_point else {}
    return Plan(
        spend, target, counted, tuple(options[i] for i in order[:top]), best, next_point, marginal, reaches,
        levers, _instead(levers, best, reaches[0] if reaches else None), len(options), tuple(dict.fromkeys(warnings)),
        predictor=model,
    )  # fmt: skip


def _not_known(counted: str, costs: Mapping[str, CostModel]) -> InputError:
    if not costs:
        return InputError("the table knows no cost of any run")
    if counted not in COSTS:
        return unknown("cost of the table", counted, costs)
    why = " (runs on a CPU have none: say hours, as in 3h)" if counted == "gpu_hours" else ""
    units = ", ".join(_unit(name) for name in costs)
    return InputError(f"the table knows the {_unit(counted)} of no run{why} (allowed: {units})")


def _nothing_fits(spend: Budget, price: Floats, counted: str) -> str:
    if np.isnan(price).all():
        return f"what the recipes cost in {_unit(counted)} is unknown: their parameters or their images seen are"
    return f"no recipe fits {spend.text}: the cheapest costs {np.nanmin(price):.3g} {_unit(counted)}"


def _options(
    rows: pd.DataFrame, model: Predictor, costs: Mapping[str, CostModel], target: float | None
) -> list[Option]:
    predictions = model.predict(rows)
    p_reach = model.p_above(rows, target) if target is not None else np.full(len(rows), np.nan)
    prices = {name: cost.predict(rows) for name, cost in costs.items()}
    factors = {name: float(np.exp(COST_SDS * cost.scatter)) for name, cost in costs.items()}
    # A model's name says more than its number of parameters, where the one stands for the other.
    names = [
        "model" if c.name == "parameters" and "model" in c.aliases and "model" in rows else c.name
        for c in model.features.columns
    ]
    out = []
    for i, (prediction, choices) in enumerate(zip(predictions, rows[names].to_dict("records"), strict=True)):
        run_id, _, distance = prediction.nearest[0]
        price = {name: float(values[i]) for name, values in prices.items()}
        out.append(Option(
            {str(k): _level_or_none(v) for k, v in choices.items()}, prediction.aa_acc, prediction.low, prediction.high,
            prediction.p_collapse, float(p_reach[i]), price,
            {name: (value / factors[name], value * factors[name]) for name, value in price.items()},
            run_id if distance == 0 else None, prediction.nearest, prediction.outside,
        ))  # fmt: skip
    return out


def _level_or_none(value: Any) -> Any:
    return None if pd.isna(value) else level_of(value)


def _next_point(options: list[Option], price: Floats, accuracy: Floats, best: Option | None) -> Option | None:
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
        # β comes and goes with the loss: one change, not two.
        absent = {k for k in changed if None in (option.choices[k], best.choices[k])}
        changed = [k for k in changed if k not in absent] or changed
        if len(changed) == 1:
            out.append(Lever(
                changed[0], option.choices[changed[0]], option.aa_acc - best.aa_acc,
                option.costs[counted] / best.costs[counted], option.p_collapse, column(changed[0]).spends,
            ))  # fmt: skip
    return tuple(sorted(out, key=lambda lever: -lever.gain))


def _instead(levers: tuple[Lever, ...], best: Option | None, reach: Reach | None) -> str:
    """What moves the accuracy most for what it costs, compute set against everything else."""
    if best is None or not levers:
        return ""
    others = [lever for lever in levers if not lever.spends]
    up = max(others, key=lambda lever: lever.gain, default=None)
    parts = []
    if up is not None and up.gain >= 0.5:
        parts.append(f"{up.feature} = {up.value} instead: {up.gain:+.1f} points at {up.cost_ratio:.2g}× the cost")
    down = min(others, key=lambda lever: lever.gain, default=None)
    if down is not None and down.gain <= -0.5:
        parts.append(f"{down.feature} = {best.choices[down.feature]} is worth {-down.gain:.1f} points here; keep it")
    if reach is not None and not reach.reachable:
        parts.append(
            f"compute alone does not buy {reach.target:.4g}% in this recipe family: more or better data, another loss "
            "or architecture would have to"
        )
    elif reach is not None and reach.decades > 1:
        parts.append(
            f"compute alone would need {10**reach.decades:.2g} times the costliest run for {reach.target:.4g}%: try "
            "more or better data, another loss or architecture first"
        )
    return "; ".join(parts)


def _unit(name: str) -> str:
    return column(name).budget_unit


# -- the recipes to choose from, where none are given ------------------------------------------------------------------


def candidate_recipes(model: Predictor) -> pd.DataFrame:
    """Every sensible combination of the choices in the predictor's table; columns that vary only with one follow it."""
    table, features = model.table, model.features.columns
    levels = []
    for c in features:
        values = sorted(set(table[c.name].dropna()))
        if c.name == "steps":  # whole numbers between those that were run are recipes, too
            low = int(min(v for v in values if v > 0))
            values = sorted({int(v) for v in values} | set(range(low, int(values[-1]) + 1)))
        if c.name in NONE_IF_MISSING and table[c.name].isna().any():  # none at all, as β without TRADES
            values = [np.nan, *values]
        levels.append(values)
    if np.prod([len(v) for v in levels], dtype=float) > MOST_CANDIDATES:
        raise InputError(
            f"the table's choices make more than {MOST_CANDIDATES} recipes: give candidates (a study's grid)"
        )
    rows = pd.DataFrame(list(product(*levels)), columns=[c.name for c in features])
    for c in features:
        followers = [a for a in c.aliases if a in table.columns]
        if followers:
            rows = rows.join(table.drop_duplicates(c.name).set_index(c.name)[followers], on=c.name)
    for name in table.columns:
        if name not in rows.columns and table[name].nunique(dropna=False) == 1:
            rows[name] = table[name].iloc[0]
    return rows.loc[_sensible(rows, table)].reset_index(drop=True)


def _sensible(rows: pd.DataFrame, table: pd.DataFrame) -> NDArray[np.bool_]:
    """Rows in which what only goes together does so as in some run: no attack steps without an adversarial loss."""
    keep = np.ones(len(rows), dtype=np.bool_)
    for switch, number in TOGETHER:
        if {switch, number} <= set(rows.columns) & set(table.columns):
            known = set(zip(table[switch], table[number].fillna(0) > 0, strict=True))
            keep &= np.array([pair in known for pair in zip(rows[switch], rows[number].fillna(0) > 0, strict=True)])
    return keep


# -- what compute alone would cost -------------------------------------------------------------------------------------


def _reaches(
    table: pd.DataFrame, first: str, others: Sequence[str], target: float | None, seed: int, warnings: list[str]
) -> tuple[Reach, ...]:
    """What `target` percent costs by the average over forms, in the column `first` and then in `others`; without a
    target, what one point more than the best run costs. Columns without a law are left out; where it is the first, none
    is left, and `warnings` say so."""
    reaches: dict[str, Reach] = {}
    for name in (first, *others):
        ratios = {other: _ratio(table, other, name) for other in reaches}
        other = next((other for other, ratio in ratios.items() if ratio is not None), None)
        if other is not None:
            one, ratio = reaches[other], ratios[other] or 1.0
            reaches[name] = replace(one, x=name, value=one.value * ratio, low=one.low * ratio, high=one.high * ratio)
            continue
        try:
            runs = points(table, name, "aa_acc")
            env = envelope_of(runs, auto_bins(runs.counts.used))
            forms = average(fit_forms(env, resamples=LAW_RESAMPLES, seed=seed))
            reaches[name] = forms.cost_at(target or min(float(env.ys.max()) + 1, 99.9))
        except InputError as error:
            if name == first:
                warnings.append(f"no law of {name}: {error}")
                return ()
    return tuple(reaches.values())


def _ratio(table: pd.DataFrame, one: str, other: str) -> float | None:
    """How many units of `other` one of `one` is, where that is the same for every run."""
    a, b = numbers_of(table, one), numbers_of(table, other)
    if not np.array_equal(a > 0, b > 0) or not (a > 0).any():
        return None
    ratios = b[a > 0] / a[a > 0]
    middle = float(np.median(ratios))
    return middle if float(np.abs(ratios / middle - 1).max()) < SAME_UNIT else None
