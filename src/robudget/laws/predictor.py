"""Predict a recipe's robust accuracy before training it: a number, a conformal interval, and P(collapse)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from robudget.errors import InputError
from robudget.laws.features import Features, rows_of
from robudget.laws.models import Fitted, ModelName, paper_gbr
from robudget.laws.plain import fields
from robudget.laws.select import Floats, check_scope, collapsed, column, failed
from robudget.recipe import Recipe

Rows = Recipe | Sequence[Recipe] | pd.DataFrame | Mapping[str, Any]
LEVEL = 0.9
FEWEST = 10  # runs


@dataclass(frozen=True)
class Prediction:
    """What to expect of one recipe, accuracies in percent. `nearest` are real runs: (run_id, aa_acc, distance).

    `survivor` is the accuracy if training does not collapse; `outside` names features beyond the fitted table's range.
    """

    aa_acc: float
    low: float
    high: float
    p_collapse: float
    survivor: float
    level: float
    nearest: tuple[tuple[str, float, float], ...] = ()
    outside: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


@dataclass(frozen=True)
class Importance:
    """How much the predictor leans on a feature: `by_model` (a share, summing to 1) and by permutation (points of mean
    absolute error added when it is shuffled, with its interval). `aliases` vary only together with it."""

    feature: str
    by_model: float
    by_permutation: float
    low: float
    high: float
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaperGBR:
    """The paper's predictor exactly: gradient boosting, 50 estimators of depth 5, fitted on 70% of the runs.

    `r2` and `mae` (points) are on the other 30%; `truth` and `predicted` (m,) are those runs; `importances` is the
    model's own, by feature. Figures 1b and 1c.
    """

    r2: float
    mae: float
    n_train: int
    n_test: int
    seed: int
    importances: dict[str, float]
    truth: Floats = field(repr=False)
    predicted: Floats = field(repr=False)
    rows: Any = field(repr=False)

    @classmethod
    def fit(cls, frame: pd.DataFrame, seed: int = 0, features: Sequence[str] | None = None) -> PaperGBR:
        """Features as in the paper where the table has them and they vary, else whatever varies."""
        from sklearn.model_selection import train_test_split

        runs, y, _ = usable(frame)
        seen = features_of(runs, features)
        X = seen.matrix(runs)
        train, test = train_test_split(np.arange(len(y)), test_size=0.3, random_state=seed)
        model = paper_gbr(X[train], y[train])
        predicted = np.asarray(model.predict(X[test]))
        miss = predicted - y[test]
        total = float(((y[test] - y[test].mean()) ** 2).sum())
        shares: dict[str, float] = {}
        for name, share in zip(seen.names, model.feature_importances_, strict=True):
            shares[name] = shares.get(name, 0.0) + float(share)
        return cls(
            1 - float((miss**2).sum()) / total if total else float("nan"), float(np.abs(miss).mean()),
            len(train), len(test), seed, shares, y[test], predicted, runs.index.to_numpy()[test],
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return fields(self) | {"truth": self.truth.tolist(), "predicted": self.predicted.tolist()}


@dataclass(frozen=True)
class Predictor:
    """A fitted predictor. `fit` chooses and fits, `predict` answers, `importances` explain.

    `calibration` (n,) are the sorted conformity scores behind the intervals.
    """

    model: ModelName
    features: Features
    level: float
    n_runs: int
    n_collapsed: int
    importances: tuple[Importance, ...]
    calibration: Floats = field(repr=False)
    table: pd.DataFrame = field(repr=False)
    fitted: Fitted = field(repr=False)

    @classmethod
    def fit(
        cls, frame: pd.DataFrame, *, model: ModelName | None = None, features: Sequence[str] | None = None,
        level: float = LEVEL, seed: int = 0,
    ) -> Predictor:  # fmt: skip
        """Fit on every finished run of one dataset and threat. Raises InputError for fewer than FEWEST of them."""
        runs, y, fallen = usable(frame)
        seen = Features.of(runs, features)
        X = seen.matrix(runs)
        name: ModelName = model or "blend"
        scores = _out_of_fold(name, X, y, fallen, seed)
        fitted = Fitted(name, X, y, fallen, seed)
        return cls(
            name, seen, level, len(y), int(fallen.sum()), _importances(fitted, seen, X, y, seed),
            np.sort(scores), runs, fitted,
        )  # fmt: skip

    def predict(self, rows: Rows) -> list[Prediction]:
        """One prediction per recipe or row; the features may come as recipes, rows of a table, or one mapping."""
        asked = rows_of(rows, self.table)
        X = self.features.matrix(asked)
        out = self.fitted.outlook(X)
        reach = self._reach()
        nearest = self._nearest(X)
        outside = self.features.outside(asked)
        return [
            Prediction(
                float(out.aa_acc[i]), float(max(0.0, out.aa_acc[i] - reach)), float(min(100.0, out.aa_acc[i] + reach)),
                float(out.p_collapse[i]), float(out.survivor[i]), self.level, nearest[i], outside[i],
            )
            for i in range(len(X))
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return fields(self)

    def _reach(self) -> float:
        n = len(self.calibration)
        rank = int(np.ceil((n + 1) * self.level)) - 1
        return float(self.calibration[rank]) if rank < n else float("inf")

    def _nearest(self, X: Floats, k: int = 3) -> list[tuple[tuple[str, float, float], ...]]:
        known = self.features.matrix(self.table)
        scale = np.where(known.std(axis=0) > 0, known.std(axis=0), 1.0)
        names = self.table["run_id"].astype(str) if "run_id" in self.table else self.table.index.astype(str)
        ids, accuracy = np.asarray(names), column(self.table, "aa_acc")
        out = []
        for row in X:
            distance = np.sqrt((((known - row) / scale) ** 2).sum(axis=1))
            order = np.argsort(distance, kind="stable")[:k]
            out.append(tuple((str(ids[i]), float(accuracy[i]), float(distance[i])) for i in order))
        return out


def usable(frame: pd.DataFrame) -> tuple[pd.DataFrame, Floats, Any]:
    """Finished runs with a known robust accuracy, their accuracy (n,) in percent, and which collapsed (n,)."""
    check_scope(frame)
    keep = ~failed(frame) & ~np.isnan(column(frame, "aa_acc", "the target"))
    runs = frame[keep]
    if len(runs) < FEWEST:
        raise InputError(f"{len(runs)} finished runs are too few for a predictor (allowed: {FEWEST} or more)")
    return runs, column(runs, "aa_acc"), collapsed(runs)


def features_of(frame: pd.DataFrame, names: Sequence[str] | None = None) -> Features:
    """The paper's features where the table has all of them, else whatever varies."""
    from robudget.laws.features import PAPER

    if names is None and set(PAPER) <= set(frame.columns):
        return Features.of(frame, PAPER)
    return Features.of(frame, names)


def _out_of_fold(name: ModelName, X: Floats, y: Floats, fallen: Any, seed: int, folds: int = 10) -> Floats:
    """Absolute error of each run predicted without it."""
    order = np.random.default_rng(seed).permutation(len(y))
    out = np.empty(len(y))
    for part in np.array_split(order, min(folds, len(y))):
        rest = np.setdiff1d(order, part)
        out[part] = np.abs(Fitted(name, X[rest], y[rest], fallen[rest], seed).outlook(X[part]).aa_acc - y[part])
    return out


def _importances(fitted: Fitted, seen: Features, X: Floats, y: Floats, seed: int) -> tuple[Importance, ...]:
    model = paper_gbr(X, y, seed)
    names = np.array(seen.names)
    rng = np.random.default_rng(seed)
    base = np.abs(fitted.outlook(X).aa_acc - y).mean()
    out = []
    for c in seen.columns:
        mine = np.flatnonzero(names == c.name)
        worse = []
        for _ in range(10):
            shuffled = X.copy()
            shuffled[:, mine] = X[rng.permutation(len(y))][:, mine]
            worse.append(float(np.abs(fitted.outlook(shuffled).aa_acc - y).mean() - base))
        low, high = np.quantile(worse, [0.025, 0.975])
        share = float(model.feature_importances_[mine].sum())
        out.append(Importance(c.name, share, float(np.mean(worse)), float(low), float(high), c.aliases))
    return tuple(sorted(out, key=lambda i: -i.by_permutation))
