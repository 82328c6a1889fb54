"""The user's cache folder, and in it the numbers that took long to compute, shared by one command and the next.

Numbers lie in `numbers`, one JSON file each, at most MOST_BYTES together; `ROBUDGET_REMEMBER=no` keeps none, and
`ROBUDGET_REMEMBER=/a/folder` keeps them there. A file is found by the SHA-256 of everything that its numbers depend
on: the data, the parameters, the source of the rooms that computed them and the versions of the libraries; it holds
the SHA-256 of its own content, so that a damaged one is computed again. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from robudget.files import write_text

LIBRARIES = ("numpy", "scipy", "pandas", "scikit-learn", "torch", "timm")
MOST_BYTES = 64 << 20
_SOURCE = Path(__file__).parent


def home() -> Path:
    """`$ROBUDGET_CACHE`, else `$XDG_CACHE_HOME/robudget`, else `~/.cache/robudget`."""
    if own := os.environ.get("ROBUDGET_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robudget"


def remembered(kind: str, data: Iterable[Any], rooms: Sequence[str], compute: Callable[[], dict[str, Any]]) -> Any:
    """What `compute()` returns, from an earlier command where nothing that it depends on has changed.

    `data` is everything that `compute` uses (arrays, and what `repr` writes in full); `rooms` are the files and folders
    of this package, relative to it, whose source it runs. The result is plain data with finite numbers, NaN or
    infinities, and comes back as JSON has it: tuples and arrays as lists.
    """
    folder = _folder()
    if folder is None:
        return compute()
    path = folder / f"{kind}-{_key(data, tuple(rooms))}.json"
    kept = _read(path)
    if kept is not None:
        return kept
    result = json.loads(json.dumps(compute()))
    _write(path, result)
    return result


def _folder() -> Path | None:
    asked = os.environ.get("ROBUDGET_REMEMBER", "")
    if asked.lower() in ("no", "off", "0"):
        return None
    if os.path.isabs(asked):
        return Path(asked)
    try:
        return home() / "numbers"
    except RuntimeError:  # a user without a home
        return None


def _key(data: Iterable[Any], rooms: tuple[str, ...]) -> str:
    digest = hashlib.sha256(code_version(rooms).encode())
    for item in data:
        if isinstance(item, np.ndarray):
            digest.update(f"|{item.dtype.str}{item.shape}|".encode())
            digest.update(np.ascontiguousarray(item).tobytes())
        else:
            digest.update(f"|{item!r}|".encode())
    return digest.hexdigest()[:32]


@cache
def code_version(rooms: tuple[str, ...]) -> str:
    """The SHA-256 of the source of `rooms` and of the versions of Python and the libraries."""
    digest = hashlib.sha256(f"{sys.version} {[version(name) for name in LIBRARIES]}".encode())
    for room in ("cache.py", *rooms):
        place = _SOURCE / room
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.relative_to(_SOURCE).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> Any:
    """The kept result; None where there is none, or it is damaged."""
    try:
        checksum, _, text = path.read_text("utf-8").partition("\n")
        if checksum != hashlib.sha256(text.encode()).hexdigest():
            return None
        os.utime(path)  # the least recently used goes first
        return json.loads(text)
    except (OSError, ValueError):
        return None


def _write(path: Path, result: Any) -> None:
    """Where the folder cannot be written nothing is kept, and nothing is lost but time."""
    text = json.dumps(result)
    if len(text) > MOST_BYTES // 4:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        _bound(path.parent)
    except OSError:
        return


def _bound(folder: Path) -> None:
    total = 0
    for path in sorted(folder.glob("*-*.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        total += path.stat().st_size
        if total > MOST_BYTES:
            path.unlink(missing_ok=True)
