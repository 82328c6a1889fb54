"""IDBH, augmentation made for adversarial training (Li & Spratling, ICLR 2023), of a whole batch at once.

Four layers, in this order, as released: a mirror image, CropShift, one of eight changes of colour or shape, and random
erasing. Every image draws its own parameters. `weak` erases half of the images, `strong` all of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from robudget.data.augment import WHOLE
from robudget.errors import InputError

STRENGTHS = {"weak": 0.5, "strong": 1.0}  # probability of erasing
SHIFT = 10  # pixels of CropShift, at most
COLOURS = ("saturation", "brightness", "contrast", "sharpness", "autocontrast", "equalize", "shear", "rotate")
_FACTORS = {"saturation": (0.1, 1.9), "brightness": (0.5, 1.9), "contrast": (0.5, 1.9), "sharpness": (0.1, 1.9)}
_SHEAR = (0.05, 0.15)  # radians
_DEGREES = 10  # of a rotation, at most; at least 1
_AREA, _ASPECT, _TRIES = (0.02, 0.33), (0.3, 1 / 0.3), 10  # of an erased box, and how often one is drawn until it fits


def idbh(
    images: Tensor, strength: str, *, generator: torch.Generator, rows: slice = WHOLE, total: int | None = None
) -> Tensor:
    """uint8 (N, C, H, W) in and out. Where `images` are only the `rows` of a batch of `total`, each image gets what it
    would have got in the whole batch. Raises InputError for images that its shifts would leave."""
    total = total or len(images)
    if min(images.shape[2:]) <= SHIFT:
        raise InputError(
            f"data.idbh = {strength} with images of {images.shape[2]}×{images.shape[3]} pixels (allowed: 11 or more)"
        )

    def draws(count: int) -> Tensor:
        """(count, N) uniform numbers."""
        return torch.rand(count, total, generator=generator, device=images.device)[:, rows]

    x = _moved(images, draws(7))
    x = _changed(x, draws(4))
    return _erased(x, STRENGTHS[strength], draws(1 + 2 * _TRIES + 2))


def _below(u: Tensor, n: Tensor | int) -> Tensor:
    """Whole numbers from 0 to n − 1, evenly."""
    return (u * n).long().clamp(max=n - 1) if isinstance(n, int) else torch.minimum((u * n).long(), n - 1)


def _moved(images: Tensor, u: Tensor) -> Tensor:
    """Mirrored with probability ½; then CropShift: a window smaller by s pixels, across and down together, from
    anywhere in the image, at any place of a black one; s from 0 to SHIFT."""
    n, c, h, w = images.shape
    size = _below(u[1], SHIFT + 1)
    across = _below(u[2], size + 1)
    cut = torch.stack([size - across, across])  # of rows, of columns
    source = torch.stack([_below(u[3], cut[0] + 1), _below(u[4], cut[1] + 1)])
    target = torch.stack([_below(u[5], cut[0] + 1), _below(u[6], cut[1] + 1)])
    grids = []
    for axis, length in enumerate((h, w)):
        at = torch.arange(length, device=images.device).expand(n, length)
        inside = (at >= target[axis, :, None]) & (at < target[axis, :, None] + length - cut[axis, :, None])
        grids.append((at - target[axis, :, None] + source[axis, :, None], inside))
    (lines, inside_lines), (columns, inside_columns) = grids
    columns = torch.where(u[0, :, None] < 0.5, w - 1 - columns, columns)
    index = lines.clamp(0, h - 1)[:, :, None] * w + columns.clamp(0, w - 1)[:, None, :]
    moved = images.reshape(n, c, h * w).gather(2, index.reshape(n, 1, h * w).expand(n, c, h * w)).view(n, c, h, w)
    return moved * (inside_lines[:, :, None] & inside_columns[:, None, :])[:, None]


def _changed(images: Tensor, u: Tensor) -> Tensor:
    """One of COLOURS each, at a strength of its own."""
    from torchvision.transforms.v2 import functional as v2  # type: ignore[import-untyped]

    kind, out = _below(u[0], len(COLOURS)), images.clone()
    for number, name in enumerate(COLOURS):
        chosen = (kind == number).nonzero().flatten()
        if len(chosen) == 0:
            continue
        part, strength, sign = images[chosen], u[1, chosen], torch.where(u[2, chosen] < 0.5, -1.0, 1.0)
        if name in _FACTORS:
            low, high = _FACTORS[name]
            out[chosen] = _blended(part, name, low + (high - low) * strength)
        elif name == "autocontrast":
            out[chosen] = v2.autocontrast(part)
        elif name == "equalize":
            out[chosen] = v2.equalize(part)
        elif name == "shear":
            slope = torch.tan(sign * (_SHEAR[0] + (_SHEAR[1] - _SHEAR[0]) * strength))
            flat, zero = u[3, chosen] < 0.5, torch.zeros_like(slope)
            one = torch.ones_like(slope)
            out[chosen] = _affine(part, one, torch.where(flat, slope, zero), torch.where(flat, zero, slope), one)
        else:
            angle = sign * torch.deg2rad(1.0 + _below(strength, _DEGREES))
            out[chosen] = _affine(part, angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    return out


def _blended(images: Tensor, name: str, factor: Tensor) -> Tensor:
    """factor·image + (1 − factor)·other: black, grey, the mean grey, or a smoothed image, as Pillow's enhancers."""
    x = images.float()
    if name == "brightness":
        other = torch.zeros_like(x)
    elif name == "sharpness":
        other = _smoothed(x)
    else:
        weights = torch.tensor([0.299, 0.587, 0.114] if x.shape[1] == 3 else [1.0], device=x.device)
        grey = (x * weights[:, None, None]).sum(1, keepdim=True).round()
        other = grey if name == "saturation" else grey.mean((2, 3), keepdim=True).round()
    mixed = other + factor[:, None, None, None] * (x - other)
    return mixed.clamp(0, 255).to(torch.uint8)


def _smoothed(x: Tensor) -> Tensor:
    """Weights 1, and 5 in the middle; the outermost pixels stay."""
    channels = x.shape[1]
    kernel = torch.ones(3, 3, device=x.device)
    kernel[1, 1] = 5
    out = x.clone()
    weight = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
    out[:, :, 1:-1, 1:-1] = F.conv2d(x, weight, groups=channels).round()
    return out


def _affine(images: Tensor, *entries: Tensor) -> Tensor:
    """Each image under its own matrix [[a, b], [c, d]] about its middle, nearest pixels, black from outside."""
    n, _, h, w = images.shape
    a, b, c, d = entries
    zero = torch.zeros_like(a)
    # The grid's units are half the width and half the height.
    matrix = torch.stack([a, b * h / w, zero, c * w / h, d, zero], dim=1).view(n, 2, 3)
    grid = F.affine_grid(matrix, [n, 1, h, w], align_corners=False)
    return F.grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False).to(
        torch.uint8
    )


def _erased(images: Tensor, probability: float, u: Tensor) -> Tensor:
    """With that probability a box becomes black (Zhong et al. 2020): the first of `_TRIES` that is smaller than the
    image, none where none is."""
    h, w = images.shape[2:]
    area = h * w * (_AREA[0] + (_AREA[1] - _AREA[0]) * u[1 : 1 + _TRIES])
    low, high = (math.log(aspect) for aspect in _ASPECT)
    aspect = torch.exp(low + (high - low) * u[1 + _TRIES : 1 + 2 * _TRIES])
    heights, widths = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (heights < h) & (widths < w)
    first = fits.long().argmax(0, keepdim=True)
    height, width = heights.gather(0, first)[0], widths.gather(0, first)[0]
    top, left = _below(u[-2], (h - height + 1).clamp(min=1)), _below(u[-1], (w - width + 1).clamp(min=1))
    on = fits.any(0) & (u[0] < probability)
    line, column = torch.arange(h, device=images.device), torch.arange(w, device=images.device)
    lines = (line >= top[:, None]) & (line < (top + height)[:, None])
    columns = (column >= left[:, None]) & (column < (left + width)[:, None])
    box = lines[:, :, None] & columns[:, None, :] & on[:, None, None]
    return images.masked_fill(box[:, None], 0)
