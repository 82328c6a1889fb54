"""RandAugment (Cubuk et al. 2020) for a whole batch at once on its device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from robudget.data.augment import WHOLE

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
