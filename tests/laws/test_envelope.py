"""The best run per bin, by hand and by brute force."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robudget.errors import InputError
from robudget.laws import envelope


def table(x, y, **columns):
    return pd.DataFrame({"train_flops_exact": x, "aa_acc": y, "clean_acc": 95.0, "loss": "at"} | columns)


def test_best_per_bin_by_hand():
    env = envelope(table([1.0, 2, 9, 10, 50, 100], [40.0, 50, 45, 55, 52, 60]), bins=2)
    assert env.edges == pytest.approx([1, 10, 100])
    assert env.xs.tolist() == [2, 100]  # 10 opens the second bin
    assert env.ys.tolist() == [50, 60]
    assert env.sizes.tolist() == [3, 3]
    assert env.rows.tolist() == [1, 5]
    assert (env.n_bins, env.n_runs, env.best) == (2, 6, "max")


def test_of_equal_runs_the_cheapest_is_best():
    env = envelope(table([1.0, 2, 3, 100], [50.0, 50, 50, 60]), bins=2)
    assert env.xs.tolist() == [1, 100]


def test_errors_take_the_smallest():
    env = envelope(table([1.0, 2, 50, 100], [40.0, 50, 45, 55]), y="aa_error", bins=2)
    assert env.best == "min"
    assert env.ys.tolist() == [50, 45]


def test_quantile_bins_hold_equally_many():
    x = np.sort(10 ** np.random.default_rng(0).uniform(0, 5, 60))
    assert envelope(table(x, np.linspace(40, 60, 60)), bins=6, how="quantile").sizes.tolist() == [10] * 6


def test_linear_bins():
    env = envelope(table([0.1, 1, 4, 6, 9, 10.1], [40.0, 50, 45, 55, 52, 60]), bins=2, how="linear")
    assert env.xs.tolist() == [1, 10.1]


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(30, 90)), min_size=2, max_size=40))
def test_pareto_is_the_runs_that_no_run_of_the_same_or_less_compute_reaches(runs):
    x, y = (np.array(v, dtype=float) for v in zip(*runs, strict=True))
    env = envelope(table(x, y), how="pareto")
    points = sorted({(a, b) for a, b in zip(x, y, strict=True)})
    best = [(a, b) for a, b in points if not any((c <= a and d >= b) and (c, d) != (a, b) for c, d in points)]
    assert list(zip(env.xs.tolist(), env.ys.tolist(), strict=True)) == best
    assert env.sizes.sum() == len(x)


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(30, 90)), min_size=3, max_size=60), st.integers(1, 12))
def test_log_bins_by_brute_force(runs, bins):
    x, y = (np.array(v, dtype=float) for v in zip(*runs, strict=True))
    if len(set(x)) < 2:
        return
    env = envelope(table(x, y), bins=bins)
    edges = np.geomspace(x.min(), x.max(), bins + 1)
    best = {}
    for a, b in zip(x, y, strict=True):
        k = min(int((edges[1:] <= a).sum()), bins - 1)
        best[k] = max(best.get(k, (-1, 0)), (b, -a))
    assert env.ys.tolist() == [best[k][0] for k in sorted(best)]
    assert env.xs.tolist() == [-best[k][1] for k in sorted(best)]


def test_runs_left_out_are_counted():
    frame = table(
        [1.0, 2, 3, 4, np.nan, -1, 5, 6, 7],
        [40.0, 5, 50, 60, 50, 50, 50, np.nan, 70],
        status=["done"] * 7 + ["failed", "ended early"],
        loss=["at", "at", "standard", "at", "at", "at", "at", "at", "at"],
    )
    counts = envelope(frame, bins=2).counts
    assert counts.to_dict() == {
        "total": 9, "used": 3, "failed": 1, "standard": 1, "collapsed": 1, "unknown": 1, "impossible": 1,
        "ended_early": 1,
    }  # fmt: skip
    assert counts.sentence() == (
        "3 of 9 runs used; left out: 1 failed, 1 ended early, 1 trained without an adversary, 1 collapsed, "
        "1 with a value missing, 1 with an impossible value"
    )


def test_collapse_is_relative_to_the_clean_accuracy():
    frame = table([1.0, 2, 3], [20.0, 20, 50], clean_acc=[50.0, 90, 90])
    assert envelope(frame, bins=1).n_runs == 2  # 20 of 50 stands, 20 of 90 has collapsed
    assert envelope(frame.assign(collapsed=[True, False, False]), bins=1).n_runs == 2
    assert envelope(frame.drop(columns="clean_acc"), bins=1).n_runs == 3  # unknown: the paper's 10%


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": 0}, "bins = 0"),
        ({"how": "logs"}, "unknown kind of envelope 'logs'; did you mean 'log'"),
        ({"x": "train_flops_exakt"}, "did you mean 'train_flops_exact'?"),
        ({"y": "aa_accuracy"}, "no column 'aa_accuracy' for y; did you mean 'aa_acc'?"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        envelope(table([1.0, 2], [40.0, 50]), **arguments)
    assert "\n" not in str(caught.value)


def test_several_datasets_or_threats_are_refused():
    with pytest.raises(InputError, match=r"mixes 2 values of dataset \(cifar10, digits\): select one, e.g. dataset="):
        envelope(table([1.0, 2], [40.0, 50], dataset=["digits", "cifar10"]))
    with pytest.raises(InputError, match=r"mixes 2 values of eps \(4/255, 8/255\)"):
        envelope(table([1.0, 2], [40.0, 50], eps=[8 / 255, 4 / 255]))


def test_all_collapsed():
    with pytest.raises(InputError, match=r"no run is left .* 0 of 2 runs used; left out: 2 collapsed"):
        envelope(table([1.0, 2], [1.0, 2]))
