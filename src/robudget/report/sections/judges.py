"""Small runs as judges: how often a cheaper run ranks two choices as the costliest scale does, by level of compute."""

from __future__ import annotations

from robudget.columns import column
from robudget.formats import fixed, known, percent
from robudget.prediction.small_runs import ComputeLevel, SmallRuns
from robudget.report.words import Table


def table(runs: SmallRuns) -> Table:
    """Decision accuracy (DataDecide) and the signal-to-noise ratio of the metric, cheapest level first."""
    choices = ", ".join(column(name).phrase for name in runs.choices)
    return Table(
        "Small runs as judges",
        f"Pairs of {choices} at less compute, ranked as with {runs.target_text()}; runs that did not collapse",
        ["compute", "#ranked alike", "#pairs", "#signal ÷ noise", "#runs", "#collapsed"],
        [
            (
                f"{one.share:.0%}",
                _span(one) if known(one.decision_accuracy) else "–",
                str(one.n_pairs),
                fixed(one.snr, 0) if known(one.snr) else "–",
                str(one.n_runs),
                f"{one.collapsed:.0%}",
            )
            for one in runs.levels
        ],
        note=f"Noise is {runs.noise.sd:.2g} points between seeds{', assumed' if runs.noise.borrowed else ''}. Decision "
        f"accuracy: DataDecide (arXiv 2504.11393); signal and noise: arXiv 2508.13144. Ties count half.",
        folded=True,
    )


def _span(one: ComputeLevel) -> tuple[str, str]:
    value, low, high = (percent(100 * share, 0) for share in (one.decision_accuracy, one.low, one.high))
    return value, f"{low} to {high}"
