"""The envelope: the best run of each compute bin, or the Pareto frontier, which needs no bins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget.errors import InputError, unknown
from robudget.laws.plain import fields
from robudget.tables.usable import Counts, Floats, Points, is_error, points

How = Literal["log", "linear", "quantile", "pareto", "all"]
HOWS: tuple[How, ...] = get_args(How)
BINS = 19  # the paper's


@dataclass(frozen=True)
class Envelope:
    """The best run of each bin, ascending in x.

    `xs`, `ys` (m,) are the points in the units of the columns `x` and `y`; `rows` (m,) their positions in the table;
    `sizes` (m,) the usable runs in each one's bin; `edges` (bins + 1,) the bin edges, empty without bins.
    `n_bins` = m counts the bins that hold a run; `best` is "max" for accuracies and "min" for errors.
    With `how="all"` every usable run is a point (for costs, where no run is "best").
    """

    x: str
    y: str
    how: How
    bins: int
    best: Literal["max", "min"]
    counts: Counts
    xs: Floats = field(repr=False)
    ys: Floats = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    sizes: NDArray[np.int64] = field(repr=False)
    edges: Floats = field(repr=False)
    points: Points = field(repr=False)

    @property
    def n_runs(self) -> int:
        """Usable runs, not only the best ones."""
        return self.counts.used

    @property
    def n_bins(self) -> int:
        return len(self.xs)

    @property
    def decades(self) -> float:
        """How many powers of ten of x the usable runs span."""
        return float(np.log10(self.points.x.max() / self.points.x.min()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `xs`, `ys` and `rows` included."""
        arrays = {name: getattr(self, name).tolist() for name in ("xs", "ys", "rows", "sizes", "edges")}
        return fields(self) | {"n_runs": self.n_runs, "n_bins": self.n_bins} | arrays


def envelope(
    frame: pd.DataFrame, x: str = "train_flops_exact", y: str = "aa_acc", bins: int = BINS, how: How = "log"
) -> Envelope:
    """The envelope of `y` over `x`: the best usable run per bin (paper: 19 bins, equal in log x).

    `how`: bins equal in `log` or `linear` x, or holding equally many runs (`quantile`); `pareto` takes every run that
    no run of the same or less x beats, and `all` every run. Failed and collapsed runs are left out and counted in
    `.counts`. Raises InputError for an unknown `how`, bins < 1, a missing column, a mixed table or an empty one.
    """
    return envelope_of(points(frame, x, y), bins, how)


def envelope_of(chosen: Points, bins: int = BINS, how: How = "log") -> Envelope:
    if how not in HOWS:
        raise unknown("kind of envelope", how, HOWS)
    if bins < 1:
        raise InputError(f"bins = {bins} (allowed: 1 or more)")
    best: Literal["max", "min"] = "min" if is_error(chosen.y_name) else "max"
    sign = 1.0 if best == "max" else -1.0
    xs, ys = chosen.x, sign * chosen.y
    edges = bin_edges(xs, bins, how)
    if how == "all":
        picked = np.argsort(xs, kind="stable")
        sizes = np.ones(len(xs), dtype=np.int64)
    elif how == "pareto":
        picked = frontier(xs, ys)
        order = np.argsort(xs, kind="stable")
        starts = np.searchsorted(xs[order], xs[picked])
        sizes = np.diff(np.append(starts, len(xs)))
    else:
        which = bin_of(xs, edges)
        order = np.lexsort((-xs, ys))  # ascending y; of equals the cheapest is written last and wins
        best_of = np.full(bins, -1)
        best_of[which[order]] = order
        picked = best_of[best_of >= 0]
        sizes = np.bincount(which, minlength=bins)[best_of >= 0]
    return Envelope(
        chosen.x_name, chosen.y_name, how, bins if len(edges) else 0, best, chosen.counts,
        xs[picked], chosen.y[picked], chosen.rows[picked], np.asarray(sizes, dtype=np.int64), edges, chosen,
    )  # fmt: skip


def bin_edges(xs: Floats, bins: int, how: How) -> Floats:
    """Edges (bins + 1,) over the range of `xs` (n,); empty for `pareto` and `all`."""
    if how == "log":
        return np.asarray(np.geomspace(xs.min(), xs.max(), bins + 1))
    if how == "linear":
        return np.linspace(xs.min(), xs.max(), bins + 1)
    if how == "quantile":
        return np.asarray(np.quantile(xs, np.linspace(0, 1, bins + 1)))
    return np.empty(0)


def bin_of(xs: Floats, edges: Floats) -> NDArray[np.int64]:
    """The bin of each x: half-open, the last one closed, as numpy's histogram."""
    inner = np.searchsorted(edges, xs, side="right") - 1
    return np.clip(inner, 0, len(edges) - 2).astype(np.int64)


def frontier(xs: Floats, ys: Floats) -> NDArray[np.int64]:
    """Positions of the runs that no run of the same or smaller x reaches in y (n,), ascending in x."""
    order = np.lexsort((-ys, xs))
    climb = np.maximum.accumulate(ys[order])
    new = np.append(True, ys[order][1:] > climb[:-1])
    return np.asarray(order[new], dtype=np.int64)
