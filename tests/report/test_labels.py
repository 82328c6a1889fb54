"""Numbers and words as a reader sees them."""

from __future__ import annotations

import math

import pytest

from robudget.columns import QUANTITIES
from robudget.report import labels


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1,234"),
        (12.345, "12.3"),
        (0.00123, "0.00123"),
        (0.000012, "1.20×10⁻⁵"),
        (2.35e21, "2.35×10²¹"),
        (9.999e5, "1.00×10⁶"),
        (-0.0041, "−0.00410"),
        (math.nan, "unknown"),
        (math.inf, "unknown"),
        (None, "unknown"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert labels.number(value) == text


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("train_seconds", 0.5, "0.500 s"),
        ("train_seconds", 90, "1.50 min"),
        ("train_seconds", 7200, "2.00 h"),
        ("train_energy_kwh", 0.0123, "12.3 Wh"),
        ("co2_kg", 0.0333, "33.3 g CO₂e"),
        ("cost_usd", 0.0112, "$0.011"),
        ("cost_usd", 2565.478, "$2,565.48"),
        ("cost_usd", 0.0, "$0.00"),
        ("train_flops_exact", 1e18, "1.00×10¹⁸ FLOP"),
        ("parameters", 36_479_194, "36.5 M"),
        ("aa_acc", 60.14, "60.1%"),
        ("something_else", 3.0, "3.00"),
    ],
)
def test_columns_are_written_with_their_unit(column: str, value: float, text: str) -> None:
    assert labels.write(column, value) == text


@pytest.mark.parametrize("column", [*QUANTITIES, "something_else"])
@pytest.mark.parametrize("value", [None, math.nan])
def test_unknown_is_said_and_never_zero(column: str, value: float | None) -> None:
    assert labels.write(column, value) == "unknown"


def test_intervals_say_which_end_is_unknown() -> None:
    assert labels.interval(59.2, 61.1) == "[59.2, 61.1]"
    assert labels.interval(59.2, math.nan) == "[59.2, unknown]"
    assert labels.interval(None, None) == "unknown"
    assert labels.fixed(-0.04, 1, signed=True) == "−0.0"
    assert labels.percent(math.nan) == "unknown"


def test_choices_as_words() -> None:
    assert [labels.word(v) for v in (True, False, 5.0, 0.995, "trades", None, math.nan)] == [
        "yes", "no", "5", "0.995", "trades", "unknown", "unknown",
    ]  # fmt: skip
    assert labels.choice("loss", "trades") == "TRADES"
    assert labels.choice("model", "trades") == "trades"
    assert labels.threat("linf", 8 / 255) == "L∞ 8/255"
    assert labels.threat("l2", math.nan) == "L2"
    assert labels.formula("y = E − A·x^−α") == "y = E − A·x⁻ᵅ"
