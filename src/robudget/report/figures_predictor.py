"""Figures of the predictor: prediction against truth on held-out runs (1b) and what it leans on (1c)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robudget.laws.explain import Importance
from robudget.laws.predictor import PaperGBR
from robudget.report import labels, style
from robudget.report.figures_runs import is_collapsed
from robudget.report.style import BLUE, COLUMN, MUTED, ORANGE, PAPER, VERMILLION


def predicted(fit: PaperGBR, table: pd.DataFrame) -> tuple[Figure, str]:
    """Figure 1b: the paper's gradient boosting on the runs it did not see."""
    figure, ax = style.new(COLUMN, 2.75)
    fallen = is_collapsed(table).to_numpy()[fit.rows]
    ends = float(min(fit.truth.min(), fit.predicted.min())), float(max(fit.truth.max(), fit.predicted.max()))
    room = 0.05 * (ends[1] - ends[0] or 1.0)
    span = np.array([ends[0] - room, ends[1] + room])
    ax.plot(span, span, color=MUTED, lw=0.7, ls=(0, (3, 2)), zorder=0)
    for mask, colour, marker in ((~fallen, BLUE, "o"), (fallen, VERMILLION, "X")):
        ax.scatter(
            fit.truth[mask],
            fit.predicted[mask],
            s=13,
            marker=marker,
            c=colour,
            linewidths=0.3,
            edgecolors=PAPER,
            alpha=0.85,
        )
    ax.set(xlim=span, ylim=span, aspect="equal")
    ax.set_xlabel("AutoAttack accuracy (%), measured")
    ax.set_ylabel("predicted (%)")
    ax.set_yticks([t for t in ax.get_xticks() if span[0] <= t <= span[1]])
    ax.set(xlim=span, ylim=span)
    style.grid(ax, "both")
    keys = [[_key("o", BLUE, "held-out run")], [Line2D([], [], color=MUTED, lw=0.7, ls=(0, (3, 2)), label="exact")]]
    if fallen.any():
        keys.insert(1, [_key("X", VERMILLION, "collapsed")])
    style.legend_above(figure, keys)
    caption = (
        f"Gradient boosting as in the paper (50 estimators, depth 5), fitted on {fit.n_train} runs and shown on the "
        f"{fit.n_test} it did not see (70:30 split, seed {fit.seed}): R² = {labels.fixed(fit.r2, 2)}, mean absolute "
        f"error {labels.fixed(fit.mae, 2)} points. It is one split of many."
    )
    return figure, caption


def importance(items: tuple[Importance, ...], n_runs: int) -> tuple[Figure, str]:
    """Figure 1c: each feature's importance, by the trees themselves (share) and by permutation (points, interval)."""
    items = tuple(sorted(items, key=lambda i: i.by_model))
    figure, (left, right) = style.new(COLUMN, 0.75 + 0.2 * len(items), 1, 2, sharey=True)
    at = np.arange(len(items))
    left.barh(at, [i.by_model for i in items], height=0.62, color=BLUE)
    middle = np.array([i.by_permutation for i in items])
    ends = np.array([[i.low, i.high] for i in items]).T
    bars = np.clip(np.vstack([middle - ends[0], ends[1] - middle]), 0, None)
    right.errorbar(middle, at, xerr=bars, fmt="D", ms=3.4, color=ORANGE, ecolor=ORANGE, elinewidth=0.9)
    right.axvline(0, color=MUTED, lw=0.6)
    left.set_yticks(at, [labels.feature(i.feature) for i in items])
    left.set_xlabel("share in the trees")
    right.set_xlabel("error added when\nshuffled (points)")
    for ax in (left, right):
        ax.tick_params(axis="y", length=0)
        style.grid(ax, "x")
    left.set_xlim(left=0)
    caption = (
        f"{n_runs} runs. Left: the trees' own importances, which sum to 1. Right: mean absolute error added on runs "
        f"not fitted on when a choice is shuffled among them, with its 95% interval (bootstrap over runs)."
    )
    twins = [
        f"{labels.feature(i.feature)} cannot be told from {' and '.join(labels.feature(a) for a in i.aliases)}"
        for i in items
        if i.aliases
    ]
    return figure, caption + (f" In this table {'; '.join(twins)}." if twins else "")


def _key(marker: str, colour: str, label: str) -> Line2D:
    return Line2D([], [], marker=marker, color=colour, ls="", ms=3.8, label=label)
