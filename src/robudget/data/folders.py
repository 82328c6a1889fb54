"""Folders of class sub-folders with images: `<root>/{train,test}/<class>/*.png`, or `<root>/<class>/*.png` alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robudget.data.dataset import stratified_rows
from robudget.data.picture import SUFFIXES
from robudget.data.source import Part, Source, identity_of
from robudget.errors import InputError

TEST_NAMES = ("test", "val", "validation", "valid")
TEST_SHARE = 1 / 6  # of a folder without a test split, as CIFAR-10's 10,000 of 60,000
_SPLIT_SEED = 6


def find(root: Path) -> bool:
    """Does `root` look like class sub-folders, with or without train and test above them?"""
    if not root.is_dir():
        return False
    train = root / "train"
    return bool(classes_in(train if train.is_dir() else root))


def read(name: str, root: Path) -> Source:
    """A source over the pictures; classes are the sub-folders' names in sorted order. Raises InputError."""
    train = root / "train"
    if not train.is_dir():
        return _one_folder(name, root)
    test = next((root / n for n in TEST_NAMES if (root / n).is_dir()), None)
    if test is None:
        raise InputError(f"{str(root)!r} has train/ but no test split (allowed: {', '.join(TEST_NAMES)})")
    classes = classes_in(train)
    if classes_in(test) != classes:
        odd = sorted(set(classes_in(test)) ^ set(classes))
        raise InputError(f"{str(root)!r}: {train.name} and {test.name} differ in classes ({', '.join(odd[:5])})")
    listed = [_list(folder, classes) for folder in (train, test)]
    identity = identity_of(root, [path for paths, _ in listed for path in paths])
    return Source(name, _part(root, *listed[0]), _part(root, *listed[1]), classes, identity)


def _one_folder(name: str, root: Path) -> Source:
    """Class sub-folders only: a sixth of each class, always the same images, becomes the test split."""
    classes = classes_in(root)
    paths, labels = _list(root, classes)
    rows = stratified_rows(torch.from_numpy(labels), TEST_SHARE, len(classes), seed=_SPLIT_SEED)
    train, test = (_part(root, [paths[i] for i in part.tolist()], labels[part.numpy()]) for part in rows)
    return Source(name, train, test, classes, identity_of(root, paths))


def classes_in(folder: Path) -> tuple[str, ...]:
    """Names of the sub-folders, sorted."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def read_part(folder: Path, classes: tuple[str, ...]) -> tuple[Part, list[Path]]:
    """All pictures of class sub-folders as one part, labelled by the order of `classes`; and their paths."""
    paths, labels = _list(folder, classes)
    return _part(folder, paths, labels), paths


def _list(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], NDArray[np.int64]]:
    """Pictures in the order of classes and names, and their labels. A class without pictures is refused."""
    paths, labels = [], []
    for label, name in enumerate(classes):
        # One level below the class, or inside an `images` folder as Tiny-ImageNet has it.
        own = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not own:
            raise InputError(f"class folder {str(folder / name)!r} has no images ({', '.join(sorted(SUFFIXES))})")
        paths += own
        labels += [label] * len(own)
    return paths, np.asarray(labels, dtype=np.int64)


def _part(root: Path, paths: list[Path], labels: NDArray[np.int64]) -> Part:
    def pictures() -> Iterator[tuple[str, Any]]:
        return ((str(path.relative_to(root)), path) for path in paths)

    return Part(labels, pictures)
