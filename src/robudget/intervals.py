"""Confidence intervals of an accuracy. Pure arithmetic: imported by rooms that start without torch."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion, as fractions in [0, 1] (Wilson 1927).

    `successes` of `n` trials; with n = 0 nothing is known and both ends are NaN. Unlike the normal approximation it
    stays inside [0, 1] and keeps its coverage near 0 and 1, where collapsed and clean accuracies live.
    """
    if not 0 < level < 1:
        raise ValueError(f"level = {level} is outside (0, 1)")
    if not 0 <= successes <= n:
        raise ValueError(f"successes = {successes} is outside [0, {n}]")
    if n == 0:
        return math.nan, math.nan
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the extremes the bound is exactly 0 or 1; rounding must not leave it a hair inside.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high
