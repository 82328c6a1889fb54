"""Writing files whole or not at all, whatever kills the writer; plain JSON from any result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from robudget.errors import InputError
from robudget.formats import known


def is_url(path: Path | str) -> bool:
    """Is this the address of a file system behind a protocol (s3://bucket/runs) rather than a path? A `Path` made of
    one has lost a slash."""
    return re.match(r"[a-z][a-z0-9+]+:/", str(path)) is not None


def local(path: Path) -> Path:
    """`path`, to be written to. Raises InputError for a URL."""
    if is_url(path):
        raise InputError(f"cannot write to {str(path)!r}: URLs can only be read (allowed: a folder)")
    return path


def replace(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Call `write(temporary)` for a fresh file beside `path`, then move it into place in one step.

    The temporary file keeps `path`'s suffix, since many writers choose their format by it, and is removed if anything
    fails. `durable` waits until the bytes are on the disk, so that a power cut leaves the old file or the new one.
    Raises what a guard of the folder raises (`guard`).
    """
    allowed(path)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}-{threading.get_ident()}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # some writers make private files; these are for whoever the folder is for
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        allowed(path)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """64 hex digits of the file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> None:
    """The folder and those above it; raises what a guard raises, so that a store that is away is not begun anew."""
    allowed(path)
    path.mkdir(parents=True, exist_ok=True)


_guards: dict[Path, Callable[[], None]] = {}


def guard(folder: Path, check: Callable[[], None]) -> None:
    """From here on, call `check` before every write of this process into `folder`; it raises where that must not be."""
    _guards[folder.absolute()] = check


def unguard(folder: Path) -> None:
    _guards.pop(folder.absolute(), None)


def allowed(path: Path) -> None:
    """Raise what a guard of a folder around `path` raises."""
    place = path.absolute()
    for folder, check in list(_guards.items()):
        if place.is_relative_to(folder):
            check()


def write_text(path: Path, text: str) -> None:
    replace(path, lambda temporary: temporary.write_text(text, "utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Strict JSON: NaN and infinities, which JSON does not have, become null (unknown)."""
    write_text(path, json.dumps(to_plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def to_plain(data: Any) -> Any:
    """`data` as plain JSON. What is unknown or unreachable (NaN, ±∞, pandas' NA) becomes None; numpy values and paths
    become what they stand for, tables a list of rows, and objects with `to_dict` or dataclasses a dict.

    Raises TypeError for what has no plain form.
    """
    if not known(data):
        return None
    if isinstance(data, Path):
        return str(data)
    if isinstance(data, Mapping):
        return {str(key): to_plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        return [to_plain(value) for value in data]
    if hasattr(data, "itertuples"):  # a pandas table: this module does not import pandas
        return to_plain(data.to_dict("records"))
    if hasattr(data, "tolist"):  # numpy's scalars and arrays
        return to_plain(data.tolist())
    if callable(getattr(data, "to_dict", None)) and not isinstance(data, type):
        return to_plain(data.to_dict())
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return fields(data)
    if not isinstance(data, (str, bool, int, float)):
        raise TypeError(f"no plain form for {type(data).__name__}")
    return data


def fields(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain JSON, in their order, without those marked repr=False."""
    return {field.name: to_plain(getattr(record, field.name)) for field in dataclasses.fields(record) if field.repr}
