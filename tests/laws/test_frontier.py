"""The frontier without bins: what it finds in the paper's table, and in tables of known truth."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from robudget.errors import InputError
from robudget.laws import fit_frontier, price
from robudget.laws.frontier_posterior import CURVES
from robudget.laws.merged_runs import Runs, merged


@pytest.fixture(scope="module")
def frontier(paper):
    return fit_frontier(paper)


def test_the_papers_exponent(frontier):
    low, high = frontier.alpha_interval
    assert 0.005 < low < frontier.alpha < high < 0.017
    assert frontier.alpha == pytest.approx(0.011, abs=0.001)
    assert frontier.n_runs == 244
    gain, at_least, at_most = frontier.gain()
    assert 0.3 < at_least < gain < at_most < 2.2
    json.dumps(frontier.to_dict(), allow_nan=False)


def test_the_top_decade_was_predicted(frontier):
    test = frontier.test
    assert test.decades == pytest.approx(1.04, abs=0.01)
    assert test.low < test.truth < test.high
    assert test.n_train == 110


def test_each_run_has_its_inefficiency(paper, frontier):
    points = frontier.inefficiency()
    assert points.shape == (244,)
    assert (points > 0).all()
    synthetic = paper.synthetic.to_numpy(dtype=bool)[frontier.points.rows]
    assert np.median(points[~synthetic]) > np.median(points[synthetic]) + 8
    far = points > 5
    gap = frontier.predict(frontier.points.x) - frontier.points.y
    np.testing.assert_allclose(points[far], gap[far], atol=0.05)


def test_families_share_a_weight_and_copies_do_not_add_any(frontier):
    assert sum(frontier.weights.values()) == pytest.approx(1)
    straight = sum(w for name, w in frontier.weights.items() if name.startswith("power"))
    assert 0.2 < straight < 0.8


def test_an_error_mirrors_the_accuracy(paper, frontier):
    mirrored = fit_frontier(paper, y="aa_error", test=False)
    x = np.geomspace(*frontier.x_range, 5)
    np.testing.assert_allclose(mirrored.predict(x), 100 - frontier.predict(x), atol=0.2)
    assert mirrored.gain()[0] < 0


@pytest.mark.usefixtures("fresh")
def test_the_same_seed_gives_the_same_frontier(paper, frontier):
    assert fit_frontier(paper).alpha_interval == frontier.alpha_interval


def table(x: list[float], y: list[float], **more: object) -> pd.DataFrame:
    return pd.DataFrame({"train_flops_exact": x, "aa_acc": y, "clean_acc": 90.0, "loss": "at", **more})


def test_two_levels_and_equal_runs():
    tied = fit_frontier(table([1e17] * 5 + [1e19] * 5, [50.0] * 10))
    low, high = tied.alpha_interval
    assert low < 0 < high
    assert tied.test is None
    assert tied.tested == 0


def test_where_hardly_any_run_is_near_the_frontier_its_level_has_no_upper_end(bench):
    """A gamma density of shape 3 is 0 at the frontier; a uniform one is not."""
    far = fit_frontier(bench.frontier_table("gamma 3", 320, 19, 0), test=False)
    assert far.open
    assert far.band(far.x_range[1])[1] == 100
    assert any("no upper end" in line for line in far.support())
    (one,) = price(bench.frontier_table("gamma 3", 320, 19, 0), [62.0], frontier=far)
    assert one.low == far.x_range[0]
    mirrored = fit_frontier(bench.frontier_table("gamma 3", 320, 19, 0).assign(aa_error=lambda t: 100 - t.aa_acc),
                            y="aa_error", test=False)  # fmt: skip
    assert mirrored.band(mirrored.x_range[1])[0] == 0
    near = fit_frontier(bench.frontier_table("uniform", 320, 19, 0), test=False)
    assert not near.open
    assert near.sparse < 0.05
    assert near.band(near.x_range[1])[1] < 70


@pytest.mark.parametrize(
    ("runs", "weight", "said"), [(60, 0.6, True), (61, 0.6, False), (60, 0.4, False), (60, 0.8, False)]
)
def test_few_runs_that_may_lie_below_the_frontier_are_said(frontier, runs, weight, said):
    """Where it is open, another sentence says more."""
    shares = {"sparse": weight / frontier.sparse, "crowded": (1 - weight) / (1 - frontier.sparse)}
    fits = tuple(replace(fit, weight=fit.weight * shares[fit.edge]) for fit in frontier.fits)
    few = replace(frontier, n_runs=runs, fits=fits)
    assert few.sparse == pytest.approx(weight)
    assert any("too few runs to tell" in line for line in few.support()) == said
    assert any("no upper end" in line for line in few.support()) == (weight > 0.7)


def test_the_papers_runs_crowd_at_their_frontier(frontier):
    assert not frontier.open
    assert frontier.sparse < 0.5


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (table([1e17] * 6, [50.0, 51, 52, 53, 54, 55]), "at least two levels"),
        (table([1e17, 1e18, 1e19], [50.0, 51, 52]), "3 runs cannot fix a frontier"),
    ],
)
def test_too_little(frame, message):
    with pytest.raises(InputError, match=message):
        fit_frontier(frame)


def test_a_cost_has_no_frontier(paper):
    with pytest.raises(InputError, match="needs a percentage"):
        fit_frontier(paper, y="cost_usd")


def test_runs_that_lie_alike_are_merged_with_their_weight():
    rng = np.random.default_rng(0)
    t, noise = rng.random(4_000), np.where(rng.random(4_000) < 0.5, 0.5, 1.5)
    frontier = 50 + 10 * t
    runs = Runs(t, frontier - rng.exponential(4, 4_000) + noise * rng.standard_normal(4_000), noise)
    fewer = merged(runs, frontier)
    assert len(fewer.t) < 1_500
    assert fewer.n == runs.n == 4_000
    for of in ("t", "y"):
        assert getattr(fewer, of) @ fewer.weight / 4_000 == pytest.approx(getattr(runs, of).mean())
    assert set(fewer.noise.round(6)) == {0.5, 1.5}
    # Near the frontier a cell is narrower than the noise.
    near = abs(50 + 10 * fewer.t - fewer.y) < 1
    assert fewer.weight[near].max() < 0.1 * fewer.weight[near].sum()


@pytest.mark.usefixtures("fresh")
def test_a_frontier_of_merged_runs_is_that_of_all(bench, monkeypatch):
    """`bench/laws.py merged` says the same of more tables."""
    frame = bench.frontier_table("exponential", 1_500, 100, 1)
    fewer = fit_frontier(frame, test=False, curves=CURVES[:1])
    monkeypatch.setattr("robudget.laws.frontier_posterior.MOST_RUNS", 10_000)
    whole = fit_frontier(frame, test=False, curves=CURVES[:1])
    low, high = whole.alpha_interval
    assert fewer.alpha == pytest.approx(whole.alpha, abs=0.25 * (high - low))
    assert np.subtract(*fewer.alpha_interval[::-1]) == pytest.approx(high - low, rel=0.25)
    assert any("merged" in line for line in fewer.support())
