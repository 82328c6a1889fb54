"""One price in every unit, bounded by what was observed and by what was tested."""

import json
import math

import numpy as np
import pytest

from robudget.errors import InputError
from robudget.laws import fit_frontier, price


@pytest.fixture(scope="module")
def frontier(paper):
    return fit_frontier(paper)


def test_every_unit_gives_the_same_answer(paper, frontier):
    for one in price(paper, [58, 60, 61.1, 65, 85], frontier=frontier):
        for name, (value, low, high) in one.costs.items():
            assert math.isfinite(value) == one.reachable, (one.target, name)
            assert low <= value <= high
        assert {"cost_usd", "train_seconds", "gpu_hours", "co2_kg", "train_energy_kwh"} <= set(one.costs)
        json.dumps(one.to_dict(), allow_nan=False)


def test_what_was_observed_is_never_out_of_reach(paper, frontier):
    """Three runs of the table are at or above 60.0%, the best at 60.14%."""
    best = paper.aa_acc.max()
    for one in price(paper, [50, 59, 60.0, best], frontier=frontier):
        there = paper[paper.aa_acc >= one.target]
        assert one.verdict == "observed"
        assert one.value <= there.train_flops_exact.min()
        assert one.observed.run in set(there.run_id)
        assert one.observed.sentence("cost_usd") in one.sentence("cost_usd")
        bill = there.loc[there.run_id == one.observed.run, "cost_usd"].item()
        assert one.observed.costs["cost_usd"] == pytest.approx(bill)


def test_beyond_twice_the_tested_distance_these_runs_cannot_say(paper, frontier):
    """85% was once said to cost 1.02×10⁴⁶ FLOP, and 75% 10³²."""
    assert frontier.tested == pytest.approx(1.04, abs=0.01)
    limit = paper.train_flops_exact.max() * 10 ** (2 * frontier.tested)
    for one in price(paper, [65, 75, 85], frontier=frontier):
        assert one.verdict == "cannot say"
        assert one.value == math.inf
        assert one.p_beyond > 0.5
        assert one.limit == pytest.approx(limit)
        assert "costs more than" in one.sentence()
        assert "these runs cannot say" in one.sentence("cost_usd")
        assert "10⁴⁶" not in one.sentence()


def test_a_point_more_than_the_best_run(paper, frontier):
    (one,) = price(paper, [61.1], frontier=frontier)
    assert one.verdict == "beyond"
    assert 5e19 < one.value < 1e21
    assert one.high == math.inf
    assert one.low > 0.5 * paper.train_flops_exact.max()
    assert one.sentence().startswith("61.1% costs ")


def test_values_and_shares_come_from_the_same_draws(paper, frontier):
    for one in price(paper, np.arange(60.5, 66, 0.5), frontier=frontier):
        draws = frontier.costs(one.target)
        assert one.p_beyond == pytest.approx(frontier.share(draws > one.limit))
        assert one.reachable == (one.p_beyond <= 0.5)


def test_targets_of_an_error(paper):
    (one,) = price(paper, [100 - 61.1], y="aa_error")
    (same,) = price(paper, [61.1])
    assert one.value == pytest.approx(same.value, rel=0.5)
    assert one.verdict == same.verdict


@pytest.mark.parametrize("target", [0, 100, -3])
def test_a_target_that_no_accuracy_is(paper, frontier, target):
    with pytest.raises(InputError, match="allowed: more than 0 and less than 100"):
        price(paper, [target], frontier=frontier)
