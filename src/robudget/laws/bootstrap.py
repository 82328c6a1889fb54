"""Resampled tables: runs drawn with replacement and the envelope rebuilt from each draw, thousands at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robudget.laws.envelope import Envelope, How
from robudget.tables.usable import Floats

Drawn = tuple[Floats, Floats, Floats]  # x, y, weight of every resample's points
LARGE = 5_000  # above this many runs, whether a run is drawn is independent of the others to within 1e-4
KEPT = 32  # best runs kept per part of a bin: all are missing from a resample once in e^32
PARTS = 8  # parts per bin, since a resample's bins may shift a little
MOST_DRAWS = 20_000_000  # numbers drawn at most for a fit to every run; larger tables get fewer resamples …
FEWEST = 200  # … but these
CHUNK = 2_000_000  # numbers held at once


def resampled_lines(env: Envelope, resamples: int, rng: np.random.Generator) -> Floats:
    """Intercept and slope of the straight line through (ln x, ln y) of all runs, for bootstrap tables: (resamples, 2).

    ln x is taken from the mean of ln `env.xs`. In closed form, from sums over the drawn runs; large tables get fewer
    resamples (first axis), for which their narrow intervals need no more.
    """
    u = np.log(env.points.x) - np.log(env.xs).mean()
    v = np.log(env.points.y)
    sums = np.stack([np.ones_like(u), u, v, u * u, u * v], axis=1)
    resamples = min(resamples, max(FEWEST, MOST_DRAWS // len(u)))
    chunk = max(1, CHUNK // len(u))
    parts = [_drawn(len(u), min(chunk, resamples - start), rng) @ sums for start in range(0, resamples, chunk)]
    n, su, sv, suu, suv = np.concatenate(parts).T
    spread = n * suu - su**2
    keep = spread > 1e-12 * n * suu  # a resample of one level has no slope
    n, su, sv, suv, spread = n[keep], su[keep], sv[keep], suv[keep], spread[keep]
    slope = (n * suv - su * sv) / spread
    return np.stack([(sv - slope * su) / n, slope], axis=1)


def resampled(env: Envelope, resamples: int, rng: np.random.Generator) -> Drawn:
    """Envelopes of `resamples` bootstrap tables: x, y, weight, each (resamples, m); weight 0 marks an empty bin.

    For `how="all"` the weight is how often a run was drawn, and large tables get fewer resamples (first axis).
    """
    x, y = env.points.x, env.points.y
    sign = 1.0 if env.best == "max" else -1.0
    order = np.lexsort((-x, sign * y))  # ascending in quality: of several written to a bin the last is the best
    if env.how == "all":
        resamples = min(resamples, max(FEWEST, MOST_DRAWS // len(x)))
        weight = _drawn(len(x), resamples, rng).astype(np.float64)
        return np.broadcast_to(x, weight.shape), np.broadcast_to(y, weight.shape), weight
    if env.how == "pareto":
        return _frontiers(x, y, sign, _drawn(len(x), resamples, rng))
    if len(x) > LARGE and env.how in ("log", "linear"):
        keep = _contenders(x, order, env)
        x, y = x[keep], y[keep]
        order = np.lexsort((-x, sign * y))
        counts = (rng.random((resamples, len(x))) < 1 - np.exp(-1)).astype(np.int64)
    else:
        counts = _drawn(len(x), resamples, rng)
    x, y, counts = x[order], y[order], counts[:, order]
    which = _bins(x, counts, env.bins, env.how)
    best = np.full((resamples, env.bins), -1)
    resample, run = np.nonzero(counts)  # row by row, runs ascending in quality
    best[resample, which[resample, run]] = run
    weight = (best >= 0).astype(np.float64)
    best = np.where(best >= 0, best, best.max(axis=1, keepdims=True))  # a hidden point still needs a finite value
    return x[best], y[best], weight


def _drawn(n: int, resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each run is drawn: (resamples, n), rows summing to n."""
    flat = rng.integers(n, size=(resamples, n)) + np.arange(resamples)[:, None] * n
    return np.asarray(np.bincount(flat.ravel(), minlength=resamples * n).reshape(resamples, n), dtype=np.int64)


def _bins(x: Floats, counts: NDArray[np.int64], bins: int, how: How) -> NDArray[np.int64]:
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


def _frontiers(x: Floats, y: Floats, sign: float, counts: NDArray[np.int64]) -> Drawn:
    ascending = np.lexsort((-sign * y, x))
    x, y, counts = x[ascending], y[ascending], counts[:, ascending]
    seen = np.where(counts > 0, sign * y, -np.inf)
    climb = np.maximum.accumulate(seen, axis=1)
    before = np.concatenate([np.full((len(counts), 1), -np.inf), climb[:, :-1]], axis=1)
    on = (counts > 0) & (seen > before)
    ever = on.any(axis=0)  # most runs are never on a frontier
    shape = (len(counts), int(ever.sum()))
    return np.broadcast_to(x[ever], shape), np.broadcast_to(y[ever], shape), on[:, ever].astype(np.float64)


def _contenders(x: Floats, order: NDArray[np.int64], env: Envelope) -> NDArray[np.int64]:
    """Runs that can be a bin's best in some resample: the best few of each part of a bin, and the outermost in x."""
    v = np.log(x) if env.how == "log" else x
    part = ((v - v.min()) / (np.ptp(v) or 1.0) * env.bins * PARTS).astype(np.int64)
    by_part = order[::-1][np.argsort(part[order[::-1]], kind="stable")]  # part by part, best first
    first = np.searchsorted(part[by_part], part[by_part])
    best = by_part[np.arange(len(x)) - first < KEPT]
    outer = np.argsort(v, kind="stable")
    return np.unique(np.concatenate([best, outer[:KEPT], outer[-KEPT:]]))
