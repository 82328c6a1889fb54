"""Numbers and words as a reader sees them."""

from __future__ import annotations

import math

import pytest

from robudget import formats
from robudget.columns import QUANTITIES, column
from robudget.report import words


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
    assert formats.number(value) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
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
def test_columns_are_written_with_their_unit(name: str, value: float, text: str) -> None:
    assert column(name).write(value) == text


@pytest.mark.parametrize("name", [*QUANTITIES, "something_else"])
@pytest.mark.parametrize("value", [None, math.nan])
def test_unknown_is_said_and_never_zero(name: str, value: float | None) -> None:
    assert column(name).write(value) == "unknown"


def test_intervals_say_which_end_is_unknown() -> None:
    assert formats.interval(59.2, 61.1) == "[59.2, 61.1]"
    assert formats.interval(59.2, math.nan) == "[59.2, unknown]"
    assert formats.interval(None, None) == "unknown"
    assert formats.fixed(-0.04, 1, signed=True) == "−0.0"
    assert formats.percent(math.nan) == "unknown"


def test_choices_as_words() -> None:
    assert [formats.word(v) for v in (True, False, 5.0, 0.995, "trades", None, math.nan)] == [
        "yes", "no", "5", "0.995", "trades", "unknown", "unknown",
    ]  # fmt: skip
    assert column("loss").level("trades") == "TRADES"
    assert column("model").level("trades") == "trades"
    assert words.threat("linf", 8 / 255) == "L∞ 8/255"
    assert words.threat("l2", math.nan) == "L2"
    assert words.formula("y = E − A·x^−α") == "y = E − A·x⁻ᵅ"
