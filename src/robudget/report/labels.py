"""Words of the report that belong to no single column."""

from __future__ import annotations

import re

from robudget.columns import column
from robudget.formats import UNKNOWN, amount, fixed, interval, known, number, percent, word
from robudget.threat import format_eps

__all__ = ["UNKNOWN", "fixed", "interval", "known", "number", "percent", "word"]  # until their users import formats

quantity = column


def short(name: str) -> str:
    """A leaderboard's entry as authors and year, then the model: `Wang2023Better_WRN-70-16` → `Wang 2023 WRN-70-16`."""
    match = re.fullmatch(r"([A-Za-z]+?)(\d{4})[A-Za-z0-9]*?(?:_(.*))?", name)
    return " ".join(part for part in match.groups() if part).replace("_", " ") if match else name


def phrase(name: str) -> str:
    """A column inside a sentence."""
    return column(name).phrase


def capital(text: str) -> str:
    """The first letter raised, the rest as it is."""
    return text[:1].upper() + text[1:]


def formula(text: str) -> str:
    """`y = C·x^α` as it is written by hand: `y = C·xᵅ`."""
    for plain, raised in (("^−α", "⁻ᵅ"), ("^α", "ᵅ"), ("^γ", "ᵞ")):
        text = text.replace(plain, raised)
    return text


def feature(name: str) -> str:
    return column(name).phrase


def count(value: float | None) -> str:
    """Large counts in thousands, millions and billions: `36.5 M`."""
    return amount(value, "count")


def write(name: str, value: float | None) -> str:
    """The value of a column as a reader wants it, with its unit."""
    return column(name).write(value)


def choice(name: str, value: str) -> str:
    """The word of a recipe's choice as the field writes it: `trades` → TRADES, `relu` → ReLU."""
    return column(name).words.get(value, value)


def threat(norm: object, eps: object) -> str:
    """`L∞ 8/255`."""
    name = column("norm").level(norm)
    return f"{name} {format_eps(float(eps))}" if isinstance(eps, (int, float)) and known(float(eps)) else name
