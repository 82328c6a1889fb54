"""What the verb `sweep` does before and beside the sweep: which runs, on what terms, what they would cost, detached."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
import time as clock
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.text import Text

from robudget import stop
from robudget.cli.view.console import TextTable, duration
from robudget.cli.view.sweeps import money
from robudget.errors import InputError, unknown
from robudget.execution import Site
from robudget.formats import UNKNOWN, known
from robudget.meter.prices import Prices
from robudget.recipe import Recipe
from robudget.store import ENDED_EARLY, Store, writing
from robudget.sweep.drive import ORDERS, Terms
from robudget.sweep.halving import Adaptive, rungs
from robudget.sweep.ledger import Budget, Ledger, Spend
from robudget.sweep.queue import SweepState
from robudget.sweep.study import Study

FRONTIER = "frontier-first"
MOST = 40  # runs that a dry run shows


def chosen_recipes(study: Study, only: Sequence[str] | None) -> list[Recipe]:
    """The study's recipes whose slug or id holds one of the patterns (`*` and `?` stand for anything, for one sign)."""
    if not only:
        return list(study.recipes)
    patterns = [f"*{pattern.lower()}*" for pattern in only]
    recipes = [r for r in study.recipes if any(fnmatch.fnmatchcase(f"{r.slug}-{r.id}".lower(), p) for p in patterns)]
    if not recipes:
        example = study.recipes[0].slug if study.recipes else ""
        raise InputError(f"--only {' '.join(only)}: no run of {study.name} has that in its name (e.g. {example})")
    return recipes


def terms_of(
    study: Study,
    recipes: Sequence[Recipe],
    store: str,
    site: Site,
    on: str,
    *,
    order: str,
    budget: str | None,
    prices: str | None,
    limit: int | None,
    max_failures: int | None,
    adaptive: Adaptive,
) -> Terms:
    limits = Budget.parse(budget, Prices.load(prices) if prices else None) if budget is not None else None
    if limits is not None and limits.unit == "gpu_hours" and site.device == "cpu":
        raise InputError(f"--budget {budget} with device = cpu, which takes no GPU (allowed: usd, kWh)")
    ranks = frontier_ranks(recipes, store) if order == FRONTIER else None
    if ranks is None and order not in ORDERS:
        raise unknown("order", order, [*ORDERS, FRONTIER])
    if adaptive.eta:
        rungs(recipes, adaptive.eta)  # raises where there is none
    return Terms(order, ranks, limit, limits, max_failures, adaptive, study.name, on)


def frontier_ranks(recipes: Sequence[Recipe], store: str) -> list[float]:
    """Recipes by Pareto front of predicted robust accuracy against work, the best front first, and within a front the
    cheapest first (ours). Raises InputError where the store has too few runs to predict from."""
    from robudget.forecast.passes import weight
    from robudget.prediction import Predictor
    from robudget.tables.read import load_runs

    try:
        table = load_runs(store)
        predicted = [each.aa_acc for each in Predictor.fit(table).predict(list(recipes))]
    except InputError as error:
        raise InputError(f"--order {FRONTIER} predicts from the store's runs: {error} (or cheapest-first)") from None
    work = [weight(recipe) for recipe in recipes]
    ranks, left, front = [0.0] * len(recipes), sorted(range(len(recipes)), key=lambda i: (work[i], -predicted[i])), 0
    while left:
        best, behind = -float("inf"), []
        for index in left:
            if predicted[index] > best:
                best, ranks[index] = (
                    predicted[index],
                    front * len(recipes) + len(recipes) - len(left) + work[index] / sum(work),
                )
            else:
                behind.append(index)
        left, front = behind, front + 1
    return ranks


def set_end(time: str | None) -> None:
    """The end of this job's time: as asked for, else as Slurm says; workers take it from the environment."""
    if time is not None:
        os.environ[stop.END_TIME] = str(int(clock.time() + stop.seconds_of(time)))
    stop.end_of_job()


def detached(store: Store, title: str) -> str:
    """Start the same command in a session of its own, and say where it is."""
    log = store.root / ".sweeps" / f"{title}.log"
    with writing(store.root):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "robudget", *(word for word in sys.argv[1:] if word != "--detach")],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
    return f"process {process.pid}, log {log}\nrobudget status {store.root}\nrobudget stop {store.root}"


def forecast_rows(recipes: Sequence[Recipe], store: Store, terms: Terms, device: str | None) -> list[dict[str, Any]]:
    """What a dry run says: a row a run in the order of the sweep, those done first, and one for all. Seconds, kWh and
    usd as measured of a done run, else as forecast: by the finished runs of the store, or on a device of the table."""
    state = SweepState.begin(recipes, store, adaptive=bool(terms.adaptive))
    ledger = Ledger(recipes, state.weights, store)
    prices = terms.prices
    table: dict[str, dict[str, Any]] = {}
    if device is not None:
        from robudget.forecast.forecast import forecast_study

        table = {each.id: each.to_dict() for each in forecast_study(recipes, device=device, prices=prices)}
    to_do = terms.sorted(state.to_do, state.weights)
    pending, rows = set(to_do), []
    for index in [*(i for i in range(len(recipes)) if i not in pending), *to_do]:
        recipe = recipes[index]
        row: dict[str, Any] = {"run": recipe.slug, "id": recipe.id, "state": "to do" if index in pending else "done"}
        if index in state.ended_before:
            row |= {"state": ENDED_EARLY}
            spend, how = ledger.begun.get(index, Spend(*[float("nan")] * 4)), "measured"
        elif index in ledger.done:
            spend, how = ledger.done[index], "measured"
        elif device is not None:
            found = table[recipe.id]
            both = {name: found[f"train_{name}"] + found[f"eval_{name}"] for name in ("seconds", "energy_kwh")}
            usd = found["cost_usd"] + found["eval_cost_usd"]
            rows.append(
                row | {"seconds": both["seconds"], "kwh": both["energy_kwh"], "usd": usd, "how": f"table, {device}"}
            )
            continue
        else:
            known_spend = ledger.forecast(index)
            if known_spend is None:
                rows.append(row | {"seconds": None, "kwh": None, "usd": None, "how": "unknown"})
                continue
            spend, how = known_spend, "by the store's runs"
        rows.append(row | {"seconds": spend.seconds, "kwh": spend.kwh, "usd": spend.usd(prices), "how": how})
    return rows


def early_text(state: SweepState, store: Store, terms: Terms) -> str:
    """How many runs were ended early, and what that saved; "" where none was."""
    early = [*state.ended_before, *state.ended_early]
    if not early:
        return ""
    saved = Ledger(state.recipes, state.weights, store).saved(early)
    what = UNKNOWN if saved is None else money(asdict(saved) | {"usd": saved.usd(terms.prices)})
    now = f", {len(state.ended_early)} of them now" if state.ended_before else ""
    return f"{len(early)} runs were ended early{now}: saved {what} (forecast less spent)"


def dry_run_text(rows: Sequence[dict[str, Any]], question: str) -> Group:
    shown = [_row(row) for row in rows[:MOST]]
    to_do = [row for row in rows if row["state"] == "to do"]
    for name, some in (("all to do", to_do), ("all", rows)):
        total = {key: None if any(row[key] is None for row in some) else sum(row[key] for row in some) for key in COSTS}
        shown.append(_row({"run": f"{name} ({len(some)})", "id": "", "state": "", "how": "", **total}))
    lines = []
    if len(rows) > MOST:
        lines.append(Text(f"the first {MOST} of {len(rows)} runs; --json has them all", style="dim"))
    if any(row["how"] == "unknown" for row in rows):
        lines.append(Text("no run of this store is finished to forecast from; --device NAME forecasts by a table, and "
                          "robudget cost by a calibration of this machine", style="dim"))  # fmt: skip
    return Group(TextTable(shown, title=question, left=("run", "id", "state", "how")), *lines)


COSTS = ("seconds", "kwh", "usd")


def _row(row: dict[str, Any]) -> dict[str, str]:
    def write(value: float | None) -> str:
        return UNKNOWN if value is None or not known(value) else f"{value:.3g}"

    return {
        "run": row["run"],
        "id": row["id"],
        "state": row["state"],
        "time": duration(row["seconds"]),
        "kWh": write(row["kwh"]),
        "usd": write(row["usd"]),
        "how": row["how"],
    }
