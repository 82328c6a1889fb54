"""Which run to make next: the one that tells most for its price."""

import json
from itertools import product

import numpy as np
import pandas as pd
import pytest

from robudget.errors import InputError
from robudget.meter.conventions import exact_factor
from robudget.planning import plan_next
from robudget.planning.answer import Measured, Option
from robudget.planning.next_runs import _weight, next_runs


def recipes():
    levels = product([1e6, 4e6, 2e7, 1e8], [2, 5, 10], ["at", "trades"], ["relu", "silu"])
    frame = pd.DataFrame(list(levels), columns=["parameters", "steps", "loss", "activation"])
    passes = np.array([exact_factor(*e) for e in zip(frame["loss"], frame["steps"], strict=True)])
    frame = frame.assign(train_flops_exact=1e8 * frame["parameters"] * passes, n_eval=10_000, clean_acc=85.0)
    return frame.assign(cost_usd=1e-15 * frame["train_flops_exact"], run_id=[f"r{i}" for i in frame.index])


def outcome(frame, rng):
    mean = 45 * (frame.train_flops_exact / 1e17) ** 0.02 + 2 * (frame.loss == "trades")
    return frame.assign(aa_acc=mean + rng.normal(0, 0.7, len(frame)))


def offered(table):
    every = recipes()
    ran = set(table.run_id)
    options = [
        Option(row, 50, 49, 51, 0.0, np.nan, {c: row[c] for c in ("train_flops_exact", "cost_usd")}, {},
               Measured((row["run_id"],), 50, 49, 51, {}) if row["run_id"] in ran else None, (), ())
        for row in every.to_dict("records")
    ]  # fmt: skip
    return options, every


@pytest.mark.parametrize("question", ["exponent", "price", "loss"])
def test_more_is_told_than_by_as_much_money_at_random(question):
    """Expected half widths, of five tables; `bench/laws.py next` has what was then measured, on more of them."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        every = outcome(recipes(), rng)
        table = every.iloc[np.sort(rng.choice(len(every), 20, replace=False))]
        options, rows = offered(table)
        found = next_runs(table, options, rows, "cost_usd", 4, question=question, target=60.0)
        assert len(found.runs) == 4
        halves = [found.half_now, *(run.half_after for run in found.runs)]
        assert halves == sorted(halves, reverse=True)
        assert found.half_after < found.half_random
        assert found.half_after <= found.half_cheapest * 1.02
        assert found.cost == pytest.approx(sum(run.option.costs["cost_usd"] for run in found.runs))
        json.dumps(found.to_dict(), allow_nan=False)


def test_an_effect_is_told_by_completing_pairs():
    rng = np.random.default_rng(0)
    every = outcome(recipes(), rng)
    without = (every.loss == "trades") & (every.activation == "silu")
    pairs = every[(every.parameters == 1e6) & ~without]
    options, rows = offered(pairs)
    found = next_runs(pairs, options, rows, "cost_usd", 2, question="loss")
    # Runs without a partner get one, the cheapest first, before a cheaper pair is repeated.
    told = [tuple(r.option.choices[name] for name in ("parameters", "loss", "activation", "steps")) for r in found.runs]
    assert told == [(1e6, "trades", "silu", steps) for steps in (2, 5)]
    assert not any(r.again for r in found.runs)
    assert found.half_after < found.half_now
    assert found.sentence().startswith("To know the effect of loss better, train ")


def test_another_seed_tells_of_the_evaluation_only():
    assert _weight(1, 0.3) == 1
    assert _weight(100, 1.0) == 100  # all noise: a hundred seeds are a hundred runs
    assert _weight(100, 0.3) < 1 / 0.7  # never more than the recipe's own share leaves
    assert _weight(0, 0.3) == 0


def test_the_published_table(paper, paper_predictor):
    found = plan_next(paper, 3, "price", target=61, budget="5usd", predictor=paper_predictor)
    assert found.cost <= 5
    assert all(run.again for run in found.runs)  # it is a full factorial: nothing is left to run but seeds
    assert any(line.startswith("That is little") for line in found.support())
    assert "a factor of" in found.sentence()


def test_where_the_cheapest_runs_first_are_as_good_it_says_so():
    rng = np.random.default_rng(0)
    every = outcome(recipes(), rng)
    options, rows = offered(every)
    found = next_runs(every, options, rows, "cost_usd", 3)
    said = any("the cheapest runs first are as good a rule here" in line for line in found.support())
    assert said == found.cheapest_as_good == (found.half_cheapest <= 1.03 * found.half_after)
    assert said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "next = 0"),
        ({"n": 1, "question": "price"}, "the price of which target"),
        ({"n": 1, "question": "los"}, "unknown question 'los'.*did you mean 'loss'"),
        ({"n": 1, "budget": "5parsecs"}, "unit of a budget"),
    ],
)
def test_mistakes(grid_predictor, arguments, message):
    with pytest.raises(InputError, match=message):
        plan_next(grid_predictor.table, predictor=grid_predictor, **arguments)


def test_a_budget_that_fits_nothing_is_an_answer(grid_predictor):
    found = plan_next(grid_predictor.table, 2, budget="1flops", predictor=grid_predictor)
    assert found.runs == ()
    assert found.sentence().startswith("No recipe fits the budget, so that no run can tell more of the exponent")
    assert "the cheapest costs " in found.sentence()
