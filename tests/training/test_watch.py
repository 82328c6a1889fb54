"""What a training does when things go wrong: divergence, collapse, no progress."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from robudget import data
from robudget.data import Dataset
from robudget.errors import InputError, RunFailed
from robudget.recipe import Recipe
from robudget.recipe.parts import CollapsePart
from robudget.training import Trainer, loop
from robudget.training.checkpoint import load_last
from robudget.training.validation import CollapseCheck, is_collapsed

BASE = Recipe().with_(
    {
        "data.name": "digits",
        "data.crop": 0,
        "data.flip": False,
        "model.name": "wrn-10-1",
        "model.base": 2,
        "craft.steps": 1,
        "threat.eps": 0.1,
        "epochs": 5,
        "epoch_images": 128,
        "batch_size": 64,
        "validation.steps": 2,
        "validation.images": 32,
        "collapse.images": 16,
        "collapse.steps": 2,
    }
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


def test_a_diverging_loss_stops_before_it_is_saved(digits: Dataset, tmp_path: Path) -> None:
    recipe = BASE.with_({"optim.lr": 1e30, "optim.schedule": "constant"})
    with pytest.raises(
        RunFailed, match=r"at step 1 of 10 \(lr .*\); there is no checkpoint yet; .*smaller optim\.lr"
    ) as caught:
        list(Trainer(recipe, digits, folder=tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "last.pt").exists()


def test_nan_is_named_with_its_step(digits: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(BASE, digits, folder=tmp_path)
    original = trainer._step._loss

    def broken(*args: object) -> torch.Tensor:
        return original(*args) * (float("nan") if trainer.step == 5 else 1)  # type: ignore[arg-type]

    trainer._step._loss = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(
        RunFailed, match=r"the loss is nan at step 5 of 10 .* is of epoch 2; likely cause: a single update"
    ):
        list(trainer)
    state = load_last(tmp_path, pytest.fail)
    assert state is not None
    assert state["step"] == 4


def test_what_counts_as_a_collapse() -> None:
    part = CollapsePart()
    assert is_collapsed(0.9, 0.02, 0.95, 0.4, part)
    assert not is_collapsed(0.5, 0.4, 0.9, 0.4, part)  # robust to both
    assert not is_collapsed(0.35, 0.11, 0.8, 0.12, part)  # early: never was better
    assert not is_collapsed(0.15, 0.0, 0.9, 0.4, part)  # robust to neither
    assert not is_collapsed(0.3, 0.0, 0.6, 0.03, part)  # early: a fall of some images in a hundred


def watched(monkeypatch: pytest.MonkeyPatch, collapsed: set[int]) -> None:
    def check(model: object, validator: object, recipe: object, before: float) -> CollapseCheck:
        check.epoch += 1  # type: ignore[attr-defined]
        fell = check.epoch in collapsed  # type: ignore[attr-defined]
        return CollapseCheck(0.9, 0.0 if fell else 0.5, fell)

    check.epoch = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(loop, "check_collapse", check)


def test_collapse_warns_and_is_recorded(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    watched(monkeypatch, {3})
    heard: list[str] = []
    trainer = Trainer(BASE, digits, notify=heard.append)
    list(trainer)
    assert trainer.collapsed_at == [3]
    assert heard == ["epoch 3: catastrophic overfitting, 90% robust to one step but 0% to 2 (collapse.action = warn)"]
    assert trainer.done
    assert trainer.stopped is None


def test_collapse_stops(digits: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watched(monkeypatch, {2})
    recipe = BASE.with_({"collapse.action": "stop"})
    trainer = Trainer(recipe, digits, folder=tmp_path, notify=lambda text: None)
    assert [record.epoch for record in trainer] == [1, 2]
    again = Trainer(recipe, digits, folder=tmp_path)
    assert again.done
    assert again.stopped == "collapsed at epoch 2"


def test_collapse_restores_and_goes_on_more_slowly(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    watched(monkeypatch, {3})
    trainer = Trainer(
        BASE.with_({"collapse.action": "restore", "optim.schedule": "constant"}), digits, notify=lambda text: None
    )
    seen = []
    for _ in trainer:
        seen.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    assert all(torch.equal(seen[1][name], seen[2][name]) for name in seen[1])
    assert not all(torch.equal(seen[2][name], seen[3][name]) for name in seen[1])
    lrs = [record.lr for record in trainer.records]
    assert lrs[3] == pytest.approx(lrs[0] / 2)


def test_no_watch_where_nothing_can_collapse(digits: Dataset) -> None:
    record = next(iter(Trainer(BASE.with_({"loss": "standard"}), digits)))
    assert record.one_step is None
    assert record.craft_acc is None
    assert record.calls["craft_forward"] == 0


def test_patience(digits: Dataset) -> None:
    recipe = BASE.with_({"epochs": 30, "optim.lr": 1e-9, "validation.patience": 3})
    trainer = Trainer(recipe, digits)
    list(trainer)
    assert len(trainer.records) == 4
    assert trainer.stopped == "no better validation in 3"
    assert trainer.best is not None
    assert trainer.best.epoch == 1


def test_standard_training_is_selected_by_clean_accuracy(digits: Dataset) -> None:
    trainer = Trainer(BASE.with_({"loss": "standard", "epochs": 4}), digits)
    records = list(trainer)
    assert trainer.best is not None
    assert trainer.best.val_clean == max(r.val_clean for r in records if r.val_clean is not None)


def test_the_best_model_is_the_average_where_the_recipe_says_so(digits: Dataset) -> None:
    for evaluate in (True, False):
        trainer = Trainer(BASE.with_({"ema.decay": 0.5, "ema.evaluate": evaluate, "epochs": 1}), digits)
        list(trainer)
        assert trainer.ema is not None
        kept = trainer.ema.model if evaluate else trainer.model
        best = trainer.best_model()
        assert not best.training
        assert all(torch.equal(v, best.state_dict()[k]) for k, v in kept.state_dict().items())


def test_no_best_before_the_first_validation(digits: Dataset) -> None:
    with pytest.raises(InputError, match="no epoch has been validated"):
        Trainer(BASE, digits).best_model()
