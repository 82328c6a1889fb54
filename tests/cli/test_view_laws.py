"""What fit and plan print, as text: the numbers are the laws' own, in words and units."""

from __future__ import annotations

import io
import math

import numpy as np
import pandas as pd
import pytest
from rich.console import Console, RenderableType

from robudget.analysis import analyse
from robudget.cli.view.laws import fit_text, plan_text
from robudget.planning import plan
from robudget.prediction import Predictor


def text_of(view: RenderableType) -> str:
    out = io.StringIO()
    Console(file=out, width=240, highlight=False).print(view)
    return out.getvalue()


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for size in (1e5, 1e6, 1e7):
        for loss in ("at", "trades"):
            for steps in (1, 2, 5, 10):
                for synthetic in (False, True):
                    flops = size * 1e6 * (2 * steps + (7 if loss == "trades" else 3))
                    acc = 20 + 3 * math.log10(size) + 4 * synthetic + 2 * (loss == "trades") + math.log2(steps)
                    rows.append({
                        "run_id": f"r{len(rows)}", "dataset": "digits", "norm": "linf", "eps": 0.1, "parameters": size,
                        "loss": loss, "steps": steps, "synthetic": synthetic, "clean_acc": 90.0, "images_seen": 1e6,
                        "aa_acc": acc + rng.normal(0, 0.1), "train_flops_exact": flops,
                        "train_energy_kwh": flops * 1e-14 * math.exp(rng.normal(0, 0.05)),
                    })  # fmt: skip
    return pd.DataFrame(rows).assign(cost_usd=lambda t: 0.2 * t.train_energy_kwh)


@pytest.fixture(scope="module")
def predictor(table: pd.DataFrame) -> Predictor:
    return Predictor.fit(table, repeats=1, groups=[])


def test_fit_says_what_the_headline_is_worth(table: pd.DataFrame) -> None:
    found = analyse(table, resamples=50, predict=False)
    text = text_of(fit_text(found))
    for line in (found.answer, *found.support, found.law.sentence(), *found.trust):
        assert line in text
    assert text.startswith(found.answer)
    brief = text_of(fit_text(found, brief=True))
    assert brief.splitlines() == [found.answer, *found.support]
    assert "hidden RMSE" in text
    for held in found.holdouts:
        assert f"{held.miss('last value').rmse:.2f}" in text


def test_a_plan_prices_everything(table: pd.DataFrame, predictor: Predictor) -> None:
    made = plan(table, budget="1e13flops", predictor=predictor)
    text = text_of(plan_text(made))
    best = made.options[0]
    assert text.startswith(f"For 1e13flops train {best.name()}")
    assert f"Recipes for 1e13flops ({made.n_candidates} considered; 90% intervals)" in text
    assert f"{best.nearest[0][0]} {best.nearest[0][1]:.1f}%" in text
    for name in ("Training compute", "Training energy", "Electricity cost"):
        assert name in text
    assert made.next_point is not None
    assert "the next point, more" in text
    assert "By more compute alone (a point more than the best run" in text
    assert "no synthetic data" in text or "synthetic data" in text


def test_a_plan_that_nothing_reaches(table: pd.DataFrame, predictor: Predictor) -> None:
    made = plan(table, target=95, predictor=predictor)
    text = text_of(plan_text(made))
    assert "The nearest to it: " in text
    assert "No recipe at tried levels is predicted a point better." in text
    assert text.startswith("No run reached 95% (the best of 48, ")
    assert "no recipe made of these choices is predicted to; the nearest recipe is" in text
    assert "Recipes for" not in text


def test_the_brief_plan_is_the_answer_and_what_it_stands_on(table: pd.DataFrame, predictor: Predictor) -> None:
    made = plan(table, budget="1e13flops", predictor=predictor)
    text = text_of(plan_text(made, brief=True))
    lines = [made.sentence(), *made.support(), *(f"note: {w}" for w in made.warnings)]
    assert text.split() == " ".join(lines).split()
    assert "Recipes for" not in text


def test_the_chance_of_reaching_a_target_is_shown(table: pd.DataFrame, predictor: Predictor) -> None:
    text = text_of(plan_text(plan(table, target=42, predictor=predictor)))
    assert "P(reach)" in text
