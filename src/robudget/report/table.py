"""The table as the report reads it: every column present (unknown where it was not), best run first, runs in words."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import pandas as pd

from robudget.columns import COLUMNS, column, stored
from robudget.errors import InputError
from robudget.formats import UNKNOWN, known, word
from robudget.losses import LOSSES
from robudget.tables.usable import collapsed_rows, numbers_of

SHOWN = tuple(name for name in stored() if name != "path")  # on the page; `path` tells about this machine
NUMBERS = tuple(name for name in SHOWN if COLUMNS[name].scale in ("log", "number"))
WORDS = tuple(name for name in SHOWN if name not in NUMBERS and name != "collapsed")


def fill(table: pd.DataFrame) -> pd.DataFrame:
    """`table` in its order and index, with every column of SHOWN: numbers as float64 with NaN for unknown, words as
    objects with None. `collapsed` is worked out where it is missing. Raises InputError for a table without a run or
    without `aa_acc`, and for a number column that holds something else."""
    if len(table) == 0:
        raise InputError("the table holds no run: there is nothing to report")
    numbers_of(table, "aa_acc", "the report")
    rows = table.reindex(columns=[*SHOWN, *(c for c in table.columns if c not in SHOWN)])
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


def run_name(row: pd.Series) -> str:
    for name in ("slug", "model", "run_id"):
        if known(row[name]):
            return str(row[name])
    return f"run {row.name}"


def choices(row: pd.Series) -> dict[str, str]:
    """A run's recipe as short phrases, by the column that each is about; what is unknown is left out."""
    phrases: dict[str, str] = {}
    if known(row["model"]):
        base = row["base"]
        phrases["model"] = word(row["model"]) + (f" (base {word(base)})" if known(base) and base != 16 else "")
    if known(row["activation"]):
        phrases["activation"] = column("activation").level(row["activation"])
    loss, steps = row["loss"], row["steps"]
    if known(loss):
        adversarial = loss not in LOSSES or LOSSES[loss].adversarial
        text = column("loss").level(loss) if adversarial else "standard training"
        if adversarial and known(steps):
            text += f", {word(steps)} step{'' if steps == 1 else 's'}"
        if loss in LOSSES and LOSSES[loss].beta and known(row["beta"]):
            text += f", β {word(row['beta'])}"
        phrases["loss"] = text
    if known(row["synthetic"]):
        share = f" {100 * row['synthetic_fraction']:.0f}%" if known(row["synthetic_fraction"]) else ""
        phrases["synthetic"] = f"synthetic data{share}" if row["synthetic"] else "real data only"
    phrases |= {name: column(name).phrase for name in ("ema", "cutmix") if row[name]}
    if known(row["epochs"]):
        phrases["epochs"] = f"{word(row['epochs'])} epochs"
    if known(row["seed"]):
        phrases["seed"] = f"seed {word(row['seed'])}"
    return phrases


def varying(rows: pd.DataFrame, phrases: Collection[dict[str, str]]) -> set[str]:
    """The columns of `phrases` (the `choices` of `rows`) in which the runs differ."""
    names = {name for run in phrases for name in run}
    return {name for name in names if rows[name].map(word).nunique() > 1}


def source(row: pd.Series, name: str) -> str | None:
    """How this run's value of a column was obtained, where the table says."""
    how_column = column(name).how
    return str(row[how_column]) if how_column and known(row[how_column]) else None


def how(rows: pd.DataFrame, name: str) -> str:
    """How a column's values were obtained, over the runs where they are known: `measured`, `estimated, measured`."""
    how_column = column(name).how
    if how_column is None or how_column not in rows.columns:
        return UNKNOWN
    values = {str(v) for v in rows.loc[rows[name].notna(), how_column] if known(v)}
    return ", ".join(sorted(values)) or UNKNOWN


def total(rows: pd.DataFrame, *names: str) -> tuple[float, int]:
    """Sum over the runs and columns where known, and the number of runs that know the first; NaN where none does."""
    values = rows[list(names)]
    n = int(values.iloc[:, 0].notna().sum())
    return (float(np.nansum(values.to_numpy(dtype=np.float64))) if n else math.nan), n
