"""How much each choice buys: pairs of runs that differ in one choice only (the paper's Figure 2 as numbers).

An effect is the mean gain of its matched pairs, with a t interval over pairs. What two runs of a pair have of noise
enters their difference with opposite signs, so that gains are symmetric around an effect that is the same everywhere,
and the t interval covers what it says from three pairs on (a percentile bootstrap of three pairs covers 75% of nominal
95%). It is an interval of pairs like those seen: where the effect fails in a fifth of the pairs and none of these was
met, it holds the effect of the others. Where an effect is not the same everywhere, its average says little: the
interaction of every two choices is estimated from quadruples of runs that differ in these two only, and an effect with
an interaction that excludes 0 is given at each level of the other choice. Every comparison is counted, and Holm's
correction (1979) says which of them exclude 0 together. `bench/laws.py effects` measures the coverage
(bench/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget.columns import COLUMNS, NONE_IF_MISSING, column
from robudget.files import fields
from robudget.prediction.features import Feature, Features, finished_runs
from robudget.prediction.regressors import Bools
from robudget.tables.usable import Floats, level_of, numbers_of, standard_rows

RESAMPLES = 2_000  # of the ratio of two standard deviations
LEVEL = 0.95
FEWEST_PAIRS = 3
FAILING, ENOUGH_PAIRS = 0.2, 15  # a share of pairs that fail, and as many pairs show one with a chance of 96%
FEWEST_RUNS = 10  # on either side of a ratio of standard deviations
MOST_LEVELS = 12  # of more, only the first and the last are compared
MOST_NUMBERS, NUMBERS_AT_ONCE = 20_000_000, 2_000_000  # drawn at most in a bootstrap, and held at once
FEWEST_RESAMPLES = 200  # of very many values
Level = tuple[str, Any]  # a choice and one of its levels


@dataclass(frozen=True)
class Effect:
    """Going from one level of `feature` to another, everything else equal, over `n_pairs` pairs in which neither
    collapsed: `gain` points of y on average, with its t interval (NaN where all gains are equal) and the `p` value of
    no gain; `stands` says whether it differs from 0 by Holm's correction over all comparisons of the table. `sd` is the
    standard deviation of the single gains, `better` the share of pairs that gain, `collapse` the change of the
    collapsed share over all `n_all` pairs.

    `aliases` are columns that vary only together with the feature, and `along` what they changed to in these pairs:
    their effects are in this one. `where` is the level of another choice that all its pairs have, and `regimes` are the
    same effect at each level of a choice that it interacts with. `cost_ratio` is by how much the second run of a pair
    costs more (geometric mean), where a cost was asked for.
    """

    feature: str
    before: Any
    after: Any
    gain: float
    low: float
    high: float
    sd: float
    better: float
    n_pairs: int
    collapse: float
    n_all: int
    aliases: tuple[str, ...] = ()
    along: tuple[tuple[str, Any, Any], ...] = ()
    p: float = float("nan")
    stands: bool = False
    where: tuple[Level, ...] = ()
    regimes: tuple[Regime, ...] = ()
    cost_ratio: float = float("nan")

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def reversed_by(self) -> tuple[str, ...]:
        """The choices by whose level the effect changes its sign, with both intervals beside 0."""
        return tuple(
            r.by for r in self.regimes if any(e.low > 0 for e in r.effects) and any(e.high < 0 for e in r.effects)
        )

    def change(self) -> str:
        """`EMA no → yes`; a model by its name where its size stands for it."""
        named = next((a for a in self.along if (self.feature, a[0]) == ("parameters", "model")), None)
        return _change(*(named or (self.feature, self.before, self.after)))

    def came_with(self) -> str:
        """What changed in every pair beside the choice itself: `epochs 110 → 400, CutMix no → yes`; empty if nothing.
        A number that the choice switches on, as the decay of EMA, and another name of it are the choice."""
        own = {("parameters", "model"), ("parameters", "base")} | {
            (self.feature, c.name) for c in COLUMNS.values() if c.switch == self.feature
        }
        return ", ".join(_change(*a) for a in self.along if (self.feature, a[0]) not in own)

    def condition(self) -> str:
        """`synthetic data yes`; empty for all runs."""
        return ", ".join(f"{column(name).phrase} {column(name).level(level)}" for name, level in self.where)


@dataclass(frozen=True)
class Regime:
    """An effect at each level of the choice `by`, as their interaction excludes 0; `stands` if it does after Holm's
    correction."""

    by: str
    effects: tuple[Effect, ...]
    stands: bool


@dataclass(frozen=True)
class Spread:
    """The standard deviation of y over all other choices at two levels of `feature`: `ratio` = after / before with its
    bootstrap interval. `survivors`: whether collapsed runs were left out."""

    feature: str
    before: Any
    after: Any
    sd_before: float
    sd_after: float
    ratio: float
    low: float
    high: float
    n_before: int
    n_after: int
    survivors: bool


@dataclass(frozen=True)
class Interaction:
    """By how many points the gain of `first` (from `before` to `after`) is larger at the level `upper` of `second` than
    at `lower`: the mean of `n` quadruples with its t interval, p value and Holm's verdict."""

    first: str
    before: Any
    after: Any
    second: str
    lower: Any
    upper: Any
    gain: float
    low: float
    high: float
    n: int
    p: float
    stands: bool = False

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Effects:
    """`effects` are ordered by the size of their gain: neighbouring levels and the whole range of each choice.

    `interactions` are ordered the same way. `n_comparisons` counts both, and `n_excluding` and `n_standing` those whose
    interval excludes 0, one by one and after Holm's correction.
    """

    y: str
    effects: tuple[Effect, ...]
    spreads: tuple[Spread, ...]
    interactions: tuple[Interaction, ...]
    level: float

    @property
    def n_comparisons(self) -> int:
        return len(self.effects) + len(self.interactions)

    @property
    def n_excluding(self) -> int:
        return sum(e.excludes_zero for e in self.effects) + sum(i.excludes_zero for i in self.interactions)

    @property
    def n_standing(self) -> int:
        return sum(e.stands for e in self.effects) + sum(i.stands for i in self.interactions)

    def of(self, feature: str) -> tuple[Effect, ...]:
        return tuple(e for e in self.effects if e.feature == feature)

    def comparisons(self) -> str:
        """How many comparisons were made, and how many of them can be chance."""
        chance = (1 - self.level) * self.n_comparisons
        return (
            f"{len(self.effects)} effects and {len(self.interactions)} interactions were compared with 0: "
            f"{self.n_excluding} {self.level:.0%} intervals exclude it where chance alone would give about "
            f"{chance:.0f}, and {self.n_standing} do after Holm's correction over all of them"
        )

    def unseen(self) -> str:
        """What intervals of few pairs cannot know: an effect that fails in pairs of which none was seen. Empty where
        all effects have pairs enough to show one."""
        every = [*self.effects, *(part for e in self.effects for r in e.regimes for part in r.effects)]
        fewest = min((e.n_pairs for e in every), default=ENOUGH_PAIRS)
        if fewest >= ENOUGH_PAIRS:
            return ""
        missed = (1 - FAILING) ** fewest
        return (
            f"An interval is of pairs like those seen: an effect that fails in 1 pair of {1 / FAILING:.0f} has no "
            f"failing pair among {fewest}, the fewest here, with a chance of {missed:.0%}, and its mean may then lie "
            f"outside"
        )

    def to_dict(self) -> dict[str, Any]:
        counted = ("n_comparisons", "n_excluding", "n_standing")
        return fields(self) | {name: getattr(self, name) for name in counted}


def effects(
    frame: pd.DataFrame, features: Sequence[str] | None = None, *, level: float = LEVEL, resamples: int = RESAMPLES,
    seed: int = 0, cost: str | None = None,
) -> Effects:  # fmt: skip
    """Matched-pair effects on `aa_acc` of every choice that varies among the runs trained against an adversary, and
    what they cost in the column `cost`; repeats (seeds) of a recipe are averaged first. `resamples=0` leaves the
    spreads out. Raises InputError where there are too few runs or nothing varies."""
    runs, y, collapsed = finished_runs(frame[~standard_rows(frame)])
    columns = Features.of(runs, features).columns
    names = [c.name for c in columns]
    with np.errstate(divide="ignore", invalid="ignore"):
        spent = np.log(numbers_of(runs, cost)) if cost is not None else np.full(len(runs), np.nan)
    recipes = _means_of_repeats(runs, names, y, collapsed, np.where(np.isfinite(spent), spent, np.nan))
    every = _Matched.of(recipes, names)
    survivors = _Matched.of(recipes[recipes["collapsed"] == 0], names)
    along = {c.name: _levels_along(runs, c) for c in columns}

    def effect(c: Feature, before: Any, after: Any, where: tuple[Level, ...] = ()) -> Effect | None:
        gains = survivors.gains(c.name, before, after, "y", where)
        if len(gains) < FEWEST_PAIRS:
            return None
        change = every.gains(c.name, before, after, "collapsed", where)
        ratios = survivors.gains(c.name, before, after, "spent", where)
        ratios = ratios[~np.isnan(ratios)]
        low, high, p = mean_interval(gains, level)
        return Effect(
            c.name, level_of(before), level_of(after), float(gains.mean()), low, high, float(gains.std(ddof=1)),
            float((gains > 0).mean()), len(gains), float(change.mean()), len(change), c.aliases,
            tuple((name, levels.get(before), levels.get(after)) for name, levels in along[c.name].items()), p,
            where=tuple(("model", along[name]["model"][value]) if name == "parameters" and "model" in along[name]
                        else (name, level_of(value)) for name, value in where),
            cost_ratio=float(np.exp(ratios.mean())) if len(ratios) else float("nan"),
        )  # fmt: skip

    single = {(c.name, *step): effect(c, *step) for c in columns for step in survivors.steps(c.name)}
    kinds = {c.name: c for c in columns}
    found = {key: e for key, e in single.items() if e is not None}
    crossings = [
        crossing
        for one, other in combinations(found, 2)
        if one[0] != other[0] and (crossing := survivors.interaction(one, other, level)) is not None
    ]
    standing = iter(holm([e.p for e in found.values()] + [i.p for i in crossings], 1 - level))
    found = {key: replace(e, stands=next(standing)) for key, e in found.items()}
    crossings = [replace(i, stands=next(standing)) for i in crossings]
    by_choice = []
    for (name, before, after), e in found.items():
        regimes = []
        for by, stands in _moderators(e, crossings).items():
            parts = [effect(kinds[name], before, after, ((by, value),)) for value in every.levels[by]]
            regimes.append(Regime(by, tuple(part for part in parts if part is not None), stands))
        by_choice.append(replace(e, regimes=tuple(regimes)))
    rng = np.random.default_rng(seed)
    spreads = [
        _spread(table, name, without_collapsed, level, resamples, rng)
        for name in names
        if resamples and recipes[name].nunique() == 2
        for table, without_collapsed in ((recipes, False), (recipes[recipes["collapsed"] == 0], True))
        if table[name].nunique() == 2 and table[name].value_counts().min() >= FEWEST_RUNS
    ]
    by_choice.sort(key=lambda e: -abs(e.gain))
    crossings.sort(key=lambda i: -abs(i.gain))
    return Effects("aa_acc", tuple(by_choice), tuple(spreads), tuple(crossings), level)


def mean_interval(values: Floats, level: float = LEVEL) -> tuple[float, float, float]:
    """The t interval of the mean of `values` (n,), and the p value of a mean of 0; NaN where all are equal."""
    from scipy.special import stdtr, stdtrit

    n = len(values)
    error = float(np.std(values, ddof=1)) / np.sqrt(n) if n > 1 else 0.0
    mean = float(np.mean(values))
    if not error > 1e-12 * max(1.0, abs(mean)):
        return float("nan"), float("nan"), float("nan")
    half = float(stdtrit(n - 1, (1 + level) / 2)) * error
    return float(mean - half), float(mean + half), 2 * float(stdtr(n - 1, -abs(mean) / error))


def holm(p: Sequence[float], alpha: float) -> list[bool]:
    """Which of many hypotheses are rejected at once with a familywise error of at most alpha (Holm 1979)."""
    values = np.where(np.isnan(p), 1.0, p)
    order = np.argsort(values, kind="stable")
    passed = np.cumprod(values[order] <= alpha / (len(values) - np.arange(len(values)))).astype(bool)
    out = np.zeros(len(values), dtype=bool)
    out[order] = passed
    return [bool(v) for v in out]


def _moderators(e: Effect, crossings: Sequence[Interaction]) -> dict[str, bool]:
    """The choices with an interaction with this effect that excludes 0, the largest first, and whether one stands."""
    key = (e.feature, e.before, e.after)
    out: dict[str, bool] = {}
    for i in sorted((i for i in crossings if i.excludes_zero), key=lambda i: -abs(i.gain)):
        sides = ((i.first, i.before, i.after), (i.second, i.lower, i.upper))
        if key in sides:
            by = sides[1 - sides.index(key)][0]
            out[by] = out.get(by, False) or i.stands
    return out


def _levels_along(runs: pd.DataFrame, feature: Feature) -> dict[str, dict[Any, Any]]:
    """Per alias of a feature: which of its values came with each level of the feature."""
    levels = runs[feature.name]
    levels = levels.fillna(0.0) if feature.name in NONE_IF_MISSING else levels
    first = ~levels.duplicated()
    return {
        name: {
            level: None if pd.isna(value) else level_of(value)
            for level, value in zip(levels[first], runs.loc[first, name], strict=True)
        }
        for name in feature.aliases
    }


def _change(name: str, before: Any, after: Any) -> str:
    choice = column(name)
    return f"{choice.phrase} {choice.level(before)} → {choice.level(after)}"


# -- matching ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matched:
    """Recipes that can be matched in all choices but one or two. `levels` of each choice in ascending order, `codes`
    (n,) into them, `marks` a random number per level: the sum of a recipe's marks is its `key` (n,), and the key less
    the marks of some choices says which recipes agree in all others (Zobrist's hashing, 1970)."""

    levels: dict[str, list[Any]]
    codes: dict[str, NDArray[np.int64]] = field(repr=False)
    marks: dict[str, NDArray[np.uint64]] = field(repr=False)
    key: NDArray[np.uint64] = field(repr=False)
    values: dict[str, Floats] = field(repr=False)

    @classmethod
    def of(cls, recipes: pd.DataFrame, names: Sequence[str]) -> _Matched:
        rng = np.random.default_rng(0)
        levels = {name: sorted(set(recipes[name])) for name in names}
        codes, marks, key = {}, {}, np.zeros(len(recipes), dtype=np.uint64)
        for name in names:
            places = {level: i for i, level in enumerate(levels[name])}
            codes[name] = np.array([places[value] for value in recipes[name]], dtype=np.int64)
            each = rng.integers(0, 2**63, len(levels[name]), dtype=np.uint64)
            marks[name] = each[codes[name]] if len(recipes) else np.zeros(0, dtype=np.uint64)
            key = key + marks[name]
        values = {name: recipes[name].to_numpy(dtype=np.float64) for name in ("y", "collapsed", "spent")}
        return cls(levels, codes, marks, key, values)

    def steps(self, name: str) -> list[tuple[Any, Any]]:
        """What is compared of a choice: neighbouring levels, and the first with the last."""
        levels = self.levels[name]
        if not levels:
            return []
        ends = [(levels[0], levels[-1])]
        return list(pairwise(levels)) + (ends if len(levels) > 2 else []) if len(levels) <= MOST_LEVELS else ends

    def gains(self, name: str, before: Any, after: Any, value: str, where: Sequence[Level] = ()) -> Floats:
        """The differences of `value` in all pairs that differ in `name` only, (pairs,)."""
        conditions = [[(name, level), *where] for level in (before, after)]
        first, second = self._aligned([name], conditions)
        return self.values[value][second] - self.values[value][first]

    def interaction(self, one: tuple[str, Any, Any], other: tuple[str, Any, Any], level: float) -> Interaction | None:
        """None where fewer than FEWEST_PAIRS quadruples are complete."""
        (a, before, after), (b, lower, upper) = one, other
        corners = [[(a, first), (b, second)] for first in (before, after) for second in (lower, upper)]
        y = [self.values["y"][rows] for rows in self._aligned([a, b], corners)]
        if len(y[0]) < FEWEST_PAIRS:
            return None
        extra = (y[3] - y[1]) - (y[2] - y[0])
        low, high, p = mean_interval(extra, level)
        return Interaction(
            a, level_of(before), level_of(after), b, level_of(lower), level_of(upper), float(extra.mean()), low, high,
            len(extra), p,
        )  # fmt: skip

    def _aligned(self, free: Sequence[str], cells: Sequence[Sequence[Level]]) -> list[NDArray[np.int64]]:
        """For each cell (levels that its recipes have) the rows of those recipes that have a partner in every other
        cell, equal in all but the `free` choices; in one order for all cells."""
        rest = self.key.copy()
        for name in free:
            rest -= self.marks[name]
        rows = []
        for cell in cells:
            keep = np.ones(len(rest), dtype=bool)
            for name, level in cell:
                keep &= self.codes[name] == (self.levels[name].index(level) if level in self.levels[name] else -1)
            rows.append(np.flatnonzero(keep))
        common = rest[rows[0]]
        for cell_rows in rows[1:]:
            common = np.intersect1d(common, rest[cell_rows])
        return [
            cell_rows[np.argsort(rest[cell_rows])][np.searchsorted(np.sort(rest[cell_rows]), common)]
            for cell_rows in rows
        ]


def _means_of_repeats(runs: pd.DataFrame, names: list[str], y: Floats, collapsed: Bools, spent: Floats) -> pd.DataFrame:
    """One row per recipe: the means of y and of ln cost, and the share of collapse, over its repeats."""
    table = runs[names].copy()
    for name in set(names) & set(NONE_IF_MISSING):
        table[name] = table[name].fillna(0.0)
    table["y"], table["collapsed"], table["spent"] = y, collapsed.astype(float), spent
    return table.groupby(names, sort=True)[["y", "collapsed", "spent"]].mean().reset_index()


def _spread(
    recipes: pd.DataFrame, name: str, survivors: bool, level: float, resamples: int, rng: np.random.Generator
) -> Spread:
    """By hand: the draws are those of `scipy.stats.bootstrap`, which takes as long to import as a table to analyse."""
    before, after = sorted(set(recipes[name]))
    first, second = (recipes.loc[recipes[name] == v, "y"].to_numpy(dtype=np.float64) for v in (before, after))
    n = max(len(first), len(second))
    resamples = min(resamples, max(FEWEST_RESAMPLES, MOST_NUMBERS // n))
    batch = max(1, min(resamples, NUMBERS_AT_ONCE // n))
    ratios = []
    for start in range(0, resamples, batch):
        size = min(batch, resamples - start)
        sd = [side[rng.integers(0, len(side), (size, len(side)))].std(axis=1, ddof=1) for side in (first, second)]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(sd[1] / sd[0])
    low, high = np.nanquantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2])
    sd_before, sd_after = float(first.std(ddof=1)), float(second.std(ddof=1))
    return Spread(
        name, level_of(before), level_of(after), sd_before, sd_after,
        sd_after / sd_before if sd_before else float("nan"),
        float(low), float(high), len(first), len(second), survivors,
    )  # fmt: skip
