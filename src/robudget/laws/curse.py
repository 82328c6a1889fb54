"""The winner's curse: a bin's best run is best partly because its evaluation was lucky, and by how much.

Accuracies carry the noise of a finite test set. Adding more of the same noise makes the best of a bin look better
still; how much better, at 1.5 and 2 times the noise, says by extrapolation how good the best would look without any
(SIMEX: Cook & Stefanski 1994; quadratic in the noise's size, which is exact both where runs differ by noise only and
where the noise is small beside their differences).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robudget.laws.bootstrap import LARGE
from robudget.laws.envelope import Envelope, bin_of
from robudget.tables.usable import Floats

READINGS = 400  # noisier tables averaged over
SIZES = (1.5, 2.0)  # of the noise, in units of what is there
WEIGHTS = (5.0, -8.0, 3.0)  # of the best at sizes 1, 1.5 and 2 in what the best loses from size 1 to 0, sign reversed
MOST = 1_000  # runs looked at in a bin of a large table: the best ones
CHUNK = 1_000_000  # numbers held at once


def curse(env: Envelope, rng: np.random.Generator) -> tuple[float, float]:
    """By how much (points of quality, usually > 0) noise lifts the envelope, and by how much that of a bootstrap table.

    Each is the mean over the bins that hold a run. Both are 0 where no run's noise is known (`points.noise`), and for
    envelopes without bins.
    """
    if env.how not in ("log", "linear", "quantile") or not env.points.noise.any():
        return 0.0, 0.0
    sign = 1.0 if env.best == "max" else -1.0
    which = bin_of(env.points.x, env.edges)
    keep = _contenders(which, sign * env.points.y, MOST if len(which) > LARGE else len(which))
    y, noise, which = sign * env.points.y[keep], env.points.noise[keep], which[keep]
    order = np.argsort(which, kind="stable")
    y, noise = y[order], noise[order]
    starts = np.flatnonzero(np.diff(which[order], prepend=-1))
    readings = max(20, min(READINGS, 20 * CHUNK // len(y)))
    step = max(1, CHUNK // len(y))
    full, drawn = [], []
    for start in range(0, readings, step):
        shape = (min(step, readings - start), len(y))
        more = noise * rng.standard_normal(shape)
        present = rng.random(shape) < 1 - np.exp(-1)  # whether a run is drawn is nearly independent of the others
        tables = [np.broadcast_to(y, shape), *(y + np.sqrt(size**2 - 1) * more for size in SIZES)]
        full.append(_lift(tables, starts))
        drawn.append(_lift([np.where(present, table, -np.inf) for table in tables], starts))
    return float(np.concatenate(full).mean()), float(np.concatenate(drawn).mean())


def _lift(tables: list[Floats], starts: NDArray[np.int64]) -> Floats:
    """What the best of each bin owes to noise, from tables at sizes 1, 1.5 and 2: (filled bins of all readings,)."""
    best = [np.maximum.reduceat(table, starts, axis=1) for table in tables]
    filled = np.isfinite(best[0])
    return -np.asarray(sum(w * b[filled] for w, b in zip(WEIGHTS, best, strict=True)))


def _contenders(which: NDArray[np.int64], quality: Floats, most: int) -> NDArray[np.int64]:
    """The best `most` runs of every bin: no other comes out best."""
    order = np.lexsort((-quality, which))
    first = np.searchsorted(which[order], which[order])
    return np.sort(order[np.arange(len(order)) - first < most])
