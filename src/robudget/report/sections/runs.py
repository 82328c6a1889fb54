"""Every run: what the page's chart and planner know about them, and the table of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from robudget.analysis import Analysis
from robudget.columns import COSTS, GROUPING, MAIN_COSTS, QUANTITIES, column, stored
from robudget.errors import InputError
from robudget.files import to_plain
from robudget.formats import interval, known, word
from robudget.laws import Law, envelope
from robudget.laws.form_selection import Average
from robudget.report import style
from robudget.report.sections.extrapolation import FAR_DECADES
from robudget.report.table import SHOWN, choices, run_name, source, varying
from robudget.report.words import AVERAGE

X_AXES = (*COSTS, *stored("size"))
Y_AXES = ("aa_acc", "clean_acc", "val_acc")
LEADERBOARD = ("aa_acc", "clean_acc", *MAIN_COSTS, "parameters")
FILTERS = (*GROUPING, "status")
SYMBOLS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross", "X": "x",
    ".": "circle",
}  # fmt: skip
CURVE_POINTS = 121


# -- the table --------------------------------------------------------------------------------------------------------


def leaderboard(rows: pd.DataFrame) -> dict[str, Any]:
    """The table of runs: a column for each number that any run knows, a line a run, and what they can be filtered by.
    A line names the choices in which the runs differ."""
    names = [c for c in LEADERBOARD if c == "aa_acc" or rows[c].notna().any()]
    phrases = [choices(row) for _, row in rows.iterrows()]
    different = {"model", "loss"} | varying(rows, phrases)
    filters = {c: list(style.encode(c, list(rows[c]))) for c in FILTERS}
    return {
        "columns": [
            {"name": c, "text": column(c).short, "title": column(c).axis, "first": "up" if c in X_AXES else "down"}
            for c in names
        ],
        "lines": [
            {
                "name": run_name(row), "choices": " · ".join(text for c, text in run.items() if c in different),
                "status": word(row["status"]), "collapsed": bool(row["collapsed"]),
                "cells": [_cell(row, c) for c in names],
            }
            for run, (_, row) in zip(phrases, rows.iterrows(), strict=True)
        ],
        "filters": [{"column": c, "label": column(c).phrase, "values": v} for c, v in filters.items() if len(v) > 1],
    }  # fmt: skip


def _cell(row: pd.Series, name: str) -> dict[str, str]:
    bounded = name == "aa_acc" and known(row["aa_acc_low"])
    return {
        "text": column(name).write(row[name]).removesuffix(" FLOP"),
        "how": (source(row, name) or "") if known(row[name]) else "",
        "small": interval(row["aa_acc_low"], row["aa_acc_high"]) if bounded else "",
    }


# -- the chart --------------------------------------------------------------------------------------------------------


def payload(rows: pd.DataFrame, analysis: Analysis | None) -> dict[str, Any]:
    """What the page's script knows: the runs by column, their encodings, frontiers and laws. NaN is null."""
    frame = rows.reset_index(drop=True)
    xs = [x for x in X_AXES if (frame[x] > 0).any()]
    ys = [y for y in Y_AXES if frame[y].notna().any()]
    colours = [c for c in GROUPING if frame[c].map(word).nunique() > 1] or ["loss"]
    colours.sort(key=lambda c: c != "loss")  # what the chart opens with
    choice_words = {c: [word(v) for v in frame[c]] for c in dict.fromkeys([*colours, *FILTERS])}
    return {
        "n": len(frame),
        "runs": {c: to_plain(frame[c].tolist()) for c in SHOWN},
        "names": [run_name(row) for _, row in frame.iterrows()],
        "choices": [" · ".join(choices(row).values()) for _, row in frame.iterrows()],
        "words": choice_words,
        "axes": {
            "x": _labelled(xs),
            "y": _labelled(ys),
            "colours": [{"column": c, "label": column(c).phrase} for c in colours],
        },
        "encodings": {
            c: [
                {"value": v, "label": column(c).level(v), "colour": style.THEMED[colour], "symbol": SYMBOLS[marker]}
                for v, (colour, marker) in style.encode(c, list(frame[c])).items()
            ]
            for c in colours
        },
        "frontiers": {f"{x}|{y}": best for x in xs for y in ys if (best := _frontier(frame, x, y))},
        "law": law_curves(analysis),
        "quantities": {
            q.name: {"axis": q.axis, "short": q.short, "unit": q.unit, "how": q.how} for q in map(column, QUANTITIES)
        },
        "hover": [c for c in (*MAIN_COSTS, "parameters") if frame[c].notna().any()],
    }  # fmt: skip


def _labelled(names: Sequence[str]) -> list[dict[str, str]]:
    return [{"column": c, "label": column(c).axis} for c in names]


def _frontier(frame: pd.DataFrame, x: str, y: str) -> list[int]:
    """The runs that no run of the same or less x beats; none where the table mixes datasets or threats, since those do
    not compare."""
    try:
        return [int(i) for i in envelope(frame, x, y, how="pareto").rows]
    except InputError:
        return []


def law_curves(analysis: Analysis | None) -> dict[str, Any] | None:
    """Every law of the result over compute, then all of them together, as points on one grid for the page's script.

    `grids` hold the grid in compute (`x`) and in every cost that the analysis has a law of, `ranges` the range of the
    best runs in each: through the law of cost, a law over compute says something about money and energy too.
    """
    if analysis is None:
        return None
    env = analysis.envelope
    xs = np.geomspace(env.xs[0], env.xs[-1] * 10**FAR_DECADES, CURVE_POINTS)
    ends = env.xs[[0, -1]]
    grids, ranges = {analysis.x: _points(xs)}, {analysis.x: _points(ends)}
    for cost in analysis.costs:
        if cost.alpha > 0:
            grids[cost.y], ranges[cost.y] = _points(cost.predict(xs)), _points(cost.predict(ends))
    curves: list[tuple[str, Law | Average]] = [(f"{law.name} law", law) for law in analysis.forms]
    if analysis.average is not None:
        curves.append((f"{AVERAGE} of all forms", analysis.average))
    lines = []
    for line, law in curves:
        low, high = law.band(xs)
        lines.append({"name": line, "y": _points(law.predict(xs)), "low": _points(low), "high": _points(high)})
    return {
        "x": analysis.x, "y": analysis.y, "level": f"{analysis.law.level:.0%}", "grids": grids, "ranges": ranges,
        "lines": lines,
    }  # fmt: skip


def _points(values: np.ndarray) -> list[float | None]:
    """Six digits; unknown is null."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values]
