"""What a recipe that was not run would have cost, from those that were; budgets as people write them, `50usd`.

Training cost is a product: what an image costs through this model, times the passes that its loss and steps make,
times the images seen. A first guess takes the first factor proportional to the parameters and the second from the
exact FLOP convention (at: 2K + 3 forward passes, trades: 2K + 7); the table then corrects both per model
and per loss and steps, by least squares on logarithms with a small ridge (Hoerl & Kennard 1970), so that a
correction that the table does not determine is 0. Counted FLOPs come out to within rounding, measured energy and
seconds with the scatter of the runs: an interval is Student's for a new run (with the doubt in the corrections, Seber
and Lee 2003, 5.3), and unknown where the model has as many corrections as runs, or where the table never varied alone
what a recipe changes. `bench/laws.py costs` measures the coverage (bench/RESULTS.md).

scikit-learn's OneHotEncoder and Ridge give the same corrections (to 3e-9) in 1.6 times the time, and the corrections
would then have to be read out of them by name: models and steps between those that were run are interpolated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from robudget.columns import COLUMNS
from robudget.errors import InputError, unknown
from robudget.files import fields
from robudget.losses import LOSSES
from robudget.meter.conventions import exact_factor
from robudget.tables.usable import Floats, failed_rows, numbers_of

RIDGE = 1e-6
Effort = tuple[str, int]  # loss, attack steps
Span = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class CostModel:
    """ln(cost per image) = base + ln(parameters) + ln(passes) + a correction of the model, of the loss and steps, and
    of the activation and variant.

    `models` maps each model that was run to its ln parameters, and `efforts`, `activations` list what else was run;
    `corrections` (p,) are theirs, in that order. `scatter` is the residual's standard deviation in ln, over `n_runs`
    with `freedom` degrees of freedom; NaN where there are none. `doubt` (p, p) is the covariance of the corrections and
    `undetermined` (p, q) what the table says nothing about, both in units of the scatter.
    """

    name: str
    base: float
    models: dict[Hashable, float]
    efforts: tuple[Effort, ...]
    activations: tuple[Hashable, ...]
    corrections: Floats
    scatter: float
    freedom: int
    n_runs: int
    per_epoch: float  # images an epoch of the fitted runs, where they agree; else NaN
    doubt: Floats = field(repr=False)
    undetermined: Floats = field(repr=False)

    @classmethod
    def fit(cls, frame: pd.DataFrame, name: str) -> CostModel | None:
        """None where the table does not hold the column, or knows it of no run."""
        if name not in frame.columns:
            return None
        cost, images = numbers_of(frame, name), images_of(frame)
        use = ~failed_rows(frame) & (cost > 0) & (images > 0)
        if not use.any():
            return None
        runs = frame[use]
        models = dict(sorted(zip(_models(runs), map(float, _sizes(runs)), strict=True), key=lambda item: str(item[0])))
        efforts = tuple(sorted(set(_efforts(runs)), key=str))
        activations = tuple(sorted(set(_activations(runs)), key=str))
        design = _design(runs, models, efforts, activations)
        target = np.log(cost[use]) - np.log(images[use]) - _first_guess(runs)
        base = float(target.mean())
        gram = design.T @ design
        corrections = np.asarray(np.linalg.solve(gram + RIDGE * np.eye(len(gram)), design.T @ (target - base)))
        residual = target - base - design @ corrections
        values, vectors = np.linalg.eigh(gram)
        seen = values > 1e-9 * values.max()
        freedom = len(runs) - int(seen.sum())
        scatter = float(np.sqrt((residual**2).sum() / freedom)) if freedom else math.nan
        doubt = (vectors[:, seen] / values[seen]) @ vectors[:, seen].T
        return cls(
            name, base, models, efforts, activations, corrections, scatter, freedom, len(runs), _per_epoch(runs),
            doubt, vectors[:, ~seen],
        )  # fmt: skip

    def predict(self, rows: pd.DataFrame) -> Floats:
        """Cost of the whole run per row, (n,); NaN where parameters or images are unknown."""
        logs = self.base + _first_guess(rows) + self._weights(rows) @ self.corrections
        return np.asarray(np.exp(logs) * images_of(rows, self.per_epoch))

    def spread(self, rows: pd.DataFrame, level: float) -> Floats:
        """Half the width in ln of the interval for a new run of each row, (n,); NaN where nothing says how wide."""
        from scipy.special import stdtrit

        if not self.freedom:
            return np.full(len(rows), np.nan)
        weights = self._weights(rows)
        leverage = np.einsum("ij,jk,ik->i", weights, self.doubt, weights)
        told = np.abs(weights @ self.undetermined).max(axis=1, initial=0.0) < 1e-6
        half = float(stdtrit(self.freedom, (1 + level) / 2)) * self.scatter * np.sqrt(1 + leverage)
        return np.where(told, half, np.nan)

    def _weights(self, rows: pd.DataFrame) -> Floats:
        return _design(rows, self.models, self.efforts, self.activations)


def difference(before: Mapping[str, float], after: Mapping[str, float], half: Mapping[str, float]) -> dict[str, Span]:
    """By how much `after` costs more than `before`, per column: value, low, high. `half` is half the width in ln of the
    interval of each cost, independent for the two."""
    out = {}
    for name, value in after.items():
        gap = value - before[name]
        width = half[name] * float(np.hypot(value, before[name]))
        out[name] = (gap, gap - width, gap + width)
    return out


def images_of(rows: pd.DataFrame, per_epoch: float = math.nan) -> Floats:
    """Training images seen in the whole run, (n,): the column, or epochs × images an epoch (`per_epoch` where a row
    does not say), or epochs where no size is known, or 1 where the table knows none of them (all runs then count as
    equally long)."""
    unknown = np.full(len(rows), np.nan)
    images = numbers_of(rows, "images_seen") if "images_seen" in rows else unknown
    epochs = numbers_of(rows, "epochs") if "epochs" in rows else unknown
    each = numbers_of(rows, "epoch_images") if "epoch_images" in rows else unknown
    counted = np.where(np.isnan(images), epochs * np.where(np.isnan(each), per_epoch, each), images)
    if not np.isnan(counted).all():
        return counted
    return np.ones(len(rows)) if np.isnan(epochs).all() else epochs


def _per_epoch(runs: pd.DataFrame) -> float:
    if not {"images_seen", "epochs"} <= set(runs.columns):
        return math.nan
    each = numbers_of(runs, "images_seen") / numbers_of(runs, "epochs")
    each = each[np.isfinite(each) & (each > 0)]
    return float(np.median(each)) if len(each) and np.ptp(each) <= 0.02 * np.median(each) else math.nan


def _passes(loss: str, steps: int) -> float:
    """In units of a forward pass of one image; a loss that we do not know counts as adversarial training."""
    return exact_factor(loss if loss in LOSSES else "at", max(steps, 1))


def _sizes(rows: pd.DataFrame) -> Floats:
    """ln parameters, (n,); 0 where the table does not say."""
    if "parameters" not in rows:
        return np.zeros(len(rows))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(numbers_of(rows, "parameters")))


def _models(rows: pd.DataFrame) -> list[Hashable]:
    names = [name for name in ("model", "base", "parameters") if name in rows]
    return [tuple(values) for values in rows[names].itertuples(index=False)] if names else [()] * len(rows)


def _activations(rows: pd.DataFrame) -> list[Hashable]:
    names = [name for name in ("activation", "variant") if name in rows]
    return [tuple(values) for values in rows[names].itertuples(index=False)] if names else [()] * len(rows)


def _efforts(rows: pd.DataFrame) -> list[Effort]:
    loss = rows["loss"].astype(str) if "loss" in rows else ["at"] * len(rows)
    steps = numbers_of(rows, "steps") if "steps" in rows else np.zeros(len(rows))
    return [(str(name), 0 if np.isnan(k) else int(k)) for name, k in zip(loss, steps, strict=True)]


def _first_guess(rows: pd.DataFrame) -> Floats:
    """ln of parameters × passes, (n,)."""
    return np.asarray(_sizes(rows) + np.log([_passes(*effort) for effort in _efforts(rows)]))


def _design(
    rows: pd.DataFrame, models: Mapping[Hashable, float], efforts: Sequence[Effort], activations: Sequence[Hashable]
) -> Floats:
    """How much of each correction a row takes, (n, p): all of its own where it was run, else parts of those of the
    next smaller and larger models (by ln parameters) and step counts; nothing of an activation that was not run."""
    out = np.zeros((len(rows), len(models) + len(efforts) + len(activations)))
    places = {key: i for i, key in enumerate(models)}
    sizes = sorted((size, places[key]) for key, size in models.items())
    effort_places = {effort: len(models) + i for i, effort in enumerate(efforts)}
    activation_places = {key: len(models) + len(efforts) + i for i, key in enumerate(activations)}
    choices = zip(_models(rows), _sizes(rows), _efforts(rows), _activations(rows), strict=True)
    for i, (key, size, effort, activation) in enumerate(choices):
        if key in places:
            out[i, places[key]] = 1
        else:
            _interpolate(out[i], float(size), sizes)
        if effort in effort_places:
            out[i, effort_places[effort]] = 1
        else:
            _interpolate(
                out[i], effort[1], sorted((k, at) for (loss, k), at in effort_places.items() if loss == effort[0])
            )
        if activation in activation_places:
            out[i, activation_places[activation]] = 1
    return out


def _interpolate(row: Floats, value: float, known: Sequence[tuple[float, int]]) -> None:
    """Add to `row` the weights of linear interpolation at `value` between `known` (abscissa, place), ascending; the
    nearest beyond their ends, nothing where none is known."""
    if not known:
        return
    at = [k for k, _ in known]
    position = float(np.interp(value, at, np.arange(len(at))))
    if math.isnan(position):
        row[:] = np.nan
        return
    low = int(position)
    row[known[low][1]] += 1 - (position - low)
    if position > low:
        row[known[low + 1][1]] += position - low


# unit → (column of the table, how many of its units one is)
UNITS = {unit.lower(): (c.name, size) for c in COLUMNS.values() for unit, size in c.budget}


@dataclass(frozen=True)
class Budget:
    """`amount` in the units of the table's column `column`; `text` as it was written."""

    text: str
    column: str
    amount: float

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


def column_of(unit: str) -> str:
    """The column that counts in a unit. Raises InputError with the nearest known one."""
    if unit.lower() not in UNITS:
        raise unknown("unit", unit, UNITS)
    return UNITS[unit.lower()][0]


def parse_budget(text: str) -> Budget:
    """A number and a unit, in either order for `$`. Raises InputError naming the unit and the nearest known one."""
    match = re.fullmatch(
        r"\s*(\$?)\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([A-Za-z$][A-Za-z0-9$-]*)?\s*", text
    )
    if not match or not (match[1] or match[3]):
        raise InputError(
            f"budget = {text!r} (allowed: a number and a unit, e.g. 50usd, 100gpu-h, 20kWh, 5kgCO2e, 1e19flops)"
        )
    unit = (match[3] or match[1]).lower()
    if unit not in UNITS:
        raise unknown("unit of a budget", match[3], UNITS)
    name, factor = UNITS[unit]
    amount = float(match[2].replace(",", "").replace("_", "")) * factor
    if amount <= 0:
        raise InputError(f"budget = {text!r} (allowed: more than 0)")
    return Budget(text.strip(), name, amount)
