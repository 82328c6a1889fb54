"""The regressors behind a prediction: the paper's gradient boosting, and models that treat collapse as what it is.

Robust accuracy has two modes where training sometimes collapses, and a mean between them describes neither. So three
things are fitted: the probability of collapse (forest, support vectors and a Gaussian process, their log-odds
averaged), the accuracy of runs that survive (forest and Gaussian process, averaged) and of runs that collapse (forest).
Four predictors are made of them:

- `gbr`: the paper's gradient boosting on everything;
- `forest`: a random forest on everything;
- `mixture`: both accuracies, weighted by P(collapse) with sharpened odds: a point prediction nearer to the likelier
  outcome, between the mean (best for R²) and the median (best for the mean absolute error);
- `blend`: 0.7 mixture, 0.3 forest.

The members are scikit-learn's (of a forest, its trees: forest.py); how they are combined is ours, and `bench/laws.py
predictor` measures its errors, AUC and coverage (bench/RESULTS.md). scikit-learn takes half a second to import, so it
is imported where a model is fitted: laws without a predictor start light.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from robudget.prediction.forest import Forest
from robudget.tables.usable import Floats

ModelName = Literal["gbr", "forest", "mixture", "blend"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
Bools = NDArray[np.bool_]
Model = Callable[[Floats], Floats]  # rows of features (n, p) to one number each (n,)

# The source that the kept numbers of a fit depend on.
ROOMS = ("prediction", "laws/least_squares.py", "tables/usable.py", "columns.py", "accuracy.py")
FEWEST_OF_CLASS = 3  # with fewer collapsed (or surviving) runs no collapse model is fitted: P(collapse) is their share
CALIBRATION_FOLDS = 5  # of the support vectors' probabilities, which take as many runs of each class
MOST_GP_RUNS = 400  # that a Gaussian process is fitted on: its cost is cubic
LEAST_PROBABILITY = 0.003  # probabilities are clipped here: no model of a few hundred runs is surer
LOG_ODDS_FACTOR = 1.5  # on the averaged log-odds: an average of cautious models is more cautious than the runs warrant
ODDS_POWER = 4 / 3  # of the odds of collapse in the point prediction
FOREST_SHARE = 0.3  # of the blend


@dataclass(frozen=True)
class Kernels:
    """Fitted kernels of the two Gaussian processes, to refit them on parts of the same table without a new search; None
    where there was nothing to fit. As numbers they are scikit-learn's `theta`, the logarithms of their parameters."""

    collapse: Any
    survivor: Any

    def numbers(self) -> dict[str, list[float] | None]:
        both = {"collapse": self.collapse, "survivor": self.survivor}
        return {name: None if kernel is None else kernel.theta.tolist() for name, kernel in both.items()}

    @classmethod
    def of_numbers(cls, numbers: Mapping[str, Sequence[float] | None], width: int) -> Kernels:
        """`width` is the number of columns of X."""
        initial = {"collapse": _collapse_kernel(width), "survivor": _survivor_kernel(width)}
        return cls(**{
            name: None if theta is None else initial[name].clone_with_theta(np.array(theta, dtype=np.float64))
            for name, theta in numbers.items()
        })  # fmt: skip


@dataclass(frozen=True)
class Outcomes:
    """Predictions for n recipes, each (n,): accuracy by every model, P(collapse), and the accuracy if it does not
    (`survivor`) or does collapse (`collapsed`)."""

    by_model: dict[ModelName, Floats]
    p_collapse: Floats
    survivor: Floats
    collapsed: Floats

    def rows(self, keep: Any) -> Outcomes:
        by_model = {name: values[keep] for name, values in self.by_model.items()}
        return Outcomes(by_model, self.p_collapse[keep], self.survivor[keep], self.collapsed[keep])

    def numbers(self) -> dict[str, Any]:
        single = {of: getattr(self, of).tolist() for of in ("p_collapse", "survivor", "collapsed")}
        return single | {"by_model": {name: values.tolist() for name, values in self.by_model.items()}}

    @classmethod
    def of_numbers(cls, numbers: Mapping[str, Any]) -> Outcomes:
        by_model = {name: np.array(numbers["by_model"][name], dtype=np.float64) for name in MODELS}
        rest = (np.array(numbers[of], dtype=np.float64) for of in ("p_collapse", "survivor", "collapsed"))
        return cls(by_model, *rest)

    @classmethod
    def joined(cls, parts: Sequence[Outcomes]) -> Outcomes:
        return cls(
            {name: np.concatenate([part.by_model[name] for part in parts]) for name in MODELS},
            *(np.concatenate([getattr(p, of) for p in parts]) for of in ("p_collapse", "survivor", "collapsed")),
        )


class FittedModels:
    """All models fitted to (X (n, p), y (n,) percent, collapsed (n,)); `outcomes(X)` predicts with each.

    Features are standardised by this table. `kernels` skips the search for the Gaussian processes' length scales.
    `shares` are the impurity importances (p,) of the two models of everything. `codes` (n,) number the recipes, whose
    runs inner folds keep together (default: each run is its own).
    """

    def __init__(
        self, X: Floats, y: Floats, collapsed: Bools, seed: int = 0, kernels: Kernels | None = None,
        codes: NDArray[np.int64] | None = None,
    ) -> None:  # fmt: skip
        from sklearn.preprocessing import StandardScaler

        self.scaler = StandardScaler().fit(X)
        Z = self.scaler.transform(X)
        self.limits = float(y.min()), float(y.max())
        boosting, self.forest = paper_gbr(X, y, seed), Forest(Z, y, seed)
        self.gbr = _model(boosting)
        self.shares = {"gbr": boosting.feature_importances_, "forest": self.forest.importances()}
        self.p_collapse, collapse_kernel = _collapse_model(Z, collapsed, seed, kernels, codes)
        self.survivor, survivor_kernel = _survivor_model(Z[~collapsed], y[~collapsed], seed, kernels)
        self.collapsed = _forest(Z[collapsed], y[collapsed], seed) if collapsed.any() else _constant(0.0)
        self.kernels = Kernels(collapse_kernel, survivor_kernel)

    def outcomes(self, X: Floats) -> Outcomes:
        Z = self.scaler.transform(X)
        p = self.p_collapse(Z)
        survivor, collapsed = np.clip(self.survivor(Z), *self.limits), self.collapsed(Z)
        forest = self.forest(Z)
        sharpened = expit(ODDS_POWER * logit(np.clip(p, 1e-9, 1 - 1e-9)))
        mixture = sharpened * collapsed + (1 - sharpened) * survivor
        blend = (1 - FOREST_SHARE) * mixture + FOREST_SHARE * forest
        by_model: dict[ModelName, Floats] = {
            "gbr": self.gbr(X), "forest": forest, "mixture": mixture, "blend": blend,
        }  # fmt: skip
        return Outcomes(by_model, p, survivor, collapsed)


def paper_gbr(X: Floats, y: Floats, seed: int = 0) -> Any:
    """The paper's regressor: gradient boosting, 50 estimators of depth 5, everything else scikit-learn's default."""
    from sklearn.ensemble import GradientBoostingRegressor

    return GradientBoostingRegressor(n_estimators=50, max_depth=5, random_state=seed).fit(X, y)


def _forest(Z: Floats, y: Floats, seed: int) -> Model:
    if len(y) < 2 or np.ptp(y) == 0:
        return _constant(float(y.mean()) if len(y) else float("nan"))
    return Forest(Z, y, seed)


def _survivor_model(Z: Floats, y: Floats, seed: int, kernels: Kernels | None) -> tuple[Model, Any]:
    from sklearn.gaussian_process import GaussianProcessRegressor

    forest = _forest(Z, y, seed)
    if len(y) < 2 * FEWEST_OF_CLASS or np.ptp(y) == 0:
        return forest, None
    fitted = kernels.survivor if kernels is not None else None
    process = GaussianProcessRegressor(fitted or _survivor_kernel(Z.shape[1]), normalize_y=True, **_search(fitted))
    rows = _subset(len(y), seed)
    gp = _model(_fit_process(process, Z[rows], y[rows]))
    return lambda Z: (forest(Z) + gp(Z)) / 2, process.kernel_


def _collapse_model(
    Z: Floats, collapsed: Bools, seed: int, kernels: Kernels | None, codes: NDArray[np.int64] | None
) -> tuple[Model, Any]:
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.gaussian_process import GaussianProcessClassifier
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
    from sklearn.svm import SVC

    if min(int(collapsed.sum()), int((~collapsed).sum())) < FEWEST_OF_CLASS:
        return _constant(float(collapsed.mean()) if len(collapsed) else float("nan")), None
    fitted = kernels.collapse if kernels is not None else None
    process = GaussianProcessClassifier(fitted or _collapse_kernel(Z.shape[1]), **_search(fitted))
    rows = _subset(len(collapsed), seed, collapsed)
    members: list[Model] = [
        Forest(Z, collapsed, seed),
        _chance(_fit_process(process, Z[rows], collapsed[rows])),
    ]
    recipes = np.arange(len(rows)) if codes is None else codes[rows]
    of_class = [len(np.unique(recipes[collapsed[rows] == state])) for state in (True, False)]
    if min(of_class) >= CALIBRATION_FOLDS:
        folds: Any = StratifiedKFold(CALIBRATION_FOLDS, shuffle=True, random_state=seed)
        if len(np.unique(recipes)) < len(rows):
            grouped = StratifiedGroupKFold(CALIBRATION_FOLDS, shuffle=True, random_state=seed)
            folds = list(grouped.split(Z[rows], collapsed[rows], recipes))
        machine = CalibratedClassifierCV(SVC(C=10), cv=folds, ensemble=False)
        members.append(_chance(machine.fit(Z[rows], collapsed[rows])))

    def p_collapse(Z: Floats) -> Floats:
        least, most = LEAST_PROBABILITY, 1 - LEAST_PROBABILITY
        log_odds = [logit(np.clip(member(Z), least, most)) for member in members]
        return np.asarray(expit(LOG_ODDS_FACTOR * np.mean(log_odds, axis=0)))

    return p_collapse, process.kernel_


def _survivor_kernel(width: int) -> Any:
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    return ConstantKernel(1.0) * RBF(np.full(width, 3.0), (0.1, 30)) + WhiteKernel(0.1, (1e-4, 10))


def _collapse_kernel(width: int) -> Any:
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel

    return ConstantKernel(100.0, (1.0, 1e3)) * RBF(np.full(width, 2.0), (0.3, 10))


def _subset(n: int, seed: int, rare: Bools | None = None) -> NDArray[np.int64]:
    """Rows for the costly models: all, or MOST_GP_RUNS at random, CALIBRATION_FOLDS or more of each class if there are
    so many."""
    if n <= MOST_GP_RUNS:
        return np.arange(n)
    order = np.random.default_rng(seed).permutation(n)
    if rare is None:
        return np.sort(order[:MOST_GP_RUNS])
    first = np.concatenate([order[rare[order]][:CALIBRATION_FOLDS], order[~rare[order]][:CALIBRATION_FOLDS]])
    return np.sort(np.unique(np.concatenate([first, order[: MOST_GP_RUNS - len(first)]])))


def _search(kernel: Any) -> dict[str, Any]:
    """A kernel that was already fitted is taken as it is."""
    return {} if kernel is None else {"optimizer": None}


def _fit_process(process: Any, Z: Floats, y: Any) -> Any:
    """Fit without warnings that a length scale reached its bound, which only say that a feature does not matter."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return process.fit(Z, y)


def _model(model: Any) -> Model:
    return lambda rows: np.asarray(model.predict(rows), dtype=np.float64)


def _chance(classifier: Any) -> Model:
    return lambda rows: np.asarray(classifier.predict_proba(rows)[:, 1], dtype=np.float64)


def _constant(value: float) -> Model:
    return lambda rows: np.full(len(rows), value)
