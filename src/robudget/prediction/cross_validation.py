"""Which model to trust: out-of-fold predictions, at random and with a whole architecture or step count left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget.files import fields
from robudget.prediction.regressors import MODELS, Bools, Fitted, Kernels, ModelName, Outlook
from robudget.tables.usable import Floats

FOLDS = 5
REPEATS = 2
GROUPS = ("parameters", "steps", "synthetic")  # what a new recipe may well have new
MOST_GROUPS = 8
MARGIN = 0.05  # scores of a few hundred runs are no finer
FEWEST_LEFT = 8  # runs that must remain to fit on when a group is left out


@dataclass(frozen=True)
class Score:
    """How well a model predicts runs that it was not fitted on: `r2`, `mae` and `rmse` (points), the area under the
    ROC curve of P(collapse) (NaN where none or all collapsed), over `n` predictions. `design` is `random` or `by
    <feature>`, in which every level of the feature is predicted from the others.
    """

    design: str
    model: ModelName
    r2: float
    mae: float
    rmse: float
    collapse_auc: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


@dataclass(frozen=True)
class OutOfFold:
    """Every run predicted by models fitted without it; a repeat adds all runs again. `rows` (m,) are positions in X."""

    design: str
    rows: NDArray[np.int64]
    outlook: Outlook
    folds: tuple[tuple[NDArray[np.int64], Fitted], ...]  # left-out rows and the models that never saw them

    def once(self, n: int) -> Outlook:
        """The first prediction of each of the n runs, in their order."""
        return self.outlook.rows(np.argsort(self.rows[:n]))

    def scores(self, y: Floats, collapsed: Bools) -> tuple[Score, ...]:
        truth, fell = y[self.rows], collapsed[self.rows]
        auc = _auc(self.outlook.p_collapse, fell)
        total = float(((truth - truth.mean()) ** 2).sum())
        out = []
        for name in MODELS:
            miss = self.outlook.by_model[name] - truth
            r2 = 1 - float((miss**2).sum()) / total if total else float("nan")
            mae, rmse = float(np.abs(miss).mean()), float(np.sqrt((miss**2).mean()))
            out.append(Score(self.design, name, r2, mae, rmse, auc, len(truth)))
        return tuple(out)


def at_random(
    X: Floats, y: Floats, collapsed: Bools, seed: int = 0, kernels: Kernels | None = None, repeats: int = REPEATS
) -> OutOfFold:
    """Repeated k-fold."""
    rng = np.random.default_rng(seed)
    folds = [part for _ in range(repeats) for part in np.array_split(rng.permutation(len(y)), min(FOLDS, len(y)))]
    return _predict("random", X, y, collapsed, folds, seed, kernels)


def by_group(
    name: str, groups: Sequence[Any], X: Floats, y: Floats, collapsed: Bools, seed: int = 0,
    kernels: Kernels | None = None,
) -> OutOfFold | None:  # fmt: skip
    """Leave one level of `groups` (n,) out at a time; None where there are fewer than two levels, or too many, or one
    holds nearly all runs."""
    codes, levels = pd.factorize(pd.Series(list(groups)))
    if not 2 <= len(levels) <= MOST_GROUPS or len(y) - np.bincount(codes).max() < FEWEST_LEFT:
        return None
    folds = [np.flatnonzero(codes == code) for code in range(len(levels))]
    return _predict(f"by {name}", X, y, collapsed, folds, seed, kernels)


def choose(scores: Sequence[Score]) -> ModelName:
    """The model with the smallest error, mean absolute and root mean square alike, relative to the paper's in each
    design
    and averaged over designs; the blend, which averages the others, unless one beats it by more than MARGIN."""
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
    design: str, X: Floats, y: Floats, collapsed: Bools, folds: Sequence[NDArray[np.int64]], seed: int,
    kernels: Kernels | None,
) -> OutOfFold:  # fmt: skip
    models, outlooks = [], []
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(y)), fold)
        models.append(Fitted(X[rest], y[rest], collapsed[rest], seed, kernels))
        outlooks.append(models[-1].outlook(X[fold]))
    return OutOfFold(
        design,
        np.concatenate(folds),
        Outlook(
            {name: np.concatenate([o.by_model[name] for o in outlooks]) for name in MODELS},
            np.concatenate([o.p_collapse for o in outlooks]),
            np.concatenate([o.survivor for o in outlooks]),
            np.concatenate([o.fallen for o in outlooks]),
        ),
        tuple(zip(folds, models, strict=True)),
    )


def _auc(score: Floats, positive: Bools) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting half."""
    n = int(positive.sum())
    if n in (0, len(positive)):
        return float("nan")
    ranks = pd.Series(score).rank().to_numpy()
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))
