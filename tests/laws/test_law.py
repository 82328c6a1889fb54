"""What a fitted law answers: predictions, intervals, cost at a target, the price of the next point."""

import json

import numpy as np
import pytest

from robudget.errors import InputError
from robudget.laws import fit_law, fit_power_law

X = np.geomspace(1e17, 1e20, 60)


@pytest.fixture(scope="module")
def saturating(simple):
    rng = np.random.default_rng(0)
    return fit_law(simple(X, 62 - 3 * (X / 1e19) ** -0.4 - rng.exponential(0.2, 60)), form="saturating", resamples=400)


@pytest.fixture(scope="module")
def power(simple):
    rng = np.random.default_rng(0)
    return fit_power_law(simple(X, 57 * (X / 1e19) ** 0.03 - rng.exponential(0.2, 60)), resamples=400)


def test_the_target_is_reached_where_the_law_says(power, saturating):
    for law, target in ((power, 60.0), (saturating, 61.0), (saturating, 52.0)):
        reach = law.cost_at(target)
        assert law.predict(reach.value) == pytest.approx(target, abs=1e-6)
        assert reach.low < reach.value < reach.high
        assert reach.reachable


def test_beyond_the_ceiling_is_unreachable(saturating):
    reach = saturating.cost_at(75)
    assert not reach.reachable
    assert reach.p_unreachable > 0.9
    assert reach.sentence().startswith("75 aa_acc: unreachable (")
    assert reach.to_dict()["value"] is None
    json.dumps(reach.to_dict(), allow_nan=False)


def test_how_far_beyond_the_runs(power):
    reach = power.cost_at(float(power.predict(1e22)))
    assert reach.decades == pytest.approx(2.0, abs=0.05)
    assert "2.0 decades outside the runs" in reach.sentence()
    assert power.decades_beyond(1e18) == 0
    assert power.cost_at(58).decades == 0


def test_a_falling_law_does_not_climb(simple):
    law = fit_power_law(simple(X, 60 * (X / 1e17) ** -0.01), resamples=50)
    assert law.alpha < 0
    assert not law.cost_at(65).reachable
    assert law.cost_at(58).value == pytest.approx(X[0], rel=1e-9)  # its cheapest run is better already


def test_the_interval_is_wider_further_out(power):
    low, high = power.band(np.array([1e18, 1e20, 1e23]))
    assert (low < high).all()
    assert (high - low)[2] > (high - low)[1]
    narrow = power.band(1e20, level=0.5)
    assert narrow[1] - narrow[0] < (high - low)[1]
    assert np.shape(narrow[0]) == ()


def test_the_price_of_the_next_point(power):
    reach = power.next_point(1e19)
    assert power.predict(reach.value) == pytest.approx(float(power.predict(1e19)) + 1)


def test_ceilings_stay_possible(saturating, power):
    low, high = saturating.ceiling_interval
    assert low < saturating.ceiling < high <= 100
    assert np.isnan(power.ceiling)


@pytest.mark.parametrize("target", [0, 100, -3, 120])
def test_impossible_targets(power, target):
    with pytest.raises(InputError, match="more than 0 and less than 100"):
        power.cost_at(target)


def test_costs_grow_without_such_bounds(grid):
    law = fit_power_law(grid, y="train_energy_kwh", resamples=50)
    assert (law.shift == 0).all()
    assert law.predict(law.cost_at(1e5).value) == pytest.approx(1e5)


def test_the_sentence_has_the_interval_and_what_it_stands_on(power):
    text = power.sentence()
    assert "α 95% interval [" in text
    assert "points from 60 runs over 3.0 decades" in text
