"""The two layouts that any dataset may come in: parquet shards as on the Hub, and class sub-folders with images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from robudget.data.dataset import stratified_rows
from robudget.data.decode import SUFFIXES, Part, Source, identity_of
from robudget.errors import InputError

# -- parquet shards ---------------------------------------------------------------------------------------------------

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
SHARD_TEST_NAMES = ("test", "validation", "valid", "val")


def find_shards(root: Path) -> tuple[list[Path], list[Path]] | None:
    """(train shards, test shards) anywhere below `root`, or None where there are no parquet files."""
    shards = sorted(root.rglob("*.parquet")) if root.is_dir() else []
    if not shards:
        return None
    train = [p for p in shards if _split_of(p) == "train"]
    for name in SHARD_TEST_NAMES:
        if test := [p for p in shards if _split_of(p) == name]:
            break
    if not train or not test:
        missing = "train" if not train else "test"
        raise InputError(f"{str(root)!r} has parquet files but no {missing}-*.parquet (found {shards[0].name}, …)")
    return train, test


def read_shards(name: str, root: Path, shards: tuple[list[Path], list[Path]], class_names: tuple[str, ...]) -> Source:
    """A source over the shards; `class_names` where the files don't carry their own. Raises InputError."""
    train, test = shards
    own = _class_names(train[0])
    labels = [_labels(paths) for paths in (train, test)]
    if not own and not class_names:
        class_names = tuple(str(i) for i in range(int(max(part.max() for part in labels)) + 1))
    parts = [Part(label, partial(_pictures, paths)) for label, paths in zip(labels, shards, strict=True)]
    return Source(name, parts[0], parts[1], own or class_names, identity_of(root, [*train, *test]))


def shards_part(shards: list[Path]) -> Part:
    """All pictures of the shards as one part."""
    return Part(_labels(shards), partial(_pictures, shards))


def _split_of(path: Path) -> str:
    return path.name.split("-")[0].split(".")[0].lower()


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"corrupt parquet file {str(path)!r}: {str(error).splitlines()[0]}") from None


def _column(file: pq.ParquetFile, path: Path, allowed: tuple[str, ...]) -> str:
    for name in allowed:
        if name in file.schema_arrow.names:
            return name
    raise InputError(f"{str(path)!r} has columns {file.schema_arrow.names} (allowed: one of {', '.join(allowed)})")


def _labels(paths: list[Path]) -> NDArray[np.int64]:
    columns = []
    for path in paths:
        file = _open(path)
        column = _column(file, path, LABEL_COLUMNS)
        values = _guard(path, partial(file.read, columns=[column]))[column]
        if not pa.types.is_integer(values.type) or values.null_count:
            raise InputError(
                f"{str(path)!r}: column {column!r} is {values.type} (allowed: whole numbers, none missing)"
            )
        columns.append(values.to_numpy().astype(np.int64))
    return np.concatenate(columns)


def _pictures(paths: list[Path]) -> Iterator[tuple[str, Any]]:
    for path in paths:
        file = _open(path)
        column = _column(file, path, IMAGE_COLUMNS)
        row = 0
        batches = file.iter_batches(batch_size=1024, columns=[column])
        while (batch := _guard(path, partial(next, batches, None))) is not None:
            for value in batch.column(0).to_pylist():
                content = value.get("bytes") if isinstance(value, dict) else value
                if not isinstance(content, bytes):
                    raise InputError(f"{str(path)!r} row {row}: column {column!r} holds no image bytes")
                yield f"{path.name} row {row}", content
                row += 1


def _guard(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"corrupt parquet file {str(path)!r}: {str(error).splitlines()[0]}") from None


def _class_names(path: Path) -> tuple[str, ...]:
    """The Hub writes its features as JSON into the schema's metadata; without it there are no names."""
    metadata = _open(path).schema_arrow.metadata or {}
    if b"huggingface" not in metadata:
        return ()
    features = json.loads(metadata[b"huggingface"]).get("info", {}).get("features", {})
    for column in LABEL_COLUMNS:
        if "names" in features.get(column, {}):
            return tuple(features[column]["names"])
    return ()


# -- class sub-folders ------------------------------------------------------------------------------------------------

FOLDER_TEST_NAMES = ("test", "val", "validation", "valid")
TEST_SHARE = 1 / 6  # of a folder without a test split, as CIFAR-10's 10,000 of 60,000
_SPLIT_SEED = 6


def has_class_folders(root: Path) -> bool:
    """Does `root` look like class sub-folders, with or without train and test above them?"""
    if not root.is_dir():
        return False
    train = root / "train"
    return bool(classes_in(train if train.is_dir() else root))


def read_class_folders(name: str, root: Path) -> Source:
    """A source over the pictures; classes are the sub-folders' names in sorted order. Raises InputError."""
    train = root / "train"
    if not train.is_dir():
        return _one_folder(name, root)
    test = next((root / n for n in FOLDER_TEST_NAMES if (root / n).is_dir()), None)
    if test is None:
        raise InputError(f"{str(root)!r} has train/ but no test split (allowed: {', '.join(FOLDER_TEST_NAMES)})")
    classes = classes_in(train)
    if classes_in(test) != classes:
        odd = sorted(set(classes_in(test)) ^ set(classes))
        raise InputError(f"{str(root)!r}: {train.name} and {test.name} differ in classes ({', '.join(odd[:5])})")
    train_files, test_files = _list(train, classes), _list(test, classes)
    identity = identity_of(root, [*train_files[0], *test_files[0]])
    return Source(name, Part.of_files(root, *train_files), Part.of_files(root, *test_files), classes, identity)


def _one_folder(name: str, root: Path) -> Source:
    """Class sub-folders only: a sixth of each class, always the same images, becomes the test split."""
    classes = classes_in(root)
    paths, labels = _list(root, classes)
    rows = stratified_rows(torch.from_numpy(labels), TEST_SHARE, len(classes), seed=_SPLIT_SEED)
    train, test = (Part.of_files(root, [paths[i] for i in part.tolist()], labels[part.numpy()]) for part in rows)
    return Source(name, train, test, classes, identity_of(root, paths))


def classes_in(folder: Path) -> tuple[str, ...]:
    """Names of the sub-folders, sorted."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def class_folders_part(folder: Path, classes: tuple[str, ...]) -> tuple[Part, list[Path]]:
    """All pictures of class sub-folders as one part, labelled by the order of `classes`; and their paths."""
    paths, labels = _list(folder, classes)
    return Part.of_files(folder, paths, labels), paths


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
