"""Plans: what fits a budget, what reaches a target, what to change instead."""

import json

import numpy as np
import pandas as pd
import pytest

from robudget.errors import InputError
from robudget.planning import plan
from robudget.planning.cost_model import difference
from robudget.planning.planner import candidate_recipes
from robudget.recipe import Recipe


@pytest.fixture
def table(grid_predictor):
    return grid_predictor.table


def asked(table, predictor, **arguments):
    return plan(table, predictor=predictor, **arguments)


def test_the_best_within_a_budget(table, grid_predictor):
    small = asked(table, grid_predictor, budget="2e14flops")
    large = asked(table, grid_predictor, budget="1e18flops")
    for made, amount in ((small, 2e14), (large, 1e18)):
        assert made.column == "train_flops_exact"
        assert all(o.costs["train_flops_exact"] <= amount for o in made.options)
        accuracies = [o.aa_acc for o in made.options]
        assert accuracies == sorted(accuracies, reverse=True)
    assert large.options[0].aa_acc > small.options[0].aa_acc
    best = large.options[0].choices
    assert (best["synthetic"], best["ema"], best["loss"], best["model"]) == (True, True, "trades", "wrn-16-4")


def test_the_cheapest_way_to_a_target(table, grid_predictor):
    made = asked(table, grid_predictor, target=50)
    assert made.column == "cost_usd"
    costs = [o.costs["cost_usd"] for o in made.options]
    assert costs == sorted(costs)
    assert all(o.aa_acc >= 50 for o in made.options)
    assert all(0 <= o.p_reach <= 1 for o in made.options)
    low, high = made.options[0].cost_intervals["cost_usd"]
    assert low < costs[0] < high
    flops = asked(table, grid_predictor, target=50, column="train_flops_exact")
    assert flops.column == "train_flops_exact"


def test_the_next_point_costs_more(table, grid_predictor):
    made = asked(table, grid_predictor, budget="2e14flops", top=1)
    assert made.next_point.aa_acc >= made.options[0].aa_acc + 1
    assert made.next_point.costs["train_flops_exact"] > 2e14
    assert len(made.options) == 1
    assert set(made.marginal) == set(made.best.costs)
    value, low, high = made.marginal["cost_usd"]
    assert value == pytest.approx(made.next_point.costs["cost_usd"] - made.best.costs["cost_usd"])
    assert low < value < high


def test_a_difference_has_the_scatter_of_both():
    out = difference({"kwh": 30.0}, {"kwh": 40.0}, {"kwh": 0.1}, 2.0)
    assert out == {"kwh": pytest.approx((10.0, 0.0, 20.0))}


def test_the_law_answers_in_every_unit(table, grid_predictor):
    made = asked(table, grid_predictor, target=52)
    reaches = {reach.x: reach for reach in made.reaches}
    assert list(reaches) == ["cost_usd", "train_flops_exact", "train_energy_kwh"]
    assert made.reach is reaches["cost_usd"]
    # Dollars are energy in another unit: the same law, not a second fit.
    ratio = float(table.cost_usd.iloc[0] / table.train_energy_kwh.iloc[0])
    for end in ("value", "low", "high"):
        one, other = getattr(reaches["cost_usd"], end), getattr(reaches["train_energy_kwh"], end)
        assert one == pytest.approx(other * ratio)
    assert {reach.target for reach in made.reaches} == {52}


def test_what_to_change_instead(table, grid_predictor):
    without = asked(table, grid_predictor, budget="1e18flops", choose={"synthetic": False})
    assert not without.options[0].choices["synthetic"]
    made = asked(table, grid_predictor, budget="1e18flops")
    levers = {(lever.feature, str(lever.value)): lever for lever in made.levers}
    assert levers["synthetic", "False"].gain == pytest.approx(-4, abs=1)
    assert levers["synthetic", "False"].cost_ratio == pytest.approx(1, rel=0.01)
    assert not levers["synthetic", "False"].spends
    assert levers["steps", "2"].spends
    assert "synthetic = True is worth" in made.instead


def test_a_number_that_comes_with_its_switch_is_one_change(table):
    """β is unknown without TRADES; two values of it make it a choice of its own."""
    from robudget.prediction import Predictor

    more = table[table.loss == "trades"].assign(beta=3.0, run_id="b3-" + table.run_id, aa_acc=lambda t: t.aa_acc - 0.5)
    both = pd.concat([table, more], ignore_index=True)
    made = plan(both, budget="1e30flops", predictor=Predictor.fit(both, repeats=1, groups=[]))
    assert "beta" in made.best.choices
    levers = {(lever.feature, lever.value) for lever in made.levers}
    assert ("loss", "at") in levers
    assert ("beta", 3) in levers
    json.dumps(made.to_dict(), allow_nan=False)


def test_a_target_out_of_reach_is_an_answer(table, grid_predictor):
    made = asked(table, grid_predictor, target=90)
    assert made.options == ()
    assert any("is predicted to reach 90%: the best reaches" in w for w in made.warnings)
    assert made.levers
    assert made.best.aa_acc == max(o.aa_acc for o in asked(table, grid_predictor, budget="1e30flops").options)
    assert made.reach.target == 90
    assert made.instead


def test_nothing_fits_a_tiny_budget(table, grid_predictor):
    made = asked(table, grid_predictor, budget="1flops")
    assert made.options == ()
    assert "the cheapest costs" in made.warnings[-1]
    assert made.levers == ()


def test_real_runs_are_named(table, grid_predictor):
    made = asked(table, grid_predictor, budget="1e18flops", top=100)
    ran = [o for o in made.options if o.ran]
    assert ran
    assert all(o.nearest[0][0] == o.ran for o in ran)
    interpolated = [o for o in made.options if o.choices["steps"] in (3, 4)]
    assert interpolated
    assert all(o.ran is None for o in interpolated)


def test_only_sensible_candidate_recipes(grid_predictor):
    rows = candidate_recipes(grid_predictor)
    assert len(rows) == 3 * 2 * 5 * 2 * 2  # sizes × losses × steps 1 to 5 × synthetic × EMA
    assert (rows["beta"].isna() == (rows["loss"] == "at")).all()  # columns that follow a choice follow it
    with_standard = pd.concat([
        grid_predictor.table,
        grid_predictor.table.iloc[:4].assign(loss="standard", steps=0, aa_acc=0.0, beta=np.nan, collapsed=False),
    ], ignore_index=True)  # fmt: skip
    from robudget.prediction import Predictor

    more = candidate_recipes(Predictor.fit(with_standard, repeats=1, groups=[]))
    assert ((more["loss"] == "standard") == (more["steps"] == 0)).all()


def test_candidates_of_ones_own(table, grid_predictor):
    recipe = Recipe.from_dict({
        "model": {"name": "wrn-16-4"}, "loss": "trades", "craft": {"steps": 5}, "epochs": 20, "epoch_images": 50_000,
        "data": {"name": "digits"},
    })  # fmt: skip
    recipes = [recipe, recipe.with_({"ema.decay": 0.99})]
    made = asked(table, grid_predictor, budget="1e18flops", candidates=recipes)
    assert made.n_candidates == 2
    assert made.options[0].choices["ema"]
    assert made.options[0].outside == ()
    far = asked(table, grid_predictor, budget="1e18flops", candidates=[recipe.with_({"craft.steps": 9})])
    assert far.options[0].outside == ("steps",)
    assert any("never tried the first one's steps" in w for w in far.warnings)


def test_recipes_that_do_not_say_how_many_images_an_epoch_has(table, grid_predictor):
    """Then it is the whole dataset, whose size the runs or the published splits tell."""
    recipe = Recipe.from_dict({"model": {"name": "wrn-16-4"}, "epochs": 20, "data": {"name": "digits"}})
    whole = table.assign(epoch_images=np.nan)  # 50,000 images an epoch in this made-up table
    by_table = asked(whole, grid_predictor, budget="1e18flops", candidates=[recipe])
    published = asked(table, grid_predictor, budget="1e18flops", candidates=[recipe])
    ratio = by_table.options[0].costs["train_flops_exact"] / published.options[0].costs["train_flops_exact"]
    assert ratio == pytest.approx(50_000 / 1396, rel=1e-6)


def test_grids_know_how_long_an_epoch_is(table, grid_predictor):
    """A table whose runs differ in length and do not say `epoch_images`: candidates cost what runs like them did."""
    from robudget.prediction import Predictor

    double = table.assign(
        epochs=40, images_seen=2 * table.images_seen, train_flops_exact=2 * table.train_flops_exact,
        aa_acc=table.aa_acc + np.where(table.collapsed, 0, 0.5), run_id="long-" + table.run_id,
    )  # fmt: skip
    both = pd.concat([table, double], ignore_index=True).drop(columns="epoch_images")
    made = plan(both, budget="1e30flops", predictor=Predictor.fit(both, repeats=1, groups=[]), top=1000)
    ran = {o.ran: o.costs["train_flops_exact"] for o in made.options if o.ran}
    assert len(ran) > 50
    truth = both.set_index("run_id").train_flops_exact
    assert max(abs(cost / truth[name] - 1) for name, cost in ran.items()) < 1e-6


def test_the_paper(paper, paper_predictor):
    made = plan(paper, budget="50usd", predictor=paper_predictor)
    best = made.options[0]
    assert best.aa_acc > 59.5
    assert best.choices["synthetic"]
    assert best.costs["cost_usd"] <= 50
    assert best.p_collapse < 0.05
    hours = plan(paper, budget="100gpu-h", predictor=paper_predictor)
    assert hours.options[0].costs["gpu_hours"] <= 100
    far = plan(paper, target=75, predictor=paper_predictor)
    assert far.options == ()
    assert far.reach.p_unreachable > 0.5
    json.dumps(far.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a budget"),
        ({"budget": "5usd", "target": 50}, "not both"),
        ({"target": 0}, "target = 0"),
        ({"budget": "5gpu-h"}, "knows the gpu-h of no run .* say hours"),
        ({"budget": "5usd", "choose": {"loss": "mart"}}, "no run has loss = 'mart'"),
        ({"budget": "5usd", "choose": {"losss": "at"}}, "did you mean 'loss'"),
    ],
)
def test_mistakes(table, grid_predictor, arguments, message):
    with pytest.raises(InputError, match=message):
        asked(table, grid_predictor, **arguments)
