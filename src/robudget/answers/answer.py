"""An answer: a sentence with its interval, or that the runs leave the question undecided, and what it stands on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget.errors import InputError
from robudget.files import fields
from robudget.tables.usable import Floats, collapsed_rows, failed_rows, numbers_of, standard_rows

LEVEL = 0.95  # of every interval, and 1 − the error of every test
X = "train_flops_exact"

# yes: the effect that the question asks about is there; no: there is a clear answer, and it is the other one;
# undecided: the runs do not say. That a test rejects nothing is undecided, never no.
Verdict = Literal["yes", "no", "undecided"]


class TooFewRuns(InputError):
    """The runs lack the variation that an analysis needs."""


@dataclass(frozen=True)
class Line:
    """A curve of a figure: y at each x, with the ends of its interval, all of one length."""

    x: Floats
    y: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Answer:
    """`sentence` says what was found, with its interval and the number of runs. `rows` are what it stands on, a row a
    group; `notes`: what was left out and why. `points` (columns x, y, group) and `lines` by group are its figure, with
    `x` and `y` as its axes; y is in percent."""

    verdict: Verdict
    sentence: str
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    points: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    lines: Mapping[str, Line] = field(default_factory=dict, repr=False)
    x: str = "training compute (FLOP)"
    y: str = "accuracy (%)"

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in fields(self).items() if key not in ("points", "lines", "x", "y")}


@dataclass(frozen=True)
class Usable:
    """The runs that count: their compute `x` (n,) in FLOP, the accuracy `y` (n,) in percent that they were trained for
    (clean accuracy where there was no adversary, AutoAttack accuracy otherwise), `group` (n,); and `collapsed` runs by
    group, which are not among them."""

    runs: pd.DataFrame
    x: Floats
    y: Floats
    group: NDArray[np.object_]
    collapsed: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The groups, in the order of the table."""
        return list(dict.fromkeys(self.group))

    @property
    def points(self) -> pd.DataFrame:
        return pd.DataFrame({"x": self.x, "y": self.y, "group": self.group})


def usable(runs: pd.DataFrame, group: pd.Series | list[str]) -> Usable:
    """The finished runs with compute and accuracy known, collapsed ones apart."""
    standard = standard_rows(runs)
    robust, clean = numbers_of(runs, "aa_acc"), numbers_of(runs, "clean_acc")
    y, x = np.where(standard, clean, robust), numbers_of(runs, X)
    groups = np.array([str(name) for name in group], dtype=np.object_)
    failed = failed_rows(runs)
    unknown = ~failed & (np.isnan(y) | ~(x > 0))
    collapsed = ~failed & ~unknown & collapsed_rows(runs) & ~standard
    keep = ~(failed | unknown | collapsed)
    left_out = {"failed": failed, "without a known accuracy or compute": unknown, "collapsed": collapsed}
    mixed = standard.any() and not standard.all()
    notes = tuple(f"{mask.sum()} of {len(runs)} runs left out: {why}" for why, mask in left_out.items() if mask.any())
    if mixed:
        notes += ("accuracy is clean accuracy where training had no adversary, AutoAttack accuracy elsewhere",)
    fell = {name: int((collapsed & (groups == name)).sum()) for name in dict.fromkeys(groups)}
    return Usable(runs[keep].reset_index(drop=True), x[keep], y[keep], groups[keep], fell, notes)
