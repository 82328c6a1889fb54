"""Conformal intervals for outcomes with two modes, calibrated on recipes that the models did not see.

A recipe's accuracy is described by a mixture, with P(collapse) around the accuracy of a collapsed run, else around a
survivor's, each with the residuals seen out of fold, scaled by how well their neighbours were predicted (Papadopoulos,
Vovk & Gammerman 2011). Central intervals of that mixture are widened or narrowed until the wanted share of the
calibration runs lies inside (the nested sets of Gupta, Kuchibhotla & Ramdas 2022), which holds whether or not the
mixture is right:

- no run is its own witness: its prediction is by models fitted without its recipe (cross-conformal: Vovk 2015), and its
  mixture is made of the residuals and neighbours of other recipes;
- every recipe counts once, whatever its number of seeds (Dunn, Wasserman & Ramdas 2023; Lee, Barber & Willett 2023), so
  that the share is of new recipes;
- a recipe that may well collapse or not has an interval that holds both;
- where recipes are many, each part of the table is calibrated by itself (Mondrian: Vovk, Gammerman & Shafer 2005), the
  parts being the leaves of a small regression tree of the scores (Cabezas, Otto, Izbicki & Stern 2025, "locart").

Predicting a new recipe by the models refitted on all runs is ours, and so is choosing the parts by the scores that
calibrate them: `bench/laws.py predictor` and `seeds` measure the coverage (bench/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robudget.accuracy import wilson
from robudget.files import fields
from robudget.prediction.regressors import Bools, Outcomes
from robudget.prediction.repeats import Codes, weights_of
from robudget.tables.usable import Floats

NEIGHBOURS = 10
NEIGHBOUR_WEIGHT = 0.9  # in the local size of residuals; the rest is the mean over all runs
FEWEST_OF_PART = 40  # recipes in a part that is calibrated by itself
BEYOND_OF_PART = 4  # of these, at least so many outside the interval
MOST_PARTS = 4
COVERAGE_FOLDS = 5
FEWEST_REPORTED = 10  # runs of a group whose coverage is reported
KNOWN = 0.05  # half width of a share's interval to which a coverage is called known
MOST_REPORTED = 4  # levels of a choice by which coverage is reported
ROWS_AT_ONCE = 2_000
SMALLEST = 1e-6  # points


@dataclass(frozen=True)
class Coverage:
    """The share `covered` of the runs of a group (`n` runs of `recipes` recipes) that lie in intervals which neither
    they nor their recipe helped to make, beside the nominal `level`. `low` to `high` is where the share of ever more
    such recipes would lie (95%, Wilson's interval over recipes)."""

    group: str
    covered: float
    n: int
    recipes: int
    level: float

    @property
    def low(self) -> float:
        return wilson(self.covered * self.recipes, self.recipes)[0]

    @property
    def high(self) -> float:
        return wilson(self.covered * self.recipes, self.recipes)[1]

    @property
    def verdict(self) -> str:
        """Whether the group is covered at the nominal level, or too small to know it (KNOWN)."""
        if self.high < self.level:
            return "too little"
        if self.low > self.level:
            return "more than it says"
        return "as it says" if self.high - self.low <= 2 * KNOWN else "too few to tell"

    def to_dict(self) -> dict[str, Any]:
        return fields(self) | {"low": self.low, "high": self.high, "verdict": self.verdict}

    @classmethod
    def of(cls, group: str, inside: Bools, codes: Codes, level: float) -> Coverage:
        """Of runs (n,) that lie inside or not, of recipes `codes` (n,)."""
        return cls(group, float(inside.mean()), len(inside), len(np.unique(codes)), level)


@dataclass(frozen=True)
class Residuals:
    """Out-of-fold residuals (k,) of runs with one outcome: `scaled` by their local size, and the size of each in
    points; the runs' standardised features (k, p), recipes (k,) and weights (k,)."""

    scaled: Floats
    sizes: Floats
    features: Floats
    codes: Codes
    weights: Floats

    @classmethod
    def of(cls, residuals: Floats, Z: Floats, codes: Codes, weights: Floats) -> Residuals:
        known = ~np.isnan(residuals)
        residuals, Z, codes, weights = residuals[known], Z[known], codes[known], weights[known]
        raw = cls(residuals, np.abs(residuals), Z, codes, weights)
        return cls(residuals / raw.local(Z, codes), raw.sizes, Z, codes, weights)

    def around(self, centre: Floats, Z: Floats, codes: Codes | None) -> tuple[Floats, Floats]:
        """Accuracies (n, k) around predictions (n,), and their weights, 0 for residuals of the row's own recipe."""
        weights = np.broadcast_to(self.weights, (len(Z), len(self.weights)))
        if codes is not None:
            weights = np.where(codes[:, None] == self.codes[None], 0.0, weights)
        total = weights.sum(axis=1, keepdims=True)
        return centre[:, None] + self.local(Z, codes)[:, None] * self.scaled, weights / np.maximum(total, 1e-300)

    def local(self, Z: Floats, codes: Codes | None) -> Floats:
        """The typical residual near each row of Z (n, p), in points: root mean square over its nearest neighbours of
        other recipes, a little from everywhere.

        By hand: scikit-learn's NearestNeighbors takes three times as long for a table of hundreds of runs, and leaves
        no neighbour out."""
        if not len(self.sizes):
            return np.full(len(Z), SMALLEST)
        everywhere = float((self.sizes**2).mean())
        k = min(NEIGHBOURS, len(self.sizes))
        distance = (Z**2).sum(axis=1)[:, None] - 2 * Z @ self.features.T + (self.features**2).sum(axis=1)[None]
        if codes is not None:
            distance[codes[:, None] == self.codes[None]] = np.inf
        near = np.argpartition(distance, k - 1, axis=1)[:, :k]
        use = np.isfinite(np.take_along_axis(distance, near, axis=1))
        n = use.sum(axis=1)
        mean = np.where(n > 0, (self.sizes[near] ** 2 * use).sum(axis=1) / np.maximum(n, 1), everywhere)
        return np.asarray(np.maximum(np.sqrt(NEIGHBOUR_WEIGHT * mean + (1 - NEIGHBOUR_WEIGHT) * everywhere), SMALLEST))


@dataclass(frozen=True)
class Calibration:
    """`betas`: for each part of the table, the central probability that the mixture's interval must have to hold
    `level` of new recipes; above 1 the interval reaches beyond the mixture's ends, by (beta − 1) × `spread` points.
    inf: too few recipes. `inside` (n,): whether each run lies in an interval made without its fold of recipes, and
    `coverage` is that by group."""

    level: float
    spread: float
    betas: Mapping[int, float]
    inside: Bools = field(repr=False)
    coverage: tuple[Coverage, ...]
    parts: Any = field(repr=False)  # scikit-learn's tree, whose leaves are the parts; None for one part
    survivors: Residuals = field(repr=False)
    collapsed: Residuals = field(repr=False)
    scaler: Any = field(repr=False)  # scikit-learn's, of all runs

    @classmethod
    def fit(
        cls, X: Floats, y: Floats, collapsed: Bools, out: Outcomes, level: float, codes: Codes | None = None,
        groups: Mapping[str, Sequence[Any]] | None = None, seed: int = 0,
    ) -> Calibration:  # fmt: skip
        """From out-of-fold predictions `out` of the runs X (n, p), y (n,) of recipes `codes` (n,; default: each its
        own). `groups` are labels (n,) by which coverage is reported, by name."""
        from sklearn.preprocessing import StandardScaler

        codes = np.arange(len(y)) if codes is None else codes
        scaler = StandardScaler().fit(X)
        Z, weights = scaler.transform(X), weights_of(codes)
        pools = [
            Residuals.of((y - centre)[keep], Z[keep], codes[keep], weights[keep])
            for centre, keep in ((out.survivor, ~collapsed), (out.collapsed, collapsed))
        ]
        mixture = cls(
            level, max(float(y.std()), 1e-9), {}, np.zeros(0, dtype=np.bool_), (), None, pools[0], pools[1], scaler
        )
        scores = mixture._scores(X, y, out, codes)
        parts, betas = _parts(X, scores, weights, codes, level)
        inside = _inside(X, scores, weights, codes, level, seed)
        coverage = _coverage(inside, codes, level, collapsed, groups or {})
        return cls(level, mixture.spread, betas, inside, coverage, parts, pools[0], pools[1], scaler)

    def interval(self, X: Floats, out: Outcomes) -> tuple[Floats, Floats]:
        """(low, high), each (n,), in percent and inside [0, 100]."""
        low, high = np.empty(len(X)), np.empty(len(X))
        betas = _of_parts(self.parts, self.betas, X)
        betas = np.where(self._undecided(out), np.maximum(betas, self.level), betas)
        inside, margin = np.minimum(betas, 1.0), np.maximum(betas - 1.0, 0.0) * self.spread
        for start in range(0, len(X), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            values, cumulated = self._mixture(X[part], out.rows(part))
            low[part] = _row_quantiles(values, cumulated, (1 - inside[part]) / 2, upper=False) - margin[part]
            high[part] = _row_quantiles(values, cumulated, (1 + inside[part]) / 2, upper=True) + margin[part]
        return np.clip(low, 0, 100), np.clip(high, 0, 100)

    def above(self, X: Floats, out: Outcomes, target: float) -> Floats:
        """The mixture's probability of at least `target` percent, (n,)."""
        chances = [np.empty(0)]
        for start in range(0, len(X), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            values, cumulated = self._mixture(X[part], out.rows(part))
            chances.append(1 - np.where(values < target, cumulated, 0.0).max(axis=1) / cumulated[:, -1])
        return np.concatenate(chances)

    def _mixture(self, X: Floats, out: Outcomes, codes: Codes | None = None) -> tuple[Floats, Floats]:
        """Support (n, s + c), ascending, and cumulative probability after each point."""
        Z = self.scaler.transform(X)
        values, weights = zip(
            self.survivors.around(out.survivor, Z, codes), self.collapsed.around(out.collapsed, Z, codes), strict=True
        )
        p = out.p_collapse if len(self.collapsed.sizes) else np.zeros(len(X))
        p = (p if len(self.survivors.sizes) else np.ones(len(X)))[:, None]
        chance = np.concatenate([(1 - p) * weights[0], p * weights[1]], axis=1)
        points = np.concatenate(values, axis=1)
        # What has no weight stands at the largest value that has one, where it moves no quantile and neither end.
        points = np.where(chance > 0, points, np.where(chance > 0, points, -np.inf).max(axis=1, keepdims=True))
        points = np.clip(points, 0, 100)
        order = np.argsort(points, axis=1, kind="stable")
        cumulated = np.cumsum(np.take_along_axis(chance, order, axis=1), axis=1)
        return np.take_along_axis(points, order, axis=1), np.maximum(cumulated, 1e-300)

    def _scores(self, X: Floats, y: Floats, out: Outcomes, codes: Codes) -> Floats:
        """The smallest beta whose interval holds each y, the mixtures being made of other recipes' runs."""
        values, cumulated = self._mixture(X, out, codes)
        total = cumulated[:, -1]
        below = np.where(values < y[:, None], cumulated, 0.0).max(axis=1) / total
        upto = np.where(values <= y[:, None], cumulated, 0.0).max(axis=1) / total
        # A quantile interval [Q(t), Q(1 − t)] holds y while t ≤ F(y) and 1 − t > F(y−).
        beta = np.maximum(0.0, np.maximum(1 - 2 * upto, 2 * below - 1))
        beyond = np.maximum(values[:, 0] - y, 0) + np.maximum(y - values[:, -1], 0)
        scores = np.where(beyond > 0, 1 + beyond / self.spread, np.minimum(beta, 1.0))
        return np.asarray(np.where(self._undecided(out) & (scores <= self.level), 0.0, scores))

    def _undecided(self, out: Outcomes) -> Bools:
        """Rows (n,) whose less likely outcome is too likely for a central interval to pass over: theirs is never made
        narrower than the mixture says, however well their part of the table was predicted."""
        both = len(self.survivors.sizes) and len(self.collapsed.sizes)
        rarer = np.minimum(out.p_collapse, 1 - out.p_collapse)
        return np.asarray(rarer > (1 - self.level) / 2) if both else np.zeros(len(rarer), dtype=np.bool_)


def _parts(X: Floats, scores: Floats, weights: Floats, codes: Codes, level: float) -> tuple[Any, dict[int, float]]:
    """A tree whose leaves are parts of the table with recipes enough (None for one part), and the beta of each."""
    recipes, tree = len(np.unique(codes)), None
    fewest = max(FEWEST_OF_PART, int(np.ceil(BEYOND_OF_PART / (1 - level))))
    if recipes >= 2 * fewest:
        from sklearn.tree import DecisionTreeRegressor

        ranks = np.argsort(np.argsort(scores)).astype(np.float64)
        tree = DecisionTreeRegressor(
            max_leaf_nodes=MOST_PARTS, min_weight_fraction_leaf=fewest / recipes, random_state=0
        ).fit(X, ranks, sample_weight=weights)
    leaves = tree.apply(X) if tree is not None else np.zeros(len(X), dtype=np.int64)
    betas = {int(leaf): _beta(scores[leaves == leaf], codes[leaves == leaf], level) for leaf in np.unique(leaves)}
    return tree, betas


def _beta(scores: Floats, codes: Codes, level: float) -> float:
    """The smallest score that holds `level` of the weight where each recipe has 1 / (recipes + 1), shared by its runs,
    and the new recipe has the rest, beyond all."""
    own = np.unique(codes, return_inverse=True)[1]
    order = np.argsort(scores)
    held = np.cumsum(weights_of(own)[order]) / (own.max() + 2)
    i = int(np.searchsorted(held, level - 1e-12))
    return float(scores[order][i]) if i < len(scores) else float("inf")


def _of_parts(tree: Any, betas: Mapping[int, float], X: Floats) -> Floats:
    if tree is None:
        return np.full(len(X), next(iter(betas.values())))
    return np.array([betas[int(leaf)] for leaf in tree.apply(X)])


def _inside(X: Floats, scores: Floats, weights: Floats, codes: Codes, level: float, seed: int) -> Bools:
    """Each fold of recipes against the betas of the others."""
    recipes = np.unique(codes)
    fold = np.random.default_rng(seed).permutation(len(recipes)) % min(COVERAGE_FOLDS, len(recipes))
    of_run = fold[np.searchsorted(recipes, codes)]
    inside = np.zeros(len(X), dtype=np.bool_)
    for number in np.unique(of_run):
        rest, own = of_run != number, of_run == number
        if rest.any():
            tree, betas = _parts(X[rest], scores[rest], weights[rest], codes[rest], level)
            inside[own] = scores[own] <= _of_parts(tree, betas, X[own])
    return inside


def _coverage(
    inside: Bools, codes: Codes, level: float, collapsed: Bools, groups: Mapping[str, Sequence[Any]]
) -> tuple[Coverage, ...]:
    members = {"all": np.ones(len(inside), dtype=np.bool_), "survived": ~collapsed, "collapsed": collapsed}
    for name, values in groups.items():
        labels = np.array([str(v) for v in values])
        levels = np.unique(labels)
        if 2 <= len(levels) <= MOST_REPORTED:
            members |= {f"{name} = {one}": labels == one for one in levels}
    return tuple(
        Coverage.of(group, inside[rows], codes[rows], level)
        for group, rows in members.items()
        if group == "all" or rows.sum() >= FEWEST_REPORTED
    )


def _row_quantiles(values: Floats, cumulated: Floats, level: Floats, upper: bool) -> Floats:
    """Row by row: the smallest value with F > level (lower end) or F ≥ level (upper end). By hand, as `numpy.quantile`
    has no F > level, and takes rows of different weights one at a time."""
    goal = (level * cumulated[:, -1])[:, None] - 1e-12
    index = (cumulated < goal if upper else cumulated <= goal).sum(axis=1)
    return np.asarray(values[np.arange(len(values)), np.minimum(index, values.shape[1] - 1)])
