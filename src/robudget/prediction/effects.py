"""How much each choice buys: pairs of runs that differ in one choice only (the paper's Figure 2 as numbers)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd

from robudget.columns import NONE_IF_MISSING
from robudget.files import fields
from robudget.prediction.features import Features
from robudget.prediction.predictor import usable
from robudget.prediction.regressors import Bools
from robudget.tables.usable import Floats, level_of, standard

RESAMPLES = 2_000
LEVEL = 0.95
FEWEST = 3  # pairs
MOST_LEVELS = 12  # of more, only the first and the last are compared
MOST_DRAWS, CHUNK = 20_000_000, 2_000_000  # numbers drawn at most, and held at once


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
    runs, y, fallen = usable(frame[~standard(frame)])
    seen = Features.of(runs, features)
    names = [c.name for c in seen.columns]
    aliases = {c.name: c.aliases for c in seen.columns}
    rng = np.random.default_rng(seed)
    every = _cells(runs, names, y, fallen)
    alive = every[every["fallen"] == 0]
    found: list[Effect] = []
    for name in names:
        levels = sorted(set(every[name]))
        steps = list(pairwise(levels)) + ([(levels[0], levels[-1])] if len(levels) > 2 else [])
        others = [n for n in names if n != name]
        pairs, all_pairs = _by_level(alive, name, others), _by_level(every, name, others)
        for before, after in steps if len(levels) <= MOST_LEVELS else steps[-1:]:
            gains = _differences(pairs, before, after, "y")
            if len(gains) < FEWEST:
                continue
            change = _differences(all_pairs, before, after, "fallen")
            low, high = _interval(gains, level, resamples, rng)
            found.append(Effect(
                name, level_of(before), level_of(after), float(gains.mean()), low, high, float(gains.std(ddof=1)),
                float((gains > 0).mean()), len(gains), float(change.mean()), len(change), aliases[name],
            ))  # fmt: skip
    found.sort(key=lambda e: -abs(e.gain))
    binary = [c.name for c in seen.columns if every[c.name].nunique() == 2]
    spreads = [
        _spread(table, name, survivors, level, resamples, rng)
        for name in binary
        for table, survivors in ((every, False), (alive, True))
        if table[name].nunique() == 2 and table[name].value_counts().min() >= FEWEST
    ]
    crossings = [_interaction(alive, a, b, names, level, resamples, rng) for a, b in combinations(binary, 2)]
    crossed = sorted((i for i in crossings if i is not None), key=lambda i: -abs(i.gain))
    return Effects("aa_acc", tuple(found), tuple(spreads), tuple(crossed), level)


def _cells(runs: pd.DataFrame, names: list[str], y: Floats, fallen: Bools) -> pd.DataFrame:
    """One row per recipe: the mean of y and the share of collapse over its repeats."""
    table = runs[names].copy()
    for name in set(names) & set(NONE_IF_MISSING):
        table[name] = table[name].fillna(0.0)
    table["y"], table["fallen"] = y, fallen.astype(float)
    return table.groupby(names, sort=True)[["y", "fallen"]].mean().reset_index()


def _by_level(cells: pd.DataFrame, name: str, others: list[str]) -> dict[Any, pd.DataFrame]:
    """The recipes at each level of `name`, indexed by their other choices, so that equal indices are matched pairs."""
    match = cells.groupby(others, sort=False).ngroup() if others else pd.Series(0, index=cells.index)
    table = cells[["y", "fallen"]].set_index(match)
    levels = sorted(set(cells[name]))
    if len(levels) > MOST_LEVELS:
        levels = [levels[0], levels[-1]]
    return {level: table[(cells[name] == level).to_numpy()] for level in levels}


def _differences(pairs: dict[Any, pd.DataFrame], before: Any, after: Any, value: str) -> Floats:
    if before not in pairs or after not in pairs:
        return np.empty(0)
    first, second = pairs[before][value], pairs[after][value]
    both = first.index.intersection(second.index)
    return np.asarray(second.loc[both].to_numpy() - first.loc[both].to_numpy(), dtype=np.float64)


def _resampled(
    values: Floats, statistic: Callable[[Floats], Floats], resamples: int, rng: np.random.Generator
) -> Floats:
    """`statistic` (over the last axis) of bootstrap samples, (resamples,); fewer of them for very many values."""
    n = len(values)
    resamples = min(resamples, max(200, MOST_DRAWS // n))
    chunk = max(1, CHUNK // n)
    return np.concatenate([
        statistic(values[rng.integers(n, size=(min(chunk, resamples - start), n))])
        for start in range(0, resamples, chunk)
    ])  # fmt: skip


def _interval(values: Floats, level: float, resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile bootstrap of the mean."""
    means = _resampled(values, lambda drawn: drawn.mean(axis=-1), resamples, rng)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _spread(
    cells: pd.DataFrame, name: str, survivors: bool, level: float, resamples: int, rng: np.random.Generator
) -> Spread:
    before, after = sorted(set(cells[name]))
    first, second = (cells.loc[cells[name] == v, "y"].to_numpy(dtype=np.float64) for v in (before, after))
    one, two = (_resampled(v, lambda drawn: drawn.std(axis=-1, ddof=1), resamples, rng) for v in (first, second))
    same = min(len(one), len(two))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = two[:same] / one[:same]
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    sd_before, sd_after = float(first.std(ddof=1)), float(second.std(ddof=1))
    return Spread(
        name, level_of(before), level_of(after), sd_before, sd_after,
        sd_after / sd_before if sd_before else float("nan"),
        float(low), float(high), len(first), len(second), survivors,
    )  # fmt: skip


def _interaction(
    cells: pd.DataFrame, first: str, second: str, names: list[str], level: float, resamples: int,
    rng: np.random.Generator,
) -> Interaction | None:  # fmt: skip
    """From quadruples that differ in the two choices only; None where fewer than FEWEST are complete."""
    others = [n for n in names if n not in (first, second)]
    if any(cells[name].nunique() != 2 for name in (first, second)):
        return None
    match = cells.groupby(others, sort=False).ngroup() if others else pd.Series(0, index=cells.index)
    a, b = (cells[name] == max(cells[name]) for name in (first, second))
    sign = pd.Series(np.where(a == b, 1.0, -1.0), index=cells.index)
    complete = match.map(match.value_counts()) == 4
    extra = (sign * cells["y"])[complete].groupby(match[complete]).sum().to_numpy(dtype=np.float64)
    if len(extra) < FEWEST:
        return None
    low, high = _interval(extra, level, resamples, rng)
    return Interaction(first, second, float(extra.mean()), low, high, len(extra))
