"""The winner's curse, against what is known where runs are equally good."""

import numpy as np
import pytest

from robudget.laws import envelope, fit_law
from robudget.laws.envelope import winners_curse

N = 400
X = np.geomspace(1e17, 1e20, N)


def table(simple, seed, truth=60.0, n_eval=10_000.0, y="aa_acc"):
    noise = 100 * np.sqrt(truth / 100 * (1 - truth / 100) / 10_000)
    return simple(X, truth + np.random.default_rng(seed).normal(0, noise, N), n_eval=n_eval)


@pytest.mark.parametrize("y", ["aa_acc", "aa_error"])
def test_where_runs_differ_by_noise_it_is_all_that_the_best_is_better(simple, y):
    lifts, resampled_lifts, truths = [], [], []
    for seed in range(8):
        env = envelope(table(simple, seed), y=y, bins=10)
        lift, resampled = winners_curse(env, np.random.default_rng(0))
        lifts.append(lift)
        resampled_lifts.append(resampled)
        truths.append(abs(env.ys - (60 if y == "aa_acc" else 40)).mean())
    # The mean of the largest of 40 normals of 0.49 points is 1.06 points.
    assert np.mean(truths) == pytest.approx(1.06, abs=0.08)
    assert np.mean(lifts) == pytest.approx(np.mean(truths), rel=0.1)
    assert 0 < np.mean(resampled_lifts) < np.mean(lifts)


def test_where_runs_differ_by_far_more_it_is_nearly_nothing(simple):
    y = 60 - np.tile(np.arange(8.0), N // 8)  # one in eight is the best, by one point
    env = envelope(simple(X, y, n_eval=1e6), bins=50)  # noise of 0.05 points
    lift, _ = winners_curse(env, np.random.default_rng(0))
    assert lift == pytest.approx(0, abs=0.01)


def test_no_noise_known_no_curse(simple):
    frame = table(simple, 0, n_eval=np.nan)
    assert winners_curse(envelope(frame), np.random.default_rng(0)) == (0.0, 0.0)
    assert winners_curse(envelope(frame.drop(columns="n_eval")), np.random.default_rng(0)) == (0.0, 0.0)
    assert winners_curse(envelope(table(simple, 0), how="pareto"), np.random.default_rng(0)) == (0.0, 0.0)


def test_an_interval_holds_the_true_level_that_the_best_runs_exceed(simple):
    frame = table(simple, 3)
    law = fit_law(frame, bins=10, resamples=300)
    low, _ = law.band(X[[0, -1]])
    assert (law.predict(X[[0, -1]]) > 60.5).all()  # as luck has it
    assert (low < 60).all()
    blind = fit_law(frame.drop(columns="n_eval"), bins=10, resamples=300)
    assert (blind.band(X[[0, -1]])[0] > 60).all()
    assert law.alpha_interval == pytest.approx(blind.alpha_interval)


def test_large_tables_take_the_best_of_each_bin_only(simple):
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(17, 20, 20_000)
    env = envelope(simple(x, 50 + rng.normal(0, 0.5, len(x)), n_eval=10_000.0))
    lift, resampled = winners_curse(env, np.random.default_rng(0))
    assert lift == pytest.approx(0.5 * 3.24, rel=0.3)  # the largest of 1,000 normals
    assert resampled == pytest.approx(lift, rel=0.3)  # the best of many is hardly missed
