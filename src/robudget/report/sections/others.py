"""One's own runs beside a leaderboard of published models: parameters against accuracy, and where the best run stands.

Nobody published what those models' training cost, so parameters are the one x they share with a table of runs; models
of unknown size stand at the right edge.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robudget.columns import SCOPE
from robudget.errors import InputError
from robudget.report import labels
from robudget.report.figures import style
from robudget.report.figures.runs import is_collapsed
from robudget.report.figures.style import BLUE, COLUMN, GREY, INK, ORANGE, PAPER
from robudget.report.labels import count, known, percent
from robudget.report.sections.evidence import table

SHOWN = 5  # published models above and below the best run in the table
NAMED = 2  # published models labelled in the figure, the best ones


def beside(rows: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The published models of the runs' own dataset and threat, the best first. Raises InputError where the runs mix
    several, or no published model has theirs."""
    kept = others[others["aa_acc"].notna()]
    for name in SCOPE:
        found = rows[name].dropna().unique()
        if len(found) > 1:
            raise InputError(f"the runs mix {len(found)} values of {name}: select one to set published models beside")
        if len(found) == 0 or name not in kept.columns:
            continue
        there = sorted({str(v) for v in kept[name].unique()})
        if name == "eps":
            kept = kept[np.isclose(kept[name].to_numpy(dtype=np.float64), float(found[0]))]
        else:
            kept = kept[(kept[name] == found[0]).to_numpy(dtype=bool)]
        if kept.empty:
            raise InputError(f"no published model has {name} = {found[0]} (found: {', '.join(there)})")
    return kept.sort_values("aa_acc", ascending=False, kind="stable").reset_index(drop=True)


def figure(rows: pd.DataFrame, others: pd.DataFrame) -> tuple[Figure, str] | None:
    """Parameters against AutoAttack accuracy, runs and published models. None where no run's size is known."""
    mine = rows[
        rows["parameters"].notna() & rows["aa_acc"].notna() & ~is_collapsed(rows) & (rows["loss"] != "standard")
    ]
    if mine.empty:
        return None
    drawing, ax = style.new(COLUMN, 2.7)
    more = (others["synthetic"].fillna(False) | others["extra_data"].fillna(False)).to_numpy(dtype=bool)
    sized = others["parameters"].notna().to_numpy(dtype=bool)
    for mask, colour, marker in ((~more, GREY, "s"), (more, ORANGE, "^")):
        seen, unsized = others[mask & sized], others[mask & ~sized]
        ax.scatter(
            seen["parameters"], seen["aa_acc"], s=12, marker=marker, facecolors="none", edgecolors=colour, lw=0.8
        )
        ax.plot(
            np.full(len(unsized), 0.985), unsized["aa_acc"], transform=ax.get_yaxis_transform(), ls="", marker="_",
            ms=6, color=colour, mew=0.9,
        )  # fmt: skip
    ax.scatter(mine["parameters"], mine["aa_acc"], s=9, c=BLUE, alpha=0.6, lw=0, zorder=3)
    style.log_x(ax)
    best = float(mine["aa_acc"].max())
    ax.axhline(best, color=BLUE, lw=0.7, ls=(0, (4, 2)), zorder=0)
    ax.set_xlabel(labels.quantity("parameters").axis)
    ax.set_ylabel("AutoAttack accuracy (%)")
    top = max(best, float(others["aa_acc"].max()))
    ax.set_ylim(max(0.0, min(float(mine["aa_acc"].min()), best - 25)), top + 4)
    for _, row in others[sized].head(NAMED).iterrows():
        ax.annotate(
            labels.short(str(row["run_id"])), (row["parameters"], row["aa_acc"]), xytext=(-4, 1), ha="right",
            va="bottom", textcoords="offset points", fontsize=5.5, color=INK,
        )  # fmt: skip
    style.grid(ax)
    style.legend_above(
        drawing,
        [
            [_key("o", BLUE, BLUE, f"these runs ({len(mine)})"), _line()],
            [
                _key("s", GREY, "none", f"published, no more data ({int((~more).sum())})"),
                _key("^", ORANGE, "none", f"extra or synthetic ({int(more.sum())})"),
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
    return drawing, caption


def _key(marker: str, edge: str, face: str, label: str) -> Line2D:
    return Line2D([], [], marker=marker, mec=edge, mfc=PAPER if face == "none" else face, ls="", ms=3.8, label=label)


def _line() -> Line2D:
    return Line2D([], [], color=BLUE, lw=0.7, ls=(0, (4, 2)), label="best of these runs")


def standing(rows: pd.DataFrame, others: pd.DataFrame) -> dict[str, Any]:
    """The page's section: where the best run would stand among published models, with its neighbours there."""
    best = rows.iloc[int(np.nanargmax(rows["aa_acc"].to_numpy(dtype=np.float64)))]
    accuracy = float(best["aa_acc"])
    above = int((others["aa_acc"] > accuracy).sum())
    low = float(best["aa_acc_low"]) if known(best["aa_acc_low"]) else accuracy
    high = float(best["aa_acc_high"]) if known(best["aa_acc_high"]) else accuracy
    level = int(((others["aa_acc"] >= low) & (others["aa_acc"] <= high)).sum())
    lead = (
        f"The best run, {percent(accuracy)}, would stand at place {above + 1} among {len(others)} published models of "
        f"this dataset and threat; {level} of them lie within its interval."
    )
    near = others.iloc[max(0, above - SHOWN) : above + SHOWN]
    shown = pd.concat([others.head(1), near]).drop_duplicates("run_id")
    cells = [
        (
            float(row["aa_acc"]),
            (
                labels.short(str(row["run_id"])), percent(row["aa_acc"]), percent(row["clean_acc"]),
                count(row["parameters"]), _data(row),
            ),
        )
        for _, row in shown.iterrows()
    ]  # fmt: skip
    mine = (
        "the best of these runs",
        percent(accuracy),
        percent(best["clean_acc"]),
        count(best["parameters"]),
        _data(best),
    )
    cells.append((accuracy, mine))
    cells.sort(key=lambda pair: -pair[0])
    about = table(
        "Published models around the best run",
        "RobustBench's entries of the same dataset and threat, and the best of these runs",
        ["model", "#AutoAttack", "#clean", "#parameters", "data beside the training set"],
        [row for _, row in cells],
        note="What their training cost was not published: a place in this list says nothing of the price.",
    )
    return {"lead": lead, "tables": [about], "warnings": []}


def _data(row: pd.Series) -> str:
    amount = row.get("synthetic_amount", math.nan)
    said = []
    if known(row["synthetic"]) and row["synthetic"]:
        said.append(f"{count(amount)} synthetic" if known(amount) and amount > 0 else "synthetic")
    if known(row.get("extra_data")) and row.get("extra_data"):
        said.append("real images")
    return ", ".join(said) or "none"
