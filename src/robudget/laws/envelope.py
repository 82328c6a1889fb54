"""The envelope (the best run of each compute bin, or the Pareto frontier), its bootstrap tables and its winner's curse.

Bootstrap tables draw runs with replacement (Efron & Tibshirani 1993) and rebuild the envelope from each draw.
`scipy.stats.bootstrap` would call the fit once a table; here all tables are arrays, to be refitted in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget.errors import InputError, unknown
from robudget.files import fields
from robudget.tables.usable import Counts, Floats, Points, is_error, points

How = Literal["log", "linear", "quantile", "pareto", "all"]
HOWS: tuple[How, ...] = get_args(How)
BINS = 19  # the paper's

Resamples = tuple[Floats, Floats, Floats]  # x, y and weight of the points of every bootstrap table
LARGE = 5_000  # above this many runs, the draws of two runs are independent to within 1e-4
BEST_PER_PART = 32  # best runs looked at per part of a bin: all are missing from a bootstrap table once in e^32
PARTS_PER_BIN = 8  # since a bootstrap table's bins may shift a little
MOST_NUMBERS = 20_000_000  # drawn at most for a fit to every run; larger tables get fewer bootstrap tables …
FEWEST_RESAMPLES = 200  # … but these
NUMBERS_AT_ONCE = 2_000_000  # held in memory

NOISY_TABLES = 400  # tables with added noise that the winner's curse is averaged over
NOISE_SIZES = (1.5, 2.0)  # in units of the noise that is there
SIMEX_WEIGHTS = (5.0, -8.0, 3.0)  # of the best at noise sizes 1, 1.5 and 2 in what it gains from size 1 to 0
BEST_PER_BIN = 1_000  # runs of each bin of a large table that the winner's curse is computed from


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
    def sign(self) -> float:
        """1 where the best is the largest y, −1 where it is the smallest: `sign` × y is the quality of a run."""
        return 1.0 if self.best == "max" else -1.0

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


def envelope_of(runs: Points, bins: int = BINS, how: How = "log") -> Envelope:
    """As `envelope`, from the usable runs of a table."""
    if how not in HOWS:
        raise unknown("kind of envelope", how, HOWS)
    if bins < 1:
        raise InputError(f"bins = {bins} (allowed: 1 or more)")
    best: Literal["max", "min"] = "min" if is_error(runs.y_name) else "max"
    xs, ys = runs.x, runs.y if best == "max" else -runs.y
    edges = _edges(xs, bins, how)
    if how == "all":
        best_runs = np.argsort(xs, kind="stable")
        sizes = np.ones(len(xs), dtype=np.int64)
    elif how == "pareto":
        best_runs = _frontier(xs, ys)
        order = np.argsort(xs, kind="stable")
        starts = np.searchsorted(xs[order], xs[best_runs])
        sizes = np.diff(np.append(starts, len(xs)))
    else:
        which = _bin_of(xs, edges)
        order = np.lexsort((-xs, ys))  # ascending y; of equals the cheapest is written last and wins
        best_of = np.full(bins, -1)
        best_of[which[order]] = order
        best_runs = best_of[best_of >= 0]
        sizes = np.bincount(which, minlength=bins)[best_of >= 0]
    return Envelope(
        runs.x_name, runs.y_name, how, bins if len(edges) else 0, best, runs.counts,
        xs[best_runs], runs.y[best_runs], runs.rows[best_runs], np.asarray(sizes, dtype=np.int64), edges, runs,
    )  # fmt: skip


def _edges(xs: Floats, bins: int, how: How) -> Floats:
    """Edges (bins + 1,) over the range of `xs` (n,); empty for `pareto` and `all`."""
    if how == "log":
        return np.asarray(np.geomspace(xs.min(), xs.max(), bins + 1))
    if how == "linear":
        return np.linspace(xs.min(), xs.max(), bins + 1)
    if how == "quantile":
        return np.asarray(np.quantile(xs, np.linspace(0, 1, bins + 1)))
    return np.empty(0)


def _bin_of(xs: Floats, edges: Floats) -> NDArray[np.int64]:
    """The bin of each x: half-open, the last one closed, as numpy's histogram."""
    inner = np.searchsorted(edges, xs, side="right") - 1
    return np.clip(inner, 0, len(edges) - 2).astype(np.int64)


def _frontier(xs: Floats, ys: Floats) -> NDArray[np.int64]:
    """Positions of the runs that no run of the same or smaller x reaches in y (n,), ascending in x."""
    order = np.lexsort((-ys, xs))
    climb = np.maximum.accumulate(ys[order])
    new = np.append(True, ys[order][1:] > climb[:-1])
    return np.asarray(order[new], dtype=np.int64)


# -- bootstrap tables --------------------------------------------------------------------------------------------------


def bootstrap_envelopes(env: Envelope, resamples: int, rng: np.random.Generator) -> Resamples:
    """Envelopes of `resamples` bootstrap tables: x, y, weight, each (resamples, m); weight 0 marks an empty bin.

    For `how="all"` the weight is how often a run was drawn, and large tables get fewer resamples (first axis).
    """
    x, y = env.points.x, env.points.y
    order = np.lexsort((-x, env.sign * y))  # ascending in quality: of several written to a bin the last is the best
    if env.how == "all":
        resamples = min(resamples, most_resamples(len(x)))
        weight = draw_counts(len(x), resamples, rng).astype(np.float64)
        return np.broadcast_to(x, weight.shape), np.broadcast_to(y, weight.shape), weight
    if env.how == "pareto":
        return _bootstrap_frontiers(x, y, env.sign, draw_counts(len(x), resamples, rng))
    if len(x) > LARGE and env.how in ("log", "linear"):
        keep = _possible_best(x, order, env)
        x, y = x[keep], y[keep]
        order = np.lexsort((-x, env.sign * y))
        counts = (rng.random((resamples, len(x))) < 1 - np.exp(-1)).astype(np.int64)
    else:
        counts = draw_counts(len(x), resamples, rng)
    x, y, counts = x[order], y[order], counts[:, order]
    which = _bootstrap_bins(x, counts, env.bins, env.how)
    best = np.full((resamples, env.bins), -1)
    resample, run = np.nonzero(counts)  # row by row, runs ascending in quality
    best[resample, which[resample, run]] = run
    weight = (best >= 0).astype(np.float64)
    best = np.where(best >= 0, best, best.max(axis=1, keepdims=True))  # a hidden point still needs a finite value
    return x[best], y[best], weight


def most_resamples(n: int) -> int:
    """Bootstrap tables that n runs are worth: the narrow intervals of a large table need no more."""
    return max(FEWEST_RESAMPLES, MOST_NUMBERS // n)


def draw_counts(n: int, resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each run is drawn: (resamples, n), rows summing to n."""
    flat = rng.integers(n, size=(resamples, n)) + np.arange(resamples)[:, None] * n
    return np.asarray(np.bincount(flat.ravel(), minlength=resamples * n).reshape(resamples, n), dtype=np.int64)


def _bootstrap_bins(x: Floats, counts: NDArray[np.int64], bins: int, how: How) -> NDArray[np.int64]:
    """The bin of every run in every resample (resamples, n), with edges from the runs that were drawn."""
    if how == "quantile":
        ascending = np.argsort(x, kind="stable")
        below = np.cumsum(counts[:, ascending], axis=1) - counts[:, ascending]
        ranks = np.empty_like(below)
        ranks[:, ascending] = below
        return np.asarray(np.minimum(ranks * bins // counts.sum(axis=1, keepdims=True), bins - 1))
    v = np.log(x) if how == "log" else x
    low = np.where(counts > 0, v, np.inf).min(axis=1, keepdims=True)
    high = np.where(counts > 0, v, -np.inf).max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(high > low, (v - low) / (high - low), 0.0)
    return np.asarray(np.clip((share * bins).astype(np.int64), 0, bins - 1))


def _bootstrap_frontiers(x: Floats, y: Floats, sign: float, counts: NDArray[np.int64]) -> Resamples:
    ascending = np.lexsort((-sign * y, x))
    x, y, counts = x[ascending], y[ascending], counts[:, ascending]
    quality = np.where(counts > 0, sign * y, -np.inf)
    climb = np.maximum.accumulate(quality, axis=1)
    before = np.concatenate([np.full((len(counts), 1), -np.inf), climb[:, :-1]], axis=1)
    on = (counts > 0) & (quality > before)
    ever = on.any(axis=0)  # most runs are never on a frontier
    shape = (len(counts), int(ever.sum()))
    return np.broadcast_to(x[ever], shape), np.broadcast_to(y[ever], shape), on[:, ever].astype(np.float64)


def _possible_best(x: Floats, order: NDArray[np.int64], env: Envelope) -> NDArray[np.int64]:
    """Runs that can be a bin's best in some resample: the best few of each part of a bin, and the outermost in x."""
    v = np.log(x) if env.how == "log" else x
    part = ((v - v.min()) / (np.ptp(v) or 1.0) * env.bins * PARTS_PER_BIN).astype(np.int64)
    best = _best_of_each(part, order[::-1], BEST_PER_PART)
    outer = np.argsort(v, kind="stable")
    return np.unique(np.concatenate([best, outer[:BEST_PER_PART], outer[-BEST_PER_PART:]]))


def _best_of_each(group: NDArray[np.int64], best_first: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The first `most` positions of every group (n,), group by group; `best_first` (n,) are all positions in order."""
    by_group = best_first[np.argsort(group[best_first], kind="stable")]
    first = np.searchsorted(group[by_group], group[by_group])
    return np.asarray(by_group[np.arange(len(group)) - first < most])


# -- the winner's curse ------------------------------------------------------------------------------------------------


def winners_curse(env: Envelope, rng: np.random.Generator) -> tuple[float, float]:
    """By how much (points of quality, usually > 0) noise lifts the envelope, and by how much that of a bootstrap table.

    A bin's best run is best partly because its evaluation on a finite test set was lucky (the winner's curse: Capen,
    Clapp & Campbell 1971). Adding more of the same noise makes the best of a bin look better still; how much better,
    at 1.5 and 2 times the noise, says by extrapolation how good the best would look without any (SIMEX: Cook &
    Stefanski 1994; quadratic in the noise's size, which is exact both where runs differ by noise only and where the
    noise is small beside their differences).

    Each number is the mean over the bins that hold a run. Both are 0 where no run's noise is known (`points.noise`),
    and for envelopes without bins.
    """
    if env.how not in ("log", "linear", "quantile") or not env.points.noise.any():
        return 0.0, 0.0
    quality, which = env.sign * env.points.y, _bin_of(env.points.x, env.edges)
    most = BEST_PER_BIN if len(which) > LARGE else len(which)
    rows = np.sort(_best_of_each(which, np.argsort(-quality, kind="stable"), most))
    rows = rows[np.argsort(which[rows], kind="stable")]
    y, noise = quality[rows], env.points.noise[rows]
    starts = np.flatnonzero(np.diff(which[rows], prepend=-1))
    tables = max(20, min(NOISY_TABLES, 10 * NUMBERS_AT_ONCE // len(y)))
    chunk = max(1, NUMBERS_AT_ONCE // 2 // len(y))
    whole, bootstrap = [], []
    for start in range(0, tables, chunk):
        shape = (min(chunk, tables - start), len(y))
        more = noise * rng.standard_normal(shape)
        present = rng.random(shape) < 1 - np.exp(-1)  # the draws of two runs are nearly independent
        by_size = [np.broadcast_to(y, shape), *(y + np.sqrt(size**2 - 1) * more for size in NOISE_SIZES)]
        whole.append(_noise_in_best(by_size, starts))
        bootstrap.append(_noise_in_best([np.where(present, table, -np.inf) for table in by_size], starts))
    return float(np.concatenate(whole).mean()), float(np.concatenate(bootstrap).mean())


def _noise_in_best(by_size: list[Floats], starts: NDArray[np.int64]) -> Floats:
    """What noise adds to the best of each bin, from tables at noise sizes 1, 1.5 and 2: (bins with a run, all tables).

    `starts` are the first positions of the bins."""
    best = [np.maximum.reduceat(table, starts, axis=1) for table in by_size]
    filled = np.isfinite(best[0])
    return -np.asarray(sum(w * b[filled] for w, b in zip(SIMEX_WEIGHTS, best, strict=True)))
