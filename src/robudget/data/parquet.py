"""Parquet shards in the Hub's layout: an image column of {bytes, path} and an integer label column."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from robudget.data.source import Part, Source, identity_of
from robudget.errors import InputError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
TRAIN, TEST = ("train",), ("test", "validation", "valid", "val")


def find(root: Path) -> tuple[list[Path], list[Path]] | None:
    """(train shards, test shards) anywhere below `root`, or None where there are no parquet files."""
    shards = sorted(root.rglob("*.parquet")) if root.is_dir() else []
    if not shards:
        return None
    train = [p for p in shards if _split_of(p) in TRAIN]
    for name in TEST:
        if test := [p for p in shards if _split_of(p) == name]:
            break
    if not train or not test:
        missing = "train" if not train else "test"
        raise InputError(f"{str(root)!r} has parquet files but no {missing}-*.parquet (found {shards[0].name}, …)")
    return train, test


def read(name: str, root: Path, shards: tuple[list[Path], list[Path]], class_names: tuple[str, ...]) -> Source:
    """A source over the shards; `class_names` where the files don't carry their own. Raises InputError."""
    train, test = shards
    own = _class_names(train[0])
    labels = [_labels(paths) for paths in (train, test)]
    if not own and not class_names:
        class_names = tuple(str(i) for i in range(int(max(part.max() for part in labels)) + 1))
    parts = [Part(label, partial(_pictures, paths)) for label, paths in zip(labels, shards, strict=True)]
    return Source(name, parts[0], parts[1], own or class_names, identity_of(root, [*train, *test]))


def read_part(shards: list[Path]) -> Part:
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
