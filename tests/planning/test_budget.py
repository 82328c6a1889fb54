"""Budgets as people write them."""

import pytest

from robudget.errors import InputError
from robudget.planning.cost_model import parse_budget


@pytest.mark.parametrize(
    ("text", "column", "amount"),
    [
        ("50usd", "cost_usd", 50),
        ("$50", "cost_usd", 50),
        ("1,000 USD", "cost_usd", 1000),
        ("100gpu-h", "gpu_hours", 100),
        ("100 GPU-hours", "gpu_hours", 100),
        ("2.5h", "train_seconds", 9000),
        ("20kWh", "train_energy_kwh", 20),
        ("500Wh", "train_energy_kwh", 0.5),
        ("5kgCO2e", "co2_kg", 5),
        ("800gCO2e", "co2_kg", 0.8),
        ("1e19flops", "train_flops_exact", 1e19),
        ("3.5 EFLOPs", "train_flops_exact", 3.5e18),
        (" .5kwh ", "train_energy_kwh", 0.5),
    ],
)
def test_amounts(text, column, amount):
    budget = parse_budget(text)
    assert (budget.column, budget.amount) == (column, pytest.approx(amount))
    assert budget.text == text.strip()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("50", "a number and a unit"),
        ("cheap", "a number and a unit"),
        ("-5usd", "a number and a unit"),
        ("0usd", "more than 0"),
        ("50eur", "unknown unit of a budget 'eur'"),
        ("5kwhs", "did you mean 'kwh'"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(InputError, match=message):
        parse_budget(text)
