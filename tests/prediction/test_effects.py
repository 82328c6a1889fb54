"""Matched pairs find what was planted."""

import json

import numpy as np
import pandas as pd
import pytest

from robudget.errors import InputError
from robudget.prediction import effects

PLANTED = {"synthetic": 4.0, "loss": 2.0, "ema": 1.0}


def test_planted_effects(grid):
    found = effects(grid, resamples=500)
    for name, worth in PLANTED.items():
        (one,) = found.of(name)
        assert one.gain == pytest.approx(worth, abs=0.15)
        assert one.low < worth < one.high
        assert one.n_pairs == 28  # 72 runs less 16 collapsed, in pairs
        assert one.n_all == 36
        assert one.better == 1
        assert one.collapse == 0
    sizes = found.of("parameters")
    assert [(e.before, e.after) for e in sizes if e.n_all] != []
    steps = {(e.before, e.after): e for e in found.of("steps")}
    assert steps[2, 5].gain == pytest.approx(3 * np.log2(2.5), abs=0.15)
    assert steps[1, 2].collapse == pytest.approx(-16 / 24)  # 16 of 24 single-step runs collapse, no two-step run does
    assert "ema_decay" in found.of("ema")[0].aliases


def test_an_interaction(grid):
    both = grid.assign(aa_acc=grid.aa_acc + 3.0 * (grid.synthetic & grid.ema & ~grid.collapsed))
    found = {(i.first, i.second): i for i in effects(both, resamples=500).interactions}
    assert found["synthetic", "ema"].gain == pytest.approx(3, abs=0.3)
    assert found["synthetic", "loss"].low < 0 < found["synthetic", "loss"].high


def test_a_choice_that_calms_the_others(grid):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 6, len(grid)) * ~grid.synthetic * ~grid.collapsed
    found = effects(grid.assign(aa_acc=grid.aa_acc + noise), resamples=500)
    (spread,) = [s for s in found.spreads if s.feature == "synthetic" and s.survivors]
    assert spread.ratio < 0.8
    assert spread.high < 1
    assert (spread.n_before, spread.n_after) == (28, 28)


def test_the_papers_claims(paper):
    found = effects(paper)
    (synthetic,) = found.of("synthetic")
    assert synthetic.gain == pytest.approx(10.7, abs=0.1)
    assert synthetic.low > 9.5
    spreads = {(s.feature, s.survivors): s for s in found.spreads}
    assert spreads["synthetic", True].high < 0.5  # shrinks the spread of the other choices to a third …
    assert spreads["synthetic", False].low > 1  # … but not where collapse counts
    assert {(i.first, i.second) for i in found.interactions if i.low > 0 or i.high < 0} == {
        ("synthetic", "loss"), ("loss", "ema"),
    }  # fmt: skip
    json.dumps(found.to_dict(), allow_nan=False)


def test_repeats_are_averaged_first(grid):
    noisy = pd.concat([grid.assign(seed=s, aa_acc=grid.aa_acc + d) for s, d in ((0, -2.0), (1, 2.0))])
    noisy = noisy.assign(run_id=[f"r{i}" for i in range(len(noisy))])
    one, two = effects(grid, resamples=50).of("synthetic")[0], effects(noisy, resamples=50).of("synthetic")[0]
    assert two.n_pairs == one.n_pairs
    assert two.gain == pytest.approx(one.gain)


def test_standard_training_is_no_pair(grid):
    plain = grid.iloc[:12].assign(loss="standard", steps=0, aa_acc=0.1, collapsed=False)
    plain = plain.assign(run_id=[f"s{i}" for i in range(12)])
    both = effects(pd.concat([grid, plain]), resamples=50)
    assert both.of("synthetic")[0].n_pairs == 28


def test_too_little():
    with pytest.raises(InputError, match="too few"):
        effects(pd.DataFrame({"aa_acc": [50.0] * 3, "steps": [1, 2, 5], "loss": "at"}))
