"""Forms weighed against each other and averaged; hidden compute, and which forms predict it."""

import json

import numpy as np
import pytest

from robudget.errors import InputError
from robudget.laws import average, envelope, fit_forms, holdout
from robudget.laws.form_selection import BASELINES, SCALED_FORMS

X = np.geomspace(1e16, 1e20, 80)
NAMES = ["power", "saturating", "shifted", "m4", "broken", "power on error", "power on logit"]


def test_the_truth_gets_the_weight(bench):
    for form, rivals in (
        ("power", ("power", "power on error", "power on logit")),
        ("saturating", ("saturating", "m4")),
    ):
        wins = [average(fit_forms(envelope(bench.table(form, s)), resamples=0)).best.name for s in range(6)]
        assert sum(name in rivals for name in wins) >= 5


def test_a_broken_law_is_recognised_as_such(bench):
    means = {}
    for form in ("broken", "power", "saturating"):
        weights = []
        for seed in range(8):
            mixed = average(fit_forms(envelope(bench.table(form, seed)), resamples=0))
            weights.append(dict(zip((law.name for law in mixed.laws), mixed.weights, strict=True))["broken"])
        means[form] = np.mean(weights)
    assert means["broken"] > 0.5 > 0.2 > max(means["power"], means["saturating"])


def test_where_it_breaks(bench):
    breaks = []
    for seed in range(8):
        laws = {law.name: law for law in fit_forms(envelope(bench.table("broken", seed)), resamples=0)}
        breaks.append(np.log10(laws["broken"].params["xb"] / 6e18))
    assert abs(np.median(breaks)) < 0.25  # decades


@pytest.fixture(scope="module")
def mixed(bench):
    return average(fit_forms(envelope(bench.table("saturating", 0)), resamples=200))


def test_weights_sum_to_one_and_the_mean_lies_between(mixed):
    assert sum(mixed.weights) == pytest.approx(1)
    each = [float(law.predict(1e20)) for law in mixed.laws]
    assert min(each) <= mixed.predict(1e20) <= max(each)
    assert [law.name for law in mixed.laws] == NAMES


def test_the_interval_holds_the_uncertainty_about_the_form(mixed):
    low, high = mixed.band(np.array([1e20, 1e23]))
    best = mixed.best.band(np.array([1e20, 1e23]))
    assert (high - low)[1] > (best[1] - best[0])[1]


def test_unreachable_in_part(mixed):
    reach = mixed.cost_at(64)
    assert not reach.reachable  # the saturating law, and most of the weight, says so
    assert 0.5 < reach.p_unreachable < 1  # the others differ
    near = mixed.cost_at(60)
    assert near.reachable
    assert near.low < near.value < near.high
    json.dumps(mixed.to_dict(), allow_nan=False)


def test_too_few_points_for_some_forms(simple):
    env = envelope(simple(np.array([1e17, 1e18, 1e19, 1e20]), np.array([50.0, 54, 57, 59])), bins=4)
    names = [law.name for law in fit_forms(env, resamples=20)]
    assert names == ["power", "saturating", "power on error", "power on logit"]
    assert sum(average(fit_forms(env, resamples=20)).weights) == pytest.approx(1)


def test_costs_have_no_error_scale(grid):
    env = envelope(grid, y="train_energy_kwh", how="all")
    assert [c.name for c in SCALED_FORMS if c.possible(env)] == ["power", "saturating", "shifted", "broken"]


def test_only_laws_of_one_envelope_are_averaged(bench):
    one, two = (fit_forms(envelope(bench.table("power", s)), resamples=0)[0] for s in (0, 1))
    with pytest.raises(InputError, match="one envelope"):
        average([one, two])
    with pytest.raises(InputError, match="no law"):
        average([])


def test_a_true_power_law_is_found_to_extrapolate(simple):
    held = holdout(envelope(simple(X, 40 * (X / 1e16) ** 0.04)))
    assert held.miss("power").rmse < 0.01
    assert held.miss("power").beats_baseline
    assert held.miss("last value").bias < -1
    assert not any("power " in w for w in held.warnings())
    assert held.sentence().startswith("The smallest miss is that of the ")


def test_on_a_plateau_the_last_value_misses_least_and_a_warning_names_the_law(simple):
    y = np.where(X < 1e18, 40 * (X / 1e16) ** 0.08, 40 * 100**0.08)
    held = holdout(envelope(simple(X, y)))
    assert held.miss("last value").rmse == pytest.approx(0, abs=1e-9)
    assert not held.miss("power").beats_baseline
    (warning,) = held.warnings()
    assert warning.startswith("do not extrapolate these forms: ")
    assert f"power {held.miss('power').rmse:.2f}" in warning
    assert "mean" not in warning
    assert held.sentence().startswith("No form beats saying the last seen value again (0.00 points)")
    assert held.best().name not in BASELINES


def test_what_is_hidden(simple):
    env = envelope(simple(X, 40 * (X / 1e16) ** 0.04), bins=16)
    decade, top = holdout(env), holdout(env, "bin")
    assert decade.x_cut <= 1e19
    assert decade.n_train + decade.n_test == env.n_bins
    assert decade.decades == pytest.approx(1.0, abs=0.15)
    assert top.n_test == 1
    assert min(decade.xs) > decade.x_cut
    assert set(decade.predictions) >= {"last value", "mean", "power", "saturating"}
    assert max(decade.train_xs) == decade.x_cut
    assert len(decade.train_xs) == len(decade.train_ys) == decade.n_train
    json.dumps(decade.to_dict(), allow_nan=False)


def test_a_short_range_hides_its_upper_third(simple):
    x = np.geomspace(1e18, 8e18, 60)
    held = holdout(envelope(simple(x, 40 * (x / 1e16) ** 0.04), bins=12))
    assert held.n_test == 4
    assert held.n_train == 8


def test_predictions_stay_below_100(simple):
    x = np.geomspace(1e16, 1e20, 40)
    held = holdout(envelope(simple(x, np.minimum(30 * (x / 1e16) ** 0.12, 90.0)), bins=12))
    assert max(max(p) for p in held.predictions.values()) <= 100


def test_too_few_levels(simple):
    env = envelope(simple(np.array([1e17, 1e18, 1e19]), np.array([50.0, 54, 57])), bins=3)
    with pytest.raises(InputError, match="too few levels"):
        holdout(env)


def test_the_papers_top_bin(paper):
    held = holdout(envelope(paper, "published_run_tflops", bins=19), "bin")
    assert held.miss("last value").rmse < held.miss("power").rmse  # a constant does better
