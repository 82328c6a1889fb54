"""One's own runs beside a leaderboard of published models: parameters against accuracy, and where the best run stands.

Nobody published what those models' training cost, so parameters are the one x they share with a table of runs; models
of unknown size stand at the right edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robudget.columns import SCOPE, column
from robudget.errors import InputError
from robudget.formats import amount, known, percent
from robudget.report import style
from robudget.report.figure_files import Drawing
from robudget.report.style import BLUE, COLUMN, GREY, INK, ORANGE, PAPER
from robudget.report.words import Section, Table, entry_name

NEIGHBOURS = 5  # published models above and below the best run in the table
LABELLED = 2  # published models named in the figure, the best ones


def section(rows: pd.DataFrame, others: pd.DataFrame) -> Section:
    """Where the best run would stand among published models, with its neighbours there."""
    best = rows.iloc[int(np.nanargmax(rows["aa_acc"].to_numpy(dtype=np.float64)))]
    accuracy = float(best["aa_acc"])
    above = int((others["aa_acc"] > accuracy).sum())
    low, high = (float(best[c]) if known(best[c]) else accuracy for c in ("aa_acc_low", "aa_acc_high"))
    lead = (
        f"The best run, {percent(accuracy)}, would stand at place {above + 1} among {len(others)} published models of "
        f"this dataset and threat; {int(others['aa_acc'].between(low, high).sum())} of them lie within its interval."
    )
    near = others.iloc[max(0, above - NEIGHBOURS) : above + NEIGHBOURS]
    models = [row for _, row in pd.concat([others.head(1), near]).drop_duplicates("run_id").iterrows()]
    models = sorted([*models, best], key=lambda row: -row["aa_acc"])
    table = Table(
        "Published models around the best run",
        "RobustBench's entries of the same dataset and threat, and the best of these runs",
        ["model", "#AutoAttack", "#clean", "#parameters", "data beside the training set"],
        [
            (
                "the best of these runs" if row is best else entry_name(str(row["run_id"])), percent(row["aa_acc"]),
                percent(row["clean_acc"]), amount(row["parameters"], "count"), _data(row),
            )
            for row in models
        ],
        note="What their training cost was not published: a place in this list says nothing about the price.",
    )  # fmt: skip
    return Section("others", "Beside others", "Beside published models", lead, [("others",), table])


def drawings(rows: pd.DataFrame, others: pd.DataFrame) -> Iterator[Drawing]:
    yield Drawing("others", "Beside published models", lambda: others_figure(rows, others))


def beside(rows: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The published models of the runs' own dataset and threat, the best first. Raises InputError where the runs mix
    several, or no published model has theirs."""
    others = others[others["aa_acc"].notna()]
    for name in SCOPE:
        values = rows[name].dropna().unique()
        if len(values) > 1:
            raise InputError(f"the runs mix {len(values)} values of {name}: select one to set published models beside")
        if len(values) == 0 or name not in others.columns:
            continue
        published = sorted({str(v) for v in others[name].unique()})
        if name == "eps":
            others = others[np.isclose(others[name].to_numpy(dtype=np.float64), float(values[0]))]
        else:
            others = others[(others[name] == values[0]).to_numpy(dtype=bool)]
        if others.empty:
            raise InputError(f"no published model has {name} = {values[0]} (found: {', '.join(published)})")
    return others.sort_values("aa_acc", ascending=False, kind="stable").reset_index(drop=True)


def others_figure(rows: pd.DataFrame, others: pd.DataFrame) -> tuple[Figure, str] | None:
    """Parameters against AutoAttack accuracy, runs and published models. None where no run's size is known."""
    adversarial = (rows["loss"] != "standard") & ~rows["collapsed"]
    mine = rows[rows["parameters"].notna() & rows["aa_acc"].notna() & adversarial]
    if mine.empty:
        return None
    figure, ax = style.new(COLUMN, 2.7)
    more = (others["synthetic"].fillna(False) | others["extra_data"].fillna(False)).to_numpy(dtype=bool)
    sized = others["parameters"].notna().to_numpy(dtype=bool)
    for mask, colour, marker in ((~more, GREY, "s"), (more, ORANGE, "^")):
        known_size, unsized = others[mask & sized], others[mask & ~sized]
        ax.scatter(
            known_size["parameters"], known_size["aa_acc"], s=12, marker=marker, facecolors="none", edgecolors=colour,
            lw=0.8,
        )  # fmt: skip
        ax.plot(
            np.full(len(unsized), 0.985), unsized["aa_acc"], transform=ax.get_yaxis_transform(), ls="", marker="_",
            ms=6, color=colour, mew=0.9,
        )  # fmt: skip
    ax.scatter(mine["parameters"], mine["aa_acc"], s=9, c=BLUE, alpha=0.6, lw=0, zorder=3)
    style.log_x(ax)
    best = float(mine["aa_acc"].max())
    ax.axhline(best, color=BLUE, lw=0.7, ls=(0, (4, 2)), zorder=0)
    ax.set_xlabel(column("parameters").axis)
    ax.set_ylabel(column("aa_acc").axis)
    top = max(best, float(others["aa_acc"].max()))
    ax.set_ylim(max(0.0, min(float(mine["aa_acc"].min()), best - 25)), top + 4)
    for _, row in others[sized].head(LABELLED).iterrows():
        ax.annotate(
            entry_name(str(row["run_id"])), (row["parameters"], row["aa_acc"]), xytext=(-4, 1), ha="right",
            va="bottom", textcoords="offset points", fontsize=5.5, color=INK,
        )  # fmt: skip
    style.grid(ax)
    style.legend_above(
        figure,
        [
            [
                style.key("o", BLUE, f"these runs ({len(mine)})", 3.8),
                Line2D([], [], color=BLUE, lw=0.7, ls=(0, (4, 2)), label="best of these runs"),
            ],
            [
                style.key("s", GREY, f"published, no more data ({int((~more).sum())})", 3.8, fill=PAPER),
                style.key("^", ORANGE, f"extra or synthetic ({int(more.sum())})", 3.8, fill=PAPER),
            ],
        ],
    )
    hidden = int((others["aa_acc"] < ax.get_ylim()[0]).sum())
    caption = (
        f"{len(mine)} runs (collapsed ones left out) beside {len(others)} published models of RobustBench, same "
        f"dataset and threat. Dashes at the right edge: {int((~sized).sum())} published models of unknown size"
        f"{f'; {hidden} published models lie below the axis' if hidden else ''}. What their training cost was not "
        f"published."
    )
    return figure, caption


def _data(row: pd.Series) -> str:
    images = row.get("synthetic_amount", math.nan)
    sources = []
    if known(row["synthetic"]) and row["synthetic"]:
        sources.append(f"{amount(images, 'count')} synthetic" if known(images) and images > 0 else "synthetic")
    if known(row.get("extra_data")) and row.get("extra_data"):
        sources.append("real images")
    return ", ".join(sources) or "none"
