"""Predict a recipe's robust accuracy before training it: a number, a conformal interval, and P(collapse)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd

from robudget.cache import remembered
from robudget.errors import InputError, unknown
from robudget.files import fields, to_plain
from robudget.prediction.conformal import Calibration, Coverage
from robudget.prediction.cross_validation import (
    GROUPS,
    REPEATS,
    OneSplit,
    OutOfFold,
    Score,
    choose_model,
    leave_group_out,
    one_split,
    random_folds,
)
from robudget.prediction.explain import (
    CollapseMap,
    Importance,
    Partial,
    collapse_chances,
    collapse_map,
    importances,
    partial,
)
from robudget.prediction.features import MOST_RUNS, Features, rows_of, runs_with_features
from robudget.prediction.regressors import MODELS, ROOMS, Bools, FittedModels, Kernels, ModelName, Outcomes
from robudget.prediction.repeats import (
    Codes,
    Ran,
    SeedNoise,
    check_same_scope,
    recipe_codes,
    runs_of,
    seed_noise,
)
from robudget.recipe import Recipe
from robudget.tables.read import as_table
from robudget.tables.usable import Floats, collapsed_rows, numbers_of

Rows = Recipe | Sequence[Recipe] | pd.DataFrame | Mapping[str, Any]
LEVEL = 0.9
NEAREST_RUNS, ALIKE = 3, 20
FEWEST_RECIPES = 5


@dataclass(frozen=True)
class Prediction:
    """What to expect of one recipe, accuracies in percent: `aa_acc` with its `level` interval `low` to `high`.

    `p_collapse` is the probability of catastrophic overfitting and `survivor` the accuracy without it. `nearest` are
    the real runs most like it: (run_id, aa_acc, distance in standard deviations of the features). `outside` names the
    features beyond the fitted table's range or in a combination it never had: nothing supports the interval there.
    `alike` is what intervals of this kind hold of the ALIKE runs nearest to it (None where the table has few more).
    """

    aa_acc: float
    low: float
    high: float
    p_collapse: float
    survivor: float
    level: float
    nearest: tuple[tuple[str, float, float], ...] = ()
    outside: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    ran: Ran | None = None
    alike: Coverage | None = None

    def to_dict(self) -> dict[str, Any]:
        return fields(self)

    def sentence(self) -> str:
        """`59.8% (90%: 58.9 to 60.3), P(collapse) 0%; nearest run paper-220: 59.9%`."""
        text = f"{self.aa_acc:.1f}% ({self.level:.0%}: {self.low:.1f} to {self.high:.1f}), "
        text += f"P(collapse) {self.p_collapse:.0%}"
        if self.nearest:
            text += f"; nearest run {self.nearest[0][0]}: {self.nearest[0][1]:.1f}%"
        text += f"; beyond the table in {', '.join(self.outside)}" if self.outside else ""
        between = [name for name in self.unseen if name not in self.outside]
        return text + (f"; no run has this value of {', '.join(between)}" if between else "")


@dataclass(frozen=True)
class Predictor:
    """A fitted predictor. `fit` chooses and fits, `predict` answers; `importances`, `partial` and `collapse_map`
    explain.

    `random_scores` are those of every model on recipes that it was not fitted on, and `scores` these and, by each of
    `groups`, those of whole levels left out; `model` is the one they chose. `one_split` is what a single yes-or-no
    question explains of left-out recipes, and `coverage` what the intervals hold of them, by group (`inside`: which,
    (n_runs,)). `n_runs` finished runs of `n_recipes` recipes were fitted on, `n_collapsed` of them collapsed;
    `n_left_out` had no accuracy, an unknown feature, or were too many. `seed_noise` is how far seeds of one recipe
    scatter. What not every question needs (`fitted`, `calibration`, the scores by group, `importances`) is computed
    from `used` the first time that it is asked for, and kept between commands where it is small.
    """

    model: ModelName
    features: Features
    level: float
    n_runs: int
    n_recipes: int
    n_collapsed: int
    n_left_out: int
    seed_noise: SeedNoise
    random_scores: tuple[Score, ...]
    one_split: OneSplit
    coverage: tuple[Coverage, ...]
    inside: Bools = field(repr=False)
    warnings: tuple[str, ...]
    table: pd.DataFrame = field(repr=False)
    used: tuple[Any, ...] = field(repr=False)
    groups: tuple[str, ...]
    fit_models: Callable[[], FittedModels] = field(repr=False)
    calibrate: Callable[[], Calibration] = field(repr=False)
    score_group: Callable[[str], tuple[Score, ...]] = field(repr=False)
    explain: Callable[[], tuple[Importance, ...]] = field(repr=False)

    @classmethod
    def fit(
        cls, frame: pd.DataFrame, *, model: ModelName | None = None, features: Sequence[str] | None = None,
        level: float = LEVEL, seed: int = 0, repeats: int = REPEATS, groups: Sequence[str] = GROUPS,
        together: Sequence[str] = (),
    ) -> Predictor:  # fmt: skip
        """Fit on the finished runs of one dataset and threat. The model is the blend unless it is named, or another is
        better in `repeats` of five-fold cross-validation and where each level of each of `groups` is left out. Runs of
        one recipe, and runs that are equal in the columns `together`, are always left out together.

        What the folds say is kept between commands (`robudget.cache`). Raises InputError for fewer than FEWEST_RUNS
        runs or FEWEST_RECIPES recipes, mixed threats, choices that do not vary, or runs that all have one accuracy.
        """
        if model is not None and model not in MODELS:
            raise unknown("model of a predictor", model, MODELS)
        if not 0 < level < 1:
            raise InputError(f"level = {level:g} (allowed: between 0 and 1, e.g. 0.9)")
        runs, y, is_collapsed, columns, _ = runs_with_features(frame, features, seed)
        X, recipes = columns.matrix(runs), recipe_codes(runs, columns)
        codes = recipe_codes(runs, columns, together) if together else recipes
        _check_enough(y, codes)
        labels = {
            name: [str(value) for value in runs[name]]
            for name in groups
            if any(c.name == name or name in c.aliases for c in columns.columns)
        }
        used = (X, y, is_collapsed, codes, repr(columns), labels, model, seed, repeats)
        searched: list[FittedModels] = []

        def search() -> dict[str, Any]:
            with _unchecked():
                searched.append(FittedModels(X, y, is_collapsed, seed, codes=codes))
            return {"kernels": searched[0].kernels.numbers()}

        @cache
        def kernels() -> Kernels:
            return Kernels.of_numbers(remembered("kernels", used, ROOMS, search)["kernels"], X.shape[1])

        @cache
        def fit_models() -> FittedModels:
            found = kernels()
            return searched[0] if searched else FittedModels(X, y, is_collapsed, seed, found, codes)

        @cache
        def left_out() -> OutOfFold:
            with _unchecked():
                return random_folds(X, y, is_collapsed, seed, kernels(), repeats, codes)

        @cache
        def score_group(name: str) -> tuple[Score, ...]:
            def leave_out() -> dict[str, Any]:
                with _unchecked():
                    out = leave_group_out(name, labels[name], X, y, is_collapsed, seed, kernels(), codes)
                return {"scores": [dataclasses.asdict(s) for s in out.scores(y, is_collapsed)] if out else []}

            kept = remembered("group", (*used, name), ROOMS, leave_out)
            return tuple(Score(**score) for score in kept["scores"])

        def cross_validate() -> dict[str, Any]:
            scores = left_out().scores(y, is_collapsed)
            chosen = model or choose_model(scores)
            if model is None and chosen != "blend":  # it must be better where whole levels are left out, too
                chosen = choose_model([*scores, *(score for name in labels for score in score_group(name))])
            return {
                "model": chosen,
                "scores": [dataclasses.asdict(score) for score in scores],
                "one_split": dataclasses.asdict(one_split(X, y, codes, columns, seed)),
                "out_of_fold": left_out().first_repeat(len(y)).numbers(),
            }

        numbers = remembered("predictor", used, ROOMS, cross_validate)

        @cache
        def explain() -> tuple[Importance, ...]:
            def of_models() -> dict[str, Any]:
                with _unchecked():
                    found = importances(numbers["model"], left_out(), fit_models(), columns, X, y, seed)
                return {"of": [dataclasses.asdict(i) for i in found]}

            kept = remembered("importances", used, ROOMS, of_models)["of"]
            return tuple(Importance(**one | {"aliases": tuple(one["aliases"])}) for one in kept)

        by = {c.name: list(runs[c.name]) for c in columns.columns if c.kind in ("flag", "category")}

        @cache
        def calibrate() -> Calibration:
            out = Outcomes.of_numbers(numbers["out_of_fold"])
            return Calibration.fit(X, y, is_collapsed, out, level, codes, by, seed)

        def cover() -> dict[str, Any]:
            return {"of": [vars(c) for c in calibrate().coverage], "inside": calibrate().inside.tolist()}

        coverage = remembered("coverage", (*used, level), ROOMS, cover)
        noise, n_recipes = seed_noise(y, is_collapsed, recipes), int(recipes.max()) + 1
        return cls(
            numbers["model"], columns, level, len(y), n_recipes, int(is_collapsed.sum()), len(frame) - len(y), noise,
            tuple(Score(**score) for score in numbers["scores"]), OneSplit(**numbers["one_split"]),
            tuple(Coverage(**one) for one in coverage["of"]), np.array(coverage["inside"], dtype=np.bool_),
            _warnings(len(frame), len(y), columns, noise, n_recipes, level), runs, used, tuple(labels), fit_models,
            calibrate, score_group, explain,
        )  # fmt: skip

    @property
    def fitted(self) -> FittedModels:
        return self.fit_models()

    @property
    def calibration(self) -> Calibration:
        return self.calibrate()

    @property
    def scores(self) -> tuple[Score, ...]:
        return (*self.random_scores, *(score for name in self.groups for score in self.score_group(name)))

    @property
    def importances(self) -> tuple[Importance, ...]:
        """By permutation on left-out recipes and by the model, the most important by permutation first."""
        return self.explain()

    def predict(self, rows: Rows) -> list[Prediction]:
        """One prediction per recipe or row; the features may come as recipes, rows of a table, or one mapping.

        Raises InputError for a missing or unknown feature, a level that no run of the table has, or another dataset or
        threat than the table's.
        """
        recipes = rows_of(rows, self.table)
        check_same_scope(recipes, self.table)
        X = self.features.matrix(recipes)
        out = self.fitted.outcomes(X)
        accuracy = np.clip(out.by_model[self.model], 0, 100)
        low, high = self.calibration.interval(X, out)
        low, high = np.minimum(low, accuracy), np.maximum(high, accuracy)
        nearest, alike = self._nearest(X)
        outside = [
            tuple(dict.fromkeys(far + new))
            for far, new in zip(
                self.features.outside(recipes), self.features.unpaired(recipes, self.table), strict=True
            )
        ]
        unseen = self.features.unseen(recipes)
        ran = runs_of(recipes, self.table, self.seed_noise, [c.name for c in self.features.columns])
        return [
            Prediction(
                float(accuracy[i]), float(low[i]), float(high[i]), float(out.p_collapse[i]), float(out.survivor[i]),
                self.level, nearest[i], outside[i], unseen[i], ran[i], alike[i],
            )
            for i in range(len(X))
        ]  # fmt: skip

    def p_above(self, rows: Rows, target: float) -> Floats:
        """The probability that each recipe reaches `target` percent, (n,)."""
        X = self.features.matrix(rows_of(rows, self.table))
        return self.calibration.above(X, self.fitted.outcomes(X), target)

    def score(self, design: str = "random", model: ModelName | None = None) -> Score | None:
        """The score of the chosen (or named) model in a design: `random`, `by steps`, …; None if it was not tried."""
        group = design.removeprefix("by ")
        scores = self.random_scores if design == group else self.score_group(group) if group in self.groups else ()
        return next((s for s in scores if s.design == design and s.model == (model or self.model)), None)

    def partial(self, feature: str) -> Partial:
        """The mean prediction over the table with one feature set to each of its levels."""

        name = self.features.named(feature).name

        def of_models() -> dict[str, Any]:
            return dataclasses.asdict(partial(self.model, self.fitted, self.features, self.table, name))

        numbers = remembered("partial", (*self.used, self.model, name), ROOMS, of_models)
        return Partial(name, *(tuple(numbers[of]) for of in ("values", "aa_acc", "p_collapse")))

    def collapse_map(self, first: str = "steps", second: str = "ema") -> CollapseMap:
        """P(collapse) over two features, beside the share that really collapsed."""

        def of_models() -> dict[str, Any]:
            return {"p_collapse": collapse_chances(self.fitted, self.features, self.table, first, second).tolist()}

        numbers = remembered("collapse", (*self.used, first, second), ROOMS, of_models)
        chances = np.array(numbers["p_collapse"], dtype=np.float64)
        return collapse_map(chances, self.features, self.table, collapsed_rows(self.table), first, second)

    def to_dict(self) -> dict[str, Any]:
        more = {"scores": to_plain(self.scores), "importances": to_plain(self.importances)}
        return {n: v for n, v in fields(self).items() if n not in ("random_scores", "groups")} | more

    def _nearest(self, X: Floats) -> tuple[list[tuple[tuple[str, float, float], ...]], list[Coverage | None]]:
        """The nearest runs of each row, and what intervals hold of the ALIKE nearest."""
        from sklearn.neighbors import NearestNeighbors

        Z = self.fitted.scaler.transform(self.features.matrix(self.table))
        enough = len(Z) >= 2 * ALIKE
        # A tree takes differences, so that a run's distance to itself is exactly 0; brute force takes scalar products.
        tree = NearestNeighbors(n_neighbors=ALIKE if enough else NEAREST_RUNS, algorithm="kd_tree").fit(Z)
        distances, indices = tree.kneighbors(self.fitted.scaler.transform(X))
        names = self.table["run_id"] if "run_id" in self.table else self.table.index.to_series()
        ids, accuracy, codes = names.astype(str).to_numpy(), numbers_of(self.table, "aa_acc"), self.used[3]
        nearest = [
            tuple((str(ids[i]), float(accuracy[i]), float(d)) for i, d in zip(*row, strict=True))
            for row in zip(indices[:, :NEAREST_RUNS], distances[:, :NEAREST_RUNS], strict=True)
        ]
        alike = [Coverage.of("nearest", self.inside[i], codes[i], self.level) if enough else None for i in indices]
        return nearest, alike


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
    predictions = Predictor.fit(as_table(source), level=level, seed=seed).predict(recipe)
    return predictions[0] if isinstance(recipe, Recipe | Mapping) else predictions


def _unchecked() -> Any:
    """Models are fitted to arrays that are checked already; scikit-learn's checks would take a tenth of the time."""
    from sklearn import config_context

    return config_context(assume_finite=True, skip_parameter_validation=True)


def _check_enough(y: Floats, codes: Codes) -> None:
    """Raises InputError where the runs say nothing of recipes that were not run, with what would help."""
    recipes = int(codes.max()) + 1
    if recipes < FEWEST_RECIPES:
        raise InputError(
            f"{len(y)} runs of {recipes} {'recipe' if recipes == 1 else 'recipes'}, repeated with other seeds, say "
            f"nothing of other recipes: train {FEWEST_RECIPES} or more that differ in a choice, e.g. in steps or epochs"
        )
    if float(np.ptp(y)) == 0:
        raise InputError(
            f"all {len(y)} runs have the same robust accuracy, {y[0]:.4g}%: there is nothing to tell recipes apart by; "
            "evaluate more images, or train recipes that differ more"
        )


def _warnings(
    n_table: int, n_runs: int, features: Features, noise: SeedNoise, n_recipes: int, level: float
) -> tuple[str, ...]:
    out = []
    if n_runs < 10 * len(features.columns):
        out.append(
            f"the predictor knows {n_runs} runs for {len(features.columns)} choices: take its intervals seriously"
        )
    needed = int(np.ceil(level / (1 - level) - 1e-9))
    if n_recipes < needed:
        out.append(
            f"{n_recipes} recipes are too few for {level:.0%} intervals, which are 0 to 100 here: {needed} would do"
        )
    if noise.borrowed:
        out.append(noise.sentence())
    if n_runs == MOST_RUNS and n_table > MOST_RUNS:
        out.append(f"the predictor was fitted on {MOST_RUNS} of {n_table} runs, drawn at random")
    for c in features.columns:
        if c.aliases:
            out.append(f"{c.name} varies only together with {', '.join(c.aliases)}: their effects cannot be told apart")
    return tuple(out)
