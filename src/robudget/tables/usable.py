"""From a table to the numbers a law is fitted on: which runs count, and what was left out and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget import accuracy
from robudget.columns import ACCURACIES, AUDIT_SD, COLUMNS, ERRORS, ROBUST, SCOPE
from robudget.errors import InputError, hint
from robudget.store import ENDED_EARLY
from robudget.threat import parse_eps

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """What became of each row of the table. `total` = `used` + everything below it."""

    total: int
    used: int
    failed: int = 0  # status is not "done"
    standard: int = 0  # trained without an adversary: no point on a robustness law
    collapsed: int = 0  # catastrophic overfitting: adversarial loss and aa_acc < 0.3 × clean_acc
    unknown: int = 0  # x or y missing
    impossible: int = 0  # x ≤ 0, y < 0, or an accuracy above 100
    ended_early: int = 0  # by a sweep, so that its accuracy is not known

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self) -> str:
        """`244 of 319 runs used; left out: 75 collapsed`."""
        out = [
            f"{n} {name}"
            for name, n in [
                ("failed", self.failed),
                ("ended early", self.ended_early),
                ("trained without an adversary", self.standard),
                ("collapsed", self.collapsed),
                ("with a value missing", self.unknown),
                ("with an impossible value", self.impossible),
            ]
            if n
        ]
        return f"{self.used} of {self.total} runs used" + (f"; left out: {', '.join(out)}" if out else "")


@dataclass(frozen=True)
class Points:
    """The runs a law sees: `x` and `y` (n,), float64, finite and positive x, in table order; `rows` (n,) their
    positions; `noise` (n,) the standard deviation of each y that its finite test set brings, 0 where it is unknown.
    """

    x_name: str
    y_name: str
    x: Floats = field(repr=False)
    y: Floats = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    noise: Floats = field(repr=False)
    counts: Counts


def is_accuracy(name: str) -> bool:
    """Whether a column holds an accuracy in percent."""
    return name in ACCURACIES or name.endswith("_acc")


def is_error(name: str) -> bool:
    return name in ERRORS or name.endswith("_error")


def is_percent(name: str) -> bool:
    return is_accuracy(name) or is_error(name)


def numbers_of(frame: pd.DataFrame, name: str, role: str = "column") -> Floats:
    """A column as float64 (NaN where unknown). Raises InputError naming the nearest column where it is missing."""
    if name not in frame.columns and name in ERRORS and ERRORS[name] in frame.columns:
        return 100.0 - numbers_of(frame, ERRORS[name], role)
    if name not in frame.columns:
        numeric = [str(c) for c in frame.columns if pd.api.types.is_numeric_dtype(frame[c])]
        shown = ", ".join(numeric[:12]) + (", …" if len(numeric) > 12 else "")
        near = hint(name, numeric, 0.4)
        raise InputError(f"the table has no column {name!r} for {role}{near} (numeric columns: {shown or 'none'})")
    try:
        values = pd.to_numeric(frame[name]).to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        raise InputError(f"{role} {name!r} does not hold numbers (found {frame[name].iloc[0]!r})") from None
    return np.asarray(values, dtype=np.float64)


def to_percent(frame: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """Accuracies given as fractions to percent, in place: where none of these columns exceeds 1 and some values lie
    between 0 and 1. Returns the notes on what was done."""
    numbers = {name: pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64) for name in names}
    known = np.concatenate([v[~np.isnan(v)] for v in numbers.values()]) if numbers else np.empty(0)
    if not len(known) or known.max() > 1 or not ((known > 0) & (known < 1)).any():
        return []
    for name, values in numbers.items():
        frame[name] = 100 * values
    return [f"no accuracy exceeds {known.max():.3g}: read as fractions and turned into percent"]


def level_of(value: Any) -> Any:
    """A choice's level as Python has it: no numpy scalars, and whole numbers without a point."""
    level = value.item() if isinstance(value, np.generic) else value
    return int(level) if isinstance(level, float) and level.is_integer() else level


def collapsed_rows(frame: pd.DataFrame) -> NDArray[np.bool_]:
    """Catastrophic overfitting per row: the column `collapsed` where known, else from loss, aa_acc and clean_acc.

    A row whose clean accuracy is unknown counts as collapsed below the paper's own cut of 10% robust accuracy.
    """
    robust = numbers_of(frame, "aa_acc") if "aa_acc" in frame else np.full(len(frame), np.nan)
    clean = numbers_of(frame, "clean_acc") if "clean_acc" in frame else np.full(len(frame), np.nan)
    low = np.where(np.isnan(clean), robust < 10.0, accuracy.collapsed(robust, clean))
    guess = low & ~standard_rows(frame)
    if "collapsed" not in frame:
        return np.asarray(guess, dtype=np.bool_)
    flags = frame["collapsed"]
    return np.where(flags.isna(), guess, flags.fillna(False).astype(bool)).astype(np.bool_)


def standard_rows(frame: pd.DataFrame) -> NDArray[np.bool_]:
    """Rows trained without an adversary."""
    if "loss" not in frame:
        return np.zeros(len(frame), dtype=np.bool_)
    return (frame["loss"] == "standard").to_numpy(dtype=np.bool_)


def early_rows(frame: pd.DataFrame) -> NDArray[np.bool_]:
    """Rows of runs that a sweep has ended early."""
    if "status" not in frame:
        return np.zeros(len(frame), dtype=np.bool_)
    return (frame["status"] == ENDED_EARLY).to_numpy(dtype=np.bool_, na_value=False)


def failed_rows(frame: pd.DataFrame) -> NDArray[np.bool_]:
    """Rows of runs that are not done, those ended early among them."""
    if "status" not in frame:
        return np.zeros(len(frame), dtype=np.bool_)
    return (~frame["status"].isin(["done"]) & frame["status"].notna()).to_numpy(dtype=np.bool_)


def select_rows(frame: pd.DataFrame, choice: Mapping[str, Any] | None) -> pd.DataFrame:
    """The rows whose columns equal `choice`, e.g. {"dataset": "cifar10", "steps": 10}. Raises InputError if none do."""
    for name, value in (choice or {}).items():
        if name == "eps":
            value = parse_eps(value)
        if name not in frame.columns:
            near = hint(name, map(str, frame.columns), 0.4)
            raise InputError(f"the table has no column {name!r} to select by{near}")
        values = frame[name]
        if isinstance(value, float):
            keep = np.isclose(pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64), value)
        else:
            keep = (values == value).to_numpy(dtype=np.bool_, na_value=False)
        if not keep.any():
            shown = ", ".join(str(v) for v in values.dropna().unique()[:8])
            raise InputError(f"no run has {name} = {value!r} (found: {shown or 'nothing'})")
        frame = frame[keep]
    return frame


def check_scope(frame: pd.DataFrame) -> None:
    """One dataset and one threat. Raises InputError naming the values when runs of several are mixed."""
    for name in SCOPE:
        if name not in frame.columns:
            continue
        known = frame[name].dropna()
        if name == "eps":
            values = [_eps(v) for v in sorted({round(float(v), 6) for v in known})]
        else:
            values = sorted({str(v) for v in known})
        if len(values) > 1:
            shown = ", ".join(values[:8])
            raise InputError(
                f"the table mixes {len(values)} values of {name} ({shown}): select one, e.g. {name}={values[0]}"
            )


def _eps(value: float) -> str:
    n = value * 255
    return f"{round(n)}/255" if abs(n - round(n)) < 1e-3 and round(n) else f"{value:g}"


def points(frame: pd.DataFrame, x: str, y: str, *, drop_collapsed: bool | None = None) -> Points:
    """The usable (x, y) of a table of one dataset and threat, with a count of what was left out and why.

    For a robust accuracy (`y` = aa_acc, val_acc or their errors) runs trained without an adversary and collapsed runs
    are left out, for other y they are kept; `drop_collapsed` says otherwise. Raises InputError for a missing column, a
    mixed table, or when nothing is left.
    """
    check_scope(frame)
    xs, ys = numbers_of(frame, x, "x"), numbers_of(frame, y, "y")
    robust = y in ROBUST
    drop = robust if drop_collapsed is None else drop_collapsed
    use = np.ones(len(frame), dtype=np.bool_)

    def leave_out(mask: NDArray[np.bool_]) -> int:
        n = int((use & mask).sum())
        use[mask] = False
        return n

    n_early = leave_out(early_rows(frame))
    n_failed = leave_out(failed_rows(frame))
    n_unknown = leave_out(np.isnan(xs) | np.isnan(ys))
    wrong = (xs <= 0) | ~np.isfinite(xs) | (ys < 0) | ~np.isfinite(ys)
    if is_percent(y):
        wrong |= ys > 100
    n_impossible = leave_out(wrong)
    n_standard = leave_out(standard_rows(frame)) if robust else 0
    n_collapsed = leave_out(collapsed_rows(frame)) if drop else 0
    rows = np.flatnonzero(use)
    counts = Counts(
        total=len(frame), used=len(rows), failed=n_failed, standard=n_standard,
        collapsed=n_collapsed, unknown=n_unknown, impossible=n_impossible, ended_early=n_early,
    )  # fmt: skip
    if not len(rows):
        raise InputError(f"no run is left to fit {y} against {x}: {counts.sentence()}")
    return Points(x, y, xs[rows], ys[rows], rows, _noise(frame, y, ys)[rows], counts)


def _noise(frame: pd.DataFrame, y: str, ys: Floats) -> Floats:
    """Standard deviation, in points, of a percentage counted over `n_eval` images: binomial, and for an AutoAttack
    accuracy that short attacks and an audit estimate, what the audit leaves; 0 where n is unknown. Taken as independent
    between runs, though shared images make errors more alike and the seed of training less."""
    images = COLUMNS[y].images if y in COLUMNS else None
    if images is None or images not in frame.columns:
        return np.zeros(len(frame))
    share = np.clip(ys / 100, 0, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        noise = 100 * np.sqrt(share * (1 - share) / numbers_of(frame, images))
    if COLUMNS[y].robust and AUDIT_SD in frame.columns:
        noise = np.hypot(noise, np.nan_to_num(numbers_of(frame, AUDIT_SD)))
    return np.where(np.isfinite(noise), noise, 0.0)


def check_not_tied(name: str, values: Floats) -> None:
    """Raises InputError where all runs have one value of the column `name`: no law can be told from them."""
    if len(values) and float(np.ptp(values)) == 0:
        raise InputError(
            f"all {len(values)} usable runs have {name} = {abs(values[0]):.4g}: they say nothing of what compute buys "
            "(evaluate more images, or train recipes that differ more)"
        )
