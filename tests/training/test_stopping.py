"""Asked to stop, a training saves at once; large checkpoints are written beside the training."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from robudget import data, stop
from robudget.data import Dataset
from robudget.recipe import Recipe
from robudget.training import Trainer, checkpoint, saver

RECIPE = Recipe.load("digits").with_(
    {
        "model.base": 2,
        "craft.steps": 1,
        "epochs": 3,
        "epoch_images": 160,
        "batch_size": 32,
        "validation.every": 1,
        "validation.steps": 1,
        "validation.images": 16,
        "collapse.action": "off",
    }
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


@pytest.fixture(autouse=True)
def _nobody_asked() -> Iterator[None]:
    yield
    stop.withdraw()


def same_bits(a: Trainer, b: Trainer) -> bool:
    return all(torch.equal(x, b.model.state_dict()[name]) for name, x in a.model.state_dict().items())


def at_step(trainer: Trainer, number: int, do: Any) -> None:
    step = trainer._train_step

    def call() -> None:
        if trainer.step == number:
            do()
        step()

    trainer._train_step = call  # type: ignore[method-assign]


@pytest.mark.parametrize("large", [False, True])
def test_a_stop_is_saved_after_the_step_at_hand(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    whole = Trainer(RECIPE, digits)
    list(whole)
    monkeypatch.setattr(saver, "LARGE_BYTES", 0 if large else 1 << 40)
    stopped = Trainer(RECIPE, digits, folder=tmp_path)
    at_step(stopped, 6, lambda: stop.request("SIGTERM"))
    with pytest.raises(stop.Stopped, match=r"stopped \(SIGTERM\)"):
        list(stopped)
    stop.withdraw()
    resumed = Trainer(RECIPE, digits, folder=tmp_path)
    assert resumed.step == 7  # of 5 in an epoch
    list(resumed)
    assert same_bits(whole, resumed)
    assert whole.best == resumed.best
    best, again = whole.best_model().state_dict(), resumed.best_model().state_dict()
    assert all(torch.equal(best[name], again[name]) for name in best)


def test_between_epochs_what_is_not_saved_yet_is_saved(digits: Dataset, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(saver, "LARGE_BYTES", 0)
    trainer = Trainer(RECIPE.with_({"validation.every": 3}), digits, folder=tmp_path)
    records = iter(trainer)
    next(records)
    assert not (tmp_path / "last.pt").exists()  # large, and a minute has not passed
    stop.request("SIGTERM")
    with pytest.raises(stop.Stopped):
        next(records)
    stop.withdraw()
    assert Trainer(RECIPE.with_({"validation.every": 3}), digits, folder=tmp_path).step == 5


def test_training_goes_on_while_a_large_checkpoint_is_written(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "LARGE_BYTES", 0)
    trained_on, steps = threading.Event(), []
    save = checkpoint.save_last

    def slow(folder: Path, state: checkpoint.State) -> None:
        assert trained_on.wait(60), "the training waits for the disk"
        steps.append(state["step"])
        save(folder, state)

    monkeypatch.setattr(checkpoint, "save_last", slow)
    trainer = Trainer(RECIPE, digits, folder=tmp_path)
    at_step(trainer, 7, trained_on.set)  # two steps into the next epoch
    list(trainer)
    assert steps[0] == 5  # what is written is what was there when it was decided
    assert steps[-1] == 15  # the last one is waited for
    resumed = Trainer(RECIPE, digits, folder=tmp_path)
    assert resumed.done
    assert same_bits(trainer, resumed)


def test_a_disk_that_fails_in_the_background_is_not_silent(digits: Dataset, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(saver, "LARGE_BYTES", 0)

    def full(folder: Path, state: checkpoint.State) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_last", full)
    with pytest.raises(OSError, match="No space left"):
        list(Trainer(RECIPE, digits, folder=tmp_path))
