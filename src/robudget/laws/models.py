"""The regressors behind a prediction: the paper's gradient boosting, and models that treat collapse as what it is.

Robust accuracy is bimodal where training sometimes collapses, and no mean describes a coin. The better default therefore
fits two things, the probability of collapse and the accuracy of what survives, and mixes them. Every model here is
`fit(X (n, p), y (n,), collapsed (n,), seed)` → an object with the four arrays of `Outlook`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from robudget.laws.select import Floats

ModelName = Literal["gbr", "forest", "mixture", "blend"]
Bools = NDArray[np.bool_]
MIN_EACH = 5  # fewer collapsed (or surviving) runs than this and no collapse model is fitted: the share stands
TREES = 100


@dataclass(frozen=True)
class Outlook:
    """Predictions for n recipes, each (n,): the accuracy, P(collapse), and the accuracy if it does and does not collapse."""

    aa_acc: Floats
    p_collapse: Floats
    survivor: Floats
    fallen: Floats


class Fitted:
    """A fitted model; `outlook(X)` predicts. Built by `fit`."""

    def __init__(self, name: ModelName, X: Floats, y: Floats, collapsed: Bools, seed: int) -> None:
        self.name = name
        self.collapse = _collapse_model(X, collapsed, seed)
        self.survivor = _survivor_model(X[~collapsed], y[~collapsed], seed)
        self.fallen = float(np.mean(y[collapsed])) if collapsed.any() else 0.0
        self.direct = _direct_model(name, X, y, seed)
        self.limits = float(y.min()), float(y.max())

    def outlook(self, X: Floats) -> Outlook:
        p = self.collapse(X)
        survivor = np.clip(self.survivor(X), *self.limits)
        fallen = np.full(len(X), self.fallen)
        if self.name in ("gbr", "forest"):
            accuracy = self.direct(X)
        else:
            sharp = p**2 / (p**2 + (1 - p) ** 2)
            accuracy = sharp * fallen + (1 - sharp) * survivor
            if self.name == "blend":
                accuracy = (accuracy + self.direct(X)) / 2
        return Outlook(accuracy, p, survivor, fallen)


def paper_gbr(X: Floats, y: Floats, seed: int = 0) -> Any:
    """The paper's regressor: gradient boosting, 50 estimators of depth 5, everything else scikit-learn's default."""
    from sklearn.ensemble import GradientBoostingRegressor

    return GradientBoostingRegressor(n_estimators=50, max_depth=5, random_state=seed).fit(X, y)


def _direct_model(name: ModelName, X: Floats, y: Floats, seed: int) -> Callable[[Floats], Floats]:
    from sklearn.ensemble import RandomForestRegressor

    if name == "gbr":
        return _call(paper_gbr(X, y, seed))
    return _call(RandomForestRegressor(TREES, max_features=0.5, random_state=seed).fit(X, y))


def _survivor_model(X: Floats, y: Floats, seed: int) -> Callable[[Floats], Floats]:
    from sklearn.ensemble import RandomForestRegressor

    if len(y) < 2:
        level = float(y.mean()) if len(y) else float("nan")
        return lambda rows: np.full(len(rows), level)
    return _call(RandomForestRegressor(TREES, random_state=seed).fit(X, y))


def _collapse_model(X: Floats, collapsed: Bools, seed: int) -> Callable[[Floats], Floats]:
    from sklearn.ensemble import RandomForestClassifier

    share = float(collapsed.mean()) if len(collapsed) else 0.0
    if min(int(collapsed.sum()), int((~collapsed).sum())) < MIN_EACH:
        return lambda rows: np.full(len(rows), share)
    forest = RandomForestClassifier(TREES, min_samples_leaf=2, max_features=None, random_state=seed).fit(X, collapsed)
    return lambda rows: np.asarray(forest.predict_proba(rows)[:, 1])


def _call(model: Any) -> Callable[[Floats], Floats]:
    return lambda rows: np.asarray(model.predict(rows), dtype=np.float64)
