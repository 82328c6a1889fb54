"""A training that starts from weights: which, that their content is in the recipe's id, and when they are not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from robudget import data
from robudget.data import Dataset
from robudget.datasets import PUBLISHED
from robudget.errors import InputError
from robudget.execution import Site
from robudget.files import sha256
from robudget.forecast.forecast import training_flops
from robudget.forecast.step_timing import timing_key
from robudget.models.build import build_for
from robudget.recipe import Recipe
from robudget.training import Trainer
from robudget.training.checkpoint import save_weights

RECIPE = Recipe.load("digits-smoke").with_({"epochs": 2, "epoch_images": 128, "ema.decay": 0.9})


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


@pytest.fixture
def weights(digits: Dataset, tmp_path: Path) -> Path:
    """Of the recipe's model, from another seed."""
    other, path = RECIPE.with_({"seed": 7}), tmp_path / "weights.safetensors"
    save_weights(path, build_for(other, digits).state_dict(), other, {})
    return path


def starting(path: Path) -> tuple[Recipe, Site]:
    """As typed: `model.weights=path`."""
    site, changes = Site.take({"model.weights": str(path)})
    return RECIPE.with_(changes), site


def test_a_training_starts_from_the_weights_and_so_does_its_average(digits: Dataset, weights: Path) -> None:
    recipe, site = starting(weights)
    trainer, wanted = Trainer(recipe, digits, site), load_file(weights)
    assert trainer.ema is not None
    for model in (trainer.model, trainer.ema.model):
        state = model.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    fresh = Trainer(RECIPE, digits).model.state_dict()
    assert not all(torch.equal(fresh[name], wanted[name]) for name in wanted)


def test_the_content_is_in_the_id_and_the_path_is_not(weights: Path, tmp_path: Path) -> None:
    recipe, _ = starting(weights)
    assert recipe.model.init == sha256(weights)
    assert recipe.id != RECIPE.id
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(weights.read_bytes())
    assert starting(moved)[0].id == recipe.id
    save_file({"other": torch.zeros(1)}, moved)
    assert starting(moved)[0].id != recipe.id
    assert recipe.with_({"model.init": None}).id == RECIPE.id
    assert training_flops(recipe, PUBLISHED["digits"]) == training_flops(RECIPE, PUBLISHED["digits"])
    assert timing_key(recipe) == timing_key(RECIPE)


def test_going_on_does_not_read_them_again_and_ends_at_the_same_bits(
    digits: Dataset, weights: Path, tmp_path: Path
) -> None:
    recipe, site = starting(weights)
    whole = Trainer(recipe, digits, site)
    list(whole)
    next(iter(Trainer(recipe, digits, site, folder=tmp_path / "run")))
    weights.unlink()
    resumed = Trainer(recipe, digits, folder=tmp_path / "run")
    list(resumed)
    one, two = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def refused(digits: Dataset, recipe: Recipe, site: Site) -> str:
    with pytest.raises(InputError) as caught:
        Trainer(recipe, digits, site)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_that_do_not_fit_are_one_line(digits: Dataset, weights: Path, tmp_path: Path) -> None:
    recipe, site = starting(weights)
    assert "needs model.weights=" in refused(digits, recipe, Site())
    wider = recipe.with_({"model.base": 4})
    assert "are of another model than 'wrn-10-1' here: " in refused(digits, wider, site)
    seven = {name: t[:7].contiguous() if name.startswith("head") else t for name, t in load_file(weights).items()}
    other: Any = tmp_path / "seven.safetensors"
    save_file(seven, other)
    said = refused(digits, *starting(other))
    assert "is (7" in said
    assert "not (10" in said
    assert "has the SHA-256" in refused(digits, recipe, Site(weights=str(other)))
    other.write_bytes(weights.read_bytes()[:-100])
    assert "are damaged" in refused(digits, *starting(other))


def test_a_path_in_the_recipe_and_a_file_that_is_not_there_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"is no SHA-256 \(allowed: null, 64 hex digits; name a file by model\.weights="
    ):
        RECIPE.with_({"model.init": "runs/best.safetensors"})
    with pytest.raises(InputError, match=r"cannot read model\.weights = .*: No such file"):
        Site.take({"model.weights": str(tmp_path / "absent.safetensors")})
