"""Intervals that cover what they say, for outcomes with two modes.

A recipe's accuracy is described by a mixture: with P(collapse) it lies around the fallen accuracy, else around the
survivor's, each with the residuals seen out of fold (the survivors' scaled by how well their neighbours were
predicted). Central intervals of that mixture are then widened or narrowed until the wanted share of the calibration
runs lies inside (split conformal prediction, with the nested intervals of Gupta 2022), which holds whether or not the
mixture is right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from robudget.prediction.regressors import Bools, Outlook
from robudget.tables.usable import Floats

NEIGHBOURS = 20
NEAR = 0.9  # weight of the neighbours in the local scale; the rest is everywhere's
CHUNK = 2_000


@dataclass(frozen=True)
class Calibration:
    """`beta` is the central probability that the mixture's interval must have to cover `level` of the calibration runs;
    above 1 the interval reaches beyond everything seen, by (beta − 1) × `spread` points. inf: too few runs to say."""

    level: float
    beta: float
    spread: float
    survivors: Floats = field(repr=False)  # residuals in units of the local scale, (s,)
    fallen: Floats = field(repr=False)  # residuals in points, (f,)
    known: Floats = field(repr=False)  # features of the survivors, standardised, (s, p)
    sizes: Floats = field(repr=False)  # their absolute residuals, (s,)
    centre: Floats = field(repr=False)
    scale: Floats = field(repr=False)

    @classmethod
    def fit(cls, X: Floats, y: Floats, collapsed: Bools, out: Outlook, level: float) -> Calibration:
        """From out-of-fold predictions `out` of the runs X (n, p), y (n,)."""
        centre, scale = X.mean(axis=0), np.where(X.std(axis=0) > 0, X.std(axis=0), 1.0)
        Z = (X - centre) / scale
        miss = (y - out.survivor)[~collapsed]
        sizes = np.abs(miss)
        own = _local(Z[~collapsed], Z[~collapsed], sizes, skip_self=True) if len(miss) else miss
        fell = (y - out.fallen)[collapsed]
        draft = cls(
            level, 1.0, max(float(y.std()), 1e-9), np.sort(miss / own) if len(miss) else miss,
            np.sort(fell[~np.isnan(fell)]), Z[~collapsed], sizes, centre, scale,
        )  # fmt: skip
        scores = np.sort(draft._scores(X, y, out))
        rank = int(np.ceil((len(y) + 1) * level)) - 1
        beta = float(scores[rank]) if rank < len(scores) else float("inf")
        return cls(**{**draft.__dict__, "beta": beta})

    def interval(self, X: Floats, out: Outlook) -> tuple[Floats, Floats]:
        """(low, high), each (n,), in percent and inside [0, 100]."""
        low, high = np.empty(len(X)), np.empty(len(X))
        inside = min(self.beta, 1.0)
        margin = max(self.beta - 1.0, 0.0) * self.spread
        for start in range(0, len(X), CHUNK):
            part = slice(start, start + CHUNK)
            values, share = self._mixture(X[part], out.rows(part))
            low[part] = _quantile(values, share, (1 - inside) / 2, upper=False) - margin
            high[part] = _quantile(values, share, (1 + inside) / 2, upper=True) + margin
        return np.clip(low, 0, 100), np.clip(high, 0, 100)

    def above(self, X: Floats, out: Outlook, target: float) -> Floats:
        """The mixture's probability of at least `target` percent, (n,)."""
        chances = []
        for start in range(0, len(X), CHUNK):
            part = slice(start, start + CHUNK)
            values, share = self._mixture(X[part], out.rows(part))
            chances.append(1 - np.where(values < target, share, 0.0).max(axis=1) / share[:, -1])
        return np.concatenate(chances)

    def _mixture(self, X: Floats, out: Outlook) -> tuple[Floats, Floats]:
        """Support (n, s + f), ascending, and cumulative probability after each point."""
        Z = (X - self.centre) / self.scale
        local = _local(Z, self.known, self.sizes) if len(self.survivors) else np.ones(len(X))
        alive = out.survivor[:, None] + local[:, None] * self.survivors[None]
        dead = out.fallen[:, None] + self.fallen[None]
        p = out.p_collapse if len(self.fallen) else np.zeros(len(X))
        p = p if len(self.survivors) else np.ones(len(X))
        values = np.clip(np.concatenate([alive, dead], axis=1), 0, 100)
        weights = np.concatenate([
            np.repeat((1 - p)[:, None] / max(alive.shape[1], 1), alive.shape[1], axis=1),
            np.repeat(p[:, None] / max(dead.shape[1], 1), dead.shape[1], axis=1),
        ], axis=1)  # fmt: skip
        order = np.argsort(values, axis=1, kind="stable")
        return np.take_along_axis(values, order, axis=1), np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)

    def _scores(self, X: Floats, y: Floats, out: Outlook) -> Floats:
        """The smallest beta whose interval holds each y."""
        values, share = self._mixture(X, out)
        total = share[:, -1]
        below = np.where(values < y[:, None], share, 0.0).max(axis=1) / total
        upto = np.where(values <= y[:, None], share, 0.0).max(axis=1) / total
        # A quantile interval [Q(t), Q(1 − t)] holds y while t ≤ F(y) and 1 − t > F(y−).
        beta = np.maximum(0.0, np.maximum(1 - 2 * upto, 2 * below - 1))
        beyond = np.maximum(values[:, 0] - y, 0) + np.maximum(y - values[:, -1], 0)
        return np.asarray(np.where(beyond > 0, 1 + beyond / self.spread, np.minimum(beta, 1.0)))


def _quantile(values: Floats, share: Floats, level: float, upper: bool) -> Floats:
    """Row-wise: the smallest value with F > level (lower end) or F ≥ level (upper end)."""
    goal = level * share[:, -1]
    n = values.shape[1]
    if upper:
        index = (share < goal[:, None] - 1e-12).sum(axis=1)
    else:
        index = (share <= goal[:, None] - 1e-12).sum(axis=1)
    return np.asarray(values[np.arange(len(values)), np.minimum(index, n - 1)])


def _local(Z: Floats, known: Floats, sizes: Floats, skip_self: bool = False) -> Floats:
    """The typical residual near each row: root mean square over its nearest neighbours, a little from everywhere."""
    everywhere = float((sizes**2).mean())
    k = min(NEIGHBOURS, len(known) - skip_self)
    if k < 1:
        return np.full(len(Z), max(np.sqrt(everywhere), 1e-6))
    distance = (Z**2).sum(axis=1)[:, None] - 2 * Z @ known.T + (known**2).sum(axis=1)[None]
    if skip_self:
        np.fill_diagonal(distance, np.inf)
    near = np.argpartition(distance, k - 1, axis=1)[:, :k]
    return np.asarray(np.maximum(np.sqrt(NEAR * (sizes[near] ** 2).mean(axis=1) + (1 - NEAR) * everywhere), 1e-6))
