"""Figures of the predictor: against truth on held-out runs (1b), what it leans on (1c), partial dependence, risk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robudget.prediction.explain import Importance
from robudget.prediction.predictor import PaperGBR, Predictor
from robudget.report import labels
from robudget.report.figures import style
from robudget.report.figures.runs import is_collapsed
from robudget.report.figures.style import BLUE, COLUMN, MUTED, ORANGE, PAGE, PAPER, VERMILLION
from robudget.report.sections.evidence import level

MOST_PANELS = 5  # choices of a partial dependence


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


def partials(predictor: Predictor) -> tuple[Figure, str]:
    """Partial dependence: the mean prediction and P(collapse) with one choice set to each of its levels, for the most
    important choices."""
    names = [i.feature for i in predictor.importances[:MOST_PANELS]]
    figure, axes = style.new(PAGE, 2.1, 1, len(names), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        found = predictor.partial(name)
        at = np.arange(len(found.values))
        ax.plot(at, found.aa_acc, color=BLUE, marker="o", ms=3.4, lw=1.1)
        ax.plot(at, 100 * np.array(found.p_collapse), color=VERMILLION, marker="X", ms=3.6, lw=1.0, ls=(0, (4, 2)))
        words = [level(name, value) for value in found.values]
        crowded = sum(map(len, words)) > 18
        ax.set_xticks(at, words, rotation=40 if crowded else 0, ha="right" if crowded else "center")
        ax.set_xlim(-0.4, len(at) - 0.6)
        ax.set_title(labels.feature(name))
        style.grid(ax)
    axes[0][0].set_ylabel("percent")
    axes[0][0].set_ylim(-3, 103 if max(_tops(predictor, names)) > 70 else None)
    style.legend_above(
        figure,
        [
            [Line2D([], [], color=BLUE, marker="o", ms=3.4, lw=1.1, label="predicted AutoAttack accuracy (%)")],
            [Line2D([], [], color=VERMILLION, marker="X", ms=3.6, lw=1, ls=(0, (4, 2)), label="P(collapse) (%)")],
        ],
    )
    caption = (
        f"Partial dependence of the default predictor ({predictor.model}, fitted on {predictor.n_runs} runs, "
        f"{predictor.n_collapsed} of them collapsed): mean over the table with one choice set to each level; the "
        f"{len(names)} choices that matter most by permutation. It averages over all combinations, unlikely ones too."
    )
    return figure, caption


def _tops(predictor: Predictor, names: Sequence[str]) -> list[float]:
    return [100 * max(predictor.partial(name).p_collapse) for name in names]


def risk(predictor: Predictor) -> tuple[Figure, str] | None:
    """P(collapse) over attack steps and the choice that moves it most, beside the share that really collapsed. None
    where nothing collapsed or steps do not vary."""
    names = [c.name for c in predictor.features.columns]
    if predictor.n_collapsed == 0 or "steps" not in names or len(names) < 2:
        return None
    moved = {name: np.ptp(predictor.partial(name).p_collapse) for name in names if name != "steps"}
    other = max(moved, key=lambda name: float(moved[name]))
    found = predictor.collapse_map("steps", other)
    grid = found.p_collapse.T  # rows: the other choice
    figure, ax = style.new(COLUMN, 1.0 + 0.28 * len(grid))
    ax.pcolormesh(grid, cmap=style.collapse_ramp(), vmin=0, vmax=1, edgecolors=PAPER, linewidth=1.5)
    for i, row in enumerate(grid):
        for j, p in enumerate(row):
            seen = found.observed[j, i]
            real = f"{seen * found.n[j, i]:.0f}/{found.n[j, i]}" if found.n[j, i] else "no run"
            ax.text(j + 0.5, i + 0.36, f"{100 * p:.0f}%", ha="center", va="center", fontsize=6.8, color="#16181b")
            ax.text(j + 0.5, i + 0.7, f"({real})", ha="center", va="center", fontsize=5.4, color="#3a4046")
    ax.invert_yaxis()
    ax.set_xticks(np.arange(grid.shape[1]) + 0.5, [level("steps", v) for v in found.first_values])
    ax.set_yticks(np.arange(grid.shape[0]) + 0.5, [level(other, v) for v in found.second_values])
    ax.set_xlabel("attack steps in training")
    ax.set_ylabel(labels.feature(other))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    caption = (
        f"P(collapse) by the default predictor ({predictor.n_runs} runs, {predictor.n_collapsed} collapsed), mean over "
        f"the table's other choices; in brackets the real runs: collapsed / all."
    )
    return figure, caption


def _key(marker: str, colour: str, label: str) -> Line2D:
    return Line2D([], [], marker=marker, color=colour, ls="", ms=3.8, label=label)
