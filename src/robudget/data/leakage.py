"""How near generated images come to test images: nearest neighbours over the pixels, beside those of training images.

A generator that was fitted on test images, or a set that was filtered by them, gives some of them back; robust accuracy
on these is no accuracy on unseen images. Distances are root mean squares over the pixels, in levels of 255.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robudget.data.dataset import Dataset, Split
from robudget.errors import InputError
from robudget.files import make_folder, write_json

BLOCK_BYTES = 1 << 26  # of pixels in float32: one block of each of the two sets is held at a time
RADII = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # levels, of the table
WITHIN = 8.0  # levels that count as near: the usual L∞ radius in CIFAR-10
_SHOWN = 20  # pairs in the record and in the picture
_SCALE = 3  # of a picture's pixel


@dataclass(frozen=True, eq=False)
class Nearest:
    """Of each of N images its nearest neighbour: `rows` int64 (N,) among the others, `levels` float64 (N,) away."""

    rows: Tensor
    levels: Tensor


def nearest(images: Tensor, others: Tensor, *, progress: Callable[[float], None] = lambda done: None) -> Nearest:
    """The nearest of `others` (M, C, H, W) for each of `images` (N, C, H, W), both uint8, the latter mirrored too.

    Every pair is compared, block by block, on the device that `images` are on. Distances are exact, of whole numbers;
    which of two neighbours is nearer is decided in float32, to about a hundredth of a level. Of equals the first.
    """
    pixels = images[0].numel()
    size = max(1, BLOCK_BYTES // (4 * pixels))
    best = torch.full((len(images),), torch.iinfo(torch.int64).max, device=images.device)
    rows = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for first in range(0, len(others), size):
        block = others[first : first + size].to(images.device)
        theirs = _centred(block)
        squares = theirs.square().sum(1)
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            for mine in (images[part], images[part].flip(3)):
                at = (squares - 2 * _centred(mine) @ theirs.T).argmin(1)
                exact = (mine.flatten(1).long() - block[at].flatten(1).long()).square_().sum(1)
                nearer = exact < best[part]
                best[part] = torch.where(nearer, exact, best[part])
                rows[part] = torch.where(nearer, first + at, rows[part])
        progress(min(first + size, len(others)) / len(others))
    return Nearest(rows.cpu(), (best.cpu().double() / pixels).sqrt())


def _centred(images: Tensor) -> Tensor:
    """float32 (N, pixels) around 0, so that sums of products are small and float32 keeps more of them."""
    return images.flatten(1).to(torch.float32).sub_(128)


@dataclass(frozen=True, eq=False)
class Leakage:
    """The nearest generated and the nearest training image of the first test images of a dataset. `within`: levels that
    count as near."""

    dataset: Dataset
    generated: Split
    test: Split
    to_generated: Nearest
    to_training: Nearest
    within: float

    @property
    def near(self) -> int:
        """Test images with a generated image within `within` levels."""
        return int((self.to_generated.levels <= self.within).sum())

    def pairs(self, most: int = _SHOWN) -> list[dict[str, Any]]:
        """The test images that are nearest to a generated one, the nearest first."""
        names, out = self.dataset.class_names, []
        for row in self.to_generated.levels.argsort(stable=True)[:most].tolist():
            other = int(self.to_generated.rows[row])
            out.append(
                {
                    "test": row,
                    "label": names[int(self.test.labels[row])],
                    "generated": other,
                    "generated_label": names[int(self.generated.labels[other])],
                    "levels": float(self.to_generated.levels[row]),
                    "training": int(self.to_training.rows[row]),
                    "training_levels": float(self.to_training.levels[row]),
                }
            )
        return out

    def summary(self) -> dict[str, Any]:
        def counts(found: Nearest) -> dict[str, int]:
            return {f"{radius:g}": int((found.levels <= radius).sum()) for radius in RADII}

        return {
            "dataset": self.dataset.name,
            "test": len(self.test),
            "generated": len(self.generated),
            "training": len(self.dataset.train),
            "within_levels": self.within,
            "near": self.near,
            "near_training": int((self.to_training.levels <= self.within).sum()),
            "generated_within": counts(self.to_generated),
            "training_within": counts(self.to_training),
            "generated_median_levels": float(self.to_generated.levels.median()),
            "training_median_levels": float(self.to_training.levels.median()),
            "pairs": self.pairs(),
        }

    def page(self) -> str:
        said = self.summary()
        lines = [
            f"{self.near:,} of {said['test']:,} test images of {self.dataset.name} have one of {said['generated']:,} "
            f"generated images within {self.within:g} levels of 255 (root mean square over the pixels, mirrored or "
            f"not); {said['near_training']:,} have one of {said['training']:,} training images so near",
            "",
            "within, levels    " + "".join(f"{radius:>8g}" for radius in RADII) + "  median distance",
        ]
        for name in ("generated", "training"):
            counts = "".join(f"{count:>8,}" for count in said[f"{name}_within"].values())
            lines.append(f"a {name} image".ljust(18) + counts + f"{said[f'{name}_median_levels']:>17.1f}")
        lines += ["", "the nearest pairs:"]
        lines += [
            f"  test image {pair['test']} ({pair['label']}), generated image {pair['generated']} "
            f"({pair['generated_label']}): {pair['levels']:.1f} levels; nearest training image "
            f"{pair['training_levels']:.1f}"
            for pair in said["pairs"][:5]
        ]
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """`leakage.json` (the summary), `nearest.csv` (a line a test image) and `pairs.png`: a row for each of the
        nearest pairs, the test image, the generated one and the nearest training image."""
        import pandas as pd
        from PIL import Image

        make_folder(folder)
        write_json(folder / "leakage.json", self.summary())
        frame = {"test": range(len(self.test)), "label": self.test.labels.tolist()}
        for name, found in (("generated", self.to_generated), ("training", self.to_training)):
            frame |= {name: found.rows.tolist(), f"{name}_levels": found.levels.tolist()}
        pd.DataFrame(frame).to_csv(folder / "nearest.csv", index=False)
        rows = [(pair["test"], pair["generated"], pair["training"]) for pair in self.pairs()]
        sets = (self.test.images, self.generated.images, self.dataset.train.images)
        picture = torch.cat([torch.cat([s[row] for s, row in zip(sets, line, strict=True)], 2) for line in rows], 1)
        picture = picture.repeat_interleave(_SCALE, 1).repeat_interleave(_SCALE, 2).permute(1, 2, 0).contiguous()
        Image.fromarray(picture.numpy().squeeze()).save(folder / "pairs.png")


def audit(
    generated: Split,
    dataset: Dataset,
    *,
    samples: int | None = None,
    within: float = WITHIN,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] = lambda done: None,
) -> Leakage:
    """How near `generated` comes to the first `samples` test images (all without a number). Raises InputError."""
    if within < 0:
        raise InputError(f"within = {within:g} (allowed: 0 or more levels of 255)")
    if dataset.evaluation_only:
        raise InputError(f"{dataset.name} has no training images here, beside which generated ones are looked at")
    test = dataset.test.first(samples)
    images = test.images.to(device)
    n, m = len(generated), len(dataset.train)
    to_generated = nearest(images, generated.images, progress=lambda done: progress(done * n / (n + m)))
    to_training = nearest(images, dataset.train.images, progress=lambda done: progress((n + done * m) / (n + m)))
    return Leakage(dataset, generated, test, to_generated, to_training, within)
