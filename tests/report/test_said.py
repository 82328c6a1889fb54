"""What the page says of the laws: the sentence, its honesty, and the tables' numbers."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest

from robudget.analysis import Analysis, analyse
from robudget.report.sections import evidence
from robudget.report.sections import laws as said
from robudget.report.sections import runs as sections
from robudget.report.table import ranked


def test_the_sentence_is_the_exponent(demo_analysis: Analysis) -> None:
    law = demo_analysis.law
    low, high = law.alpha_interval
    text = said.sentence(law)
    assert f"by {10**law.alpha:.3f} (95% interval {10**low:.3f} to {10**high:.3f})" in text
    best = law.envelope.ys.max()
    assert f"{best:.1f}%, +{best * (10**law.alpha - 1):.1f} points" in text


def test_no_points_are_promised_beyond_the_scale(demo_table: pd.DataFrame) -> None:
    demo_table["aa_acc"] = (demo_table["aa_acc"] * 1.9).clip(upper=99)
    steep = analyse(demo_table, resamples=100, predict=False)
    assert "points" not in said.sentence(steep.law)
    assert any("this law passes 99.5%" in w.lower() for w in said.answer(steep)["warnings"])


def test_losing_to_the_last_value_is_said_once_and_first_hand(demo_analysis: Analysis) -> None:
    hidden = demo_analysis.holdouts[0]
    worse = tuple(dataclasses.replace(m, beats_baseline=False) for m in hidden.misses)
    lost = dataclasses.replace(hidden, misses=worse)
    others = [w for w in demo_analysis.warnings if "extrapolate" not in w]
    beaten = dataclasses.replace(demo_analysis, holdouts=(lost,), warnings=(*others, *lost.warnings()))
    warnings = said.answer(beaten)["warnings"]
    assert sum("extrapolate" in w for w in warnings) == 1
    assert not any(w.startswith("Hiding the top") for w in warnings)


def test_without_an_analysis_every_section_says_so(demo_table: pd.DataFrame) -> None:
    rows = ranked(demo_table)
    assert "No law" in said.answer(None)["sentence"]
    for part in (said.drivers(None), said.laws(None), said.prices(None), said.collapse(rows, None)):
        assert part["lead"]
        assert part["tables"] == []
    assert said.curves(None) is None


def test_without_effects_and_predictor(demo_table: pd.DataFrame) -> None:
    bare = analyse(demo_table, resamples=50, predict=False)
    assert "too few runs" in said.drivers(bare)["lead"]
    assert said.laws(bare)["tables"]


def test_the_tables_hold_the_analysis(demo_analysis: Analysis) -> None:
    forms = evidence.forms(demo_analysis)
    assert forms["rows"][0][0]["text"] == "power"
    assert len(forms["rows"]) == len(demo_analysis.forms)
    assert len(evidence.costs(demo_analysis)["rows"]) == len(demo_analysis.costs)
    assert len(evidence.prices(demo_analysis)["rows"]) == len(demo_analysis.reaches)
    assert demo_analysis.effects is not None
    first = demo_analysis.effects.effects[0]
    row = evidence.effects(demo_analysis.effects)["rows"][0]
    assert row[1]["text"] == f"{first.gain:+.2f}".replace("-", "−")
    assert row[1]["small"] == evidence.interval(first.low, first.high, 2)
    for made in (forms, evidence.sensitivity(demo_analysis), evidence.splits(demo_analysis)):
        assert all(len(row) == len(made["head"]) for row in made["rows"])


def test_an_unreachable_price_is_not_a_number(demo_analysis: Analysis) -> None:
    never = dataclasses.replace(
        demo_analysis.reaches[0], value=math.inf, low=math.inf, high=math.inf, p_unreachable=1.0
    )
    rows = evidence.prices(dataclasses.replace(demo_analysis, reaches=(never,)))["rows"]
    assert rows[0][1] == {"text": "unreachable", "small": "never in 100% of resamples"}
    assert {cell["text"] for cell in rows[0][2:-1]} == {"–"}
    assert "out of reach" in said.prices(dataclasses.replace(demo_analysis, reaches=(never,)))["lead"]


def test_the_best_run_and_its_rivals(demo_table: pd.DataFrame) -> None:
    best = sections.best(ranked(demo_table))
    assert best is not None
    assert best["accuracy"] == "50.0%"
    rivals = int((demo_table["aa_acc"] >= demo_table["aa_acc_low"][29]).sum()) - 1
    assert f"{rivals} other runs lie within its interval" in best["about"]
    assert "times less" in best["about"]


@pytest.mark.parametrize(("rows", "text"), [(slice(0, 1), "1 run · "), (slice(0, 30), "30 runs · ")])
def test_the_head(demo_table: pd.DataFrame, rows: slice, text: str) -> None:
    assert sections.head(ranked(demo_table.iloc[rows])) == f"{text}digits · L∞ 0.1"
