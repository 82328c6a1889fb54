"""The regressors behind a prediction: the paper's gradient boosting, and models that treat collapse as what it is.

Robust accuracy is bimodal where training sometimes collapses, and no mean describes a coin. So three things are fitted:
the probability of collapse (forest, support vectors and a Gaussian process, their log-odds averaged), the accuracy of
what survives (forest and Gaussian process, averaged) and of what collapsed (forest). Four predictors are made of them:

- `gbr`: the paper's gradient boosting on everything;
- `forest`: a random forest on everything;
- `mixture`: survivor and fallen accuracy, weighted by P(collapse) with sharpened odds: a point prediction that leans to
  the likelier outcome, between the mean (best for R²) and the median (best for the mean absolute error);
- `blend`: 0.7 mixture, 0.3 forest.

scikit-learn takes a second to import, so it is imported where a model is fitted: laws without a predictor start light.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from robudget.tables.usable import Floats

ModelName = Literal["gbr", "forest", "mixture", "blend"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
Bools = NDArray[np.bool_]
Predict = Callable[[Floats], Floats]

MIN_EACH = 3  # fewer collapsed (or surviving) runs than this and no collapse model is fitted: their share stands
FOLDS = 5  # of the support vectors' calibration, which takes as many of each class
TREES = 50
GP_MOST = 600  # runs a Gaussian process sees: its cost is cubic
SURE = 0.003  # log-odds are clipped here: no model of a few hundred runs is surer
CONFIDENCE = 1.5  # on the averaged log-odds: an average of cautious models is more cautious than the runs warrant
LEAN = 4 / 3  # power of the odds in the point prediction
FOREST_SHARE = 0.3  # of the blend


@dataclass(frozen=True)
class Kernels:
    """Fitted kernels of the two Gaussian processes, to refit them on parts of the same table without a new search."""

    collapse: Any
    survivor: Any


@dataclass(frozen=True)
class Outlook:
    """Predictions for n recipes, each (n,): accuracy by every model, P(collapse), and the accuracy if it does not
    (`survivor`) or does collapse (`fallen`)."""

    by_model: dict[ModelName, Floats]
    p_collapse: Floats
    survivor: Floats
    fallen: Floats

    def rows(self, keep: Any) -> Outlook:
        return Outlook(
            {k: v[keep] for k, v in self.by_model.items()},
            self.p_collapse[keep],
            self.survivor[keep],
            self.fallen[keep],
        )


class Fitted:
    """All models fitted to (X (n, p), y (n,) percent, collapsed (n,)); `outlook(X)` predicts with each.

    Features are standardised by this table. `kernels` skips the search for the Gaussian processes' length scales.
    `shares` are the impurity importances (p,) of the two models of everything.
    """

    def __init__(self, X: Floats, y: Floats, collapsed: Bools, seed: int = 0, kernels: Kernels | None = None) -> None:
        self.centre = X.mean(axis=0)
        self.scale = np.where(X.std(axis=0) > 0, X.std(axis=0), 1.0)
        Z = self._standard(X)
        self.limits = float(y.min()), float(y.max())
        boosting, forest = paper_gbr(X, y, seed), _forest_of(Z, y, seed)
        self.gbr, self.forest = _call(boosting), _call(forest)
        self.shares = {"gbr": boosting.feature_importances_, "forest": forest.feature_importances_}
        self.collapse, kernel = _collapse_model(Z, collapsed, seed, kernels)
        self.survivor, other = _survivor_model(Z[~collapsed], y[~collapsed], seed, kernels)
        self.fallen = _forest(Z[collapsed], y[collapsed], seed) if collapsed.any() else _constant(0.0)
        self.kernels = Kernels(kernel, other)

    def outlook(self, X: Floats) -> Outlook:
        Z = self._standard(X)
        p = self.collapse(Z)
        survivor, fallen = np.clip(self.survivor(Z), *self.limits), self.fallen(Z)
        forest = self.forest(Z)
        leaning = expit(LEAN * logit(np.clip(p, 1e-9, 1 - 1e-9)))
        mixture = leaning * fallen + (1 - leaning) * survivor
        blend = (1 - FOREST_SHARE) * mixture + FOREST_SHARE * forest
        by_model: dict[ModelName, Floats] = {
            "gbr": self.gbr(X), "forest": forest, "mixture": mixture, "blend": blend,
        }  # fmt: skip
        return Outlook(by_model, p, survivor, fallen)

    def _standard(self, X: Floats) -> Floats:
        return np.asarray((X - self.centre) / self.scale)


def paper_gbr(X: Floats, y: Floats, seed: int = 0) -> Any:
    """The paper's regressor: gradient boosting, 50 estimators of depth 5, everything else scikit-learn's default."""
    from sklearn.ensemble import GradientBoostingRegressor

    return GradientBoostingRegressor(n_estimators=50, max_depth=5, random_state=seed).fit(X, y)


def _forest_of(Z: Floats, y: Floats, seed: int) -> Any:
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(TREES, random_state=seed).fit(Z, y)


def _forest(Z: Floats, y: Floats, seed: int) -> Predict:
    if len(y) < 2 or np.ptp(y) == 0:
        return _constant(float(y.mean()) if len(y) else float("nan"))
    return _call(_forest_of(Z, y, seed))


def _survivor_model(Z: Floats, y: Floats, seed: int, kernels: Kernels | None) -> tuple[Predict, Any]:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    forest = _forest(Z, y, seed)
    if len(y) < 2 * MIN_EACH or np.ptp(y) == 0:
        return forest, None
    fitted = kernels.survivor if kernels is not None else None
    fresh = ConstantKernel(1.0) * RBF(np.ones(Z.shape[1]), (0.1, 30)) + WhiteKernel(0.1, (1e-4, 10))
    process = GaussianProcessRegressor(fitted or fresh, normalize_y=True, **_search(fitted))
    few = _some(len(y), seed)
    gp = _call(_quietly(process, Z[few], y[few]))
    return lambda rows: (forest(rows) + gp(rows)) / 2, process.kernel_


def _collapse_model(Z: Floats, collapsed: Bools, seed: int, kernels: Kernels | None) -> tuple[Predict, Any]:
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.gaussian_process import GaussianProcessClassifier
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel
    from sklearn.model_selection import StratifiedKFold
    from sklearn.svm import SVC

    if min(int(collapsed.sum()), int((~collapsed).sum())) < MIN_EACH:
        return _constant(float(collapsed.mean()) if len(collapsed) else float("nan")), None
    fitted = kernels.collapse if kernels is not None else None
    fresh = ConstantKernel(10.0, (1.0, 1e3)) * RBF(np.ones(Z.shape[1]), (0.3, 10))
    process = GaussianProcessClassifier(fitted or fresh, **_search(fitted))
    few = _some(len(collapsed), seed, collapsed)
    members = [
        RandomForestClassifier(TREES, random_state=seed).fit(Z, collapsed),
        _quietly(process, Z[few], collapsed[few]),
    ]
    if min(int(collapsed[few].sum()), int((~collapsed[few]).sum())) >= FOLDS:
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
        members.append(CalibratedClassifierCV(SVC(C=10), cv=folds, ensemble=False).fit(Z[few], collapsed[few]))

    def predict(rows: Floats) -> Floats:
        shares = [np.clip(member.predict_proba(rows)[:, 1], SURE, 1 - SURE) for member in members]
        return np.asarray(expit(CONFIDENCE * np.mean([logit(share) for share in shares], axis=0)))

    return predict, process.kernel_


def _some(n: int, seed: int, rare: Bools | None = None) -> NDArray[np.int64]:
    """Rows for the costly models: all, or a random GP_MOST (with FOLDS or more of each class, if there are)."""
    if n <= GP_MOST:
        return np.arange(n)
    order = np.random.default_rng(seed).permutation(n)
    if rare is None:
        return np.sort(order[:GP_MOST])
    first = np.concatenate([order[rare[order]][:FOLDS], order[~rare[order]][:FOLDS]])
    return np.sort(np.unique(np.concatenate([first, order[: GP_MOST - len(first)]])))


def _search(kernel: Any) -> dict[str, Any]:
    """A kernel that was already fitted is taken as it is."""
    return {} if kernel is None else {"optimizer": None}


def _quietly(process: Any, Z: Floats, y: Any) -> Any:
    """Fit without warnings that a length scale reached its bound, which only say that a feature does not matter."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return process.fit(Z, y)


def _call(model: Any) -> Predict:
    return lambda rows: np.asarray(model.predict(rows), dtype=np.float64)


def _constant(value: float) -> Predict:
    return lambda rows: np.full(len(rows), value)
