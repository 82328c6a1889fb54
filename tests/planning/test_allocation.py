"""Where the next unit of compute should go, by regime."""

import json

import numpy as np
import pandas as pd
import pytest

from robudget.planning.allocation import allocation

BEST = {"model": "wrn-34-20", "synthetic": True, "activation": "silu", "loss": "at", "steps": 5, "ema": False}


def moves(found):
    return {m.effect.change(): m for m in found.moves}


def test_the_published_table(paper):
    found = allocation(paper, BEST, "cost_usd")
    assert (found.held, found.steps, found.n_runs) == ((("synthetic", True),), (5, 7, 10), 96)
    bought = moves(found)
    size = bought["model wrn-28-10 → wrn-70-16"]
    steps = bought["attack steps 5 → 10"]
    length = bought["EMA no → yes"]
    assert [round(m.effect.gain, 1) for m in (size, steps, length)] == [2.3, 0.2, -0.2]
    assert length.effect.came_with() == "epochs 110 → 400, CutMix no → yes"
    assert all(m.spends for m in (size, steps, length))
    assert (size.effect.low, size.effect.high) == pytest.approx((2.1, 2.4), abs=0.05)
    assert size.effect.cost_ratio == pytest.approx(7.1, abs=0.1)
    assert size.per_doubling == pytest.approx(2.27 / np.log2(size.effect.cost_ratio), abs=0.01)
    assert (size.from_here, steps.from_here, bought["model wrn-34-20 → wrn-70-16"].from_here) == (False, True, True)
    # What is held is no pair in its own regime: its gain is that at the recipe's size.
    data = bought["synthetic data no → yes"].effect
    assert data.gain > 12
    here, whole = found.sentences()
    assert here.startswith(
        "The next steps from here, with synthetic data yes and attack steps 5, 7, 10 (at which no run"
    )
    for text in ("wrn-28-10 → wrn-70-16 +2.3 points [2.1, 2.4]", "attack steps 5 → 10 +0.2", "CutMix no → yes) −0.2"):
        assert text in whole
    json.dumps(found.to_dict(), allow_nan=False)


def test_another_regime_another_answer(paper):
    """Without synthetic data a larger model buys nothing."""
    found = allocation(paper, BEST | {"synthetic": False}, "cost_usd")
    assert found.held == (("synthetic", False),)
    assert moves(found)["model wrn-28-10 → wrn-70-16"].effect.high < 0


def test_planted_gains_and_prices(grid):
    found = allocation(
        grid, {"model": "wrn-16-2", "loss": "at", "steps": 2, "synthetic": True, "ema": False}, "train_flops_exact"
    )
    assert found.steps == (2, 5)
    assert found.held == ()
    bought = moves(found)
    assert bought["attack steps 2 → 5"].effect.gain == pytest.approx(3 * np.log2(2.5), abs=0.15)
    ratio = np.sqrt((13 / 7) * (17 / 11))  # of passes, over both losses
    assert bought["attack steps 2 → 5"].effect.cost_ratio == pytest.approx(ratio, rel=0.01)
    assert np.isnan(bought["synthetic data no → yes"].per_doubling)  # costs no more
    assert bought["attack steps 2 → 5"].words().endswith("times the cost")


def test_too_few_pairs():
    runs = pd.DataFrame({"aa_acc": [50.0] * 3, "steps": [1, 2, 5], "loss": "at", "cost_usd": 1.0})
    assert allocation(runs, {"steps": 2}, "cost_usd") is None
