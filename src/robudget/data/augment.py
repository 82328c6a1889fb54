"""Augmentation of a whole batch at once, on the device the images are on, from an explicit generator."""

from __future__ import annotations

import torch
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
