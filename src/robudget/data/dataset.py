"""A dataset in memory: uint8 images, int64 labels, and a fingerprint of what was really read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from robudget.errors import InputError

HOLDOUT_SEED = 20231213  # fixed, so that every recipe and every seed validates on the same images


@dataclass(frozen=True, eq=False)
class Split:
    """`images` uint8 (N, C, H, W), `labels` int64 (N,), and where a teacher gave them `soft` probabilities float32
    (N, classes). Images may be memory-mapped: index, don't copy."""

    images: Tensor
    labels: Tensor
    soft: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise InputError(f"images are {self.images.dtype} {tuple(self.images.shape)} (allowed: uint8 (N, C, H, W))")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise InputError(
                f"labels are {self.labels.dtype} {tuple(self.labels.shape)} (allowed: int64 ({len(self.images)},))"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> Split:
        return Split(self.images[rows], self.labels[rows], self.soft[rows] if self.soft is not None else None)

    def first(self, n: int | None) -> Split:
        """The first n rows (all without n). Raises InputError when there are fewer."""
        if n is not None and n > len(self):
            raise InputError(f"{n} images asked for, but the split has {len(self)}")
        return self if n is None else self[:n]

    def unit(self) -> Tensor:
        """The images as float32 in [0, 1]."""
        return to_unit(self.images)


def to_unit(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]: n/255, correctly rounded, in the memory format of the input."""
    return images.to(torch.float32).div_(255)


@dataclass(frozen=True, eq=False)
class Dataset:
    """`train` and `test`, the number of `classes` and their names, and `fingerprint`: 16 hex digits of the pixels and
    labels of both splits in their order, whatever file layout they came from. `evaluation_only`: it has no training
    images."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    fingerprint: str
    evaluation_only: bool = False

    def __post_init__(self) -> None:
        for split, part in (("train", self.train), ("test", self.test)):
            if self.evaluation_only and split == "train":
                continue
            if len(part) == 0:
                raise InputError(f"dataset {self.name!r}: the {split} split is empty")
            low, high = int(part.labels.min()), int(part.labels.max())
            if low < 0 or high >= self.classes:
                raise InputError(
                    f"dataset {self.name!r}: {split} labels span {low}…{high} (allowed: 0…{self.classes - 1})"
                )
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise InputError(f"dataset {self.name!r}: train and test images differ in size")

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        _, c, h, w = self.train.images.shape
        return c, h, w

    @cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.evaluation_only:
            return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's training images
        # A histogram per channel is exact and never holds a float copy of the images; a memory-mapped set is sampled
        # evenly, since reading all of it would cost more than it tells.
        images = self.train.images[:: max(1, len(self.train) // 50_000)]
        values = np.arange(256) / 255
        means, stds = [], []
        for channel in range(images.shape[1]):
            counts = np.bincount(images[:, channel].reshape(-1).numpy(), minlength=256)
            share = counts / counts.sum()
            mean = float(share @ values)
            means.append(round(mean, 4))
            stds.append(round(max(float(share @ (values - mean) ** 2) ** 0.5, 1e-2), 4))
        return tuple(means), tuple(stds)

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of the training images in [0, 1], to four digits."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        return self._moments[1]


def fingerprint(*splits: Split) -> str:
    """16 hex digits of shapes, pixels and labels, in order."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(str(tuple(split.images.shape)).encode())
        for first in range(0, len(split), 65_536):
            digest.update(np.ascontiguousarray(split.images[first : first + 65_536].numpy()).data)
        digest.update(np.ascontiguousarray(split.labels.numpy()).data)
    return digest.hexdigest()[:16]


def sampled_fingerprint(split: Split, images: int = 1000) -> str:
    """16 hex digits of the shape, all labels and every n-th image: enough to notice other data, without reading it
    all."""
    digest = hashlib.sha256(str(tuple(split.images.shape)).encode())
    rows = split.images[:: max(1, len(split) // images)]
    digest.update(np.ascontiguousarray(rows.numpy()).data)
    digest.update(np.ascontiguousarray(split.labels.numpy()).data)
    return digest.hexdigest()[:16]


def hold_out(train: Split, share: float, classes: int, *, seed: int = HOLDOUT_SEED) -> tuple[Split, Split]:
    """(rest, held out): a stratified share of the training set, the same rows for every recipe (`stratified_rows`)."""
    rest, held = stratified_rows(train.labels, share, classes, seed=seed)
    return train[rest], train[held]


def stratified_rows(labels: Tensor, share: float, classes: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers (rest, held out) of labels int64 (N,).

    Each class gives up its share, rounded, and at least one row. The rest keeps its order; the held-out rows are mixed,
    so that the first n of them hold every class. With share 0 there are none. Raises InputError when a class would keep
    none.
    """
    if not 0 <= share < 1:
        raise InputError(f"validation.fraction = {share} (allowed: 0 <= fraction < 1)")
    held = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    if share > 0:
        for label in range(classes):
            rows = (labels == label).nonzero().flatten()
            if len(rows) == 0:
                continue
            count = max(1, round(share * len(rows)))
            if count >= len(rows):
                raise InputError(f"a held-out share of {share} leaves no image of class {label} (it has {len(rows)})")
            held[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    order = torch.randperm(int(held.sum()), generator=generator)
    return (~held).nonzero().flatten(), held.nonzero().flatten()[order]
