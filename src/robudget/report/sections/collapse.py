"""Where training collapsed, how likely it is elsewhere, and every run with its collapsed ones marked (figure 1a)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robudget.accuracy import COLLAPSE_RATIO
from robudget.analysis import Analysis
from robudget.columns import column
from robudget.formats import word
from robudget.prediction.effects import Effects
from robudget.prediction.predictor import Predictor
from robudget.report import style
from robudget.report.figure_files import Drawing
from robudget.report.style import COLUMN, INK, MANY, MUTED, PAPER
from robudget.report.words import Section, Table, change, points

MOST_EFFECTS = 8  # shown
CELL_INK, CELL_SMALL = "#16181b", "#3a4046"  # on coloured cells, in every theme


def section(rows: pd.DataFrame, analysis: Analysis | None) -> Section:
    collapsed = int(rows["collapsed"].sum())
    adversarial = int(((rows["loss"] != "standard") & rows["aa_acc"].notna()).sum())
    lead = (
        f"{collapsed} of {adversarial} adversarially trained runs collapsed: their robust accuracy is below "
        f"{COLLAPSE_RATIO} × their clean accuracy. They are left out of the laws, and counted."
    )
    effects = analysis.effects if analysis is not None else None
    tables = [collapse_table(effects)] if effects is not None else []
    return Section("collapse", "Collapse", "Collapse", lead, [("1a", "collapse", "risk"), *tables])


def drawings(rows: pd.DataFrame, analysis: Analysis | None) -> Iterator[Drawing]:
    candidates = (*((analysis.x,) if analysis else ()), "train_flops_exact", "train_flops_paper")
    x = next((c for c in candidates if c in rows and (rows[c] > 0).any()), None)
    if x is not None and rows["aa_acc"].notna().any():
        yield Drawing("1a", "Robust accuracy against compute", lambda: all_runs_figure(rows, x))
    yield Drawing("collapse", "Where training collapsed", lambda: collapse_figure(rows))
    predictor = analysis.predictor if analysis is not None else None
    if predictor is not None:
        yield Drawing("risk", "The predicted chance of collapse", lambda: risk_figure(predictor))


def collapse_table(effects: Effects) -> Table:
    largest = sorted((e for e in effects.effects if e.collapse), key=lambda e: -abs(e.collapse))[:MOST_EFFECTS]
    return Table(
        "What changes the chance of collapse",
        "All pairs of runs that differ in one choice only",
        ["choice", "#change of P(collapse)", "#pairs"],
        [(change(e.feature, e.before, e.after), points(100 * e.collapse), str(e.n_all)) for e in largest],
    )


def all_runs_figure(table: pd.DataFrame, x: str) -> tuple[Figure, str]:
    """Figure 1a: compute against AutoAttack accuracy, one point a run, with its Wilson interval."""
    rows = table[(table[x] > 0) & table["aa_acc"].notna()]
    figure, ax = style.new(COLUMN, 2.55)
    coded = style.encode("loss", rows["loss"])
    collapsed, synthetic = rows["collapsed"], rows["synthetic"].fillna(False).astype(bool)
    raster = len(rows) > MANY
    bars = style.wilson_bars(rows)
    for (loss, (colour, marker)), mixed, cross in product(coded.items(), (False, True), (True, False)):
        chosen = ((rows["loss"].map(word) == loss) & (synthetic == mixed) & (collapsed == cross)).to_numpy(dtype=bool)
        if not chosen.any():
            continue
        part = rows[chosen]
        ax.errorbar(
            part[x], part["aa_acc"], yerr=bars[:, chosen], fmt="none", ecolor=colour, elinewidth=0.6, alpha=0.45,
            zorder=1, rasterized=raster,
        )  # fmt: skip
        ax.scatter(
            part[x], part["aa_acc"], s=9 if cross else 13, marker="x" if cross else marker,
            facecolors=colour if mixed or cross else PAPER, edgecolors=None if cross else colour, linewidths=0.8,
            alpha=0.55 if cross else 1.0, zorder=2 if cross else 3, rasterized=raster,
        )  # fmt: skip
    style.log_x(ax)
    style.accuracy_axis(ax)
    ax.set_xlabel(column(x).axis)
    ax.set_ylabel(column("aa_acc").axis)
    style.grid(ax)
    losses = [style.key(marker, colour, column("loss").level(name)) for name, (colour, marker) in coded.items()]
    fills = [style.key("o", INK, "with synthetic"), style.key("o", INK, "real only", fill=PAPER)]
    crosses = [style.key("x", MUTED, "collapsed")] if collapsed.any() else []
    style.legend_above(figure, [losses, fills if synthetic.nunique() > 1 else [], crosses])
    caption = (
        f"{len(rows)} runs, AutoAttack accuracy against {column(x).phrase}; bars are 95% Wilson "
        f"intervals{_n_eval(rows)}."
    )
    if collapsed.any():
        caption += f" Crosses: {int(collapsed.sum())} collapsed runs (robust accuracy below {COLLAPSE_RATIO} × clean)."
    return figure, caption


def _n_eval(rows: pd.DataFrame) -> str:
    n = rows["n_eval"].dropna().unique()
    if len(n) == 0:
        return ""
    return f" over {int(n[0]):,} images" if len(n) == 1 else f" over {int(n.min()):,} to {int(n.max()):,} images"


def collapse_figure(table: pd.DataFrame) -> tuple[Figure, str] | None:
    """How many runs collapsed, by attack steps (columns) and the other choices that vary (rows). None where no
    adversarial run has a result."""
    rows = table[(table["loss"] != "standard") & table["aa_acc"].notna()]
    if rows.empty:
        return None
    split = [c for c in ("loss", "epochs", "synthetic") if rows[c].map(word).nunique() > 1] or ["loss"]
    keys = [rows[c].map(word) for c in split]
    cells = rows.groupby([*keys, "steps"])["collapsed"].agg(["sum", "count"])
    steps = sorted(rows["steps"].unique())
    names = sorted({index[:-1] for index in cells.index}, key=lambda name: [_natural(part) for part in name])
    share = np.full((len(names), len(steps)), np.nan)
    figure, ax = style.new(COLUMN, 0.95 + 0.21 * len(names))
    for (i, name), (j, step) in product(enumerate(names), enumerate(steps)):
        text, colour = "–", MUTED
        if (*name, step) in cells.index:
            collapsed, n = cells.loc[(*name, step)]
            share[i, j] = collapsed / n
            text, colour = f"{collapsed}/{n}", CELL_INK if collapsed else INK
        ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=colour, fontsize=6.5)
    _share_map(ax, share, [word(s) for s in steps], [_row_name(split, name) for name in names])
    n_collapsed = int(rows["collapsed"].sum())
    caption = (
        f"Collapsed runs of all adversarially trained ones ({n_collapsed} of {len(rows)}), by attack steps and "
        f"{', '.join(column(c).phrase for c in split)}; collapsed / all, darker is more. Collapsed: AutoAttack "
        f"accuracy below {COLLAPSE_RATIO} × clean."
    )
    return figure, caption


def _share_map(ax: Axes, share: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Cells from none (0) to all (1), the first row at the top; the columns are attack steps."""
    ax.pcolormesh(share, cmap=style.collapse_ramp(), vmin=0, vmax=1, edgecolors=PAPER, linewidth=1.5)
    ax.invert_yaxis()
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns)
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows)
    ax.set_xlabel("attack steps in training")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _natural(text: str) -> tuple[int, float, str]:
    return (0, float(text), "") if text.replace(".", "", 1).isdigit() else (1, 0.0, text)


def _row_name(columns: Sequence[str], key: Sequence[str]) -> str:
    """A row of the map, e.g. `TRADES, 400 ep., synthetic`."""
    return ", ".join(
        f"{v} ep." if c == "epochs" else column(c).level(v) if c == "loss" else "synthetic" if v == "yes" else "real"
        for c, v in zip(columns, key, strict=True)
    )


def risk_figure(predictor: Predictor) -> tuple[Figure, str] | None:
    """P(collapse) over attack steps and the choice that moves it most, beside the share that really collapsed. None
    where nothing collapsed or steps do not vary."""
    names = [c.name for c in predictor.features.columns]
    if predictor.n_collapsed == 0 or "steps" not in names or len(names) < 2:
        return None
    ranges = {name: float(np.ptp(predictor.partial(name).p_collapse)) for name in names if name != "steps"}
    other = max(ranges, key=lambda name: ranges[name])
    risk = predictor.collapse_map("steps", other)
    share = risk.p_collapse.T  # rows: the other choice
    figure, ax = style.new(COLUMN, 1.0 + 0.28 * len(share))
    for i, j in product(*map(range, share.shape)):
        n = risk.n[j, i]
        real = f"{risk.observed[j, i] * n:.0f}/{n}" if n else "no run"
        for text, below, size, colour in (
            (f"{share[i, j]:.0%}", 0.36, 6.8, CELL_INK),
            (f"({real})", 0.7, 5.4, CELL_SMALL),
        ):
            ax.text(j + 0.5, i + below, text, ha="center", va="center", fontsize=size, color=colour)
    _share_map(
        ax,
        share,
        [column("steps").level(v) for v in risk.first_values],
        [column(other).level(v) for v in risk.second_values],
    )
    ax.set_ylabel(column(other).phrase)
    caption = (
        f"P(collapse) by the default predictor ({predictor.n_runs} runs, {predictor.n_collapsed} collapsed), mean over "
        f"the table's other choices; in brackets the real runs: collapsed / all."
    )
    return figure, caption
