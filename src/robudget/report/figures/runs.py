"""Figures that need only the table: every run (1a), the effect of each choice (2), and where runs collapsed."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robudget.report.figures import style
from robudget.report.figures.style import COLUMN, INK, MUTED, PAGE, PAPER
from robudget.report.labels import choice, feature, phrase, quantity, word

MANY = 1500  # points above which a vector file holds them as a picture


def wilson_bars(rows: pd.DataFrame) -> np.ndarray:
    """(2, n) distances from `aa_acc` down to the low and up to the high end of its interval, in points; 0 = unknown,
    which draws no bar."""
    low = (rows["aa_acc"] - rows["aa_acc_low"]).clip(lower=0)
    high = (rows["aa_acc_high"] - rows["aa_acc"]).clip(lower=0)
    return np.vstack([low.fillna(0.0), high.fillna(0.0)])


def is_collapsed(rows: pd.DataFrame) -> pd.Series:
    return rows["collapsed"].fillna(False).astype(bool)


def plottable(table: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The runs whose x is positive and whose y is known."""
    return table[(pd.to_numeric(table[x]) > 0) & pd.to_numeric(table[y]).notna()]


def all_runs(table: pd.DataFrame, x: str) -> tuple[Figure, str]:
    """Figure 1a: compute against AutoAttack accuracy, one point a run, with its Wilson interval."""
    rows = plottable(table, x, "aa_acc")
    figure, ax = style.new(COLUMN, 2.55)
    coded = style.encode("loss", rows["loss"])
    collapsed, synthetic = is_collapsed(rows), rows["synthetic"].fillna(False).astype(bool)
    raster = len(rows) > MANY
    bars = wilson_bars(rows)
    for (loss, (colour, marker)), mixed in product(coded.items(), (False, True)):
        mine = (rows["loss"].map(word) == loss) & (synthetic == mixed)
        for fallen in (True, False):
            chosen = (mine & (collapsed == fallen)).to_numpy()
            if not chosen.any():
                continue
            part = rows[chosen]
            ax.errorbar(
                part[x], part["aa_acc"], yerr=bars[:, chosen], fmt="none", ecolor=colour, elinewidth=0.6,
                alpha=0.45, zorder=1, rasterized=raster,
            )  # fmt: skip
            ax.scatter(
                part[x], part["aa_acc"], s=9 if fallen else 13, marker="x" if fallen else marker,
                facecolors=colour if mixed or fallen else PAPER, edgecolors=None if fallen else colour,
                linewidths=0.8, alpha=0.55 if fallen else 1.0, zorder=2 if fallen else 3, rasterized=raster,
            )  # fmt: skip
    style.log_x(ax)
    style.accuracy_axis(ax)
    ax.set_xlabel(quantity(x).axis)
    ax.set_ylabel("AutoAttack accuracy (%)")
    style.grid(ax)
    losses = [_key(marker, colour, choice("loss", name)) for name, (colour, marker) in coded.items()]
    mixing = [_key("o", INK, "with synthetic"), _key("o", INK, "real only", PAPER)] if synthetic.nunique() > 1 else []
    crosses = [_key("x", MUTED, "collapsed")] if collapsed.any() else []
    style.legend_above(figure, [losses, mixing, crosses])
    caption = (
        f"{len(rows)} runs, AutoAttack accuracy against {phrase(x)}; bars are 95% Wilson intervals{_n_eval(rows)}."
    )
    if collapsed.any():
        caption += f" Crosses: {int(collapsed.sum())} collapsed runs (robust accuracy below 0.3 × clean)."
    return figure, caption


def _key(marker: str, colour: str, label: str, fill: str | None = None) -> Line2D:
    return Line2D([], [], marker=marker, color=colour, markerfacecolor=fill or colour, ls="", ms=3.6, label=label)


def _n_eval(rows: pd.DataFrame) -> str:
    n = rows["n_eval"].dropna().unique()
    if len(n) == 0:
        return ""
    return f" over {int(n[0]):,} images" if len(n) == 1 else f" over {int(n.min()):,} to {int(n.max()):,} images"


def sizes(rows: pd.DataFrame) -> pd.Series:
    """The name of each run's model as short as the table allows, with the stem's width where that varies."""
    names = rows["model"].map(word)
    if names.str.startswith("wrn-").all():
        names = names.str.removeprefix("wrn-")
    if rows.groupby("model")["base"].nunique().max() > 1:
        names = names + " b" + rows["base"].map(word)
    return names


def effects(table: pd.DataFrame) -> tuple[Figure, str] | None:
    """Figure 2: accuracy split by loss × EMA (panels), model size (along x) and synthetic data (colour). None without
    an adversarially trained run."""
    rows = table[(table["loss"] != "standard") & table["aa_acc"].notna()]
    if rows.empty:
        return None
    rows = rows.assign(size=sizes(rows), syn=rows["synthetic"].map(word), fallen=is_collapsed(rows))
    facets = [c for c in ("loss", "ema") if rows[c].map(word).nunique() > 1] or ["loss"]
    groups = list(rows.groupby([rows[c].map(word) for c in facets], sort=True))
    order = list(rows.groupby("size")["parameters"].median().sort_values(kind="stable").index)
    figure, axes = style.new(PAGE, 2.5, 1, len(groups), sharey=True, squeeze=False)
    coded = style.encode("synthetic", rows["synthetic"])
    for ax, (key, group) in zip(axes[0], groups, strict=True):
        _strips(ax, group, order, coded, raster=len(rows) > MANY)
        ax.set_title(_facet(facets, [str(part) for part in key]))
        ax.set_xticks(
            range(len(order)), order, rotation=0 if len(order) * max(map(len, order)) < 110 / len(groups) else 35
        )
        ax.set_xlim(-0.6, len(order) - 0.4)
        style.grid(ax)
    axes[0][0].set_ylabel("AutoAttack accuracy (%)")
    style.accuracy_axis(axes[0][0])
    figure.supxlabel(
        "WideResNet (depth-width), by parameters"
        if rows["model"].str.startswith("wrn-").all()
        else "model, by parameters",
        fontsize=7,
    )
    names = {"yes": "with synthetic data", "no": "real data only"}
    handles = [[_key(marker, colour, names.get(name, name))] for name, (colour, marker) in coded.items()]
    handles.append([Line2D([], [], color=INK, lw=1.4, label="median of 3 or more, collapsed left out")])
    if rows["fallen"].any():
        handles.append([_key("x", MUTED, "collapsed")])
    style.legend_above(figure, handles)
    caption = (
        f"{len(rows)} adversarially trained runs split by {', '.join(feature(c) for c in facets)}, model size and "
        f"synthetic data; each point is a run, sideways position within a group means nothing; "
        f"{int(rows['fallen'].sum())} collapsed runs are crosses."
    )
    return figure, caption


def _strips(
    ax: Axes, group: pd.DataFrame, order: list[str], coded: dict[str, tuple[str, str]], *, raster: bool
) -> None:
    """One column of points for each model size and each value of `synthetic`, side by side."""
    shift = {name: (i - (len(coded) - 1) / 2) * 0.4 for i, name in enumerate(coded)}
    for key, cell in group.groupby(["size", "syn"]):
        size, syn = (str(part) for part in key)
        colour, marker = coded[syn]
        centre = order.index(size) + shift[syn]
        spread = np.linspace(-0.13, 0.13, len(cell)) if len(cell) > 1 else np.zeros(1)
        fallen = cell["fallen"].to_numpy()
        ys = cell["aa_acc"].to_numpy()
        ax.scatter(
            centre + spread[fallen], ys[fallen], s=8, marker="x", c=colour, alpha=0.6, linewidths=0.8, rasterized=raster
        )
        ax.scatter(
            centre + spread[~fallen],
            ys[~fallen],
            s=9,
            marker=marker,
            c=colour,
            alpha=0.75,
            linewidths=0,
            rasterized=raster,
        )
        if (~fallen).sum() >= 3:  # a median of one or two runs only hides them
            ax.hlines(np.median(ys[~fallen]), centre - 0.18, centre + 0.18, color=INK, lw=1.4, zorder=4)


def _facet(columns: list[str], key: list[str]) -> str:
    words = []
    for column, value in zip(columns, key, strict=True):
        if column == "loss":
            words.append(choice("loss", value))
        else:
            words.append({"yes": "", "no": "no "}.get(value, value + " ") + feature(column))
    return ", ".join(words)


def collapse_map(table: pd.DataFrame) -> tuple[Figure, str] | None:
    """How many runs collapsed, by attack steps (columns) and the other choices that vary (rows). None where no
    adversarial run has a result."""
    rows = table[(table["loss"] != "standard") & table["aa_acc"].notna()]
    if rows.empty:
        return None
    split = [c for c in ("loss", "epochs", "synthetic") if rows[c].map(word).nunique() > 1] or ["loss"]
    keys = [rows[c].map(word) for c in split]
    cells = rows.assign(fallen=is_collapsed(rows)).groupby([*keys, "steps"])["fallen"].agg(["sum", "count"])
    steps = sorted(rows["steps"].unique())
    names = sorted({index[:-1] for index in cells.index}, key=lambda name: [_natural(part) for part in name])
    share = np.full((len(names), len(steps)), np.nan)
    figure, ax = style.new(COLUMN, 0.95 + 0.21 * len(names))
    for (i, name), (j, step) in product(enumerate(names), enumerate(steps)):
        if (*name, step) not in cells.index:
            ax.text(j + 0.5, i + 0.5, "–", ha="center", va="center", color=MUTED, fontsize=6.5)
            continue
        fallen, n = cells.loc[(*name, step)]
        share[i, j] = fallen / n
        ax.text(
            j + 0.5,
            i + 0.5,
            f"{fallen}/{n}",
            ha="center",
            va="center",
            fontsize=6.5,
            color="#16181b" if fallen else INK,
        )
    ax.pcolormesh(share, cmap=style.collapse_ramp(), vmin=0, vmax=1, edgecolors=PAPER, linewidth=1.5)
    ax.invert_yaxis()
    ax.set_xticks(np.arange(len(steps)) + 0.5, [word(s) for s in steps])
    ax.set_yticks(np.arange(len(names)) + 0.5, [_row_name(split, name) for name in names])
    ax.set_xlabel("attack steps in training")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    fallen = int(is_collapsed(rows).sum())
    caption = (
        f"Collapsed runs of all adversarially trained ones ({fallen} of {len(rows)}), by attack steps and "
        f"{', '.join(feature(c) for c in split)}; collapsed / all, darker is more. Collapsed: AutoAttack "
        f"accuracy below 0.3 × clean."
    )
    return figure, caption


def _natural(text: str) -> tuple[int, float, str]:
    return (0, float(text), "") if text.replace(".", "", 1).isdigit() else (1, 0.0, text)


def _row_name(columns: list[str], key: tuple[str, ...]) -> str:
    words = []
    for column, value in zip(columns, key, strict=True):
        if column == "loss":
            words.append(choice("loss", value))
        elif column == "epochs":
            words.append(f"{value} ep.")
        else:
            words.append("synthetic" if value == "yes" else "real")
    return ", ".join(words)
