"""How much work a recipe is beside others: for the order of a sweep and its time left, not for a bill."""

from __future__ import annotations

import re

from robudget.attacks.ensemble import ensemble
from robudget.datasets import PUBLISHED
from robudget.meter.conventions import exact_factor, wrn_forward_flops
from robudget.recipe import Recipe

# Of the passes that surviving images make through the ensemble; the others leave early.
_SURVIVING_SHARE = 0.5
# A small model is bound by overhead: the work below which a pass of one image costs the same.
_OVERHEAD = 5e5


def weight(recipe: Recipe) -> float:
    """FLOPs of training and evaluation, roughly, plus what small models lose to overhead.

    Other models than WideResNets count as a WRN-28-10: without building them nothing better is known.
    """
    sizes = PUBLISHED.get(recipe.data.name, PUBLISHED["cifar10"])
    channels, size, _ = sizes.image_shape
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", recipe.model.name)
    depth, width = (int(match[1]), int(match[2])) if match else (28, 10)
    forward = _OVERHEAD + wrn_forward_flops(depth, width, base=recipe.model.base, channels=channels, size=size)
    real = recipe.data.amount or sizes.train
    images = recipe.epochs * (recipe.epoch_images or real)
    evaluated = recipe.evaluation.images or sizes.test
    norm = recipe.evaluation_threat.norm
    passes = [member.passes(sizes.classes, norm) for member in ensemble(recipe.evaluation.version, norm)]
    attacked = _SURVIVING_SHARE * sum(each.forward + each.backward for each in passes)
    return forward * (images * exact_factor(recipe.loss, max(recipe.craft.steps, 1)) + evaluated * attacked)
