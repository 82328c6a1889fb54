"""Do small runs choose as large ones do? The decision accuracy of cheaper runs, as a study's answer.

The analysis is `prediction.small_runs` (DataDecide, Magnusson et al. 2025).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from robudget.answers.answer import LEVEL, Answer, TooFewRuns, Verdict, usable
from robudget.errors import InputError
from robudget.prediction.small_runs import small_runs

COIN = 0.5


def ranking(runs: pd.DataFrame) -> Answer:
    """Raises TooFewRuns where the runs hold no choices at two scales."""
    try:
        found = small_runs(runs)
    except InputError as error:
        raise TooFewRuns(str(error)) from None
    known = [level for level in found.levels if np.isfinite(level.low)]
    if not known:
        raise TooFewRuns("no two choices were run both at a cheaper scale and at the costliest")
    rows = tuple(
        {
            "share of the costliest scale's compute": level.share, "runs": level.n_runs, "pairs": level.n_pairs,
            "ranked alike": level.decision_accuracy, "low": level.low, "high": level.high,
            "signal to noise": level.snr, "collapsed": level.collapsed,
        }
        for level in known
    )  # fmt: skip
    cheapest, clear = known[0], [level for level in known if level.low > COIN]
    verdict: Verdict = "yes" if clear else "undecided"
    said = (
        f"Runs of {clear[0].share:.2g} of the compute choose as those of {found.target_text()} do in "
        f"{clear[0].decision_accuracy:.0%} of {clear[0].n_pairs} pairs of choices "
        f"[{clear[0].low:.0%}, {clear[0].high:.0%}], more often than a coin"
        if clear
        else f"No cheaper scale is shown to choose better than a coin: at {cheapest.share:.2g} of the compute of "
        f"{found.target_text()} it ranks {cheapest.decision_accuracy:.0%} of {cheapest.n_pairs} pairs of choices alike "
        f"[{cheapest.low:.0%}, {cheapest.high:.0%}]"
    )
    sentence = (
        f"{said} ({LEVEL:.0%} by bootstrap over {found.n_choices} choices; the costliest scale's own ranking is taken "
        f"for the truth, though {found.noise.sentence()})."
    )
    all_of = usable(runs, [str(model) for model in runs["model"]] if "model" in runs else ["runs"] * len(runs))
    return Answer(verdict, sentence, rows, all_of.notes, all_of.points)
