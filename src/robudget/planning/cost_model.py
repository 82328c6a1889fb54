"""What a recipe that was not run would have cost, from those that were; budgets as people write them, `50usd`.

Training cost is a product: what an image costs through this model, times the passes that its loss and steps make,
times the images seen. A first guess takes the first factor proportional to the parameters and the second from the
exact FLOP convention (at: 2K + 3 forward passes, trades: 2K + 7); the table then corrects both per model
and per loss and steps, by least squares on logarithms with a small ridge (Hoerl & Kennard 1970), so that a
correction that the table does not determine is 0. Counted FLOPs come out to within rounding, measured energy and
seconds with the scatter of the runs.

scikit-learn's OneHotEncoder and Ridge give the same corrections (to 3e-9) in 1.6 times the time, and the corrections
would then have to be read out of them by name: models and steps between those that were run are interpolated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
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
    """ln(cost per image) = base + ln(parameters) + ln(passes) + models[key] + efforts[(loss, steps)] +
    activations[(activation, variant)].

    `scatter` is the residual's standard deviation in ln, over `n_runs`.
    """

    name: str
    base: float
    models: dict[Hashable, tuple[float, float]]  # key → (ln parameters, correction)
    efforts: dict[Effort, float]
    activations: dict[Hashable, float]
    scatter: float
    n_runs: int
    per_epoch: float  # images an epoch of the fitted runs, where they agree; else NaN

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
        first_guess = np.log(images[use]) + _sizes(runs) + np.log([_passes(*effort) for effort in _efforts(runs)])
        target = np.log(cost[use]) - first_guess
        efforts = _efforts(runs)
        columns: list[Sequence[Hashable]] = [_models(runs), efforts, _activations(runs)]
        levels = [sorted(set(values), key=str) for values in columns]
        design = np.concatenate([_indicators(v, known) for v, known in zip(columns, levels, strict=True)], axis=1)
        base = float(target.mean())
        gram = design.T @ design
        solution = np.linalg.solve(gram + RIDGE * np.eye(len(gram)), design.T @ (target - base))
        residual = target - base - design @ solution
        freedom = max(len(runs) - int(np.linalg.matrix_rank(gram)), 1)
        parts = np.split(solution, np.cumsum([len(known) for known in levels])[:-1])
        sizes = dict(zip(columns[0], _sizes(runs), strict=True))
        return cls(
            name, base,
            {key: (float(sizes[key]), float(v)) for key, v in zip(levels[0], parts[0], strict=True)},
            {key: float(v) for key, v in zip(sorted(set(efforts), key=str), parts[1], strict=True)},
            {key: float(v) for key, v in zip(levels[2], parts[2], strict=True)},
            float(np.sqrt((residual**2).sum() / freedom)), len(runs), _per_epoch(runs),
        )  # fmt: skip

    def predict(self, rows: pd.DataFrame) -> Floats:
        """Cost of the whole run per row, (n,); NaN where parameters or images are unknown."""
        choices = zip(_models(rows), _sizes(rows), _efforts(rows), _activations(rows), strict=True)
        logs = [
            self.base + size + np.log(_passes(*effort)) + self._model(key, size) + self._effort(*effort)
            + self.activations.get(activation, 0.0)
            for key, size, effort, activation in choices
        ]  # fmt: skip
        return np.asarray(np.exp(np.array(logs)) * images_of(rows, self.per_epoch))

    def _model(self, key: Hashable, size: float) -> float:
        """The correction of this model, or of one of its size, between those that were run."""
        if key in self.models:
            return self.models[key][1]
        known = sorted(self.models.values())
        return float(np.interp(size, [k for k, _ in known], [v for _, v in known]))

    def _effort(self, loss: str, steps: int) -> float:
        known = sorted((k, v) for (name, k), v in self.efforts.items() if name == loss)
        return float(np.interp(steps, [k for k, _ in known], [v for _, v in known])) if known else 0.0


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


def _indicators(values: Sequence[Hashable], levels: Sequence[Hashable]) -> Floats:
    places = {level: i for i, level in enumerate(levels)}
    out = np.zeros((len(values), len(levels)))
    out[np.arange(len(values)), [places[value] for value in values]] = 1
    return out


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
