"""Intervals for outcomes with two modes cover what they say, whatever the model behind them is worth."""

import numpy as np
import pytest

from robudget.prediction.conformal import Calibration, Coverage
from robudget.prediction.regressors import Outcomes


def recipes(n, rng, bias=0.0):
    """Recipes of which some collapse with a known probability; `bias` spoils the survivors' predictions."""
    X = rng.normal(0, 1, (n, 2))
    p = 1 / (1 + np.exp(-3 * X[:, 0]))
    collapsed = rng.random(n) < p
    survivor = 50 + 5 * X[:, 1]
    y = np.where(collapsed, rng.exponential(1, n), survivor + rng.normal(0, 1 + (X[:, 1] > 0), n))
    by_model = dict.fromkeys(("gbr", "forest", "mixture", "blend"), survivor)
    return X, np.clip(y, 0, 100), collapsed, Outcomes(by_model, p, survivor + bias, np.ones(n))


@pytest.mark.parametrize("bias", [0.0, 4.0])
@pytest.mark.parametrize("level", [0.8, 0.9])
def test_nominal_coverage(level, bias):
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(8):
        X, y, collapsed, out = recipes(300, rng, bias)
        calibration = Calibration.fit(X, y, collapsed, out, level)
        X2, y2, _, out2 = recipes(500, rng, bias)
        low, high = calibration.interval(X2, out2)
        shares.append(((low <= y2) & (y2 <= high)).mean())
    assert np.mean(shares) == pytest.approx(level, abs=0.03)


def test_sure_recipes_get_narrow_intervals_and_undecided_ones_wide_ones():
    rng = np.random.default_rng(1)
    X, y, collapsed, out = recipes(400, rng)
    calibration = Calibration.fit(X, y, collapsed, out, 0.9)
    low, high = calibration.interval(X, out)
    undecided, sure = abs(out.p_collapse - 0.5) < 0.2, out.p_collapse < 0.02
    assert (high - low)[undecided].mean() > 40
    assert (high - low)[sure].mean() < 12


def test_the_chance_of_a_target():
    rng = np.random.default_rng(2)
    X, y, collapsed, out = recipes(400, rng)
    calibration = Calibration.fit(X, y, collapsed, out, 0.9)
    chance = calibration.above(X, out, 30.0)
    assert chance == pytest.approx(1 - out.p_collapse, abs=0.02)
    assert (calibration.above(X, out, 99.0) <= calibration.above(X, out, 50.0)).all()


def test_too_few_runs_say_so_with_everything():
    rng = np.random.default_rng(3)
    X, y, collapsed, out = recipes(8, rng)
    low, high = Calibration.fit(X, y, collapsed, out, 0.9).interval(X, out)
    assert (low == 0).all()
    assert (high == 100).all()


def test_a_groups_coverage_is_said_to_be_unknown_where_its_recipes_are_few():
    inside = np.arange(200) % 10 > 0  # nine tenths
    assert Coverage.of("all", inside, np.arange(200), 0.9).verdict == "as it says"
    assert Coverage.of("few", inside[:20], np.arange(20), 0.9).verdict == "too few to tell"
    assert Coverage.of("seeds", inside, np.arange(200) % 20, 0.9).verdict == "too few to tell"  # 20 recipes, 10 times
    assert Coverage.of("bad", inside & (np.arange(200) % 2 > 0), np.arange(200), 0.9).verdict == "too little"
    assert Coverage.of("wide", np.ones(200, dtype=bool), np.arange(200), 0.9).verdict == "more than it says"


def test_a_prediction_says_what_intervals_hold_of_the_runs_nearest_to_it(paper_predictor):
    (one,) = paper_predictor.predict(paper_predictor.table.iloc[[100]])
    assert one.alike is not None
    assert one.alike.n == 20
    assert one.alike.low < one.alike.covered < one.alike.high or one.alike.covered == 1
    assert np.mean(paper_predictor.inside) == pytest.approx(paper_predictor.coverage[0].covered)
