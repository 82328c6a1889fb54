"""Predict a recipe's robust accuracy before training it: a number, a conformal interval, and P(collapse)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd

from robudget.columns import PAPER_FEATURES
from robudget.errors import InputError, unknown
from robudget.files import fields
from robudget.prediction.conformal import Calibration
from robudget.prediction.cross_validation import GROUPS, REPEATS, Score, at_random, by_group, choose
from robudget.prediction.explain import CollapseMap, Importance, Partial, collapse_map, importances, partial
from robudget.prediction.features import Features, rows_of
from robudget.prediction.regressors import MODELS, Bools, Fitted, ModelName, paper_gbr
from robudget.recipe import Recipe
from robudget.tables.read import as_table
from robudget.tables.usable import Floats, check_scope, collapsed, column, failed

Rows = Recipe | Sequence[Recipe] | pd.DataFrame | Mapping[str, Any]
LEVEL = 0.9
FEWEST = 10  # runs
MOST = 1_000  # runs a predictor is fitted on; of more, so many are drawn
NEAREST = 3


@dataclass(frozen=True)
class Prediction:
    """What to expect of one recipe, accuracies in percent: `aa_acc` with its `level` interval `low` to `high`.

    `p_collapse` is the probability of catastrophic overfitting and `survivor` the accuracy without it. `nearest` are
    the real runs most like it: (run_id, aa_acc, distance in standard deviations of the features). `outside` names the
    features beyond the fitted table's range or in a combination it never had, where nothing vouches for the interval.
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

    def sentence(self) -> str:
        """`59.8% (90%: 58.9 to 60.3), P(collapse) 0%; nearest run paper-220: 59.9%`."""
        text = f"{self.aa_acc:.1f}% ({self.level:.0%}: {self.low:.1f} to {self.high:.1f}), "
        text += f"P(collapse) {self.p_collapse:.0%}"
        if self.nearest:
            text += f"; nearest run {self.nearest[0][0]}: {self.nearest[0][1]:.1f}%"
        return text + (f"; beyond the table in {', '.join(self.outside)}" if self.outside else "")


@dataclass(frozen=True)
class PaperGBR:
    """The paper's predictor exactly: gradient boosting, 50 estimators of depth 5, fitted on 70% of the runs.

    `r2` and `mae` (points) are on the other 30%; `truth` and `predicted` (m,) are those runs' accuracies and `rows`
    (m,) their positions in the table; `importances` is the model's own, feature → share. Figures 1b and 1c.
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

        named = features or (PAPER_FEATURES if set(PAPER_FEATURES) <= set(frame.columns) else None)
        runs, y, _, seen, positions = _usable_with_features(frame, named)
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
            len(train), len(test), seed, dict(sorted(shares.items(), key=lambda item: -item[1])),
            y[test], predicted, positions[test],
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return fields(self) | {"truth": self.truth.tolist(), "predicted": self.predicted.tolist()}


@dataclass(frozen=True)
class Predictor:
    """A fitted predictor. `fit` chooses and fits, `predict` answers; `importances`, `partial` and `collapse_map`
    explain.

    `scores` are those of every model, at random and by group, and `model` the one they chose. `n_runs` finished runs
    were fitted on, `n_collapsed` of them collapsed; `n_left_out` had no accuracy, an unknown feature, or were too
    many.
    """

    model: ModelName
    features: Features
    level: float
    n_runs: int
    n_collapsed: int
    n_left_out: int
    scores: tuple[Score, ...]
    importances: tuple[Importance, ...]
    warnings: tuple[str, ...]
    calibration: Calibration = field(repr=False)
    table: pd.DataFrame = field(repr=False)
    fitted: Fitted = field(repr=False)

    @classmethod
    def fit(
        cls, frame: pd.DataFrame, *, model: ModelName | None = None, features: Sequence[str] | None = None,
        level: float = LEVEL, seed: int = 0, repeats: int = REPEATS, groups: Sequence[str] = GROUPS,
    ) -> Predictor:  # fmt: skip
        """Fit on the finished runs of one dataset and threat. The model is chosen by `repeats` of five-fold
        cross-validation and by leaving out each level of each of `groups`, unless it is named.

        Raises InputError for fewer than FEWEST runs, mixed threats, or choices that do not vary.
        """
        if model is not None and model not in MODELS:
            raise unknown("model of a predictor", model, MODELS)
        if not 0 < level < 1:
            raise InputError(f"level = {level:g} (allowed: between 0 and 1, e.g. 0.9)")
        runs, y, fallen, seen, _ = _usable_with_features(frame, features, seed)
        X = seen.matrix(runs)
        fitted = Fitted(X, y, fallen, seed)
        random = at_random(X, y, fallen, seed, fitted.kernels, repeats)
        scores = list(random.scores(y, fallen))
        for name in groups:
            if any(c.name == name or name in c.aliases for c in seen.columns):
                out = by_group(name, list(runs[name]), X, y, fallen, seed, fitted.kernels)
                scores += out.scores(y, fallen) if out else ()
        chosen = model or choose(scores)
        return cls(
            chosen, seen, level, len(y), int(fallen.sum()), len(frame) - len(y), tuple(scores),
            importances(chosen, random, fitted, seen, X, y, seed), _warnings(len(frame), len(y), seen, fallen),
            Calibration.fit(X, y, fallen, random.once(len(y)), level), runs, fitted,
        )  # fmt: skip

    def predict(self, rows: Rows) -> list[Prediction]:
        """One prediction per recipe or row; the features may come as recipes, rows of a table, or one mapping.

        Raises InputError for a missing or unknown feature, or a level that no run of the table has.
        """
        asked = rows_of(rows, self.table)
        X = self.features.matrix(asked)
        out = self.fitted.outlook(X)
        accuracy = np.clip(out.by_model[self.model], 0, 100)
        low, high = self.calibration.interval(X, out)
        low, high = np.minimum(low, accuracy), np.maximum(high, accuracy)
        nearest = self._nearest(X)
        outside = [
            tuple(dict.fromkeys(far + new))
            for far, new in zip(self.features.outside(asked), self.features.unseen(asked, self.table), strict=True)
        ]
        return [
            Prediction(
                float(accuracy[i]), float(low[i]), float(high[i]), float(out.p_collapse[i]), float(out.survivor[i]),
                self.level, nearest[i], outside[i],
            )
            for i in range(len(X))
        ]  # fmt: skip

    def p_above(self, rows: Rows, target: float) -> Floats:
        """The probability that each recipe reaches `target` percent, (n,)."""
        X = self.features.matrix(rows_of(rows, self.table))
        return self.calibration.above(X, self.fitted.outlook(X), target)

    def score(self, design: str = "random", model: ModelName | None = None) -> Score | None:
        """The score of the chosen (or named) model in a design: `random`, `by steps`, …; None if it was not tried."""
        return next((s for s in self.scores if s.design == design and s.model == (model or self.model)), None)

    def partial(self, feature: str) -> Partial:
        """The mean prediction over the table with one feature set to each of its levels."""
        return partial(self.model, self.fitted, self.features, self.table, feature)

    def collapse_map(self, first: str = "steps", second: str = "ema") -> CollapseMap:
        """P(collapse) over two features, beside the share that really collapsed."""
        return collapse_map(self.fitted, self.features, self.table, collapsed(self.table), first, second)

    def to_dict(self) -> dict[str, Any]:
        return fields(self)

    def _nearest(self, X: Floats) -> list[tuple[tuple[str, float, float], ...]]:
        known = self.features.matrix(self.table)
        scale = np.where(known.std(axis=0) > 0, known.std(axis=0), 1.0)
        names = self.table["run_id"] if "run_id" in self.table else self.table.index.to_series()
        ids, accuracy = names.astype(str).to_numpy(), column(self.table, "aa_acc")
        out = []
        for row in X:
            distance = np.sqrt((((known - row) / scale) ** 2).sum(axis=1))
            order = np.argsort(distance, kind="stable")[:NEAREST]
            out.append(tuple((str(ids[i]), float(accuracy[i]), float(distance[i])) for i in order))
        return out


@overload
def predict(
    source: pd.DataFrame | str | Path, recipe: Recipe | Mapping[str, Any], *, level: float = ..., seed: int = ...
) -> Prediction: ...
@overload
def predict(
    source: pd.DataFrame | str | Path, recipe: Sequence[Recipe] | pd.DataFrame, *, level: float = ..., seed: int = ...
) -> list[Prediction]: ...
def predict(
    source: pd.DataFrame | str | Path, recipe: Rows, *, level: float = LEVEL, seed: int = 0
) -> Prediction | list[Prediction]:
    """What the runs of a table (or of a folder, csv or parquet) say of a recipe before it is trained.

    One prediction for a recipe or a mapping of features, a list for several. To ask more than once, fit a `Predictor`.
    """
    made = Predictor.fit(as_table(source), level=level, seed=seed).predict(recipe)
    return made[0] if isinstance(recipe, Recipe | Mapping) else made


def usable(frame: pd.DataFrame) -> tuple[pd.DataFrame, Floats, Bools]:
    """Finished runs with a known robust accuracy, their accuracy (n,) in percent, and which collapsed (n,)."""
    check_scope(frame)
    keep = ~failed(frame) & ~np.isnan(column(frame, "aa_acc", "the target"))
    runs = frame[keep]
    if len(runs) < FEWEST:
        raise InputError(f"{len(runs)} finished runs are too few for a predictor (allowed: {FEWEST} or more)")
    return runs, column(runs, "aa_acc"), collapsed(runs)


def _usable_with_features(
    frame: pd.DataFrame, names: Sequence[str] | None, seed: int = 0
) -> tuple[pd.DataFrame, Floats, Bools, Features, Any]:
    """As `usable`, without rows of unknown features, at most MOST of them; and their positions in `frame`."""
    runs, _, _ = usable(frame.assign(_position=np.arange(len(frame))))
    seen = Features.of(runs, names)
    runs = runs[seen.known(runs)]
    if len(runs) > MOST:
        runs = runs.iloc[np.sort(np.random.default_rng(seed).choice(len(runs), MOST, replace=False))]
    runs, y, fallen = usable(runs)
    positions = runs["_position"].to_numpy()
    return runs.drop(columns="_position"), y, fallen, seen, positions


def _warnings(n_table: int, n_runs: int, seen: Features, fallen: Bools) -> tuple[str, ...]:
    out = []
    if n_runs < 10 * len(seen.columns):
        out.append(f"the predictor knows {n_runs} runs for {len(seen.columns)} choices: take its intervals seriously")
    if n_runs == MOST and n_table > MOST:
        out.append(f"the predictor was fitted on {MOST} of {n_table} runs, drawn at random")
    for c in seen.columns:
        if c.aliases:
            out.append(f"{c.name} varies only together with {', '.join(c.aliases)}: their effects cannot be told apart")
    return tuple(out)
