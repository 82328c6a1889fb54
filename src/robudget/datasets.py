"""The sizes of published datasets, known without their files. Imports no torch; `robudget.data` reads the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from robudget.errors import InputError, unknown

if TYPE_CHECKING:
    from robudget.data import Dataset


@dataclass(frozen=True)
class Sizes:
    """Of a dataset: images of its two splits, their shape (C, H, W), classes."""

    train: int
    test: int
    image_shape: tuple[int, int, int]
    classes: int

    @classmethod
    def of(cls, dataset: Dataset) -> Sizes:
        return cls(len(dataset.train), len(dataset.test), dataset.image_shape, dataset.classes)


PUBLISHED = {
    "digits": Sizes(1396, 401, (1, 8, 8), 10),
    "cifar10": Sizes(50_000, 10_000, (3, 32, 32), 10),
    "cifar100": Sizes(50_000, 10_000, (3, 32, 32), 100),
    "svhn": Sizes(73_257, 26_032, (3, 32, 32), 10),
    "tiny-imagenet": Sizes(100_000, 10_000, (3, 64, 64), 200),
    "imagenet": Sizes(1_281_167, 50_000, (3, 224, 224), 1000),
}


def sizes_of(name: str) -> Sizes:
    """The sizes of a published dataset. Raises InputError for a name whose sizes only its files can tell."""
    if name not in PUBLISHED:
        raise InputError(f"{unknown('dataset', name, PUBLISHED)}; for others the forecast needs the data (data.root=…)")
    return PUBLISHED[name]
