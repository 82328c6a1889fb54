"""What sections of the page are made of: tables, and the words of a change, an interval, a threat, a formula."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from robudget.columns import column
from robudget.formats import UNKNOWN, fixed, known, number
from robudget.threat import format_eps

if TYPE_CHECKING:
    from robudget.laws import Price

AVERAGE = "weighted average"  # of all forms of a law
Cell = str | tuple[str, str]  # text, or text with a smaller line to it


@dataclass(frozen=True)
class Table:
    """A table of the page. A head that starts with `#` is of numbers; a `folded` table opens on a click."""

    title: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A section of the page: its link, its name in the list of contents, its heading, a leading sentence, and then its
    parts in order: tables, and names of figures that stand side by side. What is empty or was not drawn is left out."""

    anchor: str
    name: str
    title: str
    lead: str
    parts: Sequence[Table | tuple[str, ...]] = ()

    @property
    def tables(self) -> list[Table]:
        return [part for part in self.parts if isinstance(part, Table)]


def capital(text: str) -> str:
    """The first letter raised, the rest as it is."""
    return text[:1].upper() + text[1:]


def points(value: float | None) -> str:
    """A change of a percentage: `+3 points`."""
    return f"{fixed(value, 0, signed=True)} points"


def change(name: str, before: object, after: object) -> str:
    """A choice's change: `attack steps 2 → 10`."""
    choice = column(name)
    return f"{choice.phrase} {choice.level(before)} → {choice.level(after)}"


def span(ends: tuple[float, float], digits: int = 2) -> str:
    """An interval of numbers of any size: `[−0.0041, 0.021]`."""
    return f"[{number(ends[0], digits)}, {number(ends[1], digits)}]" if all(map(known, ends)) else UNKNOWN


def price_interval(price: Price) -> str:
    """The interval of a price, whose upper end may lie beyond what the runs can say."""
    if not known(price.low) and not known(price.high):
        return "these runs cannot say"
    high = number(price.high, 2) if math.isfinite(price.high) else f"more than {number(price.limit, 2)}"
    return f"[{number(price.low, 2)}, {high}]"


def formula(text: str) -> str:
    """`y = C·x^α` as it is written by hand: `y = C·xᵅ`."""
    for plain, raised in (("^−α", "⁻ᵅ"), ("^α", "ᵅ"), ("^γ", "ᵞ")):
        text = text.replace(plain, raised)
    return text


def threat(norm: object, eps: object) -> str:
    """`L∞ 8/255`."""
    name = column("norm").level(norm)
    return f"{name} {format_eps(float(eps))}" if isinstance(eps, (int, float)) and known(float(eps)) else name


def entry_name(name: str) -> str:
    """A leaderboard's entry as authors and year, then the model: `Wang2023Better_WRN-70-16` → `Wang 2023 WRN-70-16`."""
    match = re.fullmatch(r"([A-Za-z]+?)(\d{4})[A-Za-z0-9]*?(?:_(.*))?", name)
    return " ".join(part for part in match.groups() if part).replace("_", " ") if match else name
