"""Augmentation of a whole batch at once, on the device the images are on, from an explicit generator.

By hand: torchvision's transforms draw one set of parameters for a batch, or are called image by image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

WHOLE = slice(None)  # all rows of a batch


def crop_flip(
    images: Tensor, *, crop: int, flip: bool, generator: torch.Generator, rows: slice = WHOLE, total: int | None = None
) -> Tensor:
    """Each image shifted by up to `crop` pixels either way (zeros come in) and mirrored with probability one half.

    The random crop after padding and the flip of He et al. 2016, as one gather. uint8 (N, C, H, W) in and out. Where
    `images` are only the `rows` of a batch of `total`, each image gets what it would have got in the whole batch.
    """
    if not crop and not flip:
        return images
    n, c, h, w = images.shape
    device = images.device
    total = total or n
    lines = torch.arange(h, device=device).expand(n, h)
    columns = torch.arange(w, device=device).expand(n, w)
    if flip:
        mirrored = torch.rand(total, 1, generator=generator, device=device)[rows] < 0.5
        columns = torch.where(mirrored, w - 1 - columns, columns)
    if crop:
        shift = torch.randint(-crop, crop + 1, (total, 2, 1), generator=generator, device=device)[rows]
        lines, columns = lines + shift[:, 0], columns + shift[:, 1]
    inside = ((lines >= 0) & (lines < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
    source = lines.clamp(0, h - 1)[:, :, None] * w + columns.clamp(0, w - 1)[:, None, :]
    moved = images.reshape(n, c, h * w).gather(2, source.reshape(n, 1, h * w).expand(n, c, h * w))
    return (moved * inside.reshape(n, 1, h * w)).view(n, c, h, w)


def cutmix(images: Tensor, target: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A box of each image replaced by the same box of another, targets mixed by area (Yun et al. 2019, section 3.1).

    images (N, C, H, W), target probabilities (N, classes). The area is 1 − λ with λ ~ U(0, 1), and every image
    draws its own box and partner. λ is corrected for the part of the box that falls outside.
    """
    n, _, h, w = images.shape
    device = images.device
    lam = torch.rand(n, generator=generator, device=device)
    partner = torch.randperm(n, generator=generator, device=device)
    side = (1 - lam).sqrt()
    centre = torch.rand(2, n, generator=generator, device=device)

    def span(at: Tensor, size: int) -> Tensor:
        half = side * size / 2
        low, high = (at * size - half).round().clamp(0, size), (at * size + half).round().clamp(0, size)
        position = torch.arange(size, device=device)
        return (position >= low[:, None]) & (position < high[:, None])

    box = span(centre[0], h)[:, :, None] & span(centre[1], w)[:, None, :]
    mixed = torch.where(box[:, None], images[partner], images)
    kept = 1 - box.float().mean((1, 2))[:, None]
    return mixed, kept * target + (1 - kept) * target[partner]


# -- RandAugment ------------------------------------------------------------------------------------------------------

OPERATIONS = (
    "identity",
    "rotate",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
    "brightness",
    "contrast",
    "posterize",
    "solarize",
)
ROUNDS = 2  # operations per image, the paper's N


def randaugment(
    images: Tensor, magnitude: float, *, generator: torch.Generator, rows: slice = WHOLE, total: int | None = None
) -> Tensor:
    """Two operations per image, drawn evenly from `OPERATIONS`, at `magnitude` of 10 and with a random sign.

    At 10: 30° of rotation, shear 0.3, a shift of 0.45 of the size, brightness and contrast ×1.9 or ×0.1, 4 bits, a
    solarising threshold of 0. uint8 (N, C, H, W) in and out. Where `images` are only the `rows` of a batch of `total`,
    each gets what it would have got in the whole batch.
    """
    total = total or len(images)
    x = images.float()
    for _ in range(ROUNDS):
        draws = torch.rand(2, total, generator=generator, device=images.device)[:, rows]
        operation = (draws[0] * len(OPERATIONS)).long().clamp(max=len(OPERATIONS) - 1)
        strength = torch.where(draws[1] < 0.5, -1.0, 1.0) * magnitude / 10
        x = _photometric(_geometric(x, operation, strength), operation, strength)
    return x.round().clamp_(0, 255).to(torch.uint8)


def _is(operation: Tensor, name: str) -> Tensor:
    return operation == OPERATIONS.index(name)


def _geometric(x: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Rotation, shear and shift are one affine map per image; the others get the identity. Grey comes in."""
    n, _, h, w = x.shape
    zero = torch.zeros_like(strength)

    def chosen(name: str, value: Tensor) -> Tensor:
        return torch.where(_is(operation, name), value, zero)

    angle = chosen("rotate", strength * math.radians(30))
    cos, sin = torch.cos(angle), torch.sin(angle)
    shear_x, shear_y = chosen("shear-x", 0.3 * strength), chosen("shear-y", 0.3 * strength)
    # In the grid's units the image is 2 wide and 2 high.
    shift_x, shift_y = chosen("translate-x", 0.9 * strength), chosen("translate-y", 0.9 * strength)
    matrix = torch.stack([cos, shear_x - sin, shift_x, sin + shear_y, cos, shift_y], dim=1).view(n, 2, 3)
    grid = F.affine_grid(matrix, [n, 1, h, w], align_corners=False)
    moved = F.grid_sample(x - 128, grid, mode="nearest", padding_mode="zeros", align_corners=False) + 128
    still = ~(torch.stack([_is(operation, name) for name in OPERATIONS[1:6]]).any(0))
    return torch.where(still[:, None, None, None], x, moved)


def _photometric(x: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    def where(name: str, value: Tensor, otherwise: Tensor) -> Tensor:
        return torch.where(_is(operation, name)[:, None, None, None], value, otherwise)

    s = strength[:, None, None, None]
    factor = 1 + 0.9 * s
    mean = x.mean((1, 2, 3), keepdim=True)
    step = 2.0 ** torch.round(4 * s.abs())
    out = where("brightness", (x * factor).clamp(0, 255), x)
    out = where("contrast", (mean + (x - mean) * factor).clamp(0, 255), out)
    out = where("posterize", torch.floor(x / step) * step, out)
    return where("solarize", torch.where(x >= 256 * (1 - s.abs()), 255 - x, x), out)
