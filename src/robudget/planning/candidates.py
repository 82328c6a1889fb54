"""The recipes to choose from where none are given: every sensible combination of the choices found in a table."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget.columns import COLUMNS, NONE_IF_MISSING
from robudget.errors import InputError
from robudget.prediction.predictor import Predictor

MOST_CANDIDATES = 20_000
# Choices that only go together: a flag or loss, and the number that it switches on.
TOGETHER = tuple((c.switch, c.name) for c in COLUMNS.values() if c.switch)


def candidate_recipes(model: Predictor) -> pd.DataFrame:
    """Every sensible combination of the choices in the predictor's table; columns that vary only with one follow it."""
    table, features = model.table, model.features.columns
    levels = []
    for c in features:
        values = sorted(set(table[c.name].dropna()))
        if c.name == "steps":  # whole numbers between those that were run are recipes, too
            low = int(min(v for v in values if v > 0))
            values = sorted({int(v) for v in values} | set(range(low, int(values[-1]) + 1)))
        if c.name in NONE_IF_MISSING and table[c.name].isna().any():  # none at all, as β without TRADES
            values = [np.nan, *values]
        levels.append(values)
    if np.prod([len(v) for v in levels], dtype=float) > MOST_CANDIDATES:
        raise InputError(
            f"the table's choices make more than {MOST_CANDIDATES} recipes: give candidates (a study's grid)"
        )
    rows = pd.DataFrame(list(product(*levels)), columns=[c.name for c in features])
    for c in features:
        followers = [a for a in c.aliases if a in table.columns]
        if followers:
            rows = rows.join(table.drop_duplicates(c.name).set_index(c.name)[followers], on=c.name)
    for name in table.columns:
        if name not in rows.columns and table[name].nunique(dropna=False) == 1:
            rows[name] = table[name].iloc[0]
    return rows.loc[_sensible(rows, table)].reset_index(drop=True)


def _sensible(rows: pd.DataFrame, table: pd.DataFrame) -> NDArray[np.bool_]:
    """Rows in which what only goes together does so as in some run: no attack steps without an adversarial loss."""
    keep = np.ones(len(rows), dtype=np.bool_)
    for switch, number in TOGETHER:
        if {switch, number} <= set(rows.columns) & set(table.columns):
            known = set(zip(table[switch], table[number].fillna(0) > 0, strict=True))
            keep &= np.array([pair in known for pair in zip(rows[switch], rows[number].fillna(0) > 0, strict=True)])
    return keep
