"""What a recipe that was not run would have cost, from those that were.

Training cost is a product: what an image costs through this model, times the passes its loss and steps make, times the
images seen. Both factors are read from the table itself, by least squares on logarithms, so that any cost column will
do; passes grow linearly in the number of steps, so steps between two that were run are interpolated. Counted FLOPs come
out to within rounding; measured energy and seconds with the scatter of the runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from robudget.laws.select import Floats, column, failed

COSTS = (
    "train_flops_exact",
    "train_flops_paper",
    "train_energy_kwh",
    "cost_usd",
    "co2_kg",
    "train_seconds",
    "gpu_hours",
)
MODEL_KEY = ("model", "base", "activation", "variant")


@dataclass(frozen=True)
class CostModel:
    """ln(cost per image) = model[key] + passes[(loss, steps)]. `scatter` is the residual's standard deviation in ln."""

    name: str
    models: dict[tuple[str, ...], float]
    sizes: dict[tuple[str, ...], float]  # parameters of each, to interpolate for others
    passes: dict[tuple[str, int], float]
    scatter: float
    n_runs: int

    @classmethod
    def fit(cls, frame: pd.DataFrame, name: str) -> CostModel | None:
        """None where the table does not hold the column, or no run of it is known."""
        if name not in frame.columns:
            return None
        cost, images = column(frame, name), images_of(frame)
        use = ~failed(frame) & (cost > 0) & (images > 0)
        if not use.any():
            return None
        runs, target = frame[use], np.log(cost[use] / images[use])
        keys, efforts = model_keys(runs), _efforts(runs)
        key_list, effort_list = sorted(set(keys)), sorted(set(efforts))
        design = np.zeros((len(runs), len(key_list) + len(effort_list)))
        design[np.arange(len(runs)), [key_list.index(k) for k in keys]] = 1
        design[np.arange(len(runs)), [len(key_list) + effort_list.index(e) for e in efforts]] = 1
        solution = np.linalg.lstsq(design, target, rcond=None)[0]
        residual = target - design @ solution
        freedom = max(len(runs) - len(key_list) - len(effort_list) + 1, 1)
        sizes = column(runs, "parameters") if "parameters" in runs else np.full(len(runs), np.nan)
        return cls(
            name,
            {k: float(v) for k, v in zip(key_list, solution, strict=False)},
            {k: float(np.nanmean(sizes[[i for i, other in enumerate(keys) if other == k]])) for k in key_list},
            {e: float(v) for e, v in zip(effort_list, solution[len(key_list) :], strict=True)},
            float(np.sqrt((residual**2).sum() / freedom)), len(runs),
        )  # fmt: skip

    def predict(self, rows: pd.DataFrame) -> Floats:
        """Cost of the whole run per row, (n,); NaN where the loss is in no run of the table, or the images are
        unknown.
        """
        logs = [
            self._model(key, size) + self._passes(*effort)
            for key, size, effort in zip(model_keys(rows), column(rows, "parameters"), _efforts(rows), strict=True)
        ]
        return np.asarray(np.exp(np.array(logs)) * images_of(rows))

    def _model(self, key: tuple[str, ...], size: float) -> float:
        if key in self.models:
            return self.models[key]
        known = sorted((np.log(self.sizes[k]), v) for k, v in self.models.items() if self.sizes[k] > 0)
        if not known or not size > 0:
            return float("nan")
        xs, ys = np.array(known).T
        slope = np.polyfit(xs, ys, 1)[0] if len(set(xs)) > 1 else 1.0
        inside = float(np.interp(np.log(size), xs, ys))
        return inside + slope * float(np.log(size) - np.clip(np.log(size), xs[0], xs[-1]))

    def _passes(self, loss: str, steps: int) -> float:
        known = sorted((k, np.exp(v)) for (name, k), v in self.passes.items() if name == loss)
        if not known:
            return float("nan")
        xs, ys = np.array(known, dtype=np.float64).T
        if len(xs) == 1:
            return float(np.log(ys[0])) if steps == xs[0] else float("nan")
        slope, intercept = np.polyfit(xs, ys, 1)
        value = float(np.interp(steps, xs, ys)) if xs[0] <= steps <= xs[-1] else float(intercept + slope * steps)
        return float(np.log(value)) if value > 0 else float("nan")


def images_of(rows: pd.DataFrame) -> Floats:
    """Training images seen in the whole run: the column, or epochs × images per epoch, or epochs where no size is
    known.
    """
    n = len(rows)
    unknown = np.full(n, np.nan)
    seen = column(rows, "images_seen") if "images_seen" in rows else unknown
    epochs = column(rows, "epochs") if "epochs" in rows else unknown
    each = column(rows, "epoch_images") if "epoch_images" in rows else unknown
    counted = np.where(np.isnan(seen), epochs * each, seen)
    return counted if not np.isnan(counted).all() else epochs


def model_keys(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    names = [name for name in MODEL_KEY if name in rows.columns]
    return [tuple(str(v) for v in values) for values in rows[names].itertuples(index=False)]


def _efforts(rows: pd.DataFrame) -> list[tuple[str, int]]:
    loss = rows["loss"].astype(str) if "loss" in rows else ["at"] * len(rows)
    steps = column(rows, "steps") if "steps" in rows else np.zeros(len(rows))
    return [(name, 0 if np.isnan(k) else int(k)) for name, k in zip(loss, steps, strict=True)]
