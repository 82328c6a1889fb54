"""The image passes that a recipe will make through its model, known before it runs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from robudget.attacks.ensemble import ensemble
from robudget.datasets import PUBLISHED, Sizes
from robudget.evaluation.audit import audit_more, near_more
from robudget.losses import passes_per_image
from robudget.meter.conventions import wrn_forward_flops
from robudget.recipe import Recipe, wide_resnet

# Validation attacks only what the model gets right: over a whole training, about this share of the images.
RIGHT_SHARE = 0.8
_BROKEN_SHARE = 0.1  # of an attack's iterations: what it takes to break an image that it breaks
# A small model is limited by overhead: the FLOPs below which a pass of one image takes the same time.
_OVERHEAD_FLOPS = 5e5


@dataclass(frozen=True)
class TrainingPasses:
    """What a training will do if it does not stop early: `steps` of the optimizer, `images` of the mixed stream, and
    `calls`: image passes by phase, as in `EpochRecord.calls`. `validated_images` go through validation and the check
    for collapse, over the whole training, and `validated_attacks` are their attack steps."""

    steps: int
    images: int
    epochs: int
    validated_images: float
    validated_attacks: float
    calls: dict[str, float]


def training_passes(recipe: Recipe, sizes: Sizes, *, right: float = RIGHT_SHARE) -> TrainingPasses:
    """`right`: the share of the held-out images that the model classifies correctly, averaged over the training."""
    validation = recipe.validation
    holdout = sizes.test if validation.split == "paper" else round(validation.fraction * sizes.train)
    rest = sizes.train if validation.split == "paper" else sizes.train - holdout
    holdout = min(holdout, validation.images or holdout)
    real = min(rest, recipe.data.amount or rest)
    steps = recipe.epochs * max(1, (recipe.epoch_images or real) // recipe.batch_size)
    images = steps * recipe.batch_size
    craft = recipe.craft
    per_image = passes_per_image(recipe.loss, craft.steps, craft.objective, aligned=craft.grad_align > 0)
    validations = recipe.epochs // validation.every + bool(recipe.epochs % validation.every)
    checks, checked = 0, 0  # for collapse: every epoch, under one step and under several
    if recipe.adversarial and recipe.collapse.action != "off":
        checks, checked = recipe.epochs, min(holdout, recipe.collapse.images)
    validated = validations * holdout + 2 * checks * checked
    attacks = right * (validations * holdout * validation.steps + checks * checked * (1 + recipe.collapse.steps))
    updates = 1.0
    if recipe.awp.gamma is not None:  # one more forward and backward, to find where to move the weights
        updates += max(0.0, 1 - recipe.awp.after_epochs / recipe.epochs)
    calls = {
        "craft_forward": per_image.craft_forward * images,
        "craft_backward": per_image.craft_backward * images,
        "update_forward": updates * per_image.update_forward * images,
        "update_backward": updates * per_image.update_backward * images,
        "penalty": per_image.penalties * images,
        "validation_forward": (1 + right) * validated + attacks,
        "validation_backward": attacks,
    }
    return TrainingPasses(steps, images, recipe.epochs, validated, attacks, {name: n for name, n in calls.items() if n})


def evaluation_passes(recipe: Recipe, sizes: Sizes, *, clean: float, robust: float) -> dict[str, float]:
    """Image passes of the ensemble as `<attack>_forward` and `<attack>_backward`, given the shares of the images that
    the model classifies correctly (`clean`) and that survive (`robust`).

    An attack runs over all its iterations on what it cannot break; what it breaks takes few of them. The first
    one breaks nearly all that are not robust: it is charged a tenth of its iterations for these.
    """
    images = min(sizes.test, recipe.evaluation.images or sizes.test)
    norm = recipe.evaluation_threat.norm
    calls: dict[str, float] = {"clean_forward": images}
    broken = max(clean - robust, 0.0)
    for index, member in enumerate(ensemble(recipe.evaluation.version, norm)):
        survivor = member.passes(sizes.classes, norm)
        rows = images * (robust + (_BROKEN_SHARE * broken if index == 0 else 0.0))
        calls[f"{member.name}_forward"] = rows * survivor.forward
        calls[f"{member.name}_backward"] = rows * survivor.backward
    if recipe.evaluation.version == "quick":
        survivors = round(images * robust)
        nearest = min(near_more(survivors, ()), survivors)
        audited = min(audit_more(survivors, images, (), (), recipe.evaluation.until), survivors)
        for member in ensemble("standard", norm):
            survivor = member.passes(sizes.classes, norm)
            if member.name == "apgd-t":
                calls[f"{member.name}@near_forward"] = nearest * survivor.forward
                calls[f"{member.name}@near_backward"] = nearest * survivor.backward
            calls[f"{member.name}@audit_forward"] = audited * survivor.forward
            calls[f"{member.name}@audit_backward"] = audited * survivor.backward
    return calls


def weight(recipe: Recipe) -> float:
    """How much work a recipe is beside others, in FLOPs, for the order of a sweep and its time left; not for a bill.

    Other models than WideResNets count as a WRN-28-10: nothing better is known of them without building them.
    """
    sizes = PUBLISHED.get(recipe.data.name, PUBLISHED["cifar10"])
    channels, side, _ = sizes.image_shape
    depth, width = wide_resnet(recipe.model.name) or (28, 10)
    depth = max(10, depth - (depth - 4) % 6)  # a depth that does not exist is for the run to refuse
    forward = _OVERHEAD_FLOPS + wrn_forward_flops(depth, width, base=recipe.model.base, channels=channels, size=side)
    calls = training_passes(recipe, sizes).calls | evaluation_passes(recipe, sizes, clean=0.85, robust=0.5)
    passes = {"update_backward": 2, "penalty": 6}  # of so many forward passes
    return forward * sum(passes.get(name, 1) * number for name, number in calls.items())
