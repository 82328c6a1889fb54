"""Laws in several quantities: the published one at its published points, and one fitted to a known truth."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

from robudget.errors import InputError
from robudget.laws import BARTOLDSON, fit_joint


@pytest.mark.parametrize(("flops", "accuracy"), [(1e20, 70.3), (2.1e20, 71.4), (1.44e21, 74.0)])
def test_bartoldson_at_published_budgets(flops, accuracy):
    assert BARTOLDSON.best(flops, 1.65) == pytest.approx(accuracy, abs=0.1)


def test_bartoldson_at_published_sizes():
    N, D = BARTOLDSON.optimum(2.1e20, 1.65)
    assert pytest.approx(76e6, rel=0.02) == N
    assert pytest.approx(350e6, rel=0.02) == D
    assert BARTOLDSON.flops(N, D) == pytest.approx(2.1e20)


def test_bartoldson_costs_and_ceilings():
    assert np.log10(BARTOLDSON.cost_at(76, 1.65)) == pytest.approx(22, abs=0.05)
    assert np.log10(BARTOLDSON.cost_at(80, 1.65)) == pytest.approx(24.7, abs=0.05)
    assert BARTOLDSON.best(BARTOLDSON.cost_at(76, 1.65), 1.65) == pytest.approx(76)
    assert [BARTOLDSON.ceiling(fid) for fid in (0, 1.4, 1.65)] == pytest.approx([89.65, 84.4, 83.7], abs=0.05)
    assert BARTOLDSON.cost_at(85, 1.65) == np.inf


def test_the_optimum_is_one():
    for flops in (1e18, 1e20, 1e22):
        N, _ = BARTOLDSON.optimum(flops, 1.65)
        product = flops / BARTOLDSON.per_sample
        found = minimize_scalar(
            lambda s, product=product: float(BARTOLDSON.loss(10**s, product / 10**s, 1.65)),
            bounds=(4, 12),
            method="bounded",
        )
        assert np.log10(N) == pytest.approx(found.x, abs=1e-3)
    growth = np.log10(BARTOLDSON.optimum(1e21, 1.65)[0] / BARTOLDSON.optimum(1e20, 1.65)[0])
    assert growth == pytest.approx(0.483, abs=5e-4)


def test_mistakes():
    with pytest.raises(InputError, match="fid = -1"):
        BARTOLDSON.best(1e20, -1)
    with pytest.raises(InputError, match="flops = 0"):
        BARTOLDSON.optimum(0, 1.65)


@pytest.fixture(scope="module")
def runs():
    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform(6, 9, 150), 10 ** rng.uniform(6, 9, 150)
    y = 75 - 200 * N**-0.3 - 300 * D**-0.25
    return pd.DataFrame({"parameters": N, "images_seen": D, "aa_acc": y, "clean_acc": 90.0, "loss": "at"})


def test_a_known_truth_comes_back(runs):
    joint = fit_joint(runs, resamples=0)
    assert joint.converged
    assert joint.params == pytest.approx({"E": 75, "A": 200, "B": 300, "a": 0.3, "d": 0.25}, rel=1e-3)
    N, D = joint.split(1e16)
    nearby = [float(joint.predict(N * f, D / f)) for f in (0.8, 1.25)]
    assert float(joint.predict(N, D)) > max(nearby)


def test_intervals_hold_it(runs):
    noisy = runs.assign(aa_acc=runs.aa_acc + np.random.default_rng(1).normal(0, 0.3, len(runs)))
    joint = fit_joint(noisy, resamples=60)
    for name, value in {"E": 75, "a": 0.3, "d": 0.25}.items():
        low, high = joint.intervals[name]
        assert low - 0.1 * abs(value) < value < high + 0.1 * abs(value)


def test_what_cannot_be_told_is_refused(runs):
    with pytest.raises(InputError, match="images_seen has 1 levels"):
        fit_joint(runs.assign(images_seen=5e7))
    with pytest.raises(InputError, match="5 runs cannot fix the 5 parameters"):
        fit_joint(runs.iloc[:5])
