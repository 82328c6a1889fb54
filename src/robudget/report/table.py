"""The table as the report reads it: every column there (unknown where it was not), best run first, runs in words."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import pandas as pd

from robudget import columns
from robudget.errors import InputError
from robudget.report.labels import UNKNOWN, choice, known, quantity, word
from robudget.tables.usable import collapsed_rows, numbers_of

# `path` and whatever else a table holds stays out of the page.
COLUMNS = tuple(name for name in columns.stored() if name != "path")
NUMBERS = tuple(name for name in COLUMNS if columns.COLUMNS[name].scale in ("log", "number"))
WORDS = tuple(name for name in COLUMNS if name not in NUMBERS and name != "collapsed")


RECIPE = ("model", "activation", "loss", "synthetic", "ema", "cutmix", "epochs", "seed")


def fill(table: pd.DataFrame) -> pd.DataFrame:
    """`table` in its order and index, with every column of COLUMNS: numbers as float64 with NaN for unknown, words as
    objects with None. `collapsed` is worked out where it is missing. Raises InputError for a table without a run or
    without `aa_acc`, and for a number column that holds something else."""
    if len(table) == 0:
        raise InputError("the table holds no run: there is nothing to report")
    numbers_of(table, "aa_acc", "the report")
    rows = table.reindex(columns=[*COLUMNS, *(c for c in table.columns if c not in COLUMNS)])
    for name in NUMBERS:
        if name in table.columns:
            rows[name] = numbers_of(table, name)
        rows[name] = rows[name].astype(np.float64).replace([np.inf, -np.inf], np.nan)
    for name in WORDS:
        rows[name] = rows[name].astype(object).where(rows[name].notna(), None)
    if "train_seconds_how" not in table.columns and "path" in table.columns:
        rows["train_seconds_how"] = "measured"  # a store's seconds come from a clock; other tables say so themselves
    if "status" not in table.columns:
        rows["status"] = "done"
    rows["collapsed"] = collapsed_rows(table)
    return rows


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """`fill`ed and sorted by `aa_acc` from the best, unknown last; the index holds each run's position in `table`."""
    rows = fill(table.reset_index(drop=True))
    return rows.sort_values("aa_acc", ascending=False, kind="stable", na_position="last")


def name(row: pd.Series) -> str:
    for column in ("slug", "model", "run_id"):
        if known(row[column]):
            return str(row[column])
    return f"run {row.name}"


def varying(rows: pd.DataFrame) -> set[str]:
    """The columns of a recipe in which the runs differ."""
    return {c for c in RECIPE if rows[c].map(word).nunique() > 1}


def choices(row: pd.Series, among: Collection[str] = ()) -> list[str]:
    """A run's recipe as short phrases, those that `among` decides (default: all); what is unknown is left out."""
    steps, loss = row["steps"], row["loss"]
    said: list[tuple[str, str]] = []
    if known(row["model"]):
        base = row["base"]
        said.append(("model", word(row["model"]) + (f" (base {word(base)})" if known(base) and base != 16 else "")))
    if known(row["activation"]):
        said.append(("activation", choice("activation", word(row["activation"]))))
    if known(loss):
        shown = "standard training" if loss == "standard" else choice("loss", word(loss))
        plural = "" if steps == 1 else "s"
        steps_shown = f", {word(steps)} step{plural}" if loss != "standard" and known(steps) else ""
        beta_shown = f", β {word(row['beta'])}" if loss in ("trades", "mart") and known(row["beta"]) else ""
        said.append(("loss", shown + steps_shown + beta_shown))
    if known(row["synthetic"]):
        share = row["synthetic_fraction"]
        amount = f" {100 * share:.0f}%" if known(share) else ""
        said.append(("synthetic", f"synthetic data{amount}" if row["synthetic"] else "real data only"))
    said += [(column, label) for column, label in (("ema", "EMA"), ("cutmix", "CutMix")) if row[column]]
    if known(row["epochs"]):
        said.append(("epochs", f"{word(row['epochs'])} epochs"))
    if known(row["seed"]):
        said.append(("seed", f"seed {word(row['seed'])}"))
    return [text for column, text in said if not among or column in among]


def how(rows: pd.DataFrame, column: str) -> str:
    """How a column's values were obtained, over the runs where they are known: `measured`, `estimated, measured`."""
    source = quantity(column).how
    if source is None or source not in rows.columns:
        return UNKNOWN
    found = sorted({str(v) for v in rows.loc[rows[column].notna(), source] if known(v)})
    return ", ".join(found) or UNKNOWN


def total(rows: pd.DataFrame, *columns: str) -> tuple[float, int]:
    """Sum over the runs and columns where known, and the number of runs that know the first; NaN where none does."""
    values = rows[list(columns)]
    n = int(values.iloc[:, 0].notna().sum())
    return (float(np.nansum(values.to_numpy(dtype=np.float64))) if n else math.nan), n
