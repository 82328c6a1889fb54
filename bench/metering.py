"""What metering costs, and how well a forecast agrees with the run: python bench/metering.py [--threads 1]

Prints: seconds of a FLOP count; microseconds of an energy window and its share of a training step; the forecast's wall
time and energy against what four recipes then took (runs during which other work used the machine are listed apart); on
a GPU, NVML's counter against its power integrated.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from robudget import data
from robudget.forecast import forecast
from robudget.meter import flops
from robudget.meter.counters import Integral, Poller
from robudget.meter.cpu import machine_seconds, process_seconds
from robudget.meter.machine import open_meter
from robudget.models.build import build
from robudget.recipe import Recipe
from robudget.training import Trainer

# From the least to the most work, more than 30 times apart in training FLOPs.
RECIPES = {
    "wrn-10-1 base 8, standard": {"model.base": 8, "loss": "standard", "epochs": 12},
    "wrn-10-1 base 8, at 2": {"model.base": 8, "loss": "at", "craft.steps": 2, "epochs": 16},
    "wrn-10-2 base 8, trades 5": {"model.name": "wrn-10-2", "loss": "trades", "craft.steps": 5, "epochs": 16},
    "wrn-16-2 base 16, at 5": {"model.name": "wrn-16-2", "model.base": 16, "craft.steps": 5, "epochs": 8},
}


IDLE_CORES = 0.4  # that other processes may use in a measurement on an otherwise idle machine


def counting() -> None:
    print("FLOP count on shapes alone (second model on: the first imports)")
    for name in ("wrn-10-1", "wrn-28-10", "wrn-70-16", "vit_small_patch16_224"):
        with torch.device("meta"):
            model = build(name, classes=10, image_size=32)
        begun = time.perf_counter()
        counted = flops.count(model, (3, 32, 32))
        seconds = time.perf_counter() - begun
        print(
            f"  {name:24} {counted.forward / 1e9:8.3f} GFLOP forward, {seconds:.2f} s, "
            f"not counted {100 * counted.uncounted_share:.2f}%"
        )


def overhead(rounds: int = 41) -> None:
    with open_meter("cpu") as opened:
        times = []
        for _ in range(1000):
            begun = time.perf_counter()
            with opened.window("empty"):
                pass
            times.append(time.perf_counter() - begun)
        print(
            f"energy window, open and close: median {1e6 * statistics.median(times):.0f} µs, "
            f"largest {1e6 * max(times):.0f} µs (n = {len(times)})"
        )
        recipe = Recipe.load("digits", {"epochs": 10**6, "epoch_images": 128, "validation.every": 10**6})
        trainer = iter(Trainer(recipe, data.load("digits")))
        next(trainer)
        steps = []
        for _ in range(rounds):
            begun = time.perf_counter()
            next(trainer)
            steps.append(time.perf_counter() - begun)
    step = statistics.median(steps)
    share = statistics.median(times) / step
    print(
        f"a step of the digits recipe: median {1e3 * step:.1f} ms (n = {rounds}); a window around it: {share:.2%} of it"
    )


def preview(wanted: int = 3, tries: int = 8) -> None:
    dataset = data.load("digits")
    recipes = {name: Recipe.load("digits").with_(change) for name, change in RECIPES.items()}
    begun = time.perf_counter()
    whole = forecast.forecast_study(list(recipes.values()))
    took = time.perf_counter() - begun
    print(f"preview of {len(whole)} recipes by calibration: {took:.1f} s, {torch.get_num_threads()} thread(s)")
    exact = [plan.train_flops_exact for plan in whole]
    print(f"  training FLOPs {min(exact):.2g} to {max(exact):.2g}: {max(exact) / min(exact):.0f} times")
    for name, recipe in recipes.items():
        idle: list[tuple[float, ...]] = []
        busy: list[tuple[float, ...]] = []
        while len(idle) < wanted and len(idle) + len(busy) < tries:
            miss = _miss(recipe, dataset)
            (idle if miss[-1] < IDLE_CORES else busy).append(miss)
        for label, misses in (("idle", idle), ("busy", busy)):
            if misses:
                seconds, energy, work, taken, others = map(statistics.median, zip(*misses, strict=True))
                each = ", ".join(f"{miss[0]:+.0%}" for miss in misses)
                print(
                    f"  {name:28} {label} machine (others used {others:.1f} cores, n = {len(misses)}), {taken:5.1f} s: "
                    f"forecast wall time {seconds:+.1%} ({each}), energy {energy:+.1%}, FLOPs {work:+.1%}"
                )


def _miss(recipe: Recipe, dataset: data.Dataset) -> tuple[float, float, float, float, float]:
    """Forecast ÷ taken − 1 of wall time, energy and FLOPs; seconds taken; cores that other processes used."""
    before, begun = machine_seconds() - process_seconds(), time.monotonic()
    plan = forecast.forecast(recipe)
    with tempfile.TemporaryDirectory() as folder, open_meter("cpu") as opened, opened.window("training") as window:
        last = list(Trainer(recipe, dataset, folder=Path(folder)))[-1]
    others = (machine_seconds() - process_seconds() - before) / (time.monotonic() - begun)
    true = sum(flops.totals(flops.of_recipe(recipe, dataset.classes, dataset.image_shape), last.calls).values())
    return (
        plan.train_seconds.likely / window.energy.seconds - 1,
        plan.train_kwh.likely / window.energy.kwh - 1,
        plan.train_flops_exact / true - 1,
        window.energy.seconds,
        others,
    )


def gpu(seconds: float = 60.0) -> None:
    if not torch.cuda.is_available():
        print("NVML counter against integrated power: no GPU here")
        return
    from robudget.meter.gpu import CounterSource, _nvml_gpu, open_source

    source = open_source("cuda")
    device, why = _nvml_gpu("cuda")
    if not isinstance(source, CounterSource) or device is None:
        print(f"NVML counter against integrated power: {source.method} {why}")
        return
    integral = Integral("NVML", device.watts, time.monotonic)
    poller = Poller(integral.sample, 0.1)
    start, first = source.read().joules, integral.sample()
    x = torch.randn(8192, 8192, device="cuda")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        (x @ x).sum().item()
        if int(time.monotonic()) % 7 == 0:
            time.sleep(0.5)  # load that comes and goes
    counted, integrated = source.read().joules - start, integral.sample() - first
    poller.close()
    print(f"NVML counter ÷ integrated power over {seconds:.0f} s: {counted / integrated:.4f} ({counted:.0f} J)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["counting", "overhead", "preview", "gpu"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for part in (counting, overhead, preview, gpu):
        if arguments.only in (None, part.__name__):
            part()
