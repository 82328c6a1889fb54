"""The registry of columns says of each the same as the code that fills them."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from robudget import columns
from robudget.columns import COLUMNS, column, stored
from robudget.meter.prices import Prices
from robudget.recipe import Recipe
from robudget.store import RunFolder
from robudget.tables.read import _GPUS, _SYNTHETIC, _bills, _facts

RECIPE = Recipe()


def test_a_store_fills_every_column_and_no_other(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.finish({"recipe": RECIPE.to_dict(), "status": "done"})
    facts = _facts(folder.record(), str(tmp_path))
    row = facts | _bills(facts, Prices()) | {"path": ""}
    assert sorted(row.keys() - {_GPUS, _SYNTHETIC}) == sorted(stored())


def test_what_a_recipe_gives_is_known_before_training() -> None:
    row = RECIPE.to_row()
    assert {COLUMNS[name].kind for name in row} == {"identity", "scope", "choice"}
    assert set(stored("scope", "choice")) == set(row) - {"run_id", "slug"}
    assert math.isnan(row["beta"])
    assert row["steps"] == 10


def test_columns_name_columns() -> None:
    for c in COLUMNS.values():
        named = (c.how, c.evaluation, c.complement, c.images, c.switch)
        assert {name for name in named if name} <= set(COLUMNS), c.name
        assert c.how is None or COLUMNS[c.how].kind == "how", c.name
        assert c.evaluation is None or COLUMNS[c.evaluation].kind == "evaluation cost", c.name
    assert set(columns.FEATURES) <= {*stored("choice", "size")}


def test_a_column_has_one_name_in_three_forms() -> None:
    energy = column("train_energy_kwh")
    assert (energy.phrase, energy.label, energy.axis) == (
        "training energy", "Training energy", "Training energy (kWh)",
    )  # fmt: skip
    assert column("beta").label == "β"
    assert column("aa_acc").phrase == "AutoAttack accuracy"
    assert column("parameters").axis == "Parameters"
    assert column("my_own").axis == "My own"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", "trades", "TRADES"),
        ("activation", "silu", "SiLU"),
        ("ema", True, "yes"),
        ("steps", 5.0, "5"),
        ("parameters", 36_479_194, "36.5 M"),
        ("beta", math.nan, "unknown"),
    ],
)
def test_levels_of_a_choice(name: str, value: object, text: str) -> None:
    assert column(name).level(value) == text


def test_units_of_budgets_are_unambiguous() -> None:
    units = [unit.lower() for c in COLUMNS.values() for unit, _ in c.budget]
    assert len(units) == len(set(units))
    assert all(column(name).budget_unit != name for name in columns.COSTS)


def test_columns_import_neither_torch_nor_pandas() -> None:
    code = "import robudget.columns, sys; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
