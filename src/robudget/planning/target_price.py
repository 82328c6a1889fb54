"""Prices in every unit a table knows: what a target costs by the laws, and what one recipe costs more than another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from robudget.errors import InputError
from robudget.laws.envelope import envelope_of
from robudget.laws.fit import auto_bins
from robudget.laws.form_selection import average, fit_forms
from robudget.laws.law import Reach
from robudget.tables.usable import column, points

RESAMPLES = 500
SAME = 1e-4  # spread of a ratio of costs below which one is the other in another unit
Span = tuple[float, float, float]  # value, low, high


def reaches_of(
    table: pd.DataFrame, first: str, others: Sequence[str], target: float | None, seed: int, warnings: list[str]
) -> tuple[Reach, ...]:
    """What `target` percent costs by the average over forms, in the column `first` and then in `others`; without a
    target, what one point more than the best run costs. Columns without a law are left out: said in `warnings` where it
    is the first, which leaves none."""
    made: dict[str, Reach] = {}
    for name in (first, *others):
        source = next((known for known in made if _ratio(table, known, name) is not None), None)
        if source is not None:
            made[name] = _scaled(made[source], name, _ratio(table, source, name) or 1.0)
            continue
        try:
            made[name] = _reach(table, name, target, seed)
        except InputError as error:
            if name == first:
                warnings.append(f"no law of {name}: {error}")
                return ()
    return tuple(made.values())


def difference(
    before: Mapping[str, float], after: Mapping[str, float], scatter: Mapping[str, float], z: float
) -> dict[str, Span]:
    """By how much `after` costs more than `before`, per column: value, low, high. `scatter` is the standard deviation
    of each cost in ln, independent for the two, and `z` the interval's half width in standard deviations."""
    out = {}
    for name, value in after.items():
        gap = value - before[name]
        half = z * scatter[name] * float(np.hypot(value, before[name]))
        out[name] = (gap, gap - half, gap + half)
    return out


def _reach(table: pd.DataFrame, name: str, target: float | None, seed: int) -> Reach:
    chosen = points(table, name, "aa_acc")
    env = envelope_of(chosen, auto_bins(chosen.counts.used))
    mixed = average(fit_forms(env, resamples=RESAMPLES, seed=seed))
    return mixed.cost_at(target or min(float(env.ys.max()) + 1, 99.9))


def _ratio(table: pd.DataFrame, one: str, other: str) -> float | None:
    """How many units of `other` one of `one` is, where that is the same for every run."""
    a, b = column(table, one), column(table, other)
    if not np.array_equal(a > 0, b > 0) or not (a > 0).any():
        return None
    ratios = b[a > 0] / a[a > 0]
    middle = float(np.median(ratios))
    return middle if float(np.abs(ratios / middle - 1).max()) < SAME else None


def _scaled(reach: Reach, name: str, ratio: float) -> Reach:
    return dataclasses.replace(reach, x=name, value=reach.value * ratio, low=reach.low * ratio, high=reach.high * ratio)
