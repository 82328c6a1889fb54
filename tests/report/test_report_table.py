"""The table as the report reads it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from robudget.errors import InputError
from robudget.report import table


def test_missing_columns_are_unknown_and_extra_ones_are_kept() -> None:
    few = pd.DataFrame({"aa_acc": [10.0, 50.0], "path": ["a", "b"]}, index=[7, 9])
    rows = table.fill(few)
    assert list(rows.index) == [7, 9]
    assert set(table.SHOWN) <= set(rows.columns)
    assert rows["cost_usd"].isna().all()
    assert list(rows["model"]) == [None, None]
    assert list(rows["path"]) == ["a", "b"]


def test_best_first_unknown_last(demo_table: pd.DataFrame) -> None:
    rows = table.ranked(demo_table)
    known = rows["aa_acc"].dropna()
    assert (known.diff().dropna() <= 0).all()
    assert math.isnan(rows["aa_acc"].iloc[-1])
    assert rows.index[-1] == 7
    assert sorted(rows.index) == list(range(30))


def test_infinities_are_unknown(demo_table: pd.DataFrame) -> None:
    demo_table.loc[0, "cost_usd"] = np.inf
    assert math.isnan(table.fill(demo_table)["cost_usd"].iloc[0])


def test_collapse_is_worked_out_where_the_table_does_not_say(demo_table: pd.DataFrame) -> None:
    said = demo_table["collapsed"]
    rows = table.fill(demo_table.drop(columns="collapsed"))
    assert list(rows["collapsed"]) == list(said)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"aa_acc": []}), "holds no run"),
        (pd.DataFrame({"accuracy": [1.0]}), "no column 'aa_acc'"),
        (pd.DataFrame({"aa_acc": ["high"]}), "does not hold numbers"),
    ],
)
def test_a_table_that_cannot_be_reported(frame: pd.DataFrame, message: str) -> None:
    with pytest.raises(InputError, match=message):
        table.ranked(frame)


def test_a_recipe_in_words(demo_table: pd.DataFrame) -> None:
    rows = table.fill(demo_table)
    assert list(table.choices(rows.iloc[9]).values()) == [
        "wrn-10-1", "SiLU", "TRADES, 5 steps, β 6", "synthetic data 70%", "EMA", "40 epochs", "seed 0",
    ]  # fmt: skip
    assert table.choices(rows.iloc[2])["loss"] == "AT, 1 step"
    assert table.choices(rows.iloc[0])["loss"] == "standard training"
    assert table.choices(rows.iloc[9])["loss"] == "TRADES, 5 steps, β 6"
    phrases = [table.choices(row) for _, row in rows.iterrows()]
    assert table.varying(rows, phrases) == {"model", "activation", "loss", "synthetic", "ema"}


def test_totals_count_what_is_known(demo_table: pd.DataFrame) -> None:
    rows = table.fill(demo_table)
    total, n = table.total(rows, "train_energy_kwh", "eval_energy_kwh")
    assert n == 29
    expected = demo_table["train_energy_kwh"].sum() + demo_table["eval_energy_kwh"].sum()
    assert total == pytest.approx(expected, rel=1e-12)
    assert math.isnan(table.total(rows.assign(co2_kg=np.nan), "co2_kg")[0])


def test_how_a_value_was_obtained(demo_table: pd.DataFrame) -> None:
    rows = table.fill(demo_table)
    assert table.how(rows, "train_energy_kwh") == "estimated"
    rows.loc[3, "train_energy_how"] = "measured"
    assert table.how(rows, "train_energy_kwh") == "estimated, measured"
    assert table.how(rows, "train_seconds") == "measured"
    assert table.how(table.fill(demo_table.drop(columns="path")), "train_seconds") == "unknown"
    assert table.how(rows, "parameters") == "unknown"
