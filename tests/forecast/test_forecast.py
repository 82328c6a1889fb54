"""The bill before the run: planned passes against real ones, the table of devices, a calibration, a whole study."""

import math
import time
from dataclasses import asdict

import pytest

from robudget.data import load, names
from robudget.datasets import PUBLISHED, Sizes, sizes_of
from robudget.errors import InputError
from robudget.forecast.forecast import Forecast, forecast, forecast_study, total
from robudget.forecast.passes import evaluation_passes, training_passes, weight
from robudget.forecast.step_timing import Calibration, Times, Work
from robudget.losses import LOSSES, LossName
from robudget.meter.conventions import exact_factor
from robudget.meter.machine import open_meter
from robudget.meter.prices import Prices
from robudget.recipe import Recipe
from robudget.sweep.study import Study
from robudget.training import Trainer

SMALL = {"model.base": 4, "epochs": 2, "epoch_images": 128, "validation.steps": 2}


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "at", "craft.steps": 2},
        {"loss": "trades", "craft.steps": 1, "validation.every": 2},
        {"loss": "standard", "epochs": 3, "validation.every": 2},
        {"loss": "mart", "craft.steps": 1, "validation.split": "paper", "validation.images": 50},
        {"loss": "free-at", "craft.steps": 3, "ema.decay": 0.9, "collapse.action": "off"},
        {"loss": "fgsm-pgi", "craft.steps": 1},
        {"loss": "fgsm-rs", "craft.steps": 1, "awp.gamma": 0.005, "awp.after_epochs": 1},
    ],
)
def test_what_is_planned_is_what_happens(change: dict) -> None:
    recipe = Recipe.load("digits").with_(SMALL | change)
    last = list(Trainer(recipe, load("digits")))[-1]
    planned = training_passes(recipe, sizes_of("digits"))
    assert (planned.steps, planned.images) == (last.steps, last.images)
    for name, number in last.calls.items():
        if name.startswith("validation"):
            # Only what is classified correctly is attacked: between none and all of it.
            least = training_passes(recipe, sizes_of("digits"), right=0.0).calls.get(name, 0)
            most = training_passes(recipe, sizes_of("digits"), right=1.0).calls[name]
            assert least <= number <= most
        else:
            assert planned.calls.get(name, 0) == number


def test_known_sizes_are_the_datasets() -> None:
    assert sizes_of("digits") == Sizes.of(load("digits"))
    with pytest.raises(InputError, match="unknown dataset 'cifar1'; did you mean 'cifar10'"):
        sizes_of("cifar1")


def test_an_evaluation_costs_what_the_specification_says_of_survivors() -> None:
    recipe = Recipe.load("paper")
    sizes = sizes_of("cifar10")
    calls = evaluation_passes(recipe, sizes, clean=0.5, robust=0.5)
    assert calls["apgd-ce_forward"] == 5000 * 101
    assert calls["apgd-t_backward"] == 5000 * 9 * 101
    assert calls["fab-t_forward"] == 2 * calls["fab-t_backward"] == 5000 * 9 * 200
    assert calls["square_forward"] == 5000 * 5001
    assert evaluation_passes(recipe, sizes, clean=0.9, robust=0.0).keys() == calls.keys()


def test_the_weight_of_a_recipe_grows_with_its_work_and_refuses_nothing() -> None:
    recipe = Recipe.load("paper")
    longer = [{"craft.steps": 20}, {"epochs": 500}, {"model.name": "wrn-34-20"}, {"loss": "trades"}]
    assert all(weight(recipe.with_(change)) > weight(recipe) for change in longer)
    # The exact FLOPs of the forecast, which builds the model, but for the first layer and what small models wait for.
    plan = forecast(recipe, device="a100")
    assert weight(recipe) == pytest.approx(plan.train_flops_exact + plan.eval_flops_exact.likely, rel=0.01)
    for name in ("resnet18", "wrn-11-1", "wrn-4-1"):  # not a WideResNet, and depths that a run will refuse
        assert weight(recipe.with_({"model.name": name})) > 0


def test_the_papers_longest_run_takes_more_than_16_days_on_four_v100() -> None:
    recipe = Recipe.load("paper").with_(
        {"model.name": "wrn-70-16", "loss": "trades", "craft.steps": 10, "epochs": 400, "batch_size": 64}
    )
    plan = forecast(recipe, device="v100", gpus=4)
    days = plan.train_seconds.likely / 86_400
    assert 16 * 0.7 < days < 16 * 1.5
    assert plan.train_seconds.low < plan.train_seconds.likely < plan.train_seconds.high
    assert "Tesla V100" in plan.basis
    # 400 epochs of 50,000 images at 27 F, and the validation of every epoch on top.
    assert plan.train_flops_exact > 27 * 77.53e9 * 50_000 * 400 * 0.99
    assert plan.train_flops_paper == pytest.approx(3 * 13 * plan.forward_flops * 400 * 781 * 64)


def test_the_whole_paper_is_priced_in_a_moment() -> None:
    study = Study.load("paper-320")
    begun = time.monotonic()
    plans = forecast_study(study.recipes, device="v100", gpus=4)
    assert time.monotonic() - begun < 120  # a bound against hanging; it takes seconds
    assert len(plans) == 320
    summed = total(plans)
    assert summed["runs"] == 320
    assert summed["train_flops_exact"] == pytest.approx(sum(plan.train_flops_exact for plan in plans))
    assert summed["cost_usd_low"] < summed["cost_usd"] < summed["cost_usd_high"]
    assert {plan.parameters for plan in plans} == {36_479_194, 46_160_474, 184_531_674, 266_796_506}


def check(plan: Forecast) -> dict:
    row = plan.to_dict()
    for name in ("train_seconds", "train_energy_kwh", "cost_usd", "co2_kg", "eval_seconds", "eval_energy_kwh"):
        assert 0 < row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert row["how"] == "estimated"
    assert {"train_flops_exact", "train_flops_paper", "parameters", "memory_gb", "basis", "prices"} <= row.keys()
    return row


def test_prices_and_synthetic_data_enter_the_bill() -> None:
    recipe = Recipe.load("paper").with_({"synthetic.source": "file", "synthetic.amount": 1_000_000})
    bare = check(forecast(recipe, device="a100"))
    assert bare["synthetic"] == "not counted"
    rich = check(
        forecast(recipe, device="a100", prices=Prices(name="x", usd_per_gpu_hour=2, synthetic_wh_per_image=0.1))
    )
    assert rich["synthetic_kwh"] == pytest.approx(100)
    assert rich["rent_usd"] == pytest.approx(2 * rich["train_seconds"] / 3600)
    assert rich["cost_usd"] == bare["cost_usd"]
    unknown_number = recipe.with_({"synthetic.amount": None})
    assert check(forecast(unknown_number, device="a100"))["synthetic"] == "not counted"
    assert check(forecast(Recipe.load("paper"), device="a100"))["synthetic"] == "none"


def test_what_is_not_counted_is_listed_with_its_share() -> None:
    row = check(forecast(Recipe.load("paper"), device="a100"))
    assert 0 < row["flops_not_counted_share"] < 0.01
    assert sum(row["flops_not_counted"].values()) == pytest.approx(row["flops_not_counted_share"])
    assert any("batch_norm" in op for op in row["flops_not_counted"])


def test_a_device_that_waits_for_its_host_is_told() -> None:
    assert any("lower bounds" in note for note in forecast(Recipe.load("digits"), device="a100").notes)
    assert not any("lower bounds" in note for note in forecast(Recipe.load("paper"), device="a100").notes)


def test_sizes_of_a_data_set_that_only_its_files_tell() -> None:
    recipe = Recipe.load("paper").with_(
        {"data.name": "folder", "epoch_images": None, "validation.images": 10, "batch_size": 50}
    )
    with pytest.raises(InputError, match=r"unknown dataset 'folder'.*data\.root"):
        forecast(recipe, device="a100")
    mine = {"folder": Sizes(2000, 100, (3, 48, 48), 7)}
    small = forecast(recipe, device="a100", sizes=mine)
    large = forecast(recipe, device="a100", sizes={"folder": Sizes(4000, 100, (3, 48, 48), 7)})
    assert large.train_flops_exact == pytest.approx(2 * small.train_flops_exact, rel=0.1)


def test_every_data_set_of_the_catalog_but_any_folder_is_known() -> None:
    assert {name for name in names() if name != "folder"} == set(PUBLISHED)


def test_what_does_not_fit_is_said() -> None:
    recipe = Recipe.load("paper").with_({"model.name": "wrn-70-16", "batch_size": 512, "loss": "trades"})
    assert "T4 has 16 GB" in forecast(recipe, device="t4").notes[0]
    with pytest.raises(InputError, match="unknown device 'h10'"):
        forecast(recipe, device="h10")


def test_another_image_size_is_another_cost() -> None:
    recipe = Recipe.load("paper").with_({"model.name": "wrn-16-2"})
    small, large = (forecast(recipe.with_({"data.image_size": side}), device="a100") for side in (32, 64))
    assert large.forward_flops == pytest.approx(4 * small.forward_flops, rel=1e-3)


def test_a_calibration_times_this_machine() -> None:
    recipe = Recipe.load("digits").with_(SMALL | {"loss": "trades", "craft.steps": 3, "ema.decay": 0.9})
    standard = recipe.with_({"loss": "standard"})
    plans = forecast_study([recipe, standard], seconds=2)
    rows = [check(plan) for plan in plans]
    assert all("calibrated on this machine" in row["basis"] for row in rows)
    assert all(row["device"] == "this machine" for row in rows)
    assert rows[0]["train_seconds"] < 600


def test_a_batch_that_does_not_fit_the_time_is_scaled() -> None:
    recipe = Recipe.load("digits").with_({"model.name": "wrn-10-4", "batch_size": 512, "craft.steps": 10})
    plan = forecast(recipe, seconds=0.2)
    check(plan)
    assert any("scaled to 512" in note for note in plan.notes)


@pytest.mark.parametrize("losses", [("at", "trades"), ("fgsm-rs", "at"), ("at", "standard"), ("mart", "n-fgsm")])
def test_times_go_with_flops_from_one_model_to_another(losses: tuple[LossName, LossName]) -> None:
    """A machine of one speed: a pass of F FLOPs takes F/1e9 s, so that the times of any recipe are known."""

    def times(work: Work) -> Times:
        image = work.forward / 1e9
        free = LOSSES[work.loss].steps is None
        step = (exact_factor(work.loss, 1) - 2 * free) * image * work.batch_size
        return Times(step, 2 * free * image * work.batch_size, image, 2 * image, work.parameters / 1e6, work.batch_size)

    small = Work("small", losses[0], 10**7, 64, 10**5)
    large = Work("large", losses[1], 10**9, 256, 10**7)
    scaled, expected = times(small).scaled(small, large), times(large)
    for name, value in asdict(expected).items():
        assert getattr(scaled, name) == pytest.approx(value), name


def test_one_large_model_of_each_kind_is_timed_and_the_rest_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 seconds a step is too long for a share of a second: but for the first of each kind, nothing is timed."""
    timed = []

    def slow(recipe: Recipe, *rest: object, work: Work, **more: object) -> Calibration:
        timed.append(recipe.slug)
        return Calibration(Times(80.0, 40.0, 1.0, 1.0, 1.0, work.batch_size), 50.0, "estimated", "watts", 0.0)

    monkeypatch.setattr("robudget.forecast.forecast.calibrate", slow)
    recipes = [
        Recipe.load("paper", {"model.name": name, "model.activation": activation, "loss": loss})
        for name in ("wrn-28-10", "wrn-34-10")
        for activation in ("relu", "silu")
        for loss in ("at", "trades")
    ]
    plans = forecast_study(recipes, seconds=8)
    assert len(timed) == 2
    assert all("28-10" in slug for slug in timed)
    assert sum("scaled by FLOPs from" in " ".join(plan.notes) for plan in plans) == 6
    by_recipe = dict(zip([(r.model.name, r.model.activation, r.loss) for r in recipes], plans, strict=True))
    small, large = (by_recipe[name, "relu", "at"] for name in ("wrn-28-10", "wrn-34-10"))
    assert large.train_seconds.likely / small.train_seconds.likely == pytest.approx(13.32 / 10.49, rel=0.01)


@pytest.mark.parametrize(("seconds", "expected"), [(8, ["wrn-16-4", "wrn-16-2"]), (0, ["wrn-10-1"])])
def test_of_small_models_the_largest_of_each_kind_is_timed_while_there_is_time(
    seconds: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def quick(recipe: Recipe, *rest: object, work: Work, **more: object) -> Calibration:
        timed.append(recipe.model.name)
        return Calibration(Times(0.1, 0.05, 1e-3, 1e-3, 0.1, work.batch_size), 50.0, "estimated", "watts", 0.0)

    monkeypatch.setattr("robudget.forecast.forecast.calibrate", quick)
    names = {"relu": ("wrn-10-1", "wrn-16-4"), "silu": ("wrn-16-1", "wrn-16-2")}
    recipes = [
        Recipe.load("digits", {"model.name": name, "model.activation": activation, "epochs": epochs})
        for activation, models in names.items()
        for name in models
        for epochs in (3, 4)
    ]
    plans = forecast_study(recipes, seconds=seconds)
    assert timed == expected
    scaled = ["scaled by FLOPs from" in " ".join(plan.notes) for plan in plans]
    assert scaled == [recipe.model.name not in expected for recipe in recipes]


def test_unknown_stays_unknown_in_sums() -> None:
    recipe = Recipe.load("digits").with_({"loss": "free-at", "craft.steps": 4})
    plans = forecast_study([recipe, recipe.with_({"loss": "at"})], device="a100")
    assert math.isnan(total(plans)["train_flops_paper"])
    assert total(plans)["train_flops_exact"] > 0


def test_a_calibrated_gpu_is_timed_with_enough_images_and_rented(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 2 images a GPU's step is the launch of its kernels; and its rent used to be 0."""
    seen: list[Work] = []

    def fast(recipe: Recipe, *rest: object, work: Work, **more: object) -> Calibration:
        seen.append(work)
        return Calibration(Times(0.1, 0.05, 1e-4, 1e-4, 1.0, work.batch_size), 400.0, "measured", "NVML", 0.0)

    monkeypatch.setattr("robudget.forecast.forecast.calibrate", fast)
    monkeypatch.setattr("robudget.forecast.forecast.open_meter", lambda device: open_meter("cpu"))
    recipe = Recipe.load("paper")
    plan = forecast(recipe, site_device="cuda:0", prices=Prices(name="x", usd_per_gpu_hour=2))
    assert seen[0].probe_images == 128
    assert plan.to_dict()["rent_usd"] == pytest.approx(2 * plan.train_seconds.likely / 3600)
    on_cpu = forecast(recipe, site_device="cpu", prices=Prices(name="x", usd_per_gpu_hour=2))
    assert seen[1].probe_images == 2
    assert on_cpu.to_dict()["rent_usd"] == 0
