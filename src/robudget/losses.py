"""The training losses, as pure data: what each crafts against, what its update sees, and the passes it makes.

`training/losses.py` has their formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robudget.errors import InputError, unknown

LossName = Literal["standard", "at", "trades", "mart", "fgsm-rs", "n-fgsm", "fgsm-pgi", "free-at", "ikl", "grad-norm"]


@dataclass(frozen=True)
class ImagePasses:
    """Passes of one training image through the model: forward and backward, of craft and of update. `penalties`: the
    gradients of the image that the update differentiates again, each one a forward pass, a backward pass to the image
    and a backward pass through both to the weights, which is one of the update's where that is of the same image."""

    craft_forward: int
    craft_backward: int
    update_forward: int
    update_backward: int
    penalties: int = 0


@dataclass(frozen=True)
class Loss:
    """One loss. `label` is its name in tables and figures, `source` the paper that it comes from.

    `craft` is what its attack raises: the cross-entropy (`ce`), KL(clean ‖ adversarial) (`kl`, for which the clean
    logits are needed first), or nothing (`none`). An update sees the `clean` images, the `adversarial` ones, or both;
    with both, `beta` weighs the robust term. `steps`: the number of attack steps where the definition fixes it.
    `replays`: a batch is replayed K times, and one backward pass serves both the attack and the update. `remembers`: a
    perturbation is kept of every training image, from which its next attack starts and which the update sees too.
    `penalises`: nothing is crafted, the gradient of the images is made small; `beta` weighs it. `class_means`: what the
    model said of each class in the epoch before weighs the classes.
    """

    label: str
    source: str
    craft: Literal["none", "ce", "kl"] = "ce"
    clean: bool = False
    adversarial: bool = True
    steps: int | None = None
    replays: bool = False
    remembers: bool = False
    penalises: bool = False
    class_means: bool = False

    @property
    def images(self) -> int:
        """Images that an update takes through the model for each image of the batch: 1 or 2."""
        return self.clean + self.adversarial + self.remembers

    @property
    def beta(self) -> bool:
        return self.clean and self.robust

    @property
    def robust(self) -> bool:
        """Does it aim at robustness?"""
        return self.adversarial or self.penalises


LOSSES: dict[LossName, Loss] = {
    "standard": Loss("standard", "cross-entropy", craft="none", clean=True, adversarial=False, steps=0),
    "at": Loss("AT", "Madry et al. 2018"),
    "trades": Loss("TRADES", "Zhang et al. 2019", craft="kl", clean=True),
    "mart": Loss("MART", "Wang et al. 2020", clean=True),
    "fgsm-rs": Loss("FGSM-RS", "Wong et al. 2020", steps=1),
    "n-fgsm": Loss("N-FGSM", "de Jorge et al. 2022", steps=1),
    "fgsm-pgi": Loss("FGSM-PGI", "Jia et al. 2022", steps=1, remembers=True),
    "free-at": Loss("Free-AT", "Shafahi et al. 2019", replays=True),
    "ikl": Loss("IKL", "Cui et al. 2024", craft="kl", clean=True, class_means=True),
    "grad-norm": Loss(
        "gradient norm",
        "Rodríguez-Muñoz et al. 2024",
        craft="none",
        clean=True,
        adversarial=False,
        steps=0,
        penalises=True,
    ),
}


def loss_named(name: str) -> Loss:
    """Raises InputError for a name that is not in LOSSES."""
    for known, loss in LOSSES.items():
        if known == name:
            return loss
    raise unknown("loss", name, LOSSES)


def passes_per_image(name: str, steps: int, objective: str | None = None, *, aligned: bool = False) -> ImagePasses:
    """Passes per training image for a loss of LOSSES with K = `steps`. `objective`: what the attack raises, where it is
    not the loss's own; `aligned`: with GradAlign. Raises InputError for 0 steps of an attack."""
    loss = loss_named(name)
    if loss.penalises:
        return ImagePasses(0, 0, 0, 0, penalties=1)
    if not loss.adversarial:
        return ImagePasses(0, 0, 1, 1)
    if steps < 1:
        raise InputError(f"steps = {steps} with loss = {name!r} (allowed: at least 1)")
    if loss.replays:
        return ImagePasses(0, 0, steps, steps)
    if loss.remembers:  # the attack's forward pass is one of the update's
        return ImagePasses(0, 1, 2, 2)
    first = (objective or loss.craft) == "kl"  # the clean logits, which the attack goes away from
    return ImagePasses(steps + first, steps, loss.images, loss.images, penalties=2 * aligned)
