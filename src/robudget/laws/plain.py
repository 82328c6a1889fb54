"""Plain JSON from results: dataclasses to dicts, numpy to Python, NaN and infinity to null."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd


def plain(value: Any) -> Any:
    """`value` as JSON data. Unknown and unreachable numbers (NaN, ±inf) become None; fields with repr=False are left
    out.

    Raises TypeError for anything that has no plain form.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, float | np.floating):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, int | np.integer):
        return int(value)
    if value is None or isinstance(value, str):
        return value
    if value is pd.NA:
        return None
    to_dict = getattr(value, "to_dict", None)
    if isinstance(value, pd.DataFrame):
        return [plain(row) for row in value.to_dict("records")]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict() if callable(to_dict) else fields(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    raise TypeError(f"no plain form for {type(value).__name__}")


def fields(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON data, in their order, without those marked repr=False."""
    return {field.name: plain(getattr(record, field.name)) for field in dataclasses.fields(record) if field.repr}


def level_of(value: Any) -> Any:
    """A choice's level as Python has it: no numpy scalars, and whole numbers without a point."""
    plain_value = value.item() if isinstance(value, np.generic) else value
    return int(plain_value) if isinstance(plain_value, float) and plain_value.is_integer() else plain_value
