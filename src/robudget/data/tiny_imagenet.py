"""Tiny-ImageNet as published: train/<wnid>/images/*.JPEG, and a validation folder with its labels in a text file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from robudget.data.source import Part, Source, identity_of
from robudget.errors import InputError


def read(name: str, root: Path) -> Source | None:
    """A source over the official folder; its labelled validation images are the test split. None for other layouts."""
    home = next((p for p in (root, root / "tiny-imagenet-200") if (p / "val" / "val_annotations.txt").is_file()), None)
    if home is None:
        return None
    classes = sorted(p.name for p in (home / "train").iterdir() if p.is_dir())
    index = {wnid: label for label, wnid in enumerate(classes)}
    train = [(p, index[w]) for w in classes for p in sorted((home / "train" / w / "images").glob("*.JPEG"))]
    test = []
    for number, line in enumerate((home / "val" / "val_annotations.txt").read_text("utf-8").splitlines(), 1):
        file, wnid, *_ = [*line.split("\t"), "", ""]
        if wnid not in index:
            raise InputError(f"val_annotations.txt line {number}: class {wnid!r} has no folder in train/")
        test.append((home / "val" / "images" / file, index[wnid]))
    return Source(
        name, _part(home, train), _part(home, test), tuple(classes), identity_of(home, [p for p, _ in [*train, *test]])
    )


def _part(home: Path, listed: list[tuple[Path, int]]) -> Part:
    def pictures() -> Iterator[tuple[str, Any]]:
        return ((str(path.relative_to(home)), path) for path, _ in listed)

    return Part(np.asarray([label for _, label in listed], dtype=np.int64), pictures)
