"""What each section of the page says about the runs, in words and formatted numbers; the laws' share is in said.py."""

from __future__ import annotations

from typing import Any

import pandas as pd

from robudget.columns import GROUPING, MAIN_COSTS
from robudget.report import labels
from robudget.report.figures.style import encode
from robudget.report.labels import known, quantity, word, write
from robudget.report.table import choices, how, name, total

FILTERS = (*GROUPING, "status")
BOARD = ("aa_acc", "clean_acc", *MAIN_COSTS, "parameters")


def head(rows: pd.DataFrame) -> str:
    """`319 runs · cifar10 · L∞ 8/255`."""
    datasets = [word(v) for v in rows["dataset"].dropna().unique()]
    threats = [
        labels.threat(norm, eps) for norm, eps in rows[["norm", "eps"]].drop_duplicates().itertuples(index=False)
    ]
    runs = f"{len(rows):,} run{'' if len(rows) == 1 else 's'}"
    return " · ".join([runs, *([", ".join(datasets)] if datasets else []), ", ".join(threats)])


def best(rows: pd.DataFrame) -> dict[str, Any] | None:
    """The run of the highest known AutoAttack accuracy; `rows` are sorted (table.ranked)."""
    row = rows.iloc[0]
    if not known(row["aa_acc"]):
        return None
    low, high = row["aa_acc_low"], row["aa_acc_high"]
    about = [f"Clean accuracy {write('clean_acc', row['clean_acc'])}."]
    spent = ", ".join(
        f"{write(c, row[c])} ({_source(row, c)})" if _source(row, c) else write(c, row[c])
        for c in ("train_flops_exact", "train_energy_kwh", "cost_usd")
        if known(row[c])
    )
    if spent:
        about.append(f"Training took {spent}.")
    about += _rivals(rows)
    images = f" on {int(row['n_eval']):,} images" if known(row["n_eval"]) else ""
    return {
        "accuracy": labels.percent(row["aa_acc"]),
        "interval": f"AutoAttack, 95% interval {labels.interval(low, high)}{images}",
        "choices": choices(row),
        "about": f"{name(row)}. {' '.join(about)}",
    }


def _rivals(rows: pd.DataFrame) -> list[str]:
    """How many runs lie within the best one's interval, and what the cheapest of them cost."""
    low = rows["aa_acc_low"].iloc[0]
    rivals = rows.iloc[1:][rows["aa_acc"].iloc[1:] >= low]
    if rivals.empty:
        return []
    also = "1 other run lies" if len(rivals) == 1 else f"{len(rivals)} other runs lie"
    said = [f"{also} within its interval: the order among them is not certain."]
    column = next((c for c in ("train_flops_exact", "train_flops_paper", "cost_usd") if rivals[c].notna().any()), None)
    if column is not None and rivals[column].min() < rows[column].iloc[0]:
        cheapest = rivals.loc[rivals[column].idxmin()]
        factor = rows[column].iloc[0] / cheapest[column]
        said.append(
            f"The cheapest, {name(cheapest)} ({labels.percent(cheapest['aa_acc'])}), took "
            f"{write(column, cheapest[column])}: "
            f"{labels.number(factor, 2)} times less."
        )
    return said


def _source(row: pd.Series, column: str) -> str | None:
    """How this run's value was obtained, where the table says."""
    source = quantity(column).how
    return str(row[source]) if source and known(row[source]) else None


def bill(rows: pd.DataFrame) -> dict[str, Any]:
    """What all runs cost, training and evaluation together, each with how it was obtained and for how many runs it is
    known."""
    items = (
        ("Time", "train_seconds", "eval_seconds"),
        ("Compute", "train_flops_exact", "eval_flops_exact"),
        ("Energy", "train_energy_kwh", "eval_energy_kwh"),
        ("Carbon", "co2_kg", "eval_co2_kg"),
        ("Electricity", "cost_usd", "eval_cost_usd"),
    )
    facts = []
    for title, training, evaluation in items:
        value, n = total(rows, training, evaluation)
        tested, m = total(rows, evaluation)
        parts = [f"evaluation {write(training, tested)} of it" if m else "training only"]
        if 0 < n < len(rows):
            parts.append(f"known for {n} of {len(rows)} runs")
        facts.append({
            "name": title, "value": write(training, value), "how": how(rows, training) if n else labels.UNKNOWN,
            "small": "; ".join(parts) if n else "",
        })  # fmt: skip
    note = (
        "Energy is at the plug of the machine. Runs side by side share a clock, so their times add up to more than the "
        "wait."
    )
    return {"facts": facts, "note": note}


def board_columns(rows: pd.DataFrame) -> list[dict[str, str]]:
    """The leaderboard's number columns: those that any run knows."""
    return [
        {
            "column": c,
            "text": quantity(c).short,
            "title": quantity(c).axis,
            "first": "down" if c in ("aa_acc", "clean_acc") else "up",
        }
        for c in BOARD
        if c == "aa_acc" or rows[c].notna().any()
    ]


def board_row(row: pd.Series, columns: list[dict[str, str]], among: set[str]) -> dict[str, Any]:
    cells = []
    for column in (c["column"] for c in columns):
        cell: dict[str, Any] = {"text": write(column, row[column]).removesuffix(" FLOP")}
        source = _source(row, column)
        if source and known(row[column]):
            cell["how"] = source
        if column == "aa_acc" and known(row["aa_acc_low"]):
            cell["small"] = labels.interval(row["aa_acc_low"], row["aa_acc_high"])
        cells.append(cell)
    return {
        "name": name(row), "choices": " · ".join(choices(row, among)), "cells": cells, "status": word(row["status"]),
        "collapsed": bool(row["collapsed"]),
    }  # fmt: skip


def filters(rows: pd.DataFrame) -> list[dict[str, Any]]:
    out = []
    for column in FILTERS:
        values = list(encode(column, list(rows[column])))
        if len(values) > 1:
            out.append({"column": column, "label": labels.feature(column), "values": values})
    return out


UNITS = (
    ("cost_usd", 1.0, "$ of electricity"),
    ("train_energy_kwh", 1.0, "kWh"),
    ("train_energy_kwh", 1e-3, "Wh"),
    ("co2_kg", 1.0, "kg CO₂e"),
    ("co2_kg", 1e-3, "g CO₂e"),
    ("train_flops_exact", 1.0, "FLOP (exact)"),
    ("train_flops_paper", 1.0, "FLOP (paper)"),
    ("train_seconds", 3600.0, "hours"),
    ("train_seconds", 1.0, "seconds"),
)


def planner(rows: pd.DataFrame) -> dict[str, Any]:
    """The planner's units, and what it opens with: the median run's cost in the first unit that makes it handy."""
    units = [{"column": c, "factor": f, "text": text} for c, f, text in UNITS if rows[c].notna().any()]
    costs = dict.fromkeys(c for c, _, _ in UNITS if rows[c].notna().any())
    column, factor, start = "", 1.0, ""
    for c, f, _ in UNITS:
        middle = float(rows[c].median()) / f
        if 0.1 <= middle < 1e5:
            column, factor, start = c, f, f"{float(f'{middle:.2g}'):g}"
            break
    top = rows["aa_acc"].median()
    return {
        "units": units, "column": column, "factor": factor, "amount": start,
        "costs": [{"column": c, "label": quantity(c).phrase} for c in costs],
        "target": f"{top:.0f}" if known(float(top)) else "",
    }  # fmt: skip
