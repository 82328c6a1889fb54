"""Small runs as judges: how often a cheaper run ranks two recipes as the costly one does, and whether it can.

Choices that spend compute (size, steps, epochs) make the scale of a run, the others what is to be chosen between. At
each cheaper scale, every pair of the others is ranked by its two runs there and by their two at the costliest scale
that holds FEWEST_CHOICES of them; the share of pairs ranked alike is the decision accuracy of DataDecide (Magnusson et
al. 2025, arXiv 2504.11393). Beside it stands the signal-to-noise ratio of the metric at that scale (Heineman et al.
2025, arXiv 2508.13144): the largest difference between two choices over the standard deviation between seeds of one,
where they take it between the last checkpoints of one training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from robudget.columns import column
from robudget.errors import InputError
from robudget.files import fields
from robudget.prediction.features import Features, comparable, finished_runs
from robudget.prediction.repeats import SeedNoise, recipe_codes, seed_noise
from robudget.tables.usable import Floats, numbers_of, standard_rows

LEVEL = 0.95
RESAMPLES = 500
FEWEST_CHOICES = 3  # at the costliest scale
MOST_LEVELS = 6  # of compute that are told apart


@dataclass(frozen=True)
class ComputeLevel:
    """Scales of about the same compute, `share` of the costliest scale's (median). `decision_accuracy` with its
    interval `low` to `high` (bootstrap over the choices) is over `n_pairs` pairs of runs in which none of the four
    collapsed, ties counting half; NaN without pairs. `signal` is the largest difference between two surviving choices
    at one scale (median over scales, points), `snr` that over the seeds' standard deviation. `collapsed` is the share
    of runs that did."""

    share: float
    n_scales: int
    n_runs: int
    collapsed: float
    n_pairs: int
    decision_accuracy: float
    low: float
    high: float
    signal: float
    snr: float


@dataclass(frozen=True)
class SmallRuns:
    """`levels` ascending in compute; `scale` are the choices that spend, `choices` the others, `target` the scale that
    the others are judged by, with `n_choices` runs there, and `flops` its median compute in `cost`."""

    levels: tuple[ComputeLevel, ...]
    scale: tuple[str, ...]
    choices: tuple[str, ...]
    target: dict[str, Any]
    n_choices: int
    cost: str
    flops: float
    noise: SeedNoise

    def target_text(self) -> str:
        """`parameters 267 M, attack steps 10`."""
        return ", ".join(f"{column(name).phrase} {column(name).level(value)}" for name, value in self.target.items())

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


def small_runs(frame: pd.DataFrame, cost: str = "train_flops_exact", *, seed: int = 0) -> SmallRuns:
    """Raises InputError where nothing, or everything, that varies spends compute, or no scale that a cheaper one could
    judge holds FEWEST_CHOICES choices that did not collapse."""
    runs, y, collapsed = finished_runs(frame[~standard_rows(frame)])
    columns = Features.of(runs)
    scale = tuple(c.name for c in columns.columns if column(c.name).spends)
    choices = tuple(c.name for c in columns.columns if not column(c.name).spends)
    if not scale or not choices:
        raise InputError("small runs judge nothing here: some choices must spend compute, and others must not")
    noise = seed_noise(y, collapsed, recipe_codes(runs, columns))
    levels_of = {
        kind: list(zip(*(comparable(runs[name]) for name in names), strict=True))
        for kind, names in (("scale", scale), ("choice", choices))
    }
    codes = {kind: pd.factorize(pd.Series(cells))[0] for kind, cells in levels_of.items()}
    table = pd.DataFrame(codes | {"y": y, "collapsed": collapsed.astype(float), "cost": numbers_of(runs, cost)})
    compute = table.groupby("scale").cost.median().dropna().sort_values()
    means = table.groupby(["scale", "choice"])[["y", "collapsed"]].mean()
    accuracy = means.y.where(means.collapsed == 0).unstack("choice")
    fell = means.collapsed.unstack("choice")
    if not len(compute):
        raise InputError(f"small runs judge nothing here: the {column(cost).phrase} of no run is known")
    held = accuracy.loc[compute.index].notna().sum(axis=1).to_numpy()
    if not (held[1:] >= FEWEST_CHOICES).any():
        raise InputError(
            f"small runs judge nothing here: no {' and '.join(column(name).phrase for name in scale)} but the cheapest "
            f"was run with {FEWEST_CHOICES} or more of the other choices, not collapsed"
        )
    last = int(np.flatnonzero(held >= FEWEST_CHOICES)[-1])
    compute = compute.iloc[: last + 1]
    goal = int(compute.index[-1])
    truth = accuracy.loc[goal].to_numpy(dtype=np.float64)
    target = dict(zip(scale, levels_of["scale"][int(np.flatnonzero(codes["scale"] == goal)[0])], strict=True))
    shares = compute.iloc[:-1] / compute.iloc[-1]
    rng = np.random.default_rng(seed)
    parts = np.array_split(np.arange(len(shares)), min(MOST_LEVELS, len(shares))) if len(shares) else []
    levels = []
    for part in parts:
        scales = list(shares.index[part])
        values = accuracy.loc[scales].to_numpy(dtype=np.float64)
        right, counted = _agreement(values, truth)
        low, high = _interval(right, counted, rng)
        ranges = [np.ptp(row[~np.isnan(row)]) for row in values if (~np.isnan(row)).sum() >= FEWEST_CHOICES]
        signal = float(np.median(ranges)) if ranges else math.nan
        pairs = int(counted.sum()) // 2
        levels.append(ComputeLevel(
            float(shares.iloc[part].median()), len(scales), int(fell.loc[scales].notna().sum().sum()),
            float(np.nanmean(fell.loc[scales].to_numpy(dtype=np.float64))), pairs,
            float(right.sum() / counted.sum()) if pairs else math.nan, low, high, signal, signal / noise.sd,
        ))  # fmt: skip
    return SmallRuns(
        tuple(levels), scale, choices, target, int((~np.isnan(truth)).sum()), cost,
        float(compute.iloc[-1]), noise,
    )  # fmt: skip


def _agreement(values: Floats, truth: Floats) -> tuple[Floats, Floats]:
    """Over scales (s, k) against the costliest (k,): for each pair of choices (k, k) how often it was ranked alike and
    how often it could be; symmetric, with a zero diagonal."""
    here, there = values[:, :, None] - values[:, None, :], truth[:, None] - truth[None]
    known = ~np.isnan(here) & ~np.isnan(there)[None] & ~np.eye(len(truth), dtype=np.bool_)[None]
    product = np.sign(np.where(known, here, 0)) * np.sign(np.where(known, there, 0))
    return np.where(known, (product + 1) / 2, 0.0).sum(axis=0), known.sum(axis=0).astype(np.float64)


def _interval(right: Floats, counted: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """A percentile bootstrap over choices: pairs that share one are not independent."""
    k = len(right)
    draws = rng.multinomial(k, np.full(k, 1 / k), size=RESAMPLES).astype(np.float64)
    total = np.einsum("bi,ij,bj->b", draws, counted, draws)
    with np.errstate(invalid="ignore"):
        shares = np.einsum("bi,ij,bj->b", draws, right, draws) / total
    if not (total > 0).any():
        return math.nan, math.nan
    low, high = np.nanquantile(shares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
