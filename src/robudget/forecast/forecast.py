"""What a recipe or a study will cost: on a named device by its table, on this machine by a calibration of seconds."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from robudget.backend.batch_size import training_bytes
from robudget.datasets import Sizes, sizes_of
from robudget.forecast.passes import RIGHT_SHARE, TrainingPasses, evaluation_passes, training_passes
from robudget.forecast.step_timing import Calibration, Work, calibrate, layer_kind, timing_key
from robudget.losses import LOSSES
from robudget.meter.conventions import paper_flops_of
from robudget.meter.devices import Device, find
from robudget.meter.energy import JOULES_PER_KWH
from robudget.meter.flops import PassFlops, forward_of, of_recipe, totals, training_calls
from robudget.meter.machine import open_meter
from robudget.meter.prices import Prices, bill
from robudget.recipe import Recipe

# Each as (low, likely, high).
# Shares of the test images that are classified correctly and that are robust: the evaluation's length depends on them.
_CLEAN_SHARES, _ROBUST_SHARES = (0.5, 0.85, 1.0), (0.1, 0.5, 0.85)
_RIGHT_SHARES = (0.4, RIGHT_SHARE, 1.0)  # of the validation images, over a training
# Power of GPU, CPU and memory ÷ board power: a GPU at work draws less than that, and its host adds to it.
_POWER_FACTORS = (0.5, 0.8, 1.2)
# Time ÷ calibrated time: other work on the machine, heat and the contents of the caches are not calibrated.
_TIME_FACTORS = (0.85, 1.0, 1.25)
# Time ÷ that of the ensemble's passes: most for Square on small models, whose forward pass takes microseconds.
_ENSEMBLE_FACTORS = (0.7, 1.2, 1.8)
_LAUNCH_SECONDS = 5e-3  # a step: below it a device waits for its host to launch some hundreds of kernels of 10 µs
_BUSY_SHARE = 0.25  # of the cores: where other processes use more, the calibration was disturbed


@dataclass(frozen=True)
class Span:
    """A figure with the range that it is in, most likely."""

    low: float
    likely: float
    high: float

    def times(self, other: Span) -> Span:
        return Span(self.low * other.low, self.likely * other.likely, self.high * other.high)

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.likely + other.likely, self.high + other.high)


@dataclass(frozen=True)
class Forecast:
    """One recipe's bill before it runs. Seconds are wall time, energy is that of GPU, CPU and memory without PUE;
    `synthetic_images`: None = as many as a file holds; `not_counted`: op without a FLOP formula → its share; `basis`
    says what the times are computed from, `notes` what limits them."""

    id: str
    slug: str
    device: str
    parameters: int
    forward_flops: int
    train_flops_exact: float
    train_flops_paper: float
    eval_flops_exact: Span
    memory_gb: float
    train_seconds: Span
    eval_seconds: Span
    train_kwh: Span
    eval_kwh: Span
    prices: Prices
    gpus: int
    basis: str
    synthetic_images: int | None
    not_counted: Mapping[str, float]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """One flat object: the table's columns, with `_low` and `_high` beside each estimate."""
        data: dict[str, Any] = {
            "run_id": self.id,
            "slug": self.slug,
            "device": self.device,
            "parameters": self.parameters,
            "forward_flops": self.forward_flops,
            "train_flops_exact": self.train_flops_exact,
            "train_flops_paper": self.train_flops_paper,
            "memory_gb": self.memory_gb,
        }
        for name in ("train_seconds", "train_kwh", "eval_flops_exact", "eval_seconds", "eval_kwh"):
            data |= _columns(name.replace("_kwh", "_energy_kwh"), getattr(self, name))
        for stage in ("train", "eval"):
            prefix = "" if stage == "train" else "eval_"
            seconds, kwh = getattr(self, f"{stage}_seconds"), getattr(self, f"{stage}_kwh")
            ends = [
                bill(energy, time, self.prices, gpus=self.gpus, synthetic_images=self.synthetic_images)
                for energy, time in ((kwh.low, seconds.low), (kwh.likely, seconds.likely), (kwh.high, seconds.high))
            ]
            data |= _columns(f"{prefix}cost_usd", Span(*(end.cost_usd for end in ends)))
            data |= _columns(f"{prefix}co2_kg", Span(*(end.co2_kg for end in ends)))
            if self.prices.usd_per_gpu_hour is not None:
                data |= _columns(f"{prefix}rent_usd", Span(*(end.rent_usd or 0.0 for end in ends)))
            if stage == "train":
                data |= {"synthetic": ends[1].synthetic, "synthetic_kwh": ends[1].synthetic_kwh}
        data |= {"flops_not_counted_share": sum(self.not_counted.values()), "flops_not_counted": dict(self.not_counted)}
        return data | {"how": "estimated", "basis": self.basis, "prices": self.prices.name, "notes": list(self.notes)}


def forecast(recipe: Recipe, **options: Any) -> Forecast:
    """What one recipe will cost; `options` as for `forecast_study`."""
    return forecast_study([recipe], **options)[0]


def forecast_study(
    recipes: Sequence[Recipe],
    *,
    device: str | None = None,
    gpus: int = 1,
    prices: Prices | None = None,
    sizes: Mapping[str, Sizes] | None = None,
    site_device: str = "cpu",
    seconds: float = 20.0,
    progress: Callable[[str], None] = lambda note: None,
) -> list[Forecast]:
    """What each recipe will cost, in order.

    `device`: a name of the table of devices, `gpus` of them at work together; None calibrates on this machine's
    `site_device` for about `seconds` in all, with the threads that torch has now: one recipe of each kind of layers is
    timed, the others are scaled from it by FLOPs, and their notes say so. `sizes`: by name, of data sets
    whose names do not tell. Raises InputError for a device, model or data set that is not known.
    """
    prices, table = prices or Prices(), None if device is None else find(device)
    plans = [_Plan.of(recipe, (sizes or {}).get(recipe.data.name) or sizes_of(recipe.data.name)) for recipe in recipes]
    if table is not None:
        return [_on_device(plan, table, gpus, prices) for plan in plans]
    calibrations = _calibrations(plans, site_device, seconds, progress)
    return [_calibrated(plan, calibrations[timing_key(plan.recipe)], prices, site_device) for plan in plans]


def _calibrations(
    plans: Sequence[_Plan], site_device: str, seconds: float, progress: Callable[[str], None]
) -> dict[Hashable, Calibration]:
    """By timing key. One recipe of each kind of layers is timed, in an equal share of what is left of the `seconds`;
    the times of all others are its, scaled by FLOPs, and their calibrations say so. Once the seconds are over, a kind
    that was not timed has the times of another one."""
    kinds: dict[Hashable, list[_Plan]] = {}
    for plan in sorted(plans, key=lambda plan: plan.flops.forward):
        kinds.setdefault(layer_kind(plan.recipe), []).append(plan)
    calibrations: dict[Hashable, Calibration] = {}
    timed: tuple[Work, Calibration] | None = None
    start = time.perf_counter()
    with open_meter(site_device) as meter:
        for done, alike in enumerate(kinds.values()):
            left = seconds - (time.perf_counter() - start)
            if timed is None or left > 0:
                share = left / (len(kinds) - done)
                # The largest model tells most of what the study costs; one that is sure not to fit is not tried.
                works = [plan.work(site_device) for plan in alike]
                n = max((n for n, work in enumerate(works) if work.slow_probe_seconds <= share), default=0)
                recipe, steps = alike[n].recipe, max(plan.recipe.craft.steps for plan in alike)
                progress(f"calibrating {recipe.slug}")
                timed = (
                    works[n],
                    calibrate(
                        recipe,
                        alike[n].sizes,
                        meter,
                        device=site_device,
                        work=works[n],
                        attack_steps=steps,
                        seconds=share,
                    ),
                )
                calibrations[timing_key(recipe)] = timed[1]
            for plan in alike:
                if (key := timing_key(plan.recipe)) not in calibrations:
                    calibrations[key] = timed[1].scaled(timed[0], plan.work(site_device))
    return calibrations


def training_flops(recipe: Recipe, sizes: Sizes) -> float:
    """FLOPs that a training will take, by the exact convention: craft, update, validation and weight average."""
    passes, shape = training_passes(recipe, sizes), _resized(recipe, sizes).image_shape
    calls = training_calls(recipe, passes.calls, passes.steps)
    return sum(totals(of_recipe(recipe, sizes.classes, shape), calls).values())


def image_flops(recipe: Recipe, sizes: Sizes) -> int:
    """FLOPs of one image's forward pass through the recipe's model."""
    return forward_of(recipe, sizes.classes, _resized(recipe, sizes).image_shape)


def _resized(recipe: Recipe, sizes: Sizes) -> Sizes:
    side = recipe.data.image_size
    return sizes if side is None else replace(sizes, image_shape=(sizes.image_shape[0], side, side))


@dataclass(frozen=True)
class _Plan:
    """What is counted: FLOPs exactly; those of the evaluation within a range."""

    recipe: Recipe
    sizes: Sizes
    flops: PassFlops
    exact: float
    passes: TrainingPasses
    evaluation: Span

    @classmethod
    def of(cls, recipe: Recipe, sizes: Sizes) -> _Plan:
        sizes = _resized(recipe, sizes)
        flops = of_recipe(recipe, sizes.classes, sizes.image_shape)
        passes, exact = training_passes(recipe, sizes), training_flops(recipe, sizes)
        evaluation = (
            sum(totals(flops, evaluation_passes(recipe, sizes, clean=clean, robust=robust)).values())
            for clean, robust in zip(_CLEAN_SHARES, _ROBUST_SHARES, strict=True)
        )
        return cls(recipe, sizes, flops, exact, passes, Span(*evaluation))

    def work(self, device: str) -> Work:
        recipe, flops, on_gpu = self.recipe, self.flops, device.startswith("cuda")
        return Work(recipe.slug, recipe.loss, flops.forward, recipe.batch_size, flops.parameters, on_gpu)

    @property
    def memory_gb(self) -> float:
        """Weights, gradients, momentum and average, and what one update keeps for its backward, in float32."""
        copies = 3 + self.recipe.ema.averages
        images = self.recipe.batch_size * LOSSES[self.recipe.loss].images
        return training_bytes(self.flops.parameters, copies, images, self.flops.activation_bytes) / 1e9

    def forecast(
        self, device: str, gpus: int, prices: Prices, times: tuple[Span, Span], watts: Span, basis: str, *notes: str
    ) -> Forecast:
        recipe, (training, evaluation) = self.recipe, times
        kilowatts = Span(*(w / JOULES_PER_KWH for w in (watts.low, watts.likely, watts.high)))
        return Forecast(
            id=recipe.id,
            slug=recipe.slug,
            device=device,
            parameters=self.flops.parameters,
            forward_flops=self.flops.forward,
            train_flops_exact=self.exact,
            train_flops_paper=paper_flops_of(recipe, self.flops.forward, self.passes.images),
            eval_flops_exact=self.evaluation,
            memory_gb=self.memory_gb,
            train_seconds=training,
            eval_seconds=evaluation,
            train_kwh=training.times(kilowatts),
            eval_kwh=evaluation.times(kilowatts),
            prices=prices,
            gpus=gpus,
            basis=basis,
            synthetic_images=recipe.synthetic.amount if recipe.synthetic.share else 0,
            not_counted=self.flops.uncounted,
            notes=notes,
        )


def _on_device(plan: _Plan, device: Device, gpus: int, prices: Prices) -> Forecast:
    precision = device.precision(plan.recipe.precision)
    slow, likely, fast = (gpus * speed for speed in device.flops_per_second(precision))
    training = Span(plan.exact / fast, plan.exact / likely, plan.exact / slow)
    flops = plan.evaluation
    evaluation = Span(flops.low / fast, flops.likely / likely, flops.high / slow)
    watts = Span(*(gpus * device.watts * factor for factor in _POWER_FACTORS))
    per_gpu = plan.memory_gb if gpus == 1 else plan.memory_gb / gpus
    notes = []
    if device.memory_gb is not None and per_gpu > device.memory_gb:
        notes.append(f"needs about {per_gpu:.0f} GB on each, and {device.name} has {device.memory_gb:g} GB")
    if training.likely / plan.passes.steps < _LAUNCH_SECONDS:
        notes.append("steps this small take longer to launch than to compute: the times are lower bounds")
    low, mid, high = device.attainable[precision]
    basis = (
        f"{gpus} × {device.name} at {100 * mid:.0f}% ({100 * low:.0f}-{100 * high:.0f}%) of "
        f"{device.peak[precision] / 1e12:g} TFLOP/s in {precision} ({device.source})"
    )
    return plan.forecast(device.key, gpus, prices, (training, evaluation), watts, basis, *notes)


def _calibrated(plan: _Plan, calibration: Calibration, prices: Prices, site_device: str) -> Forecast:
    recipe, times = plan.recipe, calibration.times
    training = Span(
        *(
            factor * times.training_seconds(recipe, training_passes(recipe, plan.sizes, right=right))
            for factor, right in zip(_TIME_FACTORS, _RIGHT_SHARES, strict=True)
        )
    )
    # An attack's passes are those of a validation: a forward and the input's backward of images in eval mode.
    per_flop = times.per_attack / (plan.flops.forward + plan.flops.input_backward)
    evaluation = plan.evaluation.times(Span(*(per_flop * factor for factor in _ENSEMBLE_FACTORS)))
    watts = Span(*3 * (calibration.watts,))
    notes = []
    if calibration.scaled_from:
        notes.append(f"not timed: scaled by FLOPs from {calibration.scaled_from}")
    elif times.batch_size < recipe.batch_size:
        notes.append(f"timed with batches of {times.batch_size}, scaled to {recipe.batch_size}")
    cores = os.cpu_count() or 1
    if site_device == "cpu" and calibration.others > _BUSY_SHARE * cores:
        notes.append(f"other work took {calibration.others:.1f} of {cores} cores meanwhile: an idle machine is faster")
    threads = f", {torch.get_num_threads()} threads" if site_device == "cpu" else ""
    basis = f"calibrated on this machine ({site_device}{threads}); energy: {calibration.how} ({calibration.method})"
    gpus = int(site_device.startswith("cuda"))  # a calibrated GPU is rented as one of a table is
    return plan.forecast("this machine", gpus, prices, (training, evaluation), watts, basis, *notes)


def total(forecasts: Sequence[Forecast]) -> dict[str, Any]:
    """Sums over runs under the names of `Forecast.to_dict`; wall times are one run after the other."""
    rows = [forecast.to_dict() for forecast in forecasts]
    sums = ("train_", "eval_", "cost_usd", "co2_kg", "rent_usd")
    return {"runs": len(rows)} | {key: sum(row[key] for row in rows) for key in rows[0] if key.startswith(sums)}


def _columns(name: str, span: Span) -> dict[str, float]:
    assert not math.isinf(span.high)
    return {name: span.likely, f"{name}_low": span.low, f"{name}_high": span.high}
