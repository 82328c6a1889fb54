"""Hidden compute: who predicts it, and what is said of those who do not."""

import json

import numpy as np
import pytest

from robudget.errors import InputError
from robudget.laws import envelope, holdout
from robudget.laws.form_selection import BASELINES

X = np.geomspace(1e16, 1e20, 80)


def test_a_true_power_law_is_found_to_extrapolate(simple):
    held = holdout(envelope(simple(X, 40 * (X / 1e16) ** 0.04)))
    assert held.miss("power").rmse < 0.01
    assert held.miss("power").beats_baseline
    assert held.miss("last value").bias < -1
    assert not any("power " in w for w in held.warnings())
    assert held.sentence().startswith("The smallest miss is that of the ")


def test_on_a_plateau_the_last_value_wins_and_the_law_is_warned_of(simple):
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
