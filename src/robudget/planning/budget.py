"""Budgets as people write them: `50usd`, `100gpu-h`, `20kWh`, `5kgCO2e`, `1e19flops`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from robudget.columns import COLUMNS
from robudget.errors import InputError, unknown
from robudget.files import fields

# unit → (column of the table, how many of its units one is)
UNITS = {unit.lower(): (c.name, size) for c in COLUMNS.values() for unit, size in c.budget}


@dataclass(frozen=True)
class Budget:
    """`amount` in the units of the table's column `column`; `text` as it was written."""

    text: str
    column: str
    amount: float

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


def column_of(unit: str) -> str:
    """The column that counts in a unit. Raises InputError with the nearest known one."""
    if unit.lower() not in UNITS:
        raise unknown("unit", unit, UNITS)
    return UNITS[unit.lower()][0]


def parse_budget(text: str) -> Budget:
    """A number and a unit, in either order for `$`. Raises InputError naming the unit and the nearest known one."""
    match = re.fullmatch(
        r"\s*(\$?)\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([A-Za-z$][A-Za-z0-9$-]*)?\s*", text
    )
    if not match or not (match[1] or match[3]):
        raise InputError(
            f"budget = {text!r} (allowed: a number and a unit, e.g. 50usd, 100gpu-h, 20kWh, 5kgCO2e, 1e19flops)"
        )
    unit = (match[3] or match[1]).lower()
    if unit not in UNITS:
        raise unknown("unit of a budget", match[3], UNITS)
    name, factor = UNITS[unit]
    amount = float(match[2].replace(",", "").replace("_", "")) * factor
    if amount <= 0:
        raise InputError(f"budget = {text!r} (allowed: more than 0)")
    return Budget(text.strip(), name, amount)
