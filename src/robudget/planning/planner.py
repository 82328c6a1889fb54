"""What to train: the best recipes within a budget, or the cheapest way to a target accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget.columns import COSTS, column
from robudget.errors import InputError, unknown
from robudget.laws.frontier import fit_frontier
from robudget.laws.price import Price, next_target, price, priced_in
from robudget.meter.prices import Prices
from robudget.planning.allocation import allocation
from robudget.planning.answer import Lever, Measured, Option, Plan
from robudget.planning.candidates import candidate_recipes
from robudget.planning.cost_model import Budget, CostModel, difference, parse_budget
from robudget.planning.next_runs import EXPONENT, NextRuns, next_runs
from robudget.prediction.features import rows_of
from robudget.prediction.predictor import Predictor, Rows
from robudget.tables.read import as_table
from robudget.tables.usable import Floats, collapsed_rows, level_of, numbers_of, select_rows, standard_rows

FAIR_CHANCE = 0.25  # of reaching a target again, for a recipe that did so once
MOST_MARGIN = 1.0  # points of accuracy that count as a tie where the number of test images is unknown
RENT = "rent_usd"
AA_ENDS = ("aa_acc_low", "aa_acc_high")


def plan(
    source: pd.DataFrame | str | Path,
    budget: str | Budget | None = None,
    target: float | None = None,
    *,
    candidates: Rows | None = None,
    column: str | None = None,
    choose: Mapping[str, Any] | None = None,
    prices: Prices | None = None,
    top: int = 10,
    predictor: Predictor | None = None,
    seed: int = 0,
) -> Plan:
    """Rank recipes by predicted robust accuracy within `budget`, or find the cheapest ways to `target` percent.

    `candidates` are the recipes to choose from (recipes, or rows of a table); without them, every sensible combination
    of the choices found in the table, and step counts between them. `choose` fixes choices, e.g. {"synthetic": False};
    `column` is the cost to count a target in (dollars where known, else FLOPs); `prices` with `usd_per_gpu_hour` add
    the rent of the GPUs. Raises InputError for a budget that cannot be read, a target outside (0, 100), neither of the
    two, or a cost that the table does not know.
    """
    spend = parse_budget(budget) if isinstance(budget, str) else budget
    if (spend is None) == (target is None):
        raise InputError("a plan needs a budget (e.g. 50usd) or a target (e.g. 65), and not both")
    if target is not None and not 0 < target < 100:
        raise InputError(f"target = {target:g} (allowed: more than 0 and less than 100, in percent)")
    offer = _offer(source, candidates, column, choose, prices, predictor, seed, spend, target)
    table, model, _, options, counted = offer
    spent = np.array([o.costs[counted] for o in options])
    accuracy = np.array([o.aa_acc for o in options])
    untried = np.array([bool(o.untried) for o in options])
    warnings = list(table.attrs.get("notes", ()))
    fits = ~np.isnan(spent) & (spent <= (spend.amount if spend else np.inf))
    leader = _first(fits, untried, -accuracy)
    margin = _margin(options[leader], model, table) if leader is not None else np.nan
    if spend is not None:
        near = fits & (accuracy >= accuracy[leader] - margin) if leader is not None else fits
        first = _first(near, untried, spent)
        order = sorted(np.flatnonzero(fits), key=lambda i: (i != first, untried[i], -accuracy[i], spent[i]))
    else:
        order = sorted(np.flatnonzero(fits & _reaching(options, target or 0)), key=lambda i: (untried[i], spent[i]))
    # Where nothing reaches the target, what is nearest to it still shows which levers there are.
    best = options[order[0]] if order else (options[leader] if target is not None and leader is not None else None)
    next_point = _next_point(options, spent, accuracy, best)
    law = _law_price(table, choose, target, seed, warnings)
    levers = _levers(options, best, counted)
    half = {name: float(np.log(high / low)) / 2 for name, (low, high) in best.cost_intervals.items()} if best else {}
    marginal = difference(best.costs, next_point.costs, half) if best and next_point else {}
    measured = numbers_of(model.table, "aa_acc")
    stable = np.array([o.p_collapse < 0.5 for o in options])
    cheapest = _first(~np.isnan(spent) & (stable if (stable & ~np.isnan(spent)).any() else True), untried, spent)
    return Plan(
        spend, target, counted, tuple(options[i] for i in order[:top]), None if leader is None else options[leader],
        float(margin), best, None if cheapest is None else options[cheapest], next_point, marginal,
        (run_ids(model.table)[int(measured.argmax())], float(measured.max())), _lowest(model.table),
        int((measured >= (target or 0)).sum()),
        len(measured), law,
        allocation(model.table, best.choices, counted) if best else None, levers, _instead(levers, best, law),
        len(options),
        tuple(dict.fromkeys(warnings)), predictor=model,
    )  # fmt: skip


def plan_next(
    source: pd.DataFrame | str | Path,
    n: int,
    question: str = EXPONENT,
    *,
    target: float | None = None,
    budget: str | Budget | None = None,
    candidates: Rows | None = None,
    column: str | None = None,
    choose: Mapping[str, Any] | None = None,
    predictor: Predictor | None = None,
    seed: int = 0,
) -> NextRuns:
    """The `n` runs that tell most of `question` for what they cost: `exponent`, `price` (of `target`) or a choice
    whose effect is asked for; together within `budget`. The other arguments are those of `plan`."""
    spend = parse_budget(budget) if isinstance(budget, str) else budget
    table, _, rows, options, counted = _offer(source, candidates, column, choose, None, predictor, seed, spend, target)
    most = spend.amount if spend else float("inf")
    return next_runs(
        table, options, rows, counted, n, question=question, target=target, budget=most,
        tried_only=candidates is None, seed=seed,
    )  # fmt: skip


def _offer(
    source: pd.DataFrame | str | Path, candidates: Rows | None, column: str | None, choose: Mapping[str, Any] | None,
    prices: Prices | None, predictor: Predictor | None, seed: int, spend: Budget | None, target: float | None,
) -> tuple[pd.DataFrame, Predictor, pd.DataFrame, list[Option], str]:  # fmt: skip
    """The table, its predictor, the recipes to choose from as rows and as options, and the cost that is counted."""
    table = as_table(source)
    model = predictor or Predictor.fit(table, seed=seed)
    models = {name: CostModel.fit(table, name) for name in (*COSTS, RENT)}
    costs = {name: model for name, model in models.items() if model is not None}
    counted = column or (spend.column if spend else next((n for n in ("cost_usd", *costs) if n in costs), "cost_usd"))
    if counted not in costs:
        raise _not_known(counted, costs)
    recipes = candidate_recipes(model) if candidates is None else rows_of(candidates, table)
    rows = select_rows(recipes, choose).reset_index(drop=True)
    options = _options(rows, model, costs, target, prices)
    return table, model, rows, options, counted


def _first(which: NDArray[np.bool_], untried: NDArray[np.bool_], value: Floats) -> int | None:
    """The position of the smallest `value` among `which`, of recipes at tried levels where there is one."""
    pool = np.flatnonzero(which & ~untried) if (which & ~untried).any() else np.flatnonzero(which)
    return int(pool[np.argmin(value[pool])]) if len(pool) else None


def _reaching(options: Sequence[Option], target: float) -> NDArray[np.bool_]:
    """Recipes predicted to reach the target, and those measured to, if another run has a fair chance of it."""
    return np.array([
        o.aa_acc >= target or (o.measured is not None and o.measured.aa_acc >= target and o.p_reach >= FAIR_CHANCE)
        for o in options
    ])  # fmt: skip


def _margin(top: Option, model: Predictor, table: pd.DataFrame) -> float:
    """One standard error of the most accurate recipe, in points: the lower half of its interval as that of a normal
    distribution, or the noise of the test images where that is less (the rule of one standard error:
    Breiman et al. 1984, 3.4.3)."""
    from scipy.special import ndtri

    error = (top.aa_acc - top.low) / float(ndtri((1 + model.level) / 2))
    images = numbers_of(table, "n_eval") if "n_eval" in table else np.array([np.nan])
    share = top.aa_acc / 100
    noise = 100 * np.sqrt(share * (1 - share) / np.nanmedian(images)) if (images > 0).any() else MOST_MARGIN
    return float(min(error, noise))


def _not_known(counted: str, costs: Mapping[str, CostModel]) -> InputError:
    if not costs:
        return InputError(
            "the table knows no cost of any run: a plan counts in one, e.g. in train_flops_exact or cost_usd"
        )
    if counted not in COSTS:
        return unknown("cost of the table", counted, costs)
    why = " (runs on a CPU have none: say hours, as in 3h)" if counted == "gpu_hours" else ""
    units = ", ".join(_unit(name) for name in costs)
    return InputError(f"the table knows the {_unit(counted)} of no run{why} (allowed: {units})")


def _options(
    rows: pd.DataFrame, model: Predictor, costs: Mapping[str, CostModel], target: float | None, prices: Prices | None
) -> list[Option]:
    predictions = model.predict(rows)
    p_reach = model.p_above(rows, target) if target is not None else np.full(len(rows), np.nan)
    predicted = {name: cost.predict(rows) for name, cost in costs.items()}
    factors = {name: np.exp(cost.spread(rows, model.level)) for name, cost in costs.items()}
    hourly = prices.usd_per_gpu_hour if prices is not None else None
    if hourly is not None and "gpu_hours" in costs:
        predicted[RENT], factors[RENT] = hourly * predicted["gpu_hours"], factors["gpu_hours"]
    # A model's name says more than its number of parameters, where the one stands for the other.
    names = [
        "model" if c.name == "parameters" and "model" in c.aliases and "model" in rows else c.name
        for c in model.features.columns
    ]
    runs_of, ids = _runs_of(rows, model), run_ids(model.table)
    empty = np.full(len(model.table), np.nan)
    columns = ("aa_acc", *AA_ENDS, *costs)
    values = {name: numbers_of(model.table, name) if name in model.table else empty for name in columns}
    out = []
    for i, (prediction, choices) in enumerate(zip(predictions, rows[names].to_dict("records"), strict=True)):
        measured = _measured(runs_of[i], ids, values, list(costs)) if runs_of[i] else None
        if measured is not None and hourly is not None and "gpu_hours" in costs:
            measured.bill[RENT] = hourly * measured.bill["gpu_hours"]
        price = {name: float(values[i]) for name, values in predicted.items()}
        bill = {} if measured is None else {name: v for name, v in measured.bill.items() if not np.isnan(v)}
        out.append(Option(
            {str(k): _level_or_none(v) for k, v in choices.items()}, prediction.aa_acc, prediction.low, prediction.high,
            prediction.p_collapse, float(p_reach[i]), price | bill,
            {name: (value / factors[name][i], value * factors[name][i]) for name, value in price.items()},
            measured, prediction.nearest, prediction.outside, prediction.unseen,
        ))  # fmt: skip
    return out


def _runs_of(rows: pd.DataFrame, model: Predictor) -> list[list[int]]:
    """For each recipe the positions of its own runs in the predictor's table."""
    places: dict[bytes, list[int]] = {}
    for i, row in enumerate(model.features.matrix(model.table)):
        places.setdefault(row.tobytes(), []).append(i)
    return [places.get(row.tobytes(), []) for row in model.features.matrix(rows)]


def _measured(rows: list[int], ids: Sequence[str], values: Mapping[str, Floats], costs: Sequence[str]) -> Measured:
    """The runs at these rows of the table, whose columns are `values`."""
    accuracy = float(values["aa_acc"][rows].mean())
    root = np.sqrt(len(rows))  # the mean of n runs on as many images each
    low, high = (accuracy + float((values[end][rows] - values["aa_acc"][rows]).mean()) / root for end in AA_ENDS)
    return Measured(
        tuple(ids[i] for i in rows), accuracy, low, high, {name: float(values[name][rows].mean()) for name in costs}
    )


def _lowest(runs: pd.DataFrame) -> float:
    accuracy = numbers_of(runs, "aa_acc")[~collapsed_rows(runs) & ~standard_rows(runs)]
    return float(accuracy.min()) if len(accuracy) else float("nan")


def run_ids(runs: pd.DataFrame) -> list[str]:
    return [str(v) for v in runs.get("run_id", runs.index)]


def _level_or_none(value: Any) -> Any:
    return None if pd.isna(value) else level_of(value)


def _next_point(options: list[Option], price: Floats, accuracy: Floats, best: Option | None) -> Option | None:
    if best is None:
        return None
    tried = np.array([not o.untried for o in options])
    better = np.flatnonzero((accuracy >= best.aa_acc + 1) & ~np.isnan(price) & tried)
    return options[better[np.argmin(price[better])]] if len(better) else None


def _levers(options: list[Option], best: Option | None, counted: str) -> tuple[Lever, ...]:
    if best is None:
        return ()
    out = []
    for option in (o for o in options if not o.untried):
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


def _instead(levers: tuple[Lever, ...], best: Option | None, price: Price | None) -> str:
    """What moves the accuracy most for what it costs, compute set against everything else."""
    if best is None or not levers:
        return ""
    others = [lever for lever in levers if not lever.spends]
    up = max(others, key=lambda lever: lever.gain, default=None)
    parts = []
    if up is not None and up.gain >= 0.5:
        new = _as_words(up.feature, up.value)
        parts.append(f"{new} instead: {up.gain:+.1f} points at {up.cost_ratio:.2g}× the cost")
    down = min(others, key=lambda lever: lever.gain, default=None)
    if down is not None and down.gain <= -0.5:
        kept = _as_words(down.feature, best.choices[down.feature])
        parts.append(f"{kept} is worth {-down.gain:.1f} points here: keep it")
    if price is not None and (not price.reachable or price.decades > 1):
        far = f"{10**price.decades:.2g} times the costliest run" if price.reachable else "more than these runs can say"
        parts.append(
            f"{price.target:.4g}% by compute alone takes {far}: more or better data, another loss or another "
            "architecture would be the next thing to try"
        )
    return "; ".join(parts)


def _as_words(name: str, value: Any) -> str:
    return f"{column(name).phrase} = {column(name).level(value)}"


def _unit(name: str) -> str:
    return column(name).budget_unit


# -- what compute alone would cost -------------------------------------------------------------------------------------


def _law_price(
    table: pd.DataFrame, choose: Mapping[str, Any] | None, target: float | None, seed: int, warnings: list[str]
) -> Price | None:
    """What `target` percent, or one more point than the best run's, costs by the frontier of the runs with these
    choices; None where they hold no frontier, and `warnings` say so."""
    held = {name: value for name, value in (choose or {}).items() if name in table.columns}
    try:
        runs = select_rows(table, held)
        law = fit_frontier(runs, priced_in(runs), seed=seed)
        return price(runs, [target or next_target(law.points)], frontier=law, seed=seed)[0]
    except InputError as error:
        warnings.append(f"no law of the best runs: {error}")
        return None
