"""What run.json says of a stage: phases that add up, both conventions, JSON."""

import json
import math

import pytest

from robudget.files import to_plain
from robudget.meter.conventions import exact_factor, paper_factor
from robudget.meter.energy import Energy, Part
from robudget.meter.flops import model_record, of_recipe, stage_record, training_record
from robudget.meter.prices import Prices, bill
from robudget.recipe import Recipe

ENERGY = Energy(60.0, (Part("cpu", 0.002, "estimated", "CPU time × 4 W a thread", 0.6, {"cpu_seconds": 60.0}),))
IMAGES, STEPS = 1000, 10


def trained(recipe: Recipe, calls: dict[str, float]) -> dict:
    flops = of_recipe(recipe, 10, (3, 32, 32))
    made = training_record(recipe, flops, calls, images=IMAGES, steps=STEPS, energy=ENERGY)
    return json.loads(json.dumps(to_plain(made), allow_nan=False))


def test_phases_add_up_to_the_exact_total_and_both_conventions_stand_side_by_side() -> None:
    recipe = Recipe.load("paper").with_({"craft.steps": 2, "ema.decay": 0.9})
    calls = {"craft_forward": 2, "craft_backward": 2, "update_forward": 1, "update_backward": 1}
    made = trained(recipe, {name: n * IMAGES for name, n in calls.items()})
    assert made["flops_exact"] == pytest.approx(sum(made["flops_by_phase"].values()))
    assert set(made["flops_by_phase"]) == {*calls, "ema"}
    forward = of_recipe(recipe, 10, (3, 32, 32)).forward
    assert made["flops_exact"] == pytest.approx(exact_factor("at", 2) * forward * IMAGES, rel=1e-3)
    assert made["flops_paper"] == pytest.approx(paper_factor("at", 2).value * forward * IMAGES)
    assert made["seconds"] == 60
    assert made["energy"]["how"] == "estimated"


def test_free_at_is_charged_full_backwards_and_has_no_figure_by_the_paper() -> None:
    recipe = Recipe.load("digits").with_({"loss": "free-at", "craft.steps": 4, "ema.decay": 0.9})
    made = trained(recipe, {"update_forward": 4 * IMAGES, "update_backward": 4 * IMAGES})
    flops = of_recipe(recipe, 10, (3, 32, 32))
    assert made["flops_by_phase"]["update_full_backward"] == 4 * IMAGES * flops.full_backward
    assert made["flops_by_phase"]["ema"] == 4 * STEPS * flops.ema
    assert made["flops_paper"] is None


def test_an_old_record_is_priced_anew_from_what_it_holds() -> None:
    recipe = Recipe.load("digits")
    made = trained(recipe, {"update_forward": IMAGES})
    energy = Energy.from_dict(made["energy"])
    assert energy == ENERGY
    dear = Prices(name="dear", usd_per_kwh=0.5, pue=2.0)
    assert bill(energy.kwh, energy.seconds, dear).cost_usd == pytest.approx(0.002)


def test_an_evaluation_is_billed_by_attack() -> None:
    recipe = Recipe.load("digits")
    flops = of_recipe(recipe, 10, (1, 8, 8))
    made = stage_record(
        flops, {"apgd-ce_forward": 101, "apgd-ce_backward": 101, "square_forward": 5001}, Energy(math.nan, ())
    )
    by_phase = made["flops_by_phase"]
    assert by_phase["square_forward"] == 5001 * flops.forward
    assert by_phase["apgd-ce_backward"] == 101 * flops.input_backward
    assert math.isnan(made["energy"]["kwh"])
    about = model_record(flops)
    assert about["parameters"] == flops.parameters
    assert about["flops_per_image"]["forward"] == flops.forward
