"""Fits against closed forms, scipy and the paper's numbers; what they refuse and what they say."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import curve_fit

from robudget.errors import InputError
from robudget.laws import envelope, fit_law, fit_power_law
from robudget.laws.fit import auto_bins, fit_envelope
from robudget.laws.forms import FORMS

X = np.geomspace(1e17, 1e20, 25)


def test_the_papers_accuracy_law(paper):
    law = fit_power_law(paper, x="published_run_tflops", y="aa_acc", bins=19)
    assert pytest.approx(50.86, abs=0.005) == law.C
    assert law.alpha == pytest.approx(0.0105, abs=5e-5)
    assert round(law.alpha, 2) == 0.01
    assert law.r2 == pytest.approx(0.81, abs=0.005)
    assert (law.n_runs, law.n_bins) == (244, 19)
    assert law.envelope.counts.collapsed == 75
    assert law.alpha_interval[0] < law.alpha < law.alpha_interval[1]


def test_the_papers_electricity_law(paper):
    law = fit_power_law(paper, x="published_run_tflops", y="cost_usd")
    assert law.alpha == pytest.approx(0.95, abs=0.005)
    assert 6e-6 < law.C < 9e-6 or pytest.approx(6e-6, rel=0.02) == law.C
    low, high = law.alpha_interval
    assert 0.92 < low < 0.95 < high < 0.98
    assert 0.93 < law.r2 < 0.98
    assert law.n_bins == law.n_runs == 319  # collapsed runs cost as much as others


def test_the_same_laws_on_true_totals(paper):
    law = fit_power_law(paper, x="train_flops_exact", y="aa_acc")
    assert 0.0105 <= law.alpha <= 0.0145
    energy = fit_power_law(paper, x="train_flops_exact", y="train_energy_kwh")
    assert energy.alpha == pytest.approx(0.94, abs=0.01)


def test_as_scipy_does_it(paper):
    law = fit_power_law(paper, resamples=0)
    (C, alpha), _ = curve_fit(
        lambda x, c, a: c * (x / 1e18) ** a, law.envelope.xs, law.envelope.ys, p0=(50, 0.01), xtol=1e-14
    )
    assert law.alpha == pytest.approx(alpha, rel=1e-6)
    assert pytest.approx(C * 1e18**-alpha, rel=1e-6) == law.C


TRUTH = {
    "power": lambda x: 57 * (x / 1e19) ** 0.03,
    "saturating": lambda x: 62 - 3 * (x / 1e19) ** -0.4,
    "shifted": lambda x: 62 - 4 * (x / 1e19 + 0.25) ** -0.8,
    "broken": lambda x: 58 * (x / 6e18) ** 0.06 * np.exp(-0.05 * 0.25 * np.logaddexp(0, np.log(x / 6e18) / 0.25)),
}
PARAMS = {
    "power": {"alpha": 0.03},
    "saturating": {"E": 62, "alpha": 0.4, "A": 3 * 1e19**0.4},
    "shifted": {"E": 62, "alpha": 0.8, "x0": 2.5e18},
    "broken": {"alpha": 0.06, "alpha2": 0.01, "xb": 6e18},
}


@pytest.mark.parametrize("form", list(TRUTH))
def test_exact_data_give_exact_parameters(form, simple):
    law = fit_law(simple(X, TRUTH[form](X)), form=form, bins=200, resamples=0)
    assert law.rmse < 1e-4
    assert law.converged
    for name, value in PARAMS[form].items():
        assert law.params[name] == pytest.approx(value, rel=2e-3), name
    assert law.predict(1e20) == pytest.approx(TRUTH[form](1e20), rel=1e-4)


@pytest.mark.parametrize("form", list(FORMS))
def test_errors_and_accuracies_tell_the_same(form, simple):
    """A form on the error of an accuracy is the form on the error column."""
    frame = simple(X, TRUTH["saturating"](X))
    one = fit_law(frame, form=form, on="error", bins=200, resamples=0)
    two = fit_law(frame, y="aa_error", form=form, bins=200, resamples=0)
    assert one.predict(X) == pytest.approx(100 - two.predict(X), abs=1e-5)
    assert one.rmse == pytest.approx(two.rmse, abs=1e-6)


def test_a_straight_line_in_log_odds(simple):
    odds = 1.2 * (X / 1e18) ** 0.05
    law = fit_law(simple(X, 100 * odds / (1 + odds)), on="logit", bins=200, resamples=0)
    assert law.alpha == pytest.approx(0.05, rel=1e-6)
    assert law.predict(X) == pytest.approx(100 * odds / (1 + odds), rel=1e-6)


def test_huber_is_hardly_moved_by_an_outlier(simple):
    y = TRUTH["power"](X)
    y[7] -= 12
    robust = fit_law(simple(X, y), space="huber", bins=200, resamples=0)
    plain = fit_law(simple(X, y), bins=200, resamples=0)
    assert robust.alpha == pytest.approx(0.03, abs=2e-4)
    assert abs(plain.alpha - 0.03) > 5 * abs(robust.alpha - 0.03)


@pytest.mark.usefixtures("fresh")
def test_one_seed_one_answer(grid):
    one, two = (fit_power_law(grid, resamples=200, seed=3) for _ in range(2))
    assert one.alpha_interval == two.alpha_interval
    assert (one.draws == two.draws).all()
    assert fit_power_law(grid, resamples=200, seed=4).alpha_interval != one.alpha_interval


def test_plain_data(paper):
    data = fit_power_law(paper, resamples=50).to_dict()
    first = ["form", "C", "alpha", "alpha_interval", "r2", "n_runs", "n_bins", "x", "y"]
    assert list(data)[:9] == first
    assert data["form"] == "power"
    assert data["ceiling"] is None  # NaN is null
    json.dumps(data, allow_nan=False)


def test_fewer_bins_for_fewer_runs():
    assert [auto_bins(n) for n in (5, 40, 319)] == [6, 10, 19]


@pytest.mark.parametrize(
    ("x", "y", "form", "message"),
    [
        ([1e18], [50.0], "power", "all 1 runs have train_flops_exact = 1e"),
        ([1e18] * 5, [50.0, 51, 52, 53, 54], "power", "all 5 runs have train_flops_exact = 1e"),
        ([1e17, 1e18], [50.0, 55], "saturating", r"2 points \(of 2 runs\) cannot fix the 3 parameters"),
    ],
)
def test_what_holds_no_law_is_refused(x, y, form, message, simple):
    with pytest.raises(InputError, match=message):
        fit_law(simple(np.array(x), np.array(y)), form=form)


def test_zero_everywhere_is_refused(simple):
    frame = simple(X, np.zeros(len(X))).drop(columns="clean_acc").assign(collapsed=False)
    with pytest.raises(InputError, match="aa_acc is 0 for every run"):
        fit_power_law(frame)


def test_three_points_are_a_law_only_with_a_warning(simple):
    law = fit_power_law(simple(np.array([1e17, 1e18, 1e19]), np.array([50.0, 55, 58])), resamples=50)
    assert any("3 points only" in w for w in law.warnings)
    exact = fit_power_law(simple(np.array([1e17, 1e19]), np.array([50.0, 58])), resamples=50)
    assert any("nothing is left to judge it by" in w for w in exact.warnings)


@pytest.mark.parametrize(
    ("points", "form", "said"), [(11, "saturating", True), (12, "saturating", False), (11, "power", False)]
)
def test_a_ceiling_on_few_points_is_said(points, form, said, simple):
    x = np.geomspace(1e17, 1e20, points)
    law = fit_law(simple(x, TRUTH["saturating"](x)), form=form, bins=points, resamples=0)
    assert law.n_bins == points
    assert any(f"too narrow on {points} points" in w for w in law.warnings) == said


def test_a_short_range_is_said(simple):
    x = np.linspace(1e18, 3e18, 30)
    assert any("factor of 3 only" in w for w in fit_power_law(simple(x, 50 + x / 1e18), resamples=20).warnings)


def test_a_parameter_at_its_bound_is_said(simple):
    y = 60 - 30 * np.exp(-X / 1e18)  # faster than any power
    law = fit_law(simple(X, y), form="shifted", bins=200, resamples=0)
    assert any("ran to its bound" in w for w in law.warnings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "powr"}, "unknown form 'powr'; did you mean 'power'"),
        ({"space": "lin"}, "unknown space 'lin'"),
        ({"on": "odds"}, "unknown scale 'odds'"),
        ({"on": "logit", "space": "linear"}, "fitted in log space"),
        ({"y": "train_energy_kwh", "on": "error"}, "needs a percentage"),
        ({"y": "train_energy_kwh", "form": "m4"}, "needs an accuracy or an error"),
    ],
)
def test_mistakes(arguments, message, grid):
    with pytest.raises(InputError, match=message):
        fit_law(grid, **arguments)


def test_nan_and_negative_values_are_left_out_and_counted(simple):
    x, y = X.copy(), TRUTH["power"](X)
    clean = fit_power_law(simple(x[3:], y[3:]), bins=200, resamples=0)
    x[0], x[1], y[2] = np.nan, -5.0, -3.0
    law = fit_power_law(simple(x, y), bins=200, resamples=0)
    assert law.alpha == pytest.approx(clean.alpha)
    assert (law.envelope.counts.unknown, law.envelope.counts.impossible) == (1, 2)


def test_an_envelope_can_be_fitted_without_a_table(grid):
    env = envelope(grid, how="pareto")
    law = fit_envelope(env, resamples=100)
    assert law.envelope is env
    assert law.resamples == 100
    assert isinstance(pd.Series(law.params)["alpha"], float)
