"""How much each choice buys: pairs of runs that differ in one choice only (the paper's Figure 2 as numbers).

Means of matched pairs; intervals are percentile bootstraps over pairs, by `scipy.stats.bootstrap`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd

from robudget.columns import NONE_IF_MISSING
from robudget.files import fields
from robudget.prediction.features import Features, finished_runs
from robudget.prediction.regressors import Bools
from robudget.tables.usable import Floats, level_of, standard_rows

RESAMPLES = 2_000
LEVEL = 0.95
FEWEST_PAIRS = 3
MOST_LEVELS = 12  # of more, only the first and the last are compared
MOST_NUMBERS, NUMBERS_AT_ONCE = 20_000_000, 2_000_000  # drawn at most in a bootstrap, and held at once
FEWEST_RESAMPLES = 200  # of very many values


@dataclass(frozen=True)
class Effect:
    """Going from one level of `feature` to another, everything else equal, over `n_pairs` pairs in which neither
    collapsed: `gain` points of y on average, with its interval (bootstrap over pairs); `sd` of the single gains;
    `better` the share of pairs that gain. `collapse` is the change of the collapsed share over all `n_all` pairs.
    `aliases` change along with the feature in this table, so that their effects are in it too.
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
    """By how many points the gain of `first` is larger at the upper level of `second` than at its lower one."""

    first: str
    second: str
    gain: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Effects:
    """`effects` are ordered by the size of their gain, neighbouring levels and the whole range of each choice."""

    y: str
    effects: tuple[Effect, ...]
    spreads: tuple[Spread, ...]
    interactions: tuple[Interaction, ...]
    level: float

    def of(self, feature: str) -> tuple[Effect, ...]:
        return tuple(e for e in self.effects if e.feature == feature)

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


def effects(
    frame: pd.DataFrame, features: Sequence[str] | None = None, *, level: float = LEVEL, resamples: int = RESAMPLES,
    seed: int = 0,
) -> Effects:  # fmt: skip
    """Matched-pair effects on `aa_acc` of every choice that varies among the runs trained against an adversary; repeats
    (seeds) of a recipe are averaged first. Raises InputError where there are too few runs or nothing varies."""
    runs, y, collapsed = finished_runs(frame[~standard_rows(frame)])
    columns = Features.of(runs, features).columns
    names = [c.name for c in columns]
    rng = np.random.default_rng(seed)
    recipes = _means_of_repeats(runs, names, y, collapsed)
    survivors = recipes[recipes["collapsed"] == 0]
    by_choice: list[Effect] = []
    for name, aliases in ((c.name, c.aliases) for c in columns):
        levels = sorted(set(recipes[name]))
        steps = list(pairwise(levels)) + ([(levels[0], levels[-1])] if len(levels) > 2 else [])
        others = [n for n in names if n != name]
        pairs, all_pairs = _by_level(survivors, name, others), _by_level(recipes, name, others)
        for before, after in steps if len(levels) <= MOST_LEVELS else steps[-1:]:
            gains = _differences(pairs, before, after, "y")
            if len(gains) < FEWEST_PAIRS:
                continue
            change = _differences(all_pairs, before, after, "collapsed")
            low, high = mean_interval(gains, level, resamples, rng)
            by_choice.append(Effect(
                name, level_of(before), level_of(after), float(gains.mean()), low, high, float(gains.std(ddof=1)),
                float((gains > 0).mean()), len(gains), float(change.mean()), len(change), aliases,
            ))  # fmt: skip
    by_choice.sort(key=lambda e: -abs(e.gain))
    binary = [name for name in names if recipes[name].nunique() == 2]
    spreads = [
        _spread(table, name, without_collapsed, level, resamples, rng)
        for name in binary
        for table, without_collapsed in ((recipes, False), (survivors, True))
        if table[name].nunique() == 2 and table[name].value_counts().min() >= FEWEST_PAIRS
    ]
    crossings = [_interaction(survivors, a, b, names, level, resamples, rng) for a, b in combinations(binary, 2)]
    interactions = sorted((i for i in crossings if i is not None), key=lambda i: -abs(i.gain))
    return Effects("aa_acc", tuple(by_choice), tuple(spreads), tuple(interactions), level)


def mean_interval(values: Floats, level: float, resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `values` (n,)."""
    interval = _bootstrap((values,), np.mean, level, resamples, rng).confidence_interval
    return float(interval.low), float(interval.high)


def _bootstrap(
    samples: tuple[Floats, ...], statistic: Callable[..., Any], level: float, resamples: int, rng: np.random.Generator
) -> Any:
    """scipy's percentile bootstrap of `statistic(*samples, axis)`; fewer resamples of very many values."""
    from scipy.stats import DegenerateDataWarning, bootstrap

    n = max(map(len, samples))
    resamples = min(resamples, max(FEWEST_RESAMPLES, MOST_NUMBERS // n))
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)  # some resample has no statistic; its NaN says so
        return bootstrap(
            samples, statistic, n_resamples=resamples, batch=max(1, min(resamples, NUMBERS_AT_ONCE // n)),
            vectorized=True, confidence_level=level, method="percentile", rng=rng,
        )  # fmt: skip


def _means_of_repeats(runs: pd.DataFrame, names: list[str], y: Floats, collapsed: Bools) -> pd.DataFrame:
    """One row per recipe: the mean of y and the share of collapse over its repeats."""
    table = runs[names].copy()
    for name in set(names) & set(NONE_IF_MISSING):
        table[name] = table[name].fillna(0.0)
    table["y"], table["collapsed"] = y, collapsed.astype(float)
    return table.groupby(names, sort=True)[["y", "collapsed"]].mean().reset_index()


def _by_level(recipes: pd.DataFrame, name: str, others: list[str]) -> dict[Any, pd.DataFrame]:
    """The recipes at each level of `name`, indexed by their other choices, so that equal indices are matched pairs."""
    match = recipes.groupby(others, sort=False).ngroup() if others else pd.Series(0, index=recipes.index)
    table = recipes[["y", "collapsed"]].set_index(match)
    levels = sorted(set(recipes[name]))
    if len(levels) > MOST_LEVELS:
        levels = [levels[0], levels[-1]]
    return {level: table[(recipes[name] == level).to_numpy()] for level in levels}


def _differences(pairs: dict[Any, pd.DataFrame], before: Any, after: Any, value: str) -> Floats:
    if before not in pairs or after not in pairs:
        return np.empty(0)
    first, second = pairs[before][value], pairs[after][value]
    both = first.index.intersection(second.index)
    return np.asarray(second.loc[both].to_numpy() - first.loc[both].to_numpy(), dtype=np.float64)


def _spread(
    recipes: pd.DataFrame, name: str, survivors: bool, level: float, resamples: int, rng: np.random.Generator
) -> Spread:
    before, after = sorted(set(recipes[name]))
    first, second = (recipes.loc[recipes[name] == v, "y"].to_numpy(dtype=np.float64) for v in (before, after))

    def ratio(one: Floats, two: Floats, axis: int) -> Any:
        return two.std(axis=axis, ddof=1) / one.std(axis=axis, ddof=1)

    ratios = _bootstrap((first, second), ratio, level, resamples, rng).bootstrap_distribution
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    sd_before, sd_after = float(first.std(ddof=1)), float(second.std(ddof=1))
    return Spread(
        name, level_of(before), level_of(after), sd_before, sd_after,
        sd_after / sd_before if sd_before else float("nan"),
        float(low), float(high), len(first), len(second), survivors,
    )  # fmt: skip


def _interaction(
    recipes: pd.DataFrame, first: str, second: str, names: list[str], level: float, resamples: int,
    rng: np.random.Generator,
) -> Interaction | None:  # fmt: skip
    """From quadruples that differ in the two choices only; None where fewer than FEWEST_PAIRS are complete."""
    others = [n for n in names if n not in (first, second)]
    if any(recipes[name].nunique() != 2 for name in (first, second)):
        return None
    match = recipes.groupby(others, sort=False).ngroup() if others else pd.Series(0, index=recipes.index)
    a, b = (recipes[name] == max(recipes[name]) for name in (first, second))
    sign = pd.Series(np.where(a == b, 1.0, -1.0), index=recipes.index)
    complete = match.map(match.value_counts()) == 4
    extra = (sign * recipes["y"])[complete].groupby(match[complete]).sum().to_numpy(dtype=np.float64)
    if len(extra) < FEWEST_PAIRS:
        return None
    low, high = mean_interval(extra, level, resamples, rng)
    return Interaction(first, second, float(extra.mean()), low, high, len(extra))
