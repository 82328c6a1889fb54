"""Writing files so that a reader never sees half of one, whatever kills the writer."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def replace(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Call `write(temporary)` for a fresh file beside `path`, then move it into place in one step.

    The temporary file keeps `path`'s suffix, since many writers choose their format by it, and is removed if anything
    fails. `durable` waits until the bytes are on the disk, so that a power cut leaves the old file or the new one.
    """
    temporary = path.with_name(f".{path.stem}-{os.getpid()}-{threading.get_ident()}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # some writers make private files; these are for whoever the folder is for
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    replace(path, lambda temporary: temporary.write_text(text, "utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Strict JSON: NaN and infinities, which JSON does not have, become null (unknown)."""
    write_text(path, json.dumps(to_plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def to_plain(data: Any) -> Any:
    """Plain JSON types; NaN and ±∞ become None; numpy scalars and paths become what they stand for."""
    if isinstance(data, Mapping):
        return {str(key): to_plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        return [to_plain(value) for value in data]
    if isinstance(data, Path):
        return str(data)
    if hasattr(data, "tolist") and not isinstance(data, (str, bytes)):  # numpy scalars and arrays
        return to_plain(data.tolist())
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
