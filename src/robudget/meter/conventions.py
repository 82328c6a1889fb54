"""The two ways of counting FLOPs, as arithmetic on F, the forward FLOPs of one image. Imports no torch.

`exact` is what a counter counts; `paper` is what arXiv 2312.13131 charged: every forward together with its backward is
3F, an attack step included, plus one extra pass that the released code makes. A multiply-add is 2 FLOPs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from robudget.errors import InputError
from robudget.losses import loss_named, passes_per_image
from robudget.recipe import Recipe

PAPER_GPUS = 4  # the published figures are one GPU's share
PAPER_EPOCH_IMAGES = 50_000
PAPER_MODELS = {"wrn-28-10": (28, 10), "wrn-34-10": (34, 10), "wrn-34-20": (34, 20), "wrn-70-16": (70, 16)}


_PENALTY_FACTOR = 6  # forward, the image's gradient, and 4F through both: weights and signals of each


def exact_factor(loss: str, steps: int, *, aligned: bool = False) -> float:
    """Exact FLOPs per training image in units of F, neglecting the first layer: (2K+3) for at, (2K+7) for trades.
    `aligned`: with GradAlign.

    For networks of convolutions and linear layers, where the gradient of the input and that of the weights cost F each.
    Attention has no weights of its own and its backward costs more; `flops.count` counts it.
    """
    n = passes_per_image(loss, steps, aligned=aligned)
    update = n.update_forward + 2 * n.update_backward
    return n.craft_forward + n.craft_backward + update + _PENALTY_FACTOR * n.penalties


@dataclass(frozen=True)
class PaperFactor:
    """FLOPs per training image in units of F by the paper's convention; `value` is NaN where it says nothing."""

    value: float
    reason: str


def paper_factor(loss: str, steps: int) -> PaperFactor:
    """3(K+2) for at, 3(K+3) for trades (the released code's rule), 3 for standard training; else by the same rule."""
    n = passes_per_image(loss, steps)
    if loss_named(loss).penalises:
        return PaperFactor(math.nan, "the paper trains no loss with a gradient in it")
    if not loss_named(loss).adversarial:
        return PaperFactor(3.0, "forward and backward of one update")
    if loss_named(loss).replays:
        return PaperFactor(math.nan, "the paper trains no free-at, whose attack and update share their passes")
    value = 3.0 * (steps + n.update_forward + 1)
    stated = loss in ("at", "trades")
    return PaperFactor(value, "the released code's rule" if stated else "the released code's rule, applied by analogy")


def paper_flops(loss: str, steps: int, forward: float, images: float) -> float:
    """FLOPs of a whole run on all devices by the paper's convention: `images` training images seen, F = `forward`."""
    return paper_factor(loss, steps).value * forward * images


def paper_flops_of(recipe: Recipe, forward: float, images: float) -> float:
    """`paper_flops` of the recipe, NaN where the paper's convention says nothing of it."""
    if recipe.differentiates_twice:
        return math.nan
    return paper_flops(recipe.loss, recipe.craft.steps, forward, images)


def paper_published_tflops(loss: str, steps: int, forward: float) -> float:
    """The number that the published table holds: TFLOPs of one epoch on one of the four GPUs."""
    return paper_flops(loss, steps, forward, PAPER_EPOCH_IMAGES / PAPER_GPUS) / 1e12


def wrn_forward_flops(
    depth: int, width: int, *, classes: int = 10, base: int = 16, channels: int = 3, size: int = 32
) -> int:
    """Forward FLOPs of one `channels` × `size` × `size` image through a pre-activation WideResNet (Zagoruyko 2016).

    Convolutions and the head, 2 per multiply-add, biases not counted: 10.49, 13.32, 53.16 and 77.53 G for WRN-28-10,
    34-10, 34-20 and 70-16 on 32 × 32 images.
    """
    blocks, widths = _wrn_shape(depth, width, base)
    macs, c_in, side = channels * base * 9 * size**2, base, size
    for stage, c_out in enumerate(widths):
        stride = 1 if stage == 0 else 2
        for block in range(blocks):
            step = stride if block == 0 else 1
            side = math.ceil(side / step)
            shortcut = c_in * c_out if c_in != c_out or step != 1 else 0
            macs += (c_in * c_out * 9 + c_out * c_out * 9 + shortcut) * side**2
            c_in = c_out
    return 2 * (macs + c_in * classes)


def wrn_parameters(depth: int, width: int, *, classes: int = 10, base: int = 16, channels: int = 3) -> int:
    """Parameters of the same network: weights, BatchNorm scales and shifts, and the head's bias."""
    blocks, widths = _wrn_shape(depth, width, base)
    total, c_in = channels * base * 9, base
    for stage, c_out in enumerate(widths):
        for block in range(blocks):
            same = c_in == c_out and (stage == 0 or block > 0)
            total += 2 * c_in + c_in * c_out * 9 + 2 * c_out + c_out * c_out * 9 + (0 if same else c_in * c_out)
            c_in = c_out
    return total + 2 * c_in + c_in * classes + classes


def _wrn_shape(depth: int, width: int, base: int) -> tuple[int, tuple[int, int, int]]:
    if depth < 10 or (depth - 4) % 6:
        raise InputError(f"depth = {depth} is not that of a WideResNet (allowed: 6n + 4, e.g. 16, 28, 34, 70)")
    return (depth - 4) // 6, (base * width, 2 * base * width, 4 * base * width)
