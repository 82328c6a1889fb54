"""What is known of data sets without their files: published sizes, how a picture becomes an input. Imports no torch."""

from __future__ import annotations

import re
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
    "mnist-5k": Sizes(4000, 1000, (1, 28, 28), 10),
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


# -- from a picture to an input ---------------------------------------------------------------------------------------

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """`resize`: pixels of the shorter side (`square`: of both sides), None: as it is; `crop`: of the square that is cut
    at the centre, None: all."""

    resize: int | None = 256
    crop: int | None = 224
    interpolation: str = "bilinear"
    square: bool = False

    @classmethod
    def parse(cls, text: str) -> Preprocessing:
        """A name of RobustBench's (`Res256Crop224`, `BicubicRes256Crop224`, `Crop288`, `Res224`), with any number of
        pixels. Raises InputError."""
        match = re.fullmatch(r"(Bicubic)?(?:Res(\d+))?(?:Crop(\d+))?", text)
        if not match or not (match[2] or match[3]):
            raise unknown("preprocessing", text, NAMES)
        resize, crop = (None if group is None else int(group) for group in match.groups()[1:])
        if 0 in (resize, crop):
            raise InputError(f"preprocessing = {text!r} (allowed: at least 1 pixel)")
        return cls(resize, crop, "bicubic" if match[1] else "bilinear", square=crop is None)

    def __str__(self) -> str:
        resize = "" if self.resize is None else f"Res{self.resize}"
        crop = "" if self.crop is None else f"Crop{self.crop}"
        return ("Bicubic" if self.interpolation == "bicubic" else "") + resize + crop

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", self.interpolation, INTERPOLATIONS)


NAMES = ("Res256Crop224", "BicubicRes256Crop224", "Crop288", "Res224")
