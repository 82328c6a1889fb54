"""What run.json says of the cost of one stage (training or evaluation): FLOPs, energy and seconds, as plain data.

Money and carbon are not in it: they follow from it and a `Prices` record whenever a table is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from robudget.meter.conventions import paper_flops
from robudget.meter.energy import Energy
from robudget.meter.flops import PassFlops, totals
from robudget.recipe import Recipe


def training_calls(recipe: Recipe, calls: Mapping[str, float], steps: int) -> dict[str, float]:
    """The trainer's image passes with what it does not count as such: the moving average, once per update of weights.

    Free-AT takes the gradient of the input and of the weights from one backward, so its update is a full one; it
    updates the weights `craft.steps` times a step.
    """
    named = dict(calls)
    if recipe.loss == "free-at" and "update_backward" in named:
        named["update_full_backward"] = named.pop("update_backward")
    if recipe.ema.decay is not None:
        named["ema"] = steps * (recipe.craft.steps if recipe.loss == "free-at" else 1)
    return named


def of_training(
    recipe: Recipe, flops: PassFlops, calls: Mapping[str, float], *, images: int, steps: int, energy: Energy
) -> dict[str, Any]:
    """The training's bill: `calls`, `images` and `steps` as the last `EpochRecord` has them (cumulative).

    `flops_paper` is None where the paper's convention says nothing of the loss.
    """
    by_phase = totals(flops, training_calls(recipe, calls, steps))
    paper = paper_flops(recipe.loss, recipe.craft.steps, flops.forward, images)
    return {
        **_stage(by_phase, energy),
        "flops_paper": None if math.isnan(paper) else paper,
    }


def of_evaluation(flops: PassFlops, calls: Mapping[str, float], *, energy: Energy) -> dict[str, Any]:
    """The evaluation's bill: `calls` counts image passes as `<attack>_forward` and `<attack>_backward`."""
    return _stage(totals(flops, calls), energy)


def _stage(by_phase: Mapping[str, float], energy: Energy) -> dict[str, Any]:
    return {
        "flops_exact": sum(by_phase.values()),
        "flops_by_phase": dict(by_phase),
        "flops_how": "counted",
        "seconds": energy.seconds,
        "energy": energy.to_dict(),
    }


def of_model(flops: PassFlops) -> dict[str, Any]:
    """What run.json says of the model itself."""
    data = flops.to_dict()
    return {"parameters": data.pop("parameters"), "flops_per_image": data}
