"""Tables of runs from wherever they are: our run folders, csv, parquet, the paper's CSV, RobustBench's JSON folder.

What was understood about a table beyond its plain reading is said in `frame.attrs["notes"]`, one line each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from robudget.columns import COLUMNS, ERRORS
from robudget.errors import InputError
from robudget.store import load_runs
from robudget.tables import leaderboard, published
from robudget.tables.usable import is_accuracy
from robudget.threat import parse_eps

FLAGS = tuple(c.name for c in COLUMNS.values() if c.scale == "flag")
WORDS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False, "1.0": True, "0.0": False}


def read_table(source: str | Path) -> pd.DataFrame:
    """One row a run, accuracies in percent, costs as whole-run totals with units in the column names.

    `source` is a folder of runs, RobustBench's folder of JSON entries, or a .csv or .parquet file; the paper's CSV is
    recognised by its columns. Raises InputError where it is none of these or holds no row.
    """
    path = Path(source)
    if path.is_dir():
        if leaderboard.is_folder(path):
            return tidy(leaderboard.load(path))
        runs = load_runs(path)
        if runs.empty:
            raise InputError(f"no finished run in {str(path)!r}")
        return tidy(runs)
    if not path.exists():
        raise InputError(f"no table at {str(path)!r} (allowed: a folder of runs, .csv, .parquet, RobustBench's folder)")
    kind = path.suffix.lower()
    try:
        if kind == ".csv":
            frame = pd.read_csv(path)
        elif kind in (".parquet", ".pq"):
            frame = pd.read_parquet(path)
        else:
            raise InputError(f"{str(path)!r} is no table (allowed: .csv, .parquet, a folder of runs)")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {str(path)!r}: {' '.join(str(error).split())}") from None
    if frame.empty:
        raise InputError(f"{str(path)!r} holds no run")
    if published.is_paper_table(frame.columns):
        return tidy(published.table(frame, where=str(path)))
    return tidy(frame)


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with accuracies in percent, flags as booleans, ε as numbers, and each run once; rows numbered from 0.

    Accuracies given as fractions are recognised (none above 1) and rows that repeat another are dropped; both are said
    in `attrs["notes"]`. Raises InputError where one run_id names different runs, or flags or ε cannot be read. A tidy
    table is returned as it is.
    """
    if frame.attrs.get("tidy"):
        return frame
    out = frame.copy()
    notes = list(frame.attrs.get("notes", ()))
    out = _once(out, notes)
    for name in FLAGS:
        if name in out.columns and not pd.api.types.is_bool_dtype(out[name]):
            flags = pd.Series([_flag(value, name) for value in out[name]], index=out.index, dtype=object)
            out[name] = flags if flags.isna().any() else flags.astype(bool)
    if "eps" in out.columns and not pd.api.types.is_numeric_dtype(out["eps"]):
        out["eps"] = [np.nan if pd.isna(value) else parse_eps(value) for value in out["eps"]]
    _percent(out, notes)
    out = out.reset_index(drop=True)
    out.attrs = {"notes": tuple(notes), "tidy": True}
    return out


def as_table(source: pd.DataFrame | str | Path) -> pd.DataFrame:
    """A tidy table from a path or a frame."""
    return tidy(source) if isinstance(source, pd.DataFrame) else read_table(source)


def _once(frame: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    kept = frame[~_repeats(frame)]
    if "run_id" in frame.columns and (again := kept["run_id"].duplicated() & kept["run_id"].notna()).any():
        name = kept.loc[again, "run_id"].iloc[0]
        n = int((kept["run_id"] == name).sum())
        raise InputError(f"run_id {name!r} names {n} different runs (allowed: one each)")
    if len(kept) < len(frame):
        notes.append(f"{len(frame) - len(kept)} rows repeat another run and were dropped")
    return kept


def _repeats(frame: pd.DataFrame) -> pd.Series[bool]:
    """Rows that say in every column but `path` what one before them says."""
    told = frame.drop(columns="path", errors="ignore")
    for name in told.columns:
        loose = pd.api.types.is_object_dtype(told[name])
        if loose and told[name].map(lambda v: isinstance(v, list | dict | np.ndarray)).any():  # they do not hash
            told[name] = told[name].astype(str)
    return told.duplicated()


def _flag(value: object, name: str) -> object:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return None
    word = str(value).strip().lower()
    if word not in WORDS:
        raise InputError(f"{name} = {value!r} (allowed: true, false)")
    return WORDS[word]


def _percent(frame: pd.DataFrame, notes: list[str]) -> None:
    """Fractions to percent, in place: where no accuracy of the table exceeds 1 and some lie between 0 and 1."""
    names = [str(c) for c in frame.columns if is_accuracy(str(c)) and not str(c).startswith("published_")]
    names += [name for name in ERRORS if name in frame.columns]
    numbers = {name: pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64) for name in names}
    known = np.concatenate([v[~np.isnan(v)] for v in numbers.values()]) if numbers else np.empty(0)
    if len(known) and known.max() <= 1 and ((known > 0) & (known < 1)).any():
        for name, values in numbers.items():
            frame[name] = 100 * values
        notes.append(f"no accuracy exceeds {known.max():.3g}: read as fractions and turned into percent")
