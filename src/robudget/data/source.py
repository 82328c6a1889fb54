"""A dataset that has been found but not decoded: what every reader of a file layout returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robudget.errors import InputError


@dataclass(frozen=True)
class Part:
    """One split: int64 labels (N,) and, in the same order, an iterator of (where, picture).

    A picture is a path, the bytes of an image file, or a uint8 array (C, H, W); `where` names it in messages.
    """

    labels: NDArray[np.int64]
    pictures: Callable[[], Iterator[tuple[str, Any]]]


@dataclass(frozen=True)
class Source:
    """`identity` changes when the files do: their names, sizes and modification times."""

    name: str
    train: Part
    test: Part
    class_names: tuple[str, ...]
    identity: str


def identity_of(root: Path, paths: Iterable[Path]) -> str:
    """Names under `root`, sizes and modification times, as one string."""
    facts = []
    for path in sorted(paths):
        stat = path.stat()
        facts.append(f"{path.relative_to(root) if path != root else path.name}:{stat.st_size}:{stat.st_mtime_ns}")
    return f"{root.resolve()}|" + "|".join(facts)


def folder_at(root: Path | None, name: str) -> Path:
    """`root`, which must exist and hold something. Raises InputError."""
    if root is None:
        raise InputError(
            f"dataset {name!r} needs data.root=PATH, or --data-root PATH of robudget eval (nothing is downloaded)"
        )
    if not root.exists():
        raise InputError(f"data.root = {str(root)!r} does not exist")
    if root.is_dir() and not any(root.iterdir()):
        raise InputError(f"data.root = {str(root)!r} is an empty folder")
    return root
