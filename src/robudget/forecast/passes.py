"""How often a recipe will send images through its model, known before it runs. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from robudget.attacks.ensemble import ensemble
from robudget.datasets import PUBLISHED, Sizes
from robudget.meter.conventions import passes, wrn_forward_flops
from robudget.recipe import Recipe


@dataclass(frozen=True)
class Schedule:
    """What a training will do: `steps` of the optimizer, `images` of the mixed stream, and `calls`: image passes by
    phase, as `EpochRecord.calls` counts them. `held_images` are looked at by validation and by the collapse watch, over
    the whole training, and `held_attacks` are their attack steps. Nothing stops early."""

    steps: int
    images: int
    epochs: int
    held_images: float
    held_attacks: float
    calls: dict[str, float]


# Validation leaves out what the model gets wrong anyway; over a whole training it gets about so much right.
VALIDATED_SHARE = 0.8


def training(recipe: Recipe, sizes: Sizes, *, right: float = VALIDATED_SHARE) -> Schedule:
    """`right`: the share of the held-out images that the model classifies correctly, averaged over the training."""
    held = sizes.test if recipe.validation.split == "paper" else round(recipe.validation.fraction * sizes.train)
    rest = sizes.train if recipe.validation.split == "paper" else sizes.train - held
    held = min(held, recipe.validation.images or held)
    real = min(rest, recipe.data.amount or rest)
    steps = recipe.epochs * max(1, (recipe.epoch_images or real) // recipe.batch_size)
    images = steps * recipe.batch_size
    per_image = passes(recipe.loss, recipe.craft.steps)
    validations = recipe.epochs // recipe.validation.every + bool(recipe.epochs % recipe.validation.every)
    looks, watched = 0, 0  # of the collapse watch: every epoch, under one step and under several
    if recipe.adversarial and recipe.collapse.action != "off":
        looks, watched = recipe.epochs, min(held, recipe.collapse.images)
    seen = validations * held + 2 * looks * watched
    attacks = right * (validations * held * recipe.validation.steps + looks * watched * (1 + recipe.collapse.steps))
    updates = 1.0
    if recipe.awp.gamma is not None:  # one more forward and backward, to find where to move the weights
        updates += max(0.0, 1 - recipe.awp.after_epochs / recipe.epochs)
    calls = {
        "craft_forward": per_image.craft_forward * images,
        "craft_backward": per_image.craft_backward * images,
        "update_forward": updates * per_image.update_forward * images,
        "update_backward": updates * per_image.update_backward * images,
        "validation_forward": (1 + right) * seen + attacks,
        "validation_backward": attacks,
    }
    return Schedule(steps, images, recipe.epochs, seen, attacks, {name: n for name, n in calls.items() if n})


def evaluation(recipe: Recipe, sizes: Sizes, *, clean: float, robust: float) -> dict[str, float]:
    """Image passes of the ensemble as `<attack>_forward` and `<attack>_backward`, given the shares of the images that
    the model classifies correctly (`clean`) and that survive (`robust`).

    An attack runs over all its iterations on what it cannot break; what it breaks leaves within a few. The first one
    breaks nearly all that will fall, so it is charged the survivors in full and a tenth of the iterations for the rest.
    """
    images = min(sizes.test, recipe.evaluation.images or sizes.test)
    norm = recipe.evaluation_threat.norm
    calls: dict[str, float] = {"clean_forward": images}
    fallen = max(clean - robust, 0.0)
    for index, member in enumerate(ensemble(recipe.evaluation.version, norm)):
        survivor = member.passes(sizes.classes, norm)
        rows = images * (robust + (0.1 * fallen if index == 0 else 0.0))
        calls[f"{member.name}_forward"] = rows * survivor.forward
        calls[f"{member.name}_backward"] = rows * survivor.backward
    return calls


# A small model is limited by overhead: the FLOPs below which a pass of one image takes the same time.
_OVERHEAD_FLOPS = 5e5


def weight(recipe: Recipe) -> float:
    """How much work a recipe is beside others, in FLOPs, for the order of a sweep and its time left; not for a bill.

    Other models than WideResNets count as a WRN-28-10: nothing better is known of them without building them.
    """
    sizes = PUBLISHED.get(recipe.data.name, PUBLISHED["cifar10"])
    channels, side, _ = sizes.image_shape
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", recipe.model.name)
    depth, width = (int(match[1]), int(match[2])) if match else (28, 10)
    depth = max(10, depth - (depth - 4) % 6)  # a depth that does not exist is for the run to refuse
    forward = _OVERHEAD_FLOPS + wrn_forward_flops(depth, width, base=recipe.model.base, channels=channels, size=side)
    calls = training(recipe, sizes).calls | evaluation(recipe, sizes, clean=0.85, robust=0.5)
    return forward * sum(2 * number if name == "update_backward" else number for name, number in calls.items())
