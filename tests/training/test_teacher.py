"""Labels made by a teacher: they are the teacher's, and a teacher that does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from robudget import data
from robudget.data import Dataset
from robudget.errors import InputError
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.training import Trainer, best_model
from robudget.training.checkpoint import save_weights

RECIPE = Recipe().with_(
    {
        "data.name": "digits",
        "model.name": "wrn-10-1",
        "model.base": 2,
        "loss": "standard",
        "epochs": 1,
        "epoch_images": 256,
        "batch_size": 64,
        "validation.images": 32,
        "validation.steps": 1,
    }
)
TAUGHT = RECIPE.with_({"synthetic.source": "mixture", "synthetic.amount": 300, "synthetic.relabel": True})


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


@pytest.fixture(scope="module")
def teacher(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    list(Trainer(RECIPE, digits, folder=folder))
    return folder / "best.safetensors"


def test_labels_are_the_teachers(digits: Dataset, teacher: Path) -> None:
    taught = Trainer(TAUGHT, digits, Site(teacher=str(teacher))).data.synthetic
    own = Trainer(TAUGHT.with_({"synthetic.relabel": False}), digits).data.synthetic
    assert taught is not None
    assert own is not None
    assert torch.equal(taught.images, own.images)
    assert not torch.equal(taught.labels, own.labels)
    with torch.no_grad():
        says = best_model(RECIPE, digits, teacher)(taught.unit()).argmax(1)
    assert torch.equal(taught.labels, says)


def test_resuming_with_another_teachers_labels_is_refused(digits: Dataset, teacher: Path, tmp_path: Path) -> None:
    recipe = TAUGHT.with_({"epochs": 2})
    next(iter(Trainer(recipe, digits, Site(teacher=str(teacher)), folder=tmp_path / "run")))
    torch.manual_seed(1)
    weights = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in load_file(teacher).items()}
    save_weights(tmp_path / "other.safetensors", weights, RECIPE, {})
    with pytest.raises(InputError, match="was made with synthetic images = "):
        Trainer(recipe, digits, Site(teacher=str(tmp_path / "other.safetensors")), folder=tmp_path / "run")


def test_a_teacher_that_is_missing_or_does_not_fit(digits: Dataset, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs synthetic\.teacher="):
        Trainer(TAUGHT, digits)
    with pytest.raises(InputError, match="no weights at"):
        Trainer(TAUGHT, digits, Site(teacher=str(tmp_path / "absent.safetensors")))
    weights = load_file(teacher)
    other = {name: t[:7].contiguous() if name.startswith("head") else t for name, t in weights.items()}
    save_weights(tmp_path / "seven.safetensors", other, RECIPE, {})
    with pytest.raises(InputError, match=r"other classes or images than .*: head\.\w+ is \(7.*not \(10"):
        Trainer(TAUGHT, digits, Site(teacher=str(tmp_path / "seven.safetensors")))
    save_file(weights, tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match="carries no recipe"):
        Trainer(TAUGHT, digits, Site(teacher=str(tmp_path / "bare.safetensors")))
    (tmp_path / "torn.safetensors").write_bytes(teacher.read_bytes()[:-100])
    with pytest.raises(InputError, match="are damaged"):
        Trainer(TAUGHT, digits, Site(teacher=str(tmp_path / "torn.safetensors")))
