"""How much each choice buys: pairs of runs that differ in one choice only (the paper's Figure 2 as numbers)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd

from robudget.laws.features import Features
from robudget.laws.plain import fields
from robudget.laws.predictor import usable
from robudget.laws.select import Floats, standard

RESAMPLES = 2_000
LEVEL = 0.95
FEWEST = 3  # pairs


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
        wide = _wide(alive, name, names, "y")
        lost = _wide(every, name, names, "fallen")
        for before, after in steps if len(levels) <= 12 else steps[-1:]:
            gains = _differences(wide, before, after)
            if len(gains) < FEWEST:
                continue
            change = _differences(lost, before, after)
            low, high = _interval(gains, level, resamples, rng)
            found.append(Effect(
                name, before, after, float(gains.mean()), low, high, float(gains.std(ddof=1)),
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
    pairs = [_interaction(alive, a, b, names, level, resamples, rng) for a, b in combinations(binary, 2)]
    crossed = sorted((i for i in pairs if i is not None), key=lambda i: -abs(i.gain))
    return Effects("aa_acc", tuple(found), tuple(spreads), tuple(crossed), level)


def _cells(runs: pd.DataFrame, names: list[str], y: Floats, fallen: Any) -> pd.DataFrame:
    """One row per recipe: the mean of y and the share of collapse over its repeats."""
    table = runs[names].copy()
    for name in names:
        if table[name].dtype == bool or table[name].dtype == object:
            table[name] = table[name].map(lambda v: bool(v) if isinstance(v, bool | np.bool_) else v)
    table["y"], table["fallen"] = y, fallen.astype(float)
    return table.groupby(names, dropna=False, sort=True)[["y", "fallen"]].mean().reset_index()


def _wide(cells: pd.DataFrame, name: str, names: list[str], value: str) -> pd.DataFrame:
    """Rows: the other choices; columns: the levels of `name`."""
    others = [n for n in names if n != name]
    return cells.pivot_table(index=others or None, columns=name, values=value, aggfunc="mean", dropna=False)


def _differences(wide: pd.DataFrame, before: Any, after: Any) -> Floats:
    if before not in wide.columns or after not in wide.columns:
        return np.empty(0)
    gains = (wide[after] - wide[before]).dropna()
    return np.asarray(gains.to_numpy(dtype=np.float64))


def _interval(values: Floats, level: float, resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile bootstrap of the mean."""
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _spread(
    cells: pd.DataFrame, name: str, survivors: bool, level: float, resamples: int, rng: np.random.Generator
) -> Spread:
    before, after = sorted(set(cells[name]))
    first, second = (cells.loc[cells[name] == v, "y"].to_numpy(dtype=np.float64) for v in (before, after))

    def deviations(values: Floats) -> Floats:
        return np.asarray(values[rng.integers(len(values), size=(resamples, len(values)))].std(axis=1, ddof=1))

    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = deviations(second) / deviations(first)
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    one, two = float(first.std(ddof=1)), float(second.std(ddof=1))
    return Spread(
        name, before, after, one, two, two / one if one else float("nan"), float(low), float(high),
        len(first), len(second), survivors,
    )  # fmt: skip


def _interaction(
    cells: pd.DataFrame, first: str, second: str, names: list[str], level: float, resamples: int,
    rng: np.random.Generator,
) -> Interaction | None:  # fmt: skip
    others = [n for n in names if n not in (first, second)]
    wide = cells.pivot_table(index=others or None, columns=[first, second], values="y", aggfunc="mean", dropna=False)
    a0, a1 = sorted(set(cells[first])) if cells[first].nunique() == 2 else (None, None)
    b0, b1 = sorted(set(cells[second])) if cells[second].nunique() == 2 else (None, None)
    corners = [(a1, b1), (a0, b1), (a1, b0), (a0, b0)]
    if any(corner not in wide.columns for corner in corners):
        return None
    extra = (wide[corners[0]] - wide[corners[1]] - wide[corners[2]] + wide[corners[3]]).dropna().to_numpy(np.float64)
    if len(extra) < FEWEST:
        return None
    low, high = _interval(extra, level, resamples, rng)
    return Interaction(first, second, float(extra.mean()), low, high, len(extra))
