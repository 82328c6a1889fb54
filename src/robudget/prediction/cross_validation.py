"""Out-of-fold predictions: which model to choose by them, and the conformal intervals that are calibrated on them.

Folds are random, or leave out a whole architecture or step count. Intervals cover what they say for outcomes with two
modes: a recipe's accuracy is described by a mixture, with P(collapse) around the accuracy of a collapsed run, else
around a survivor's, each with the residuals seen out of fold (the survivors' scaled by how well their neighbours were
predicted: Papadopoulos, Vovk & Gammerman 2011). Central intervals of that mixture are then widened or narrowed until
the wanted share of the calibration runs lies inside (split conformal prediction with the nested intervals of Gupta,
Kuchibhotla & Ramdas 2022), which holds whether or not the mixture is right. Calibrating on out-of-fold predictions
while the model is refitted on all runs is ours; `bench/laws.py predictor` measures the coverage (bench/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget.files import fields
from robudget.laws.least_squares import r_squared
from robudget.prediction.regressors import MODELS, Bools, FittedModels, Kernels, ModelName, Outcomes
from robudget.tables.usable import Floats

FOLDS = 5
REPEATS = 2
GROUPS = ("parameters", "steps", "synthetic")  # what a new recipe may well have new
MOST_GROUPS = 8
MARGIN = 0.05  # relative; scores of a few hundred runs are no finer
FEWEST_LEFT = 8  # runs that must remain to fit on when a group is left out
NEIGHBOURS = 20
NEIGHBOUR_WEIGHT = 0.9  # in the local size of residuals; the rest is the mean over all runs
ROWS_AT_ONCE = 2_000


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
    outcomes: Outcomes
    folds: tuple[tuple[NDArray[np.int64], FittedModels], ...]  # left-out rows and the models fitted without them

    def first_repeat(self, n: int) -> Outcomes:
        """The first prediction of each of the n runs, in their order."""
        return self.outcomes.rows(np.argsort(self.rows[:n]))

    def scores(self, y: Floats, collapsed: Bools) -> tuple[Score, ...]:
        from sklearn.metrics import roc_auc_score

        truth, labels = y[self.rows], collapsed[self.rows]
        both = bool(labels.any()) and not labels.all()
        auc = float(roc_auc_score(labels, self.outcomes.p_collapse)) if both else float("nan")
        out = []
        for name in MODELS:
            residual = self.outcomes.by_model[name] - truth
            mae, rmse = float(np.abs(residual).mean()), float(np.sqrt((residual**2).mean()))
            out.append(Score(self.design, name, r_squared(residual, truth), mae, rmse, auc, len(truth)))
        return tuple(out)


def random_folds(
    X: Floats, y: Floats, collapsed: Bools, seed: int = 0, kernels: Kernels | None = None, repeats: int = REPEATS
) -> OutOfFold:
    """Repeated k-fold."""
    from sklearn.model_selection import KFold

    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(y)) for _ in range(repeats)]
    splits = [
        (np.sort(order[rest]), order[fold]) for order in orders for rest, fold in KFold(min(FOLDS, len(y))).split(order)
    ]
    return _predict("random", X, y, collapsed, splits, seed, kernels)


def leave_group_out(
    name: str, groups: Sequence[Any], X: Floats, y: Floats, collapsed: Bools, seed: int = 0,
    kernels: Kernels | None = None,
) -> OutOfFold | None:  # fmt: skip
    """Leave one level of `groups` (n,) out at a time; None where there are fewer than two levels, or too many, or one
    holds nearly all runs."""
    from sklearn.model_selection import LeaveOneGroupOut

    codes, levels = pd.factorize(pd.Series(list(groups)))
    if not 2 <= len(levels) <= MOST_GROUPS or len(y) - np.bincount(codes).max() < FEWEST_LEFT:
        return None
    splits = list(LeaveOneGroupOut().split(X, groups=codes))
    return _predict(f"by {name}", X, y, collapsed, splits, seed, kernels)


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
    design: str, X: Floats, y: Floats, collapsed: Bools, splits: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    seed: int, kernels: Kernels | None,
) -> OutOfFold:  # fmt: skip
    """`splits` are (rows to fit on, left-out rows)."""
    folds = [(fold, FittedModels(X[rest], y[rest], collapsed[rest], seed, kernels)) for rest, fold in splits]
    outcomes = Outcomes.joined([models.outcomes(X[fold]) for fold, models in folds])
    return OutOfFold(design, np.concatenate([fold for fold, _ in folds]), outcomes, tuple(folds))


# -- conformal intervals -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """`beta` is the central probability that the mixture's interval must have to cover `level` of the calibration runs;
    above 1 the interval reaches beyond the mixture's ends, by (beta − 1) × `spread` points. inf: too few runs."""

    level: float
    beta: float
    spread: float
    survivors: Floats = field(repr=False)  # residuals in units of their local size, (s,)
    collapsed: Floats = field(repr=False)  # residuals in points, (c,)
    features: Floats = field(repr=False)  # of the survivors, standardised, (s, p)
    sizes: Floats = field(repr=False)  # the survivors' absolute residuals in points, (s,)
    scaler: Any = field(repr=False)  # scikit-learn's, of all runs

    @classmethod
    def fit(cls, X: Floats, y: Floats, collapsed: Bools, out: Outcomes, level: float) -> Calibration:
        """From out-of-fold predictions `out` of the runs X (n, p), y (n,)."""
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(X)
        Z = scaler.transform(X)[~collapsed]
        residuals = (y - out.survivor)[~collapsed]
        sizes = np.abs(residuals)
        local = _local_size(Z, Z, sizes, skip_self=True) if len(sizes) else sizes
        of_collapsed = (y - out.collapsed)[collapsed]
        mixture = cls(
            level, 1.0, max(float(y.std()), 1e-9), np.sort(residuals / local),
            np.sort(of_collapsed[~np.isnan(of_collapsed)]), Z, sizes, scaler,
        )  # fmt: skip
        scores = np.sort(mixture._scores(X, y, out))
        rank = int(np.ceil((len(y) + 1) * level)) - 1
        return replace(mixture, beta=float(scores[rank]) if rank < len(scores) else float("inf"))

    def interval(self, X: Floats, out: Outcomes) -> tuple[Floats, Floats]:
        """(low, high), each (n,), in percent and inside [0, 100]."""
        low, high = np.empty(len(X)), np.empty(len(X))
        inside = min(self.beta, 1.0)
        margin = max(self.beta - 1.0, 0.0) * self.spread
        for start in range(0, len(X), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            values, cumulated = self._mixture(X[part], out.rows(part))
            low[part] = _row_quantiles(values, cumulated, (1 - inside) / 2, upper=False) - margin
            high[part] = _row_quantiles(values, cumulated, (1 + inside) / 2, upper=True) + margin
        return np.clip(low, 0, 100), np.clip(high, 0, 100)

    def above(self, X: Floats, out: Outcomes, target: float) -> Floats:
        """The mixture's probability of at least `target` percent, (n,)."""
        chances = []
        for start in range(0, len(X), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            values, cumulated = self._mixture(X[part], out.rows(part))
            chances.append(1 - np.where(values < target, cumulated, 0.0).max(axis=1) / cumulated[:, -1])
        return np.concatenate(chances)

    def _mixture(self, X: Floats, out: Outcomes) -> tuple[Floats, Floats]:
        """Support (n, s + c), ascending, and cumulative probability after each point."""
        s, c = len(self.survivors), len(self.collapsed)
        local = _local_size(self.scaler.transform(X), self.features, self.sizes) if s else np.ones(len(X))
        survivor = out.survivor[:, None] + local[:, None] * self.survivors[None]
        collapsed = out.collapsed[:, None] + self.collapsed[None]
        p = (out.p_collapse if c else np.zeros(len(X))) if s else np.ones(len(X))
        values = np.clip(np.concatenate([survivor, collapsed], axis=1), 0, 100)
        weights = np.concatenate([
            np.repeat((1 - p)[:, None] / max(s, 1), s, axis=1), np.repeat(p[:, None] / max(c, 1), c, axis=1),
        ], axis=1)  # fmt: skip
        order = np.argsort(values, axis=1, kind="stable")
        return np.take_along_axis(values, order, axis=1), np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)

    def _scores(self, X: Floats, y: Floats, out: Outcomes) -> Floats:
        """The smallest beta whose interval holds each y."""
        values, cumulated = self._mixture(X, out)
        total = cumulated[:, -1]
        below = np.where(values < y[:, None], cumulated, 0.0).max(axis=1) / total
        upto = np.where(values <= y[:, None], cumulated, 0.0).max(axis=1) / total
        # A quantile interval [Q(t), Q(1 − t)] holds y while t ≤ F(y) and 1 − t > F(y−).
        beta = np.maximum(0.0, np.maximum(1 - 2 * upto, 2 * below - 1))
        beyond = np.maximum(values[:, 0] - y, 0) + np.maximum(y - values[:, -1], 0)
        return np.asarray(np.where(beyond > 0, 1 + beyond / self.spread, np.minimum(beta, 1.0)))


def _row_quantiles(values: Floats, cumulated: Floats, level: float, upper: bool) -> Floats:
    """Row by row: the smallest value with F > level (lower end) or F ≥ level (upper end). By hand, as `numpy.quantile`
    has no F > level, and takes rows of different weights one at a time."""
    goal = (level * cumulated[:, -1])[:, None] - 1e-12
    index = (cumulated < goal if upper else cumulated <= goal).sum(axis=1)
    return np.asarray(values[np.arange(len(values)), np.minimum(index, values.shape[1] - 1)])


def _local_size(Z: Floats, known: Floats, sizes: Floats, skip_self: bool = False) -> Floats:
    """The typical residual near each row: root mean square over its nearest neighbours, a little from everywhere.

    By hand: scikit-learn's NearestNeighbors takes three times as long for a table of hundreds of runs, and breaks the
    many ties between discrete choices another way."""
    everywhere = float((sizes**2).mean())
    k = min(NEIGHBOURS, len(known) - skip_self)
    if k < 1:
        return np.full(len(Z), max(np.sqrt(everywhere), 1e-6))
    distance = (Z**2).sum(axis=1)[:, None] - 2 * Z @ known.T + (known**2).sum(axis=1)[None]
    if skip_self:
        np.fill_diagonal(distance, np.inf)
    near = np.argpartition(distance, k - 1, axis=1)[:, :k]
    square = NEIGHBOUR_WEIGHT * (sizes[near] ** 2).mean(axis=1) + (1 - NEIGHBOUR_WEIGHT) * everywhere
    return np.asarray(np.maximum(np.sqrt(square), 1e-6))
