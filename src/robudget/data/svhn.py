"""SVHN, cropped digits, as published (Netzer et al. 2011): train_32x32.mat and test_32x32.mat, MD5-checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from robudget.data.source import Part, Source, identity_of
from robudget.errors import InputError

MD5 = {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373", "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"}


def read(name: str, root: Path) -> Source | None:
    """A source over the two files in `root`, or None where they are not. The digit 0 is published as label 10."""
    paths = [root / file for file in MD5]
    if not all(path.is_file() for path in paths):
        return None
    train, test = (_part(path) for path in paths)
    return Source(name, train, test, tuple("0123456789"), identity_of(root, paths))


def _part(path: Path) -> Part:
    from scipy.io import loadmat

    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != MD5[path.name]:
        raise InputError(f"{str(path)!r} is corrupt: its MD5 is {found}, the published one {MD5[path.name]}")
    table = loadmat(path)
    images = np.ascontiguousarray(table["X"].transpose(3, 2, 0, 1))

    def pictures() -> Iterator[tuple[str, Any]]:
        return ((f"{path.name} row {row}", image) for row, image in enumerate(images))

    return Part(table["y"].reshape(-1).astype(np.int64) % 10, pictures)
