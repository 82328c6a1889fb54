"""An index of a store: what its finished runs say, in one file, so that a table of thousands of them opens at once.

The folders are the truth. A line of the index counts only while the run's `run.json` has the inode, size and time of
change that it had when it was read (or `evals`, where later evaluations of the run are, its time), and the whole index
only for the code that wrote it; it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from robudget import accuracy, columns, recipe
from robudget.files import replace
from robudget.store import RunFolder

FILE = ".index.parquet"
LEAST_RUNS = 200  # a smaller store is read in less than a second
Stamp = tuple[int, int, int]  # inode, bytes, nanoseconds of the last change


def facts_of(
    root: Path, folders: Sequence[RunFolder], read: Callable[[RunFolder], dict[str, Any]], reader: Path
) -> list[dict[str, Any]]:
    """What `read` says of each of these finished runs of the store at `root`, from the index where it still holds.

    `read` returns numbers, words and flags by name; `reader` is the file of its code.
    """
    if len(folders) < LEAST_RUNS:
        return [read(folder) for folder in folders]
    version = _version(reader)
    index = _load(root / FILE, version)
    stamps = {folder.path.name: _stamp(folder) for folder in folders}
    lines = {name: index[name][1] for name, stamp in stamps.items() if name in index and index[name][0] == stamp}
    fresh = {folder.path.name: read(folder) for folder in folders if folder.path.name not in lines}
    lines |= {name: json.dumps(facts) for name, facts in fresh.items()}
    if fresh or len(index) != len(lines):
        _save(root / FILE, version, {name: (stamps[name], line) for name, line in lines.items()})
    return [fresh.get(folder.path.name) or json.loads(lines[folder.path.name]) for folder in folders]


def _stamp(folder: RunFolder) -> Stamp:
    status = (folder.path / "run.json").stat()
    try:  # evaluations of the run that came later touch this folder
        evaluations = (folder.path / "evals").stat().st_mtime_ns
    except OSError:
        evaluations = 0
    return status.st_ino, status.st_size, max(status.st_mtime_ns, evaluations)


@cache
def _version(reader: Path) -> str:
    """The SHA-256 of the source that turns a record into facts."""
    digest = hashlib.sha256()
    for file in (reader, *(module.__file__ for module in (accuracy, columns, recipe))):
        digest.update(Path(file or "").read_bytes())
    return digest.hexdigest()


def _load(path: Path, version: str) -> dict[str, tuple[Stamp, str]]:
    """Folder name → (stamp, facts as JSON); {} where there is no index, a damaged one, or one of other code."""
    try:
        table = pq.read_table(path)
        if (table.schema.metadata or {}).get(b"version") != version.encode():
            return {}
        names, inodes, sizes, times, facts = (table.column(name).to_pylist() for name in _SCHEMA.names)
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return {}
    return dict(zip(names, zip(zip(inodes, sizes, times, strict=True), facts, strict=True), strict=True))


_SCHEMA = pa.schema([
    ("folder", pa.string()), ("inode", pa.uint64()), ("bytes", pa.int64()), ("nanoseconds", pa.int64()),
    ("facts", pa.string()),
])  # fmt: skip


def _save(path: Path, version: str, lines: Mapping[str, tuple[Stamp, str]]) -> None:
    """Where the store cannot be written there is no index, and nothing is lost but time."""
    rows = [(name, *stamp, facts) for name, (stamp, facts) in lines.items()]
    columns = [list(column) for column in zip(*rows, strict=True)]
    table = pa.table(columns, schema=_SCHEMA.with_metadata({"version": version}))
    with contextlib.suppress(OSError):
        replace(path, lambda temporary: pq.write_table(table, temporary), durable=False)
