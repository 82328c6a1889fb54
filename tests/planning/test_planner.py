"""Plans: what fits a budget, what reaches a target, what to change instead."""

import json

import numpy as np
import pandas as pd
import pytest

from robudget.errors import InputError
from robudget.meter.prices import Prices
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
        first, *others = made.options
        tried = [o.aa_acc for o in others if not o.untried]
        assert tried == sorted(tried, reverse=True)
        assert [bool(o.untried) for o in made.options] == sorted(bool(o.untried) for o in made.options)
        # The first is the cheapest within one standard error of the most accurate.
        ties = [o for o in others if not o.untried and o.aa_acc >= made.most_accurate.aa_acc - made.margin]
        assert first.aa_acc >= made.most_accurate.aa_acc - made.margin
        assert all(first.costs["train_flops_exact"] <= o.costs["train_flops_exact"] for o in ties)
    assert large.options[0].aa_acc > small.options[0].aa_acc
    best = large.options[0].choices
    assert (best["synthetic"], best["ema"], best["loss"], best["model"]) == (True, True, "trades", "wrn-16-4")


def test_the_cheapest_way_to_a_target(table, grid_predictor):
    made = asked(table, grid_predictor, target=50)
    assert made.column == "cost_usd"
    assert not made.options[0].untried
    for untried in (False, True):
        costs = [o.costs["cost_usd"] for o in made.options if bool(o.untried) == untried]
        assert costs == sorted(costs)
    assert all(o.aa_acc >= 50 for o in made.options)
    assert all(0 <= o.p_reach <= 1 for o in made.options)
    low, high = made.options[0].cost_intervals["cost_usd"]
    assert low < made.options[0].costs["cost_usd"] < high
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
    out = difference({"kwh": 30.0}, {"kwh": 40.0}, {"kwh": 0.2})
    assert out == {"kwh": pytest.approx((10.0, 0.0, 20.0))}


def test_the_law_has_one_price_in_every_unit(table, grid_predictor):
    made = asked(table, grid_predictor, target=52)
    assert (made.price.x, made.price.target) == ("train_flops_exact", 52)
    # Dollars are energy in another unit: the same price, not a second fit.
    ratio = float(table.cost_usd.iloc[0] / table.train_energy_kwh.iloc[0])
    for one, other in zip(made.price.span("cost_usd"), made.price.span("train_energy_kwh"), strict=True):
        assert one == pytest.approx(other * ratio, rel=1e-3)
    more = asked(table, grid_predictor, budget="1e18flops").price
    assert more.target == pytest.approx(table.aa_acc.max() + 1, abs=0.06)


def test_where_law_and_predictor_differ_the_reason_is_given(paper, paper_predictor):
    """The law goes on beyond the runs, the predictor does not."""
    made = plan(paper, target=61, predictor=paper_predictor)
    assert made.options == ()
    assert made.price.reachable
    (line,) = [text for text in made.support() if text.startswith("The law of the best runs and the predictor differ")]
    assert made.price.sentence() in line
    assert "never says more than the best run's 60.1%" in line
    assert not any("differ" in text for text in plan(paper, target=59, predictor=paper_predictor).support())


def test_what_to_change_instead(table, grid_predictor):
    without = asked(table, grid_predictor, budget="1e18flops", choose={"synthetic": False})
    assert not without.options[0].choices["synthetic"]
    made = asked(table, grid_predictor, budget="1e18flops")
    levers = {(lever.feature, str(lever.value)): lever for lever in made.levers}
    assert levers["synthetic", "False"].gain == pytest.approx(-4, abs=1)
    assert levers["synthetic", "False"].cost_ratio == pytest.approx(1, rel=0.01)
    assert not levers["synthetic", "False"].spends
    assert levers["steps", "2"].spends
    assert "synthetic data = yes is worth" in made.instead


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
    assert made.sentence().startswith("No run reached 90% (the best of 72, ")
    assert "no recipe made of these choices is predicted to; the nearest recipe is" in made.sentence()
    assert made.levers
    assert made.best.aa_acc == max(o.aa_acc for o in asked(table, grid_predictor, budget="1e30flops").options)
    assert made.price.target == 90
    assert made.instead


def test_nothing_fits_a_tiny_budget(table, grid_predictor):
    made = asked(table, grid_predictor, budget="1flops")
    assert made.options == ()
    assert made.sentence().startswith("No recipe of these choices fits 1flops: the cheapest that is not predicted to")
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
        "data": {"name": "digits"}, "threat": {"eps": 0.1},
    })  # fmt: skip
    recipes = [recipe, recipe.with_({"ema.decay": 0.99})]
    made = asked(table, grid_predictor, budget="1e18flops", candidates=recipes)
    assert made.n_candidates == 2
    assert made.options[0].choices["ema"]
    assert made.options[0].outside == ()
    far = asked(table, grid_predictor, budget="1e18flops", candidates=[recipe.with_({"craft.steps": 9})])
    assert far.options[0].outside == ("steps",)
    assert "no run has this value of attack steps, so nothing supports it" in far.sentence()


def test_recipes_that_do_not_say_how_many_images_an_epoch_has(table, grid_predictor):
    """Then it is the whole dataset, whose size the runs or the published splits tell."""
    recipe = Recipe.from_dict(
        {"model": {"name": "wrn-16-4"}, "epochs": 20, "data": {"name": "digits"}} | {"threat": {"eps": 0.1}}
    )
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
    assert not far.price.reachable
    assert "75.0% costs more than 5" in " ".join(far.support())
    json.dumps(far.to_dict(), allow_nan=False)


def test_the_cheapest_within_the_noise_comes_first(paper, paper_predictor):
    made = plan(paper, budget="50usd", predictor=paper_predictor, top=1000)
    first = made.options[0]
    assert first.costs["cost_usd"] < 9.46
    assert made.most_accurate.costs["cost_usd"] > 25
    assert first.low <= made.most_accurate.aa_acc <= first.high
    assert made.most_accurate.low <= first.aa_acc
    (tie,) = [line for line in made.support() if line.startswith("It is the cheapest within one standard error")]
    assert made.most_accurate.name() in tie
    assert first.untried == ()
    assert "model wrn-28-10 → wrn-70-16 +2.3 points" in made.allocation.sentences()[1]
    # It was run: its run comes first, with its interval and its bill, and the prediction second.
    assert first.ran == "paper-065"
    assert "measured 59.62% [58.7, 60.6] (95%) as paper-065 for $4.92 of electricity; another run is predicted" in (
        made.sentence()
    )
    assert any("Dollars are electricity alone" in line for line in made.support())


def test_a_step_count_that_nobody_ran_is_never_first(paper, paper_predictor):
    made = plan(paper, target=59, predictor=paper_predictor, top=1000)
    assert made.options[0].untried == ()
    four = [o for o in made.options if o.choices["steps"] == 4]
    assert four  # they are offered, after all that were run, and say so
    assert all(o.unseen == ("steps",) for o in four)
    assert min(made.options.index(o) for o in four) > max(made.options.index(o) for o in made.options if o.ran)
    assert all(lever.value not in (3, 4, 6, 8, 9) for lever in made.levers if lever.feature == "steps")


def test_a_target_that_runs_reached_is_never_out_of_reach(paper, paper_predictor):
    made = plan(paper, target=60, predictor=paper_predictor)
    assert (made.reached, made.top_run[0]) == (3, "paper-250")
    assert made.top_run[1] == pytest.approx(60.14)
    assert made.sentence().startswith("60% was reached by 3 runs, at the least cost by wrn-70-16")
    assert "as paper-055 for $10.49 of electricity" in made.sentence()
    assert made.options[0].measured.aa_acc >= 60
    assert made.price.reachable
    assert made.price.observed.run == "paper-055"
    assert made.price.value <= paper.set_index("run_id").train_flops_exact["paper-055"]
    everything = " ".join([made.sentence(), *made.support(), made.instead, *made.warnings])
    assert "unreachable" not in everything
    assert "No run" not in everything
    assert "no recipe" not in everything


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ({"target": 20}, "For 20% train"),
        ({"target": 75}, "No run reached 75% (the best of 319, paper-250: 60.14%), and no recipe"),
        ({"target": 99.9}, "No run reached 99.9% "),
        ({"budget": "0.01usd"}, "No recipe of these choices fits 0.01usd: the cheapest that is not predicted to"),
        (
            {"target": 60, "choose": {"synthetic": False}},
            "60% was reached by 3 runs (the best, paper-250: 60.14%), none",
        ),
    ],
)
def test_an_answer_to_every_question(paper, paper_predictor, arguments, answer):
    made = plan(paper, predictor=paper_predictor, **arguments)
    assert made.sentence().startswith(answer)
    assert all(line.endswith(".") for line in (made.sentence(), *made.support()))
    json.dumps(made.to_dict(), allow_nan=False)


def test_rent_where_the_prices_have_it(paper, paper_predictor):
    made = plan(paper, budget="50usd", predictor=paper_predictor, prices=Prices(usd_per_gpu_hour=2.0))
    first = made.options[0]
    assert first.costs["rent_usd"] == pytest.approx(2 * first.costs["gpu_hours"])
    assert any(
        line.startswith("Dollars are electricity; renting the GPUs for it costs $173.") for line in made.support()
    )


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
