"""Out-of-fold predictions of new recipes: which model to choose by them, and how good it is.

Folds are random, or leave out a whole architecture or step count. Runs of one recipe, which differ in the seed only,
are always in the same fold: a predictor that knows one seed of a recipe knows the others, and says nothing of a new
recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from robudget.files import fields
from robudget.laws.least_squares import r_squared
from robudget.prediction.features import Features
from robudget.prediction.regressors import MODELS, Bools, FittedModels, Kernels, ModelName, Outcomes
from robudget.prediction.repeats import Codes
from robudget.tables.usable import Floats

FOLDS = 5
REPEATS = 1
GROUPS = ("parameters", "steps", "synthetic")  # what a new recipe may well have new
MOST_GROUPS = 8
MARGIN = 0.05  # relative; scores of a few hundred runs are no finer
FEWEST_LEFT = 8  # runs that must remain to fit on when a group is left out


@dataclass(frozen=True)
class Score:
    """How well a model predicts runs that it was not fitted on: `r2`, `mae` and `rmse` (points), the area under the
    ROC curve of P(collapse) (NaN where none or all collapsed), over `n` predictions. `design` is `random` or `by
    <feature>`, in which every level of the feature is predicted from the others. `r2_survivors` and `mae_survivors` are
    over the `n_survivors` predictions of runs that did not collapse: most of the rest of R² is whether they do.
    """

    design: str
    model: ModelName
    r2: float
    mae: float
    rmse: float
    collapse_auc: float
    n: int
    r2_survivors: float = float("nan")
    mae_survivors: float = float("nan")
    n_survivors: int = 0

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


@dataclass(frozen=True)
class OutOfFold:
    """Every run predicted by models fitted without it; a repeat adds all runs again. `rows` (m,) are positions in X."""

    design: str
    rows: Codes
    outcomes: Outcomes
    folds: tuple[tuple[Codes, FittedModels], ...]  # left-out rows and the models fitted without them

    def first_repeat(self, n: int) -> Outcomes:
        """The first prediction of each of the n runs, in their order."""
        return self.outcomes.rows(np.argsort(self.rows[:n]))

    def first_folds(self, n: int) -> tuple[tuple[Codes, FittedModels], ...]:
        """The folds of the first repeat over n runs."""
        ends = np.cumsum([len(rows) for rows, _ in self.folds])
        return self.folds[: int(np.searchsorted(ends, n)) + 1]

    def scores(self, y: Floats, collapsed: Bools) -> tuple[Score, ...]:
        from sklearn.metrics import roc_auc_score

        truth, labels = y[self.rows], collapsed[self.rows]
        both = bool(labels.any()) and not labels.all()
        auc = float(roc_auc_score(labels, self.outcomes.p_collapse)) if both else float("nan")
        out = []
        for name in MODELS:
            residual = self.outcomes.by_model[name] - truth
            mae, rmse = float(np.abs(residual).mean()), float(np.sqrt((residual**2).mean()))
            some = ~labels
            out.append(Score(
                self.design, name, r_squared(residual, truth), mae, rmse, auc, len(truth),
                r_squared(residual[some], truth[some]) if some.any() else float("nan"),
                float(np.abs(residual[some]).mean()) if some.any() else float("nan"), int(some.sum()),
            ))  # fmt: skip
        return tuple(out)


@dataclass(frozen=True)
class OneSplit:
    """What a single yes-or-no question about one choice explains of left-out recipes: how much of a model's R² is the
    easiest part of it. The question is scikit-learn's decision tree of depth 1, fitted on all runs for `text`."""

    text: str
    r2: float
    mae: float

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


def random_folds(
    X: Floats, y: Floats, collapsed: Bools, seed: int = 0, kernels: Kernels | None = None, repeats: int = REPEATS,
    codes: Codes | None = None,
) -> OutOfFold:  # fmt: skip
    """Repeated k-fold over recipes `codes` (n,; default: each run its own)."""
    codes = np.arange(len(y)) if codes is None else codes
    return _predict("random", X, y, collapsed, recipe_folds(codes, seed, repeats), seed, kernels, codes)


def recipe_folds(codes: Codes, seed: int, repeats: int) -> list[tuple[Codes, Codes]]:
    """(rows to fit on, left-out rows) of repeated k-fold over recipes: scikit-learn's KFold of the recipes in random
    order, where its GroupKFold would balance the folds by their runs."""
    from sklearn.model_selection import KFold

    n = int(codes.max()) + 1
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(n) for _ in range(repeats)]
    out = []
    for order in orders:
        for _, fold in KFold(min(FOLDS, n)).split(order):
            left_out = np.isin(codes, order[fold])
            out.append((np.flatnonzero(~left_out), np.flatnonzero(left_out)))
    return out


def leave_group_out(
    name: str, groups: Sequence[Any], X: Floats, y: Floats, collapsed: Bools, seed: int = 0,
    kernels: Kernels | None = None, codes: Codes | None = None,
) -> OutOfFold | None:  # fmt: skip
    """Leave one level of `groups` (n,) out at a time; None where there are fewer than two levels, or too many, or one
    holds nearly all runs. Runs of a left-out recipe are not fitted on either, whatever their level."""
    from sklearn.model_selection import LeaveOneGroupOut

    codes = np.arange(len(y)) if codes is None else codes
    levels, labels = pd.factorize(pd.Series(list(groups)))
    if not 2 <= len(labels) <= MOST_GROUPS:
        return None
    splits = [
        (rest[~np.isin(codes[rest], codes[fold])], fold) for rest, fold in LeaveOneGroupOut().split(X, groups=levels)
    ]
    if min(len(rest) for rest, _ in splits) < FEWEST_LEFT:
        return None
    return _predict(f"by {name}", X, y, collapsed, splits, seed, kernels, codes)


def one_split(X: Floats, y: Floats, codes: Codes, features: Features, seed: int = 0) -> OneSplit:
    """By the same folds over recipes as the models' scores."""
    from sklearn.tree import DecisionTreeRegressor

    predicted = np.empty(len(y))
    for rest, fold in recipe_folds(codes, seed, 1):
        predicted[fold] = DecisionTreeRegressor(max_depth=1, random_state=seed).fit(X[rest], y[rest]).predict(X[fold])
    tree = DecisionTreeRegressor(max_depth=1, random_state=seed).fit(X, y).tree_
    residual = predicted - y
    column, threshold = int(max(tree.feature[0], 0)), float(tree.threshold[0])
    text = features.question(column, float(X[:, column][X[:, column] <= threshold].max(initial=-np.inf)))
    return OneSplit(text, r_squared(residual, y), float(np.abs(residual).mean()))


def choose_model(scores: Sequence[Score]) -> ModelName:
    """The model with the smallest error, mean absolute and root mean square alike, relative to the paper's in each
    design and averaged over designs; the blend, which averages the others, unless one beats it by more than MARGIN.
    The rule is ours; `bench/laws.py predictor` counts what it chooses."""
    designs = {s.design for s in scores}

    def error(name: ModelName) -> float:
        ratios = []
        for design in designs:
            of = {s.model: s.mae + s.rmse for s in scores if s.design == design}
            ratios.append(of[name] / of["gbr"] if of["gbr"] > 0 else 1.0)
        return float(np.mean(ratios))

    best = min(MODELS, key=error)
    return best if error(best) < (1 - MARGIN) * error("blend") else "blend"


def _predict(
    design: str, X: Floats, y: Floats, collapsed: Bools, splits: Sequence[tuple[Codes, Codes]], seed: int,
    kernels: Kernels | None, codes: Codes,
) -> OutOfFold:  # fmt: skip
    """`splits` are (rows to fit on, left-out rows)."""
    folds = [
        (fold, FittedModels(X[rest], y[rest], collapsed[rest], seed, kernels, codes[rest])) for rest, fold in splits
    ]
    outcomes = Outcomes.joined([models.outcomes(X[fold]) for fold, models in folds])
    return OutOfFold(design, np.concatenate([fold for fold, _ in folds]), outcomes, tuple(folds))
