"""Does the error fall as fast with compute in every group? A power law in each, and a test that they agree.

In each group log error = log K − α·log compute, by least squares over all its runs with one variance for all groups;
equal exponents are tested by the F test of the analysis of covariance (Fisher 1932; Maxwell and Delaney 2004, chapter
9), and levels at the same compute are compared by Bonferroni's intervals. All runs count, not only the best: what is
compared is what a recipe of the group reaches on the average of the study's sizes and lengths.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from robudget.answers.answer import LEVEL, Answer, Line, TooFewRuns, Verdict, usable
from robudget.tables.usable import Floats

FEWEST = 3  # runs of a group
LEAST_SPAN = 2.0  # times as costly as its cheapest is the costliest run of a group
LEAST_ERROR = 0.05  # percent, in place of 0


def exponents(runs: pd.DataFrame, group: pd.Series | list[str], along: str = "group") -> Answer:
    """Raises TooFewRuns where fewer than two groups have FEWEST runs over a factor of LEAST_SPAN in compute."""
    all_of = usable(runs, group)
    names = [
        name
        for name in all_of.names
        if (mine := all_of.x[all_of.group == name]).size >= FEWEST and mine.max() >= LEAST_SPAN * mine.min()
    ]
    if len(names) < 2:
        raise TooFewRuns(
            f"{len(names)} of {len(all_of.names)} alternatives of {along} have the {FEWEST} runs over a factor of "
            f"{LEAST_SPAN:g} in compute that an exponent needs (allowed: two or more)"
        )
    keep = np.isin(all_of.group, names)
    u, group_of = np.log10(all_of.x[keep]), all_of.group[keep]
    v = np.log10(np.maximum(100 - all_of.y[keep], LEAST_ERROR))
    member = np.array([[g == name for name in names] for g in group_of], dtype=np.float64)
    n, k = len(u), len(names)
    middle, common = _middle([u[group_of == name] for name in names])
    design = np.hstack([member, member * (u - middle)[:, None]])
    if (freedom := n - 2 * k) < 1:
        raise TooFewRuns(f"{n} runs fix the {2 * k} numbers of {k} power laws exactly (allowed: {2 * k + 1} or more)")
    beta, covariance = least_squares(design, v, freedom)
    levels, slopes = beta[:k], -beta[k:]
    pooled = np.hstack([member, (u - middle)[:, None]])
    alike = float(((v - pooled @ np.linalg.lstsq(pooled, v, rcond=None)[0]) ** 2).sum())
    rest = float(((v - design @ beta) ** 2).sum())
    p_slopes = float(stats.f.sf((alike - rest) / (k - 1) / max(rest / freedom, 1e-300), k - 1, freedom))
    t = float(stats.t.ppf(0.5 + LEVEL / 2, freedom))
    slope_sd = np.sqrt(np.diag(covariance)[k:])
    rows = [
        {
            along: name,
            "runs": int((group_of == name).sum()),
            "exponent": float(a),
            "low": float(a - t * sd),
            "high": float(a + t * sd),
            "accuracy at equal compute": float(100 - 10**level) if common else np.nan,
            "collapsed": all_of.collapsed.get(name, 0),
        }
        for name, a, sd, level in zip(names, slopes, slope_sd, levels, strict=True)
    ]
    one, two = _farthest(slopes)
    gap, low, high = _difference(slopes, covariance[k:, k:], one, two, k, freedom)
    verdict: Verdict = "yes" if p_slopes < 1 - LEVEL else "undecided"
    said = "differ" if verdict == "yes" else "are not shown to differ"
    sentence = (
        f"Exponents of the error in training compute {said} between the {k} alternatives of {along} (F test of equal "
        f"exponents: p = {p_slopes:.2g}, {n} runs): {names[one]} {_span(rows[one])} against {names[two]} "
        f"{_span(rows[two])}, a difference of {gap:.3f} [{low:.3f}, {high:.3f}]. "
        + (
            _levels(rows, levels, covariance[:k, :k], middle, freedom)
            if common
            else f"No compute is common to all {k}, so that what they reach is not compared."
        )
    )
    lines = {name: _line(u[group_of == name], i, beta, covariance, middle, t, k) for i, name in enumerate(names)}
    dropped = [name for name in all_of.names if name not in names]
    notes = all_of.notes + ((f"too few runs for an exponent: {', '.join(dropped)}",) if dropped else ())
    return Answer(verdict, sentence, tuple(rows), notes, all_of.points, lines)


def _middle(ranges: list[Floats]) -> tuple[float, bool]:
    """The log compute at which levels are compared: the mean of all runs where every group reaches it, else the middle
    of the range that all share; and whether they share one."""
    low, high = max(float(u.min()) for u in ranges), min(float(u.max()) for u in ranges)
    mean = float(np.concatenate(ranges).mean())
    return (mean if low <= mean <= high or low > high else (low + high) / 2), low <= high


def least_squares(design: Floats, v: Floats, freedom: int) -> tuple[Floats, Floats]:
    """Coefficients and their covariance."""
    beta = np.asarray(np.linalg.lstsq(design, v, rcond=None)[0], dtype=np.float64)
    variance = float(((v - design @ beta) ** 2).sum()) / freedom
    return beta, np.asarray(variance * np.linalg.inv(design.T @ design), dtype=np.float64)


def _farthest(values: Floats) -> tuple[int, int]:
    """Positions of the largest and of the smallest."""
    return int(np.argmax(values)), int(np.argmin(values))


def _difference(
    values: Floats, covariance: Floats, one: int, two: int, k: int, freedom: int
) -> tuple[float, float, float]:
    """values[one] − values[two] with an interval that holds for all pairs of k at once (Bonferroni)."""
    pairs = len(list(combinations(range(k), 2)))
    t = float(stats.t.ppf(1 - (1 - LEVEL) / 2 / pairs, freedom))
    gap = float(values[one] - values[two])
    sd = float(np.sqrt(covariance[one, one] + covariance[two, two] - 2 * covariance[one, two]))
    return gap, gap - t * sd, gap + t * sd


def _span(row: dict[str, Any]) -> str:
    return f"{row['exponent']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _levels(rows: list[dict[str, Any]], levels: Floats, covariance: Floats, middle: float, freedom: int) -> str:
    """Which group reaches most at the compute `middle` (log10 FLOP), and by how much."""
    along = next(iter(rows[0]))
    worst, best = _farthest(levels)  # of log error
    gap, low, high = _difference(levels, covariance, worst, best, len(levels), freedom)
    top, bottom = (rows[i]["accuracy at equal compute"] for i in (best, worst))
    shown = "shown" if low > 0 else "not shown"
    ratio = f"{100 * (1 - 10**-gap):.1f}% of the error [{100 * (1 - 10**-low):.1f}, {100 * (1 - 10**-high):.1f}]"
    return (
        f"At {10**middle:.2g} FLOP {rows[best][along]} reaches most ({top:.1f}%) and {rows[worst][along]} least "
        f"({bottom:.1f}%): it leaves out {ratio}, a difference that is {shown}."
    )


def _line(u: Floats, i: int, beta: Floats, covariance: Floats, middle: float, t: float, k: int) -> Line:
    grid = np.linspace(u.min(), u.max(), 40)
    value = beta[i] + beta[k + i] * (grid - middle)
    c = covariance
    sd = np.sqrt(c[i, i] + 2 * (grid - middle) * c[i, k + i] + (grid - middle) ** 2 * c[k + i, k + i])
    accuracy = (np.maximum(100 - 10**error, 0.0) for error in (value, value + t * sd, value - t * sd))
    return Line(10**grid, *accuracy)
