"""What the laws say, in words and tables for the page. Nothing is computed here: numbers come from `robudget.laws`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from robudget.laws.analysis import Analysis


def answer(analysis: Analysis | None) -> dict[str, Any]:
    return {"sentence": "No law was fitted.", "lines": [], "warnings": [], "facts": []}


def drivers(analysis: Analysis | None) -> dict[str, Any]:
    return {"lead": "", "warnings": [], "tables": []}


def laws(analysis: Analysis | None) -> dict[str, Any]:
    return {"lead": "", "warnings": [], "tables": []}


def collapse(rows: pd.DataFrame, analysis: Analysis | None) -> dict[str, Any]:
    return {"lead": "", "tables": []}


def prices(analysis: Analysis | None) -> dict[str, Any]:
    return {"lead": "", "warnings": [], "tables": []}


def methods(rows: pd.DataFrame, analysis: Analysis | None, notes: Any) -> list[str]:
    return list(notes)


def curves(analysis: Analysis | None) -> list[dict[str, Any]]:
    return []
