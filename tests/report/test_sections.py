"""What the page says about the laws: the sentence, its honesty, and the tables' numbers."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest

from robudget.analysis import Analysis, analyse
from robudget.formats import interval
from robudget.report.sections import answer, collapse, drivers, laws, next_point, runs
from robudget.report.table import ranked


def test_the_sentence_is_the_exponent(demo_analysis: Analysis) -> None:
    law = demo_analysis.law
    low, high = law.alpha_interval
    text = answer.sentence(law)
    assert f"by {10**law.alpha:.3f} (95% interval {10**low:.3f} to {10**high:.3f})" in text
    best = law.envelope.ys.max()
    assert f"{best:.1f}%, +{best * (10**law.alpha - 1):.1f} points" in text


def test_no_points_are_promised_beyond_the_scale(demo_table: pd.DataFrame) -> None:
    demo_table["aa_acc"] = (demo_table["aa_acc"] * 1.9).clip(upper=99)
    steep = analyse(demo_table, resamples=100, predict=False)
    assert "points" not in answer.sentence(steep.law)
    assert any("this law passes 99.5%" in w.lower() for w in answer.answer(steep)["warnings"])


def test_losing_to_the_last_value_is_said_once_and_first_hand(demo_analysis: Analysis) -> None:
    hidden = demo_analysis.holdouts[0]
    worse = tuple(dataclasses.replace(m, beats_baseline=False) for m in hidden.misses)
    lost = dataclasses.replace(hidden, misses=worse)
    others = [w for w in demo_analysis.warnings if "extrapolate" not in w]
    beaten = dataclasses.replace(demo_analysis, holdouts=(lost,), warnings=(*others, *lost.warnings()))
    warnings = answer.answer(beaten)["warnings"]
    assert sum("extrapolate" in w for w in warnings) == 1
    assert not any(w.startswith("Hiding the top") for w in warnings)


def test_without_an_analysis_every_section_says_so(demo_table: pd.DataFrame) -> None:
    rows = ranked(demo_table)
    assert "No law" in answer.answer(None)["sentence"]
    for section in (drivers, laws, next_point, collapse):
        part = section.section(rows, None)
        assert part.lead
        assert part.tables == []
    assert runs.law_curves(None) is None


def test_the_page_gives_the_answer_of_the_terminal(demo_analysis: Analysis) -> None:
    found = answer.answer(demo_analysis)
    assert found["sentence"] == demo_analysis.answer
    assert found["lines"][: len(demo_analysis.support)] == list(demo_analysis.support)
    assert any(line.startswith("The paper's law, fitted to the best run in each of") for line in found["lines"])


def test_without_effects_and_predictor(demo_table: pd.DataFrame) -> None:
    bare = analyse(demo_table, resamples=50, predict=False)
    rows = ranked(demo_table)
    assert "too few runs" in drivers.section(rows, bare).lead
    assert laws.section(rows, bare).tables


def test_the_tables_hold_the_analysis(demo_analysis: Analysis) -> None:
    forms = laws.forms_table(demo_analysis)
    assert forms.rows[0][0] == "power"
    assert len(forms.rows) == len(demo_analysis.forms)
    assert len(laws.costs_table(demo_analysis).rows) == len(demo_analysis.clocks) < len(demo_analysis.costs)
    assert len(next_point.prices_table(demo_analysis).rows) == len(demo_analysis.prices)
    assert demo_analysis.effects is not None
    first = demo_analysis.effects.effects[0]
    row = drivers.effects_table(demo_analysis.effects).rows[0]
    assert row[1] == (f"{first.gain:+.2f}".replace("-", "−"), interval(first.low, first.high, 2))
    for table in (forms, laws.sensitivity_table(demo_analysis), laws.splits_table(demo_analysis)):
        assert all(len(row) == len(table.head) for row in table.rows)


def test_a_price_that_cannot_be_given_is_not_a_number(demo_analysis: Analysis) -> None:
    never = dataclasses.replace(
        demo_analysis.prices[0], value=math.inf, low=math.inf, high=math.inf, p_beyond=1.0, verdict="cannot say"
    )
    beyond = dataclasses.replace(demo_analysis, prices=(never,))
    rows = next_point.prices_table(beyond).rows
    assert rows[0][1][0].startswith("more than ")
    assert rows[0][1][1] == "these runs cannot say"
    assert never.sentence() in next_point.section(ranked(demo_analysis.table), beyond).lead
    assert "these runs cannot say" in never.sentence()


def test_the_page_says_the_price_as_the_terminal_does(demo_analysis: Analysis) -> None:
    section = next_point.section(ranked(demo_analysis.table), demo_analysis)
    assert demo_analysis.prices[0].sentence() in section.lead


def test_the_best_run_and_its_rivals(demo_table: pd.DataFrame) -> None:
    best = answer.best(ranked(demo_table))
    assert best is not None
    assert best["accuracy"] == "50.0%"
    rivals = int((demo_table["aa_acc"] >= demo_table["aa_acc_low"][29]).sum()) - 1
    assert f"{rivals} other runs lie within its interval" in best["about"]
    assert "times less" in best["about"]


@pytest.mark.parametrize(("rows", "text"), [(slice(0, 1), "1 run · "), (slice(0, 30), "30 runs · ")])
def test_the_head(demo_table: pd.DataFrame, rows: slice, text: str) -> None:
    assert answer.head(ranked(demo_table.iloc[rows])) == f"{text}digits · L∞ 0.1"


def test_every_law_has_its_reporting_checklist(demo_analysis: Analysis) -> None:
    tables = [t for t in laws.section(demo_analysis.table, demo_analysis).tables if t.title.startswith("Reporting")]
    assert len(tables) == 1 + len(demo_analysis.clocks) + len(demo_analysis.published)
    answers = dict(tables[0].rows)
    assert demo_analysis.counts.sentence() in answers["Runs"]
    assert "weight of hardly any run near it" in answers["Frontier"]
    assert all("only form fitted" in dict(t.rows)["Form"] for t in tables[1:])


def test_small_runs_as_judges_are_on_the_page(demo_analysis: Analysis) -> None:
    judged = demo_analysis.small_runs
    assert judged is not None
    found = [t for t in drivers.section(demo_analysis.table, demo_analysis).tables if t.title == "Small runs as judges"]
    assert len(found) == 1
    assert len(found[0].rows) == len(judged.levels)
    assert judged.target_text() in found[0].caption
