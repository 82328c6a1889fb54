"""Runs of a large table as fewer, weighted ones: those that a frontier can hardly tell apart count as one.

The likelihood of a frontier is a sum over runs of a smooth function of how far each lies below it, in standard
deviations of its noise. Runs of nearly the same compute, distance and noise have nearly the same term, so that one run
at their means, as often as there are of them, stands for all: what is left out is of second order in the width of a
cell. Cells are half a standard deviation wide at the frontier and a quarter of the distance far below it, where the
density of inefficiencies is flat. The grid is ours; `bench/laws.py merged` puts the answers beside those of all runs,
each for itself (bench/RESULTS.md).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from robudget.tables.usable import Floats

LEVELS = 16  # cells of compute
NARROWEST, GROWTH = 0.5, 0.25  # width of a cell at the frontier, in standard deviations, and in distances far below it
NOISE_RATIO = 2**0.5  # between the ends of a cell of noise


class Runs(NamedTuple):
    """What a likelihood sums over, (n,) each: compute `t` (0 to 1), accuracy `y` and its `noise` in points, and how
    many runs each stands for (None: each for itself)."""

    t: Floats
    y: Floats
    noise: Floats
    weight: Floats | None = None

    @property
    def n(self) -> int:
        """Runs of the table."""
        return len(self.t) if self.weight is None else round(float(self.weight.sum()))


def merged(runs: Runs, frontier: Floats) -> Runs:
    """Runs (n,) with those merged that lie in one cell; `frontier` (n,) is roughly how high it is at each one's t."""
    cells = np.stack([
        np.floor(runs.t * LEVELS),
        np.floor(np.arcsinh((frontier - runs.y) / runs.noise * GROWTH / NARROWEST) / GROWTH),
        np.floor(np.log(runs.noise) / np.log(NOISE_RATIO)),
    ])  # fmt: skip
    _, cell, size = np.unique(cells, axis=1, return_inverse=True, return_counts=True)
    t, y, variance = (np.bincount(cell, of) / size for of in (runs.t, runs.y, runs.noise**2))
    return Runs(t, y, np.sqrt(variance), size.astype(np.float64))
