"""What each section of the page says about the runs, in words and formatted numbers; the laws' share is in said.py."""

from __future__ import annotations

from typing import Any

import pandas as pd

from robudget.report import labels
from robudget.report.labels import known, quantity, word, write
from robudget.report.style import encode
from robudget.report.table import choices, how, name, total

FILTERS = ("loss", "model", "steps", "synthetic", "status")
BOARD = (
    "aa_acc",
    "clean_acc",
    "train_flops_exact",
    "train_energy_kwh",
    "cost_usd",
    "co2_kg",
    "train_seconds",
    "parameters",
)


def head(rows: pd.DataFrame) -> str:
    """`319 runs · cifar10 · L∞ 8/255`."""
    datasets = [word(v) for v in rows["dataset"].dropna().unique()]
    threats = [
        labels.threat(norm, eps) for norm, eps in rows[["norm", "eps"]].drop_duplicates().itertuples(index=False)
    ]
    runs = f"{len(rows):,} run{'' if len(rows) == 1 else 's'}"
    return " · ".join([runs, *([", ".join(datasets)] if datasets else []), ", ".join(threats)])


def best(rows: pd.DataFrame) -> dict[str, Any] | None:
    """The run of the highest known AutoAttack accuracy; `rows` are sorted (table.complete)."""
    row = rows.iloc[0]
    if not known(row["aa_acc"]):
        return None
    low, high = row["aa_acc_low"], row["aa_acc_high"]
    about = [f"Clean accuracy {write('clean_acc', row['clean_acc'])}."]
    spent = ", ".join(
        f"{write(c, row[c])} ({row[quantity(c).how]})" if row[quantity(c).how] else write(c, row[c])
        for c in ("train_flops_exact", "train_energy_kwh", "cost_usd")
        if known(row[c])
    )
    if spent:
        about.append(f"Training took {spent}.")
    second = rows.iloc[1] if len(rows) > 1 else None
    if second is not None and known(second["aa_acc"]) and known(low) and second["aa_acc"] >= low:
        rivals = int((rows["aa_acc"] >= low).sum()) - 1
        also = "1 other run lies" if rivals == 1 else f"{rivals} other runs lie"
        about.append(f"{also} within its interval: the order among them is not certain.")
    images = f" on {int(row['n_eval']):,} images" if known(row["n_eval"]) else ""
    return {
        "accuracy": labels.percent(row["aa_acc"]),
        "interval": f"AutoAttack, 95% interval {labels.interval(low, high)}{images}",
        "choices": choices(row),
        "about": f"{name(row)}. {' '.join(about)}",
    }


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
    note = "Energy is at the plug of the machine. Runs side by side share a clock, so their times add up to more than the wait."
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


def board_row(row: pd.Series, columns: list[dict[str, str]]) -> dict[str, Any]:
    cells = []
    for column in (c["column"] for c in columns):
        cell: dict[str, Any] = {"text": write(column, row[column])}
        source = quantity(column).how
        if source and known(row[column]) and known(row[source]):
            cell["how"] = str(row[source])
        if column == "aa_acc" and known(row["aa_acc_low"]):
            cell["small"] = labels.interval(row["aa_acc_low"], row["aa_acc_high"])
        cells.append(cell)
    said = " · ".join(choices(row))
    return {
        "name": name(row), "choices": said, "cells": cells, "status": word(row["status"]),
        "collapsed": bool(row["collapsed"]), "text": f"{name(row)} {said} {row['run_id']}".lower(),
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
    """The planner's units and what it opens with: the median run's cost in the first unit that makes it a handy number."""
    units = [{"column": c, "factor": f, "text": text} for c, f, text in UNITS if rows[c].notna().any()]
    costs = dict.fromkeys(c for c, _, _ in UNITS if rows[c].notna().any())
    chosen = {"column": "", "factor": 1.0, "amount": ""}
    for unit in units:
        amount = float(rows[unit["column"]].median()) / float(unit["factor"])
        if 0.1 <= amount < 1e5:
            chosen = {**unit, "amount": f"{float(f'{amount:.2g}'):g}"}
            break
    top = rows["aa_acc"].median()
    return {
        "units": units, "column": chosen["column"], "factor": chosen["factor"], "amount": chosen["amount"],
        "costs": [{"column": c, "label": quantity(c).name.lower()} for c in costs],
        "target": f"{top:.0f}" if known(float(top)) else "",
    }  # fmt: skip
