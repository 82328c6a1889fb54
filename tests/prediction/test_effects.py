"""Matched pairs find what was planted."""

import json

import numpy as np
import pandas as pd
import pytest

from robudget.errors import InputError
from robudget.prediction import effects
from robudget.prediction.effects import holm, mean_interval

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
    of_two_levels = {"synthetic", "loss", "ema", "activation"}
    assert {
        (i.first, i.second) for i in found.interactions if i.excludes_zero and {i.first, i.second} <= of_two_levels
    } == {("synthetic", "loss"), ("loss", "ema")}
    json.dumps(found.to_dict(), allow_nan=False)


def by_level(effect, by):
    (regime,) = [r for r in effect.regimes if r.by == by]
    return {e.where[0][1]: e for e in regime.effects}


def test_effects_that_depend_on_another_choice_are_given_at_each_of_its_levels(paper):
    found = effects(paper)
    (size,) = [e for e in found.of("parameters") if e.change() == "model wrn-28-10 → wrn-70-16"]
    assert size.low < 0 < size.high  # the average over both kinds of data says nothing
    assert size.reversed_by == ("synthetic",)
    data = by_level(size, "synthetic")
    assert (data[True].gain, data[True].low, data[True].high) == pytest.approx((2.2, 2.0, 2.4), abs=0.05)
    assert (data[False].gain, data[False].low, data[False].high) == pytest.approx((-2.6, -4.4, -0.9), abs=0.3)
    (loss,) = found.of("loss")
    data = by_level(loss, "synthetic")
    assert (data[True].gain, data[True].low, data[True].high) == pytest.approx((0.06, -0.07, 0.20), abs=0.02)
    assert data[False].gain == pytest.approx(5.2, abs=0.05)
    assert {r.by: r.stands for r in size.regimes} == {"synthetic": True, "ema": False}
    assert (found.n_comparisons, found.n_excluding, found.n_standing) == (66, 14, 7)
    assert "12 effects and 54 interactions" in found.comparisons()
    # Multi-level choices are split by, too: every level of the model's size.
    assert set(by_level(found.of("synthetic")[0], "parameters")) == {"wrn-28-10", "wrn-34-10", "wrn-34-20", "wrn-70-16"}


def test_what_always_came_along_is_said(paper):
    found = effects(paper)
    assert found.of("ema")[0].came_with() == "epochs 110 → 400, CutMix no → yes"
    assert found.of("activation")[0].came_with() == "padding and BatchNorm momentum original → DeepMind's"
    for choice in ("synthetic", "loss", "steps", "parameters"):  # their amount, β and name are the choice itself
        assert found.of(choice)[0].came_with() == ""


def test_the_interval_of_few_pairs_is_students():
    low, high, p = mean_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)  # t(0.975; 2) = 4.303, over √3
    assert p == pytest.approx(0.0742, abs=1e-4)
    assert all(np.isnan(v) for v in mean_interval(np.full(5, 0.7)))  # no scatter seen is not none


def made_up(pairs, rng, gain=1.0):
    """`pairs` pairs and ten runs without a partner, their noise with the two tails of unequal length."""
    sizes = np.arange(pairs + 10)
    frame = pd.DataFrame({"ema": False, "batch_size": 64 * (sizes + 1), "loss": "at", "clean_acc": 80.0})
    frame = pd.concat([frame, frame.iloc[:pairs].assign(ema=True)], ignore_index=True)
    frame["aa_acc"] = 50 + 0.05 * frame.batch_size / 64 + gain * frame.ema - rng.exponential(1, len(frame))
    return frame


@pytest.mark.parametrize("pairs", [3, 8, 30])
def test_intervals_cover_what_was_planted(pairs):
    """Measured with more tables by `bench/laws.py effects`."""
    rng = np.random.default_rng(pairs)
    hits = 0
    for _ in range(150):
        (one,) = effects(made_up(pairs, rng), ["ema", "batch_size"], resamples=20).of("ema")
        assert one.n_pairs == pairs
        hits += one.low <= 1 <= one.high
    assert hits / 150 == pytest.approx(0.95, abs=0.05)


def testholms_correction():
    assert holm([0.01, 0.04, 0.03, float("nan")], 0.05) == [True, False, False, False]
    assert holm([0.01, 0.016, 0.02, 0.04], 0.05) == [True, True, True, True]
    assert holm([], 0.05) == []


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


def test_few_pairs_cannot_know_of_failures_that_they_did_not_meet(bench):
    """Where a losing pair was met the interval holds the mean; where none was, the effect of the pairs that gain."""
    rng, met, others = np.random.default_rng(0), [], []
    for _ in range(2000):
        gains = 1 + np.where(rng.random(6) < 0.2, -2.4, 0.6) + rng.normal(0, 0.3 * 2**0.5, 6)
        low, high, _ = mean_interval(gains)
        (met if (gains < 0).any() else others).append(low <= (1.0 if (gains < 0).any() else 1.6) <= high)
    assert np.mean(met) > 0.95
    assert 0.91 < np.mean(others) < 0.99
    few = effects(bench.matched(6, "normal", 0), ["ema", "batch_size"], resamples=20)
    assert "among 6, the fewest here, with a chance of 26%" in few.unseen()
    assert effects(bench.matched(20, "normal", 0), ["ema"], resamples=20).unseen() == ""
