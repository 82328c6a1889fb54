"""Which runs are of one recipe: what folds keep together, how far seeds scatter, and the runs of a recipe asked about.

A recipe is all its choices but the seed. Runs of one recipe never stand on both sides of a fold: what a predictor
knows of a recipe by its other seeds says nothing of recipes that were not run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget.accuracy import wilson
from robudget.columns import COLUMNS, COSTS, SCOPE, stored
from robudget.errors import InputError, hint
from robudget.files import fields
from robudget.prediction.features import Features, comparable
from robudget.prediction.regressors import Bools
from robudget.tables.usable import Floats, collapsed_rows, numbers_of

Codes = NDArray[np.int64]
CHOICES = tuple(name for name in stored("choice") if name != "seed")
BORROWED_SD = 0.3  # points; ours, a round figure for robust accuracy on CIFAR-10, where a table has no repeats
FEWEST_FREEDOM = 3  # degrees of freedom of a standard deviation that is worth more than a borrowed one
RUN_LEVEL = 0.95  # of the intervals of a run that was made


@dataclass(frozen=True)
class SeedNoise:
    """The standard deviation `sd` (points) of robust accuracy between seeds of one recipe: pooled within recipes over
    the `n_runs` runs of `n_recipes` recipes that have two or more and did not collapse; `borrowed` where there are too
    few of them for an estimate (BORROWED_SD then)."""

    sd: float
    n_recipes: int
    n_runs: int
    borrowed: bool

    def sentence(self) -> str:
        if self.borrowed:
            return (
                f"no recipe of the table was repeated often enough to see how far seeds scatter: {self.sd:g} points "
                "are assumed, which is not from these runs (repeat a few recipes with other seeds)"
            )
        return f"seeds of one recipe scatter by {self.sd:.2g} points ({self.n_runs} runs of {self.n_recipes} recipes)"


def recipe_codes(runs: pd.DataFrame, features: Features, together: Sequence[str] = ()) -> Codes:
    """A number for each run (n,), the same for runs that folds keep together: those of one recipe and, by `together`,
    those that are equal in these columns. Raises InputError for a column that the table lacks."""
    names = {*CHOICES, *(name for c in features.columns for name in (c.name, *c.aliases))} & set(runs.columns)
    codes = _codes(runs, sorted(names))
    for name in together:
        if name not in runs.columns:
            raise InputError(
                f"the table has no column {name!r} to keep runs together by{hint(name, runs.columns, 0.4)}"
            )
    if not together:
        return codes
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    others = _codes(runs, together)
    ones, n = np.ones(len(runs)), codes.max() + 1
    links = coo_array((ones, (codes, others + n)), shape=(n + others.max() + 1,) * 2)
    return np.unique(connected_components(links)[1][codes], return_inverse=True)[1].astype(np.int64)


def _codes(runs: pd.DataFrame, names: Sequence[str]) -> Codes:
    cells = list(zip(*(comparable(runs[name]) for name in names), strict=True))
    known: dict[Any, int] = {}
    return np.array([known.setdefault(cell, len(known)) for cell in cells], dtype=np.int64)


def weights_of(codes: Codes) -> Floats:
    """(n,) weights with which every recipe counts once: 1 / its number of runs."""
    return np.asarray(1.0 / np.bincount(codes)[codes], dtype=np.float64)


def seed_noise(y: Floats, collapsed: Bools, codes: Codes) -> SeedNoise:
    """From accuracies y (n,) in percent of runs of recipes `codes` (n,)."""
    values, recipes = y[~collapsed], codes[~collapsed]
    counts = np.bincount(recipes, minlength=1)
    means = np.bincount(recipes, weights=values, minlength=1) / np.maximum(counts, 1)
    repeated = counts[recipes] > 1
    freedom = int((counts[counts > 1] - 1).sum())
    squares = float(((values - means[recipes])[repeated] ** 2).sum())
    n = int((counts > 1).sum())
    if freedom < FEWEST_FREEDOM:
        return SeedNoise(BORROWED_SD, n, int(repeated.sum()), True)
    return SeedNoise(math.sqrt(squares / freedom), n, int(repeated.sum()), False)


@dataclass(frozen=True)
class Ran:
    """The runs of the table that are this very recipe, in every choice that both know: `aa_acc` is their mean robust
    accuracy in percent, `low` to `high` its 95% interval: of one run that of its evaluation (Wilson, over its images;
    NaN where their number is unknown), of more a normal one by the seeds' standard deviation. `next_low` to `next_high`
    is where 95% of further seeds lie. `costs` are the means of the table's cost columns (NaN: unknown)."""

    runs: tuple[str, ...]
    aa_acc: float
    low: float
    high: float
    next_low: float
    next_high: float
    n_collapsed: int
    costs: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


def runs_of(rows: pd.DataFrame, table: pd.DataFrame, noise: SeedNoise, names: Sequence[str]) -> list[Ran | None]:
    """For each of `rows` the runs of `table` that agree in `names` and in every other choice that both know."""
    shared = [name for name in dict.fromkeys((*names, *CHOICES)) if name in rows.columns and name in table.columns]
    runs = {name: comparable(table[name]) for name in shared}
    index: dict[tuple[Any, ...], list[int]] = {}
    for i, cell in enumerate(zip(*(runs[name] for name in names), strict=True)):
        index.setdefault(cell, []).append(i)
    asked = {name: comparable(rows[name]) for name in shared}
    out: list[Ran | None] = []
    for i, cell in enumerate(zip(*(asked[name] for name in names), strict=True)):
        same = [
            j for j in index.get(cell, ())
            if all(None in (asked[n][i], runs[n][j]) or asked[n][i] == runs[n][j] for n in shared)
        ]  # fmt: skip
        out.append(_ran(table.iloc[same], noise) if same else None)
    return out


def _ran(runs: pd.DataFrame, noise: SeedNoise) -> Ran:
    values = numbers_of(runs, "aa_acc")
    mean, z = float(values.mean()), NormalDist().inv_cdf(0.5 + RUN_LEVEL / 2)
    images = float(numbers_of(runs, "n_eval")[0]) if "n_eval" in runs else math.nan
    if len(values) > 1:
        half = z * noise.sd / math.sqrt(len(values))
        low, high = mean - half, mean + half
    elif images > 0:
        low, high = (100 * end for end in wilson(mean / 100 * images, round(images), RUN_LEVEL))
    else:
        low, high = math.nan, math.nan
    further = z * noise.sd * math.sqrt(1 + 1 / len(values))
    ids = runs["run_id"] if "run_id" in runs else runs.index.to_series()
    costs = {name: numbers_of(runs, name) for name in COSTS if name in runs}
    return Ran(
        tuple(ids.astype(str)), mean, low, high, mean - further, mean + further, int(collapsed_rows(runs).sum()),
        {name: float(v[~np.isnan(v)].mean()) if (~np.isnan(v)).any() else math.nan for name, v in costs.items()},
    )  # fmt: skip


def check_same_scope(rows: pd.DataFrame, table: pd.DataFrame) -> None:
    """Raises InputError where a row is of another dataset or threat than the table's runs."""
    for name in SCOPE:
        if name not in rows.columns or name not in table.columns:
            continue
        known = set(comparable(table[name])) - {None}
        other = next((v for v in comparable(rows[name]) if v is not None and v not in known), None)
        if known and other is not None:
            here = ", ".join(_scope(name, v) for v in sorted(known))
            raise InputError(
                f"a recipe with {COLUMNS[name].phrase} {_scope(name, other)} cannot be predicted from runs with "
                f"{COLUMNS[name].phrase} {here}: they say nothing of it (give a table of such runs)"
            )


def _scope(name: str, value: Any) -> str:
    if name == "eps" and value and abs(value * 255 - round(value * 255)) < 1e-3:
        return f"{round(value * 255)}/255"
    return COLUMNS[name].level(value)
