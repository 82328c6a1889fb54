"""Every figure of the report, drawn into a folder as PDF, SVG and PNG.

The paper's 1a, 1b, 1c, 2, 3a, 3b, 3c, and: `fan`, `holdout`, `forms`, `collapse`, `partial`, `risk`, `price`, `others`.
A figure whose law or
predictor the analysis does not have is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from robudget.analysis import Analysis
from robudget.laws import Reach
from robudget.report.figures import forecast as figures_forecast
from robudget.report.figures import laws as figures_laws
from robudget.report.figures import predictor as figures_predictor
from robudget.report.figures import runs as figures_runs
from robudget.report.figures import style
from robudget.report.figures.drawn import FigureFile, save
from robudget.report.sections import others
from robudget.report.table import fill, how
from robudget.tables.usable import is_percent

Drawn = tuple[Figure, str] | None
POINTS = 5  # further points of accuracy that are priced
POOLED = "weighed together"


def draw_all(
    analysis: Analysis | None, table: pd.DataFrame, folder: Path | str, published: pd.DataFrame | None = None
) -> dict[str, FigureFile]:
    """Draw every figure that `table` and `analysis` have data for; name → files, title and caption, in the paper's
    order. `analysis` None draws those that need only the runs; `published` are models to set beside them
    (`others.beside`). Raises InputError for a table without runs."""
    rows = fill(table)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    with style.house():
        for name, title, draw in _plan(analysis, rows, published):
            drawn = draw()
            if drawn is not None:
                figure, caption = drawn
                out[name] = save(figure, folder, name, title=title, caption=caption)
    return out


def _plan(
    analysis: Analysis | None, rows: pd.DataFrame, published: pd.DataFrame | None
) -> Iterator[tuple[str, str, Callable[[], Drawn]]]:
    x = _compute(analysis, rows)
    if x is not None and rows["aa_acc"].notna().any():
        yield "1a", "Robust accuracy against compute", lambda: figures_runs.all_runs(rows, x)
    if analysis is not None:
        yield from _predictor(analysis)
    yield "2", "The effect of each choice", lambda: figures_runs.effects(rows)
    if analysis is not None:
        yield from _laws(analysis, fill(analysis.table))
    yield "collapse", "Where training collapsed", lambda: figures_runs.collapse_map(rows)
    if analysis is not None and analysis.predictor is not None:
        made = analysis.predictor
        yield "partial", "What each choice does to the prediction", lambda: figures_predictor.partials(made)
        yield "risk", "The predicted chance of collapse", lambda: figures_predictor.risk(made)
    if published is not None:
        yield "others", "Beside published models", lambda: others.figure(rows, published)


def _compute(analysis: Analysis | None, rows: pd.DataFrame) -> str | None:
    wanted = (*((analysis.x,) if analysis else ()), "train_flops_exact", "train_flops_paper")
    return next((c for c in wanted if c in rows and (rows[c] > 0).any()), None)


def _predictor(analysis: Analysis) -> Iterator[tuple[str, str, Callable[[], Drawn]]]:
    gbr, predictor = analysis.gbr, analysis.predictor
    if gbr is not None:
        yield "1b", "Predicted before training", lambda: figures_predictor.predicted(gbr, fill(analysis.table))
    if predictor is not None:
        yield (
            "1c",
            "What the predictor leans on",
            lambda: figures_predictor.importance(predictor.importances, predictor.n_runs),
        )


def _laws(analysis: Analysis, seen: pd.DataFrame) -> Iterator[tuple[str, str, Callable[[], Drawn]]]:
    """`seen` are the rows that the analysis was made of, by position."""
    env, average = analysis.envelope, analysis.average
    costs = {law.y: law for law in analysis.costs}
    yield "3a", "The best that compute bought", lambda: figures_laws.best_runs(analysis.law, seen)
    spent = next((costs[c] for c in ("cost_usd", "train_energy_kwh") if c in costs), None)
    if spent is not None:
        yield "3b", "Electricity against compute", lambda: figures_laws.cost(spent, seen, how(seen, spent.y))
    if "co2_kg" in costs:
        yield "3c", "Carbon against compute", lambda: figures_laws.cost(costs["co2_kg"], seen, how(seen, "co2_kg"))
    yield "fan", "Forecast", lambda: figures_forecast.fan(analysis.law, analysis.forms, average, seen)
    if analysis.holdouts:
        yield "holdout", "Hiding the costliest runs", lambda: figures_laws.holdout(analysis.holdouts[0], env, seen)
    if average is not None:
        yield "forms", "Competing forms", lambda: figures_laws.forms(average, seen)
    yield "price", "The price of the next point", lambda: figures_forecast.price(*_prices(analysis), float(env.xs[-1]))


def _prices(analysis: Analysis) -> tuple[list[str], list[list[Reach]]]:
    """What the headline, the saturating form and the average ask for each of the next points."""
    env = analysis.envelope
    if env.best != "max" or not is_percent(env.y):
        return [], []
    start = math.floor(float(env.ys.max())) + 1
    targets = [t for t in range(start, start + POINTS) if t < 100]
    chosen = [law for law in analysis.forms if law.name in ("power", "saturating")]
    names = [law.name for law in chosen]
    series = [[law.cost_at(t) for t in targets] for law in chosen]
    if analysis.average is not None:
        names.append(POOLED)
        series.append([analysis.average.cost_at(t) for t in targets])
    return names, series
