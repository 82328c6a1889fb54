"""Resampled envelopes are what a plain loop over resampled tables gives."""

import numpy as np
import pandas as pd
import pytest

from robudget.laws import envelope
from robudget.laws.envelope import bootstrap_envelopes
from robudget.laws.fit import bootstrap_lines


@pytest.fixture
def runs() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    return pd.DataFrame({
        "train_flops_exact": 10 ** rng.uniform(17, 20, 60), "aa_acc": rng.uniform(40, 60, 60), "clean_acc": 95.0,
        "train_energy_kwh": rng.uniform(1, 2, 60), "loss": "at",
    })  # fmt: skip


def drawn(n: int, resamples: int, seed: int) -> np.ndarray:
    """The same draws, as run numbers."""
    return np.random.default_rng(seed).integers(n, size=(resamples, n))


@pytest.mark.parametrize("how", ["log", "linear", "pareto"])
@pytest.mark.parametrize("y", ["aa_acc", "aa_error"])
def test_as_a_loop_over_tables(runs, how, y):
    env = envelope(runs, y=y, bins=7, how=how)
    x, best, weight = bootstrap_envelopes(env, 50, np.random.default_rng(5))
    for i, rows in enumerate(drawn(60, 50, 5)):
        again = envelope(runs.iloc[rows], y=y, bins=7, how=how)
        mine = sorted(zip(x[i][weight[i] > 0], best[i][weight[i] > 0], strict=True))
        assert np.array(mine) == pytest.approx(np.stack([again.xs, again.ys], axis=1))


def test_quantile_bins_hold_as_many_draws_each(runs):
    env = envelope(runs, bins=6, how="quantile")
    x, y, weight = bootstrap_envelopes(env, 40, np.random.default_rng(5))
    assert (weight.sum(axis=1) >= 5).all()
    assert set(y[weight > 0]) <= set(env.points.y)
    assert set(x[weight > 0]) <= set(env.points.x)


def test_every_run_counts_as_often_as_it_was_drawn(runs):
    env = envelope(runs, y="train_energy_kwh", how="all")
    _, _, weight = bootstrap_envelopes(env, 30, np.random.default_rng(5))
    assert weight.tolist() == [np.bincount(rows, minlength=60).tolist() for rows in drawn(60, 30, 5)]


def test_lines_in_closed_form(runs):
    env = envelope(runs, y="train_energy_kwh", how="all")
    lines = bootstrap_lines(env, 30, np.random.default_rng(5))
    centre = np.log(env.xs).mean()
    for line, rows in zip(lines, drawn(60, 30, 5), strict=True):
        u, v = np.log(env.points.x[rows]) - centre, np.log(env.points.y[rows])
        slope, intercept = np.polyfit(u, v, 1)
        assert line == pytest.approx([intercept, slope], rel=1e-9)


def test_of_very_many_runs_only_those_that_can_be_best_are_drawn(monkeypatch):
    rng = np.random.default_rng(2)
    n = 6_000
    frame = pd.DataFrame({
        "train_flops_exact": 10 ** rng.uniform(17, 20, n), "aa_acc": rng.uniform(40, 60, n), "clean_acc": 95.0,
        "loss": "at",
    })  # fmt: skip
    env = envelope(frame, bins=5)
    fast = bootstrap_envelopes(env, 300, np.random.default_rng(0))[1]
    monkeypatch.setitem(bootstrap_envelopes.__globals__, "LARGE", n + 1)
    slow = bootstrap_envelopes(env, 300, np.random.default_rng(0))[1]
    assert fast.mean(axis=0) == pytest.approx(slow.mean(axis=0), abs=2e-3)
    assert fast.std(axis=0) == pytest.approx(slow.std(axis=0), rel=0.4)
    assert (fast.max(axis=0) == env.ys).all()
