"""What more real images buy, and what generated ones add to them: a least-squares plane of the accuracy.

Accuracy (points) = level of the block + slope·log2(real images) + effect of the alternative + turn of the alternative ·
log2(real images), with one variance. Blocks are the combinations of all other axes (the size of the model, the seed).
Effects and turns are against the first alternative, with Bonferroni's intervals over the others. What the plane misses
counts as noise, so that intervals get wider by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from robudget.answers.answer import LEVEL, Answer, Line, TooFewRuns, Usable, Verdict, usable
from robudget.answers.exponents import least_squares
from robudget.tables.usable import Floats

FEWEST = 3  # runs of an alternative, at two amounts of real images or more
FEWEST_FREEDOM = 3  # runs beyond the numbers of the plane


def amounts(
    runs: pd.DataFrame,
    group: pd.Series | Sequence[str],
    real: ArrayLike,
    block: pd.Series | Sequence[str],
    along: str = "group",
    baseline: str | None = None,
) -> Answer:
    """`group` (n,): the alternative of generated images of every run, `baseline` (default: the first of the table) that
    without; `real` (n,): real images trained on; `block` (n,): all else that differs. Raises TooFewRuns where the
    baseline or all others have too few runs, or one amount of real images."""
    labels = [str(name) for name in group]
    all_of, d, blocks = _usable(runs, labels, np.asarray(real, dtype=np.float64), [str(name) for name in block])
    first = baseline if baseline is not None else next(iter(labels), "")
    fit = [
        name
        for name in dict.fromkeys([first, *all_of.names])
        if (mine := d[all_of.group == name]).size >= FEWEST and np.ptp(mine) > 0
    ]
    if len(fit) < 2 or fit[0] != first:
        raise TooFewRuns(
            f"{len(fit)} alternatives of {along}{'' if first in fit else f', without {first},'} have {FEWEST} runs "
            f"that did not collapse, at two amounts of real images (allowed: two or more, {first or 'none'} among them)"
        )
    keep = np.isin(all_of.group, fit)
    y, group_of, d, blocks = all_of.y[keep], all_of.group[keep], d[keep], blocks[keep]
    others, kinds, middle = fit[1:], list(dict.fromkeys(blocks)), float(d.mean())
    k, m, centred = len(others), len(kinds), d - middle
    member = np.array([[g == name for name in others] for g in group_of], dtype=np.float64)
    levels = np.array([[b == kind for kind in kinds] for b in blocks], dtype=np.float64)
    design = np.hstack([levels, centred[:, None], member, member * centred[:, None]])
    if (freedom := len(y) - design.shape[1]) < FEWEST_FREEDOM or np.linalg.matrix_rank(design) < design.shape[1]:
        raise TooFewRuns(
            f"{len(y)} runs do not fix the {design.shape[1]} numbers of levels, slopes and effects "
            f"(allowed: {design.shape[1] + FEWEST_FREEDOM} or more that vary in each apart from the others)"
        )
    beta, covariance = least_squares(design, y, freedom)
    sd = np.sqrt(np.diag(covariance))
    t = float(stats.t.ppf(0.5 + LEVEL / 2, freedom))
    family = float(stats.t.ppf(1 - (1 - LEVEL) / 2 / k, freedom))  # holds for all effects at once

    def span(i: int, factor: float) -> tuple[float, float, float]:
        return float(beta[i]), float(beta[i] - factor * sd[i]), float(beta[i] + factor * sd[i])

    doubling = span(m, t)
    effects, turns = ([span(m + 1 + at + i, family) for i in range(k)] for at in (0, k))
    best = int(np.argmax([low for _, low, _ in effects]))
    verdict: Verdict = (
        "yes" if any(low > 0 for _, low, _ in effects) else "no" if all(e[2] < 0 for e in effects) else "undecided"
    )
    said = {
        "yes": f"{along} is shown to raise the accuracy",
        "no": f"every alternative of {along} is shown to lower the accuracy",
        "undecided": f"no alternative of {along} is shown to raise the accuracy, and not all to lower it",
    }[verdict]
    worse = [name for name, (_, _, high) in zip(others, effects, strict=True) if high < 0]
    sentence = (
        f"{said[0].upper()}{said[1:]}: the best, {others[best]}, moves it by {_span(effects[best])} points against "
        f"{first} at {2**middle:,.0f} real images (Bonferroni's intervals over {k}, {len(y)} runs), and each doubling "
        f"of these moves that effect by {_span(turns[best])}; "
        + (f"shown to be worse than {first}: {', '.join(worse)}. " if worse else "none is shown to lower it. ")
        + f"A doubling of the real images alone moves the accuracy by {_span(doubling)} points."
    )
    rows = [
        {
            along: name, "runs": int((group_of == name).sum()), "accuracy": float(y[group_of == name].mean()),
            "effect": e[0], "low": e[1], "high": e[2], "effect per doubling of real images": turn[0],
            "its low": turn[1], "its high": turn[2], "collapsed": all_of.collapsed.get(name, 0),
        }
        for name, e, turn in zip(
            fit, [(0.0, np.nan, np.nan), *effects], [(0.0, np.nan, np.nan), *turns], strict=True
        )
    ]  # fmt: skip
    dropped = [name for name in all_of.names if name not in fit]
    notes = all_of.notes + ((f"too few runs: {', '.join(dropped)}",) if dropped else ())
    grid = np.linspace(d.min(), d.max(), 40)
    share = levels.mean(axis=0)  # a line is at the mean of the blocks
    lines = {}
    for i, name in enumerate(fit):
        mine = np.eye(k + 1)[i, 1:]
        row = [[*share, u - middle, *mine, *(mine * (u - middle))] for u in grid]
        lines[name] = _line(2**grid, np.array(row), beta, covariance, t)
    points = pd.DataFrame({"x": 2**d, "y": y, "group": group_of})
    return Answer(verdict, sentence, tuple(rows), notes, points, lines, x="real images")


def _usable(
    runs: pd.DataFrame, labels: list[str], real: Floats, block: list[str]
) -> tuple[Usable, Floats, np.ndarray[tuple[int], np.dtype[np.object_]]]:
    """The runs that count, with the log2 of their real images and their block."""
    marked = runs.assign(_real=real, _block=block)
    all_of = usable(marked, labels)
    d = np.log2(all_of.runs["_real"].to_numpy(dtype=np.float64))
    blocks = all_of.runs["_block"].to_numpy(dtype=np.object_)
    return replace(all_of, runs=all_of.runs.drop(columns=["_real", "_block"])), d, blocks


def _line(x: Floats, rows: Floats, beta: Floats, covariance: Floats, t: float) -> Line:
    value = rows @ beta
    half = t * np.sqrt(np.einsum("ij,jk,ik->i", rows, covariance, rows))
    return Line(x, value, np.maximum(value - half, 0.0), value + half)


def _span(span: tuple[float, float, float]) -> str:
    return f"{span[0]:+.1f} [{span[1]:+.1f}, {span[2]:+.1f}]"
