"""How numbers and choices are written for a reader. An unknown one (None, NaN, ±∞) reads "unknown", never 0."""

from __future__ import annotations

import math

UNKNOWN = "unknown"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# A unit of a table's column → (size, name) of the units in which its values are written, ascending.
_SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "s": ((1, "s"), (60, "min"), (3600, "h")),
    "GPU-h": ((1, "GPU-h"),),
    "kWh": ((1e-6, "mWh"), (1e-3, "Wh"), (1, "kWh"), (1e3, "MWh")),
    "kg CO₂e": ((1e-6, "mg CO₂e"), (1e-3, "g CO₂e"), (1, "kg CO₂e"), (1e3, "t CO₂e")),
    "count": ((1, ""), (1e3, "k"), (1e6, "M"), (1e9, "G")),
}


def known(value: object) -> bool:
    """Whether a cell holds something: not None, NaN, pandas' NA or NaT, or an infinity."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # by name: this module does not import pandas
        return False
    return not isinstance(value, float) or math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits; `1.23×10¹⁷` at and above 1e6 or below 1e-4; thousands separated."""
    if value is None or not known(float(value)):
        return UNKNOWN
    value = float(value)
    if value == 0:
        return "0"
    sign, size = ("−" if value < 0 else ""), abs(value)
    power = math.floor(math.log10(float(f"{size:.{digits - 1}e}")))
    if power >= 6 or power < -4:
        mantissa = f"{size / 10.0**power:.{digits - 1}f}"
        return f"{sign}{mantissa}×10{str(power).translate(_SUPERSCRIPT)}"
    return f"{sign}{size:,.{max(digits - 1 - power, 0)}f}"


def fixed(value: float | None, decimals: int = 1, *, signed: bool = False) -> str:
    """So many decimals, with a plus sign where `signed`."""
    if value is None or not known(float(value)):
        return UNKNOWN
    text = f"{float(value):+.{decimals}f}" if signed else f"{float(value):.{decimals}f}"
    return text.replace("-", "−")


def percent(value: float | None, decimals: int = 1) -> str:
    """`60.1%` of a value in percent."""
    text = fixed(value, decimals)
    return text if text == UNKNOWN else text + "%"


def interval(low: float | None, high: float | None, decimals: int = 1) -> str:
    """`[61.2, 64.0]`; an unknown end reads "unknown", and two of them only once."""
    ends = fixed(low, decimals), fixed(high, decimals)
    return UNKNOWN if ends == (UNKNOWN, UNKNOWN) else f"[{ends[0]}, {ends[1]}]"


def dollars(usd: float | None) -> str:
    """`$12.30`; two significant digits below a dollar."""
    if usd is None or not known(float(usd)):
        return UNKNOWN
    if usd == 0 or abs(usd) >= 0.995:
        return f"${usd:,.2f}"
    return f"${number(usd, 2)}"


def amount(value: float | None, unit: str) -> str:
    """A value in a column's unit, with the unit: `12.3 Wh`, `36.5 M`, `1.00×10¹⁸ FLOP`, `60.1%`; seconds, kWh, kg CO₂e
    and counts in the largest of their multiples that keeps the number at or above 1."""
    if value is None or not known(float(value)):
        return UNKNOWN
    if unit == "%":
        return percent(value)
    if unit == "$":
        return dollars(value)
    size, name = _multiple(value, unit)
    return f"{number(float(value) / size)} {name}".strip()


def amount_range(value: float | None, low: float | None, high: float | None, unit: str, digits: int = 3) -> str:
    """A value with its range, all three in the multiple of the unit that suits the value: `13.0 h [10.3 to 20.6]`;
    without a range, or with one too narrow to see, the value alone."""
    if value is None or low is None or high is None or not known(float(value)):
        return amount(value, unit)
    size, name = _multiple(value, unit)
    middle, *ends = (number(float(v) / size, digits) for v in (value, low, high))
    text = f"{name}{middle}" if unit == "$" else f"{middle} {name}".strip()
    return text if set(ends) == {middle} else f"{text} [{ends[0]} to {ends[1]}]"


def _multiple(value: float, unit: str) -> tuple[float, str]:
    """The size and the name of the largest multiple of a unit that is at most the value; the smallest for less."""
    steps = _SCALES.get(unit, ((1, unit if unit in ("FLOP", "$") else ""),))
    return max((step for step in steps if abs(value) >= step[0]), default=steps[0])


def word(value: object) -> str:
    """A recipe's choice as text: true → yes, 5.0 → 5, unknown → unknown."""
    if not known(value):
        return UNKNOWN
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)
