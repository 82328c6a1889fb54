"""What a predictor depends on: importances, partial dependence, and where training collapses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from robudget.files import fields
from robudget.prediction.cross_validation import OutOfFold
from robudget.prediction.effects import mean_interval
from robudget.prediction.features import Feature, Features
from robudget.prediction.regressors import Bools, FittedModels, ModelName
from robudget.tables.usable import Floats

SHUFFLES = 5
RESAMPLES = 1_000
MOST_ROWS = 500  # of a table averaged over in a partial dependence
MOST_LEVELS = 12


@dataclass(frozen=True)
class Importance:
    """How much the predictor depends on a feature. `by_model`: the trees' own share of impurity, summing to 1.
    `by_permutation`: points of mean absolute error added on runs that the model was not fitted on when the feature is
    shuffled among them, with the 95% interval `low` to `high` (bootstrap over runs). `aliases` vary only together with
    the feature in this table.
    """

    feature: str
    by_model: float
    by_permutation: float
    low: float
    high: float
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Partial:
    """The mean predicted accuracy (percent) and P(collapse) over the table with `feature` set to each of `values`."""

    feature: str
    values: tuple[Any, ...]
    aa_acc: tuple[float, ...]
    p_collapse: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


@dataclass(frozen=True)
class CollapseMap:
    """P(collapse), averaged over the table's other choices, for every pair of levels of two features; `observed` is the
    share of real runs that collapsed (NaN without runs), `n` their number. Arrays are (first, second)."""

    first: str
    second: str
    first_values: tuple[Any, ...]
    second_values: tuple[Any, ...]
    p_collapse: Floats = field(repr=False)
    observed: Floats = field(repr=False)
    n: Any = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name) for name in ("p_collapse", "observed", "n")}
        return fields(self) | {name: [[_number(v) for v in row] for row in a] for name, a in arrays.items()}


def importances(
    model: ModelName, out: OutOfFold, fitted: FittedModels, features: Features, X: Floats, y: Floats, seed: int
) -> tuple[Importance, ...]:
    """By the model and by permutation (Breiman 2001), the most important by permutation first. `out`: folds over the
    whole table.

    By hand: scikit-learn's permutation_importance shuffles one matrix column at a time, where a category takes several,
    and predicts each copy by itself, which takes six times as long.
    """
    rng = np.random.default_rng(seed)
    names = np.array(features.names)
    shares = fitted.shares["gbr" if model == "gbr" else "forest"]
    added = np.zeros((len(features.columns), len(y)))
    for rows, fold in out.first_folds(len(y)):
        copies = []
        for feature in features.columns:
            columns = np.flatnonzero(names == feature.name)
            for _ in range(SHUFFLES):
                shuffled = X[rows].copy()
                shuffled[:, columns] = X[rng.permutation(rows)][:, columns]
                copies.append(shuffled)
        # One call for all copies: predicting has a fixed cost that would dominate otherwise.
        predicted = fold.outcomes(np.concatenate([X[rows], *copies])).by_model[model]
        error = np.abs(predicted.reshape(1 + len(copies), len(rows)) - y[rows])
        added[:, rows] = (error[1:] - error[0]).reshape(len(features.columns), SHUFFLES, len(rows)).mean(axis=1)
    parts = []
    for feature, errors in zip(features.columns, added, strict=True):
        low, high, _ = mean_interval(errors)
        share = float(shares[names == feature.name].sum())
        parts.append(Importance(feature.name, share, float(errors.mean()), low, high, feature.aliases))
    return tuple(sorted(parts, key=lambda importance: -importance.by_permutation))


def partial(model: ModelName, fitted: FittedModels, features: Features, table: pd.DataFrame, name: str) -> Partial:
    """The partial dependence on one feature (Friedman 2001). Raises InputError for an unknown one.

    By hand: scikit-learn's partial_dependence answers with one number a value, here it is two from one pass."""
    feature = features.named(name)
    values = _levels(feature, table)
    base = _sample(table)
    out = fitted.outcomes(np.concatenate([features.matrix(base.assign(**{feature.name: v})) for v in values]))
    accuracy, collapse = (v.reshape(len(values), len(base)).mean(axis=1) for v in (out.by_model[model], out.p_collapse))
    return Partial(feature.name, values, tuple(accuracy.tolist()), tuple(collapse.tolist()))


def collapse_chances(fitted: FittedModels, features: Features, table: pd.DataFrame, first: str, second: str) -> Floats:
    """The `p_collapse` of a CollapseMap. Raises InputError for a feature that the predictor does not know."""
    one, two = features.named(first), features.named(second)
    rows, columns = _levels(one, table), _levels(two, table)
    base = _sample(table)
    chances = np.empty((len(rows), len(columns)))
    for i, a in enumerate(rows):
        # One call for a row of cells: predicting has a fixed cost that would dominate otherwise.
        cells = [features.matrix(base.assign(**{one.name: a, two.name: b})) for b in columns]
        chances[i] = fitted.outcomes(np.concatenate(cells)).p_collapse.reshape(len(columns), len(base)).mean(axis=1)
    return chances


def collapse_map(
    chances: Floats, features: Features, table: pd.DataFrame, collapsed: Bools, first: str, second: str
) -> CollapseMap:
    """The `chances` of these models beside the runs (`collapsed` (n,) of the table's)."""
    one, two = features.named(first), features.named(second)
    rows, columns = _levels(one, table), _levels(two, table)
    shape = (len(rows), len(columns))
    observed, n = np.full(shape, np.nan), np.zeros(shape, dtype=np.int64)
    for i, a in enumerate(rows):
        for j, b in enumerate(columns):
            here = ((table[one.name] == a) & (table[two.name] == b)).to_numpy(dtype=np.bool_)
            n[i, j] = here.sum()
            observed[i, j] = collapsed[here].mean() if here.any() else np.nan
    return CollapseMap(one.name, two.name, rows, columns, chances, observed, n)


def _levels(feature: Feature, table: pd.DataFrame) -> tuple[Any, ...]:
    values = sorted(set(table[feature.name].dropna()))
    if len(values) > MOST_LEVELS:
        values = list(np.quantile(np.array(values, dtype=np.float64), np.linspace(0, 1, MOST_LEVELS)))
    return tuple(v.item() if isinstance(v, np.generic) else v for v in values)


def _sample(table: pd.DataFrame) -> pd.DataFrame:
    """Evenly spaced rows of a large table."""
    step = -(-len(table) // MOST_ROWS)
    return table.iloc[::step]


def _number(value: Any) -> float | int | None:
    if isinstance(value, int | np.integer):
        return int(value)
    return None if np.isnan(value) else float(value)
