"""How the numbers of the page were obtained, and what they do not say."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from robudget.accuracy import COLLAPSE_RATIO
from robudget.analysis import Analysis
from robudget.columns import MAIN_COSTS, column
from robudget.report.table import how


def methods(rows: pd.DataFrame, analysis: Analysis | None, notes: Sequence[str]) -> list[str]:
    """The sentences of the section, those of the caller (`notes`) last."""
    sentences = [
        "AutoAttack accuracy is the share of test images that are classified correctly and that no attack of the "
        "standard ensemble breaks within the threat. Its intervals are 95% Wilson intervals over those images: they "
        "contain the variation between images, not that between training seeds.",
        "FLOP are counted exactly as a counter counts them (2 per multiply-add; an attack step costs two forward "
        "passes, an update three). The paper's count takes every backward pass as twice a forward one and adds the "
        "released code's extra passes.",
        _estimates(rows),
        f"Collapsed (catastrophic overfitting) means trained with an adversary, and robust accuracy below "
        f"{COLLAPSE_RATIO} × clean accuracy.",
        "What is not known is shown as unknown, and sums say over how many runs they are known.",
    ]
    if analysis is not None:
        sentences += [
            f"A law is fitted to the best usable run of each bin of compute ({analysis.counts.sentence()}). Its "
            f"intervals come from drawing runs with replacement and rebuilding the envelope each time "
            f"({analysis.law.resamples:,} resamples): they contain the uncertainty about the runs, not about the form. "
            f"Bands of the weighted average of all forms contain both.",
            "A hold-out hides the costliest runs, fits the rest and predicts. A form whose error is larger than that "
            "of repeating the last seen value is not to be extrapolated.",
            "Matched pairs compare runs that differ in one choice only. A choice that always changes together with "
            "another is named beside it: the table cannot separate the two.",
        ]
    return [*sentences, *notes]


def _estimates(rows: pd.DataFrame) -> str:
    estimated = [column(c).phrase for c in MAIN_COSTS if "estimated" in how(rows, c)]
    first = f"Estimated rather than measured, for some runs or all: {', '.join(estimated)}. " if estimated else ""
    return (
        f"{first}Dollars are energy × PUE × price and carbon is energy × grid intensity, both by the price list that "
        f"the table was made with."
    )
