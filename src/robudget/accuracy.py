"""What an accuracy means: its confidence interval, and when a robust one is a collapse. Imports no torch."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

COLLAPSE_RATIO = 0.3  # ours, of the clean accuracy: 75 of the paper's 319 runs lie below, none in [0.23, 0.35]


@overload
def collapsed(robust: float, clean: float) -> bool: ...
@overload
def collapsed(robust: NDArray[np.floating[Any]], clean: NDArray[np.floating[Any]]) -> NDArray[np.bool_]: ...
def collapsed(
    robust: float | NDArray[np.floating[Any]], clean: float | NDArray[np.floating[Any]]
) -> bool | NDArray[np.bool_]:
    """Catastrophic overfitting of an adversarial loss (Wong et al. 2020): the robust accuracy lies below 0.3 of the
    clean one, both in the same unit. False where one is unknown (NaN)."""
    return robust < COLLAPSE_RATIO * clean


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion, as fractions in [0, 1] (Wilson 1927).

    `successes` of `n` trials; with n = 0 nothing is known and both ends are NaN. Unlike the normal approximation it
    stays inside [0, 1] and keeps its coverage near 0 and 1, where accuracies often are. By hand, because
    `scipy.stats` takes longer to import than a command that prints an interval takes to run.
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
    # At the extremes the bound is exactly 0 or 1; rounding must not move it inside.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def hypergeometric_most(found: int, sample: int, population: int, error: float = 0.05) -> int:
    """An exact upper bound on how many of a population have a property that `found` of a random sample have.

    The largest count K for which a sample drawn without replacement shows `found` or fewer with a probability of more
    than `error` (the finite population's Clopper–Pearson bound; Clopper & Pearson 1934). Without a sample it is the
    population. By hand for the same reason as `wilson`.
    """
    if not 0 <= found <= sample <= population:
        raise ValueError(f"found = {found} of {sample} of {population} (allowed: 0 <= found <= sample <= population)")
    low, high = found, population - sample + found
    while low < high:  # the probability falls as K grows
        middle = (low + high + 1) // 2
        if hypergeometric_cdf(found, sample, middle, population) > error:
            low = middle
        else:
            high = middle - 1
    return low


def hypergeometric_cdf(found: int, sample: int, having: int, population: int) -> float:
    """P(X ≤ found), X hypergeometric: of a sample from a population of which `having` have the property."""

    def choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    least = max(0, sample - (population - having))
    whole = choose(population, sample)
    terms = range(least, min(found, having) + 1)
    return math.fsum(math.exp(choose(having, k) + choose(population - having, sample - k) - whole) for k in terms)


def spent_error(look: int, error: float = 0.05) -> float:
    """The error that may be spent on the `look`-th (from 0) of any number of looks at data that keep growing.

    Four fifths of what is left, each time: the shares add up to `error`, so that bounds which each hold with their
    share hold together, whichever look was the last (Bonferroni; the shares are ours).
    """
    return error * 0.8 * 0.2**look
