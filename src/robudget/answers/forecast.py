"""Does a law fitted to small runs predict larger ones? The frontier of the cheap runs against the best of the costly.

The law is `laws.fit_frontier`, whose band's coverage is measured in bench/laws.py. The costly runs are those of another
table (the paper's) beyond the study's own, or else the study's top decade of compute, hidden from the fit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from robudget.answers.answer import LEVEL, Answer, Line, TooFewRuns, Verdict, X
from robudget.columns import SCOPE
from robudget.errors import InputError
from robudget.laws.frontier import FEWEST_RUNS, Frontier, fit_frontier
from robudget.tables.usable import Points, check_scope, points

HIDDEN = 10.0  # without a table of costlier runs, those within this factor of the costliest are predicted
FEWEST_LEVELS = 4  # of compute, among the runs that the law is fitted to
WIDEST = 20.0  # points: an interval wider than this says nothing


def forecast(runs: pd.DataFrame, beside: pd.DataFrame | None = None) -> Answer:
    """Raises TooFewRuns where too few runs are left to fit a law to, or none above them to be predicted."""
    try:
        below = points(runs, X, "aa_acc")
    except InputError as error:
        raise TooFewRuns(str(error)) from None
    if beside is None:
        cut = below.x.max() / HIDDEN
        above = points(runs.iloc[below.rows[below.x > cut]], X, "aa_acc")
        below = points(runs.iloc[below.rows[below.x <= cut]], X, "aa_acc") if (below.x <= cut).any() else below
        which = "the study's own costlier runs, hidden from the fit"
    else:
        both = [table[[name for name in SCOPE if name in table]] for table in (runs, beside)]
        check_scope(pd.concat(both, ignore_index=True))
        above = points(beside, X, "aa_acc")
        which = "the runs of the table beside"
    levels, n_above = len(np.unique(below.x)), int((above.x > below.x.max()).sum())
    if len(below.x) < FEWEST_RUNS or levels < FEWEST_LEVELS or not n_above:
        raise TooFewRuns(
            f"{len(below.x)} runs that did not collapse, at {levels} levels of compute, with {n_above} runs above them "
            f"(allowed: {FEWEST_RUNS} runs at {FEWEST_LEVELS} levels, and one above)"
        )
    law = fit_frontier(below, test=False)
    best = _best(above, below.x.max())
    low, high = law.band(best.x)
    middle = law.predict(best.x)
    rows = [
        {
            "training FLOP": float(x), "decades beyond": float(np.log10(x / below.x.max())),
            "best accuracy up to there": float(y), "predicted": float(m), "low": float(a), "high": float(b),
            "inside": bool(a <= y <= b),
        }
        for x, y, m, a, b in zip(best.x, best.y, middle, low, high, strict=True)
    ]  # fmt: skip
    top = rows[-1]
    width = top["high"] - top["low"]
    verdict: Verdict = "undecided" if width > WIDEST and top["inside"] else "yes" if top["inside"] else "no"
    inside = sum(row["inside"] for row in rows)
    held = {
        "yes": "It does",
        "no": "It does not",
        "undecided": f"An interval of {width:.0f} points leaves it open",
    }[verdict]
    sentence = (
        f"{held}. The law of {law.n_runs} runs of {below.x.min():.2g} to {below.x.max():.2g} FLOP expects "
        f"{top['predicted']:.1f}% [{top['low']:.1f}, {top['high']:.1f}] at {top['training FLOP']:.2g} FLOP, "
        f"{top['decades beyond']:.1f} decades beyond them, where the best of {which} has "
        f"{top['best accuracy up to there']:.1f}%; {inside} of the {len(rows)} "
        f"runs that are best for their compute there lie inside the {LEVEL:.0%} band."
    )
    notes = (f"below: {below.counts.sentence()}", f"above: {above.counts.sentence()}")
    drawn = [(below, "fitted"), (above, "predicted")]
    table = pd.concat([pd.DataFrame({"x": p.x, "y": p.y, "group": name}) for p, name in drawn], ignore_index=True)
    lines = {"fitted": _line(law, float(above.x.max()))}
    return Answer(verdict, sentence, tuple(rows), notes, table, lines, y="robust accuracy (%)")


def _best(runs: Points, beyond: float) -> Points:
    """The runs of more compute than `beyond` that are more accurate than every cheaper one of them. The best of
    finitely many runs lies a little below the frontier."""
    order = np.lexsort((-runs.y, runs.x))
    order = order[runs.x[order] > beyond]
    y = runs.y[order]
    keep = order[y > np.concatenate([[-np.inf], np.maximum.accumulate(y)[:-1]])]
    fields: dict[str, Any] = {name: getattr(runs, name)[keep] for name in ("x", "y", "rows", "noise")}
    return Points(runs.x_name, runs.y_name, **fields, counts=runs.counts)


def _line(law: Frontier, end: float) -> Line:
    grid = np.geomspace(law.x_range[0], end, 80)
    return Line(grid, law.predict(grid), *law.band(grid))
