"""Training end to end on digits: resume to the same bits, and what the records say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from robudget import data
from robudget.data import Dataset
from robudget.errors import InputError
from robudget.recipe import Recipe
from robudget.training import Trainer, load_weights

TINY = Recipe().with_(
    {
        "data.name": "digits",
        "data.crop": 1,
        "data.flip": False,
        "model.name": "wrn-10-1",
        "model.base": 4,
        "loss": "at",
        "craft.steps": 2,
        "threat.eps": 0.1,
        "optim.lr": 0.1,
        "optim.lr_batch": None,
        "ema.decay": 0.9,
        "epochs": 3,
        "epoch_images": 512,
        "batch_size": 128,
        "validation.steps": 3,
        "validation.images": 64,
        "collapse.action": "off",
    }
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_records_count_every_pass(digits: Dataset) -> None:
    trainer = Trainer(TINY, digits)
    records = list(trainer)
    assert [r.epoch for r in records] == [1, 2, 3]
    images = 3 * 4 * 128
    assert records[-1].steps == 12
    assert records[-1].images == images
    calls = records[-1].calls
    assert calls["craft_forward"] == calls["craft_backward"] == 2 * images
    assert calls["update_forward"] == calls["update_backward"] == images
    right = sum(round(r.val_clean * 64) for r in records if r.val_clean is not None)
    assert calls["validation_backward"] == 3 * right
    assert calls["validation_forward"] == 3 * 64 + 4 * right


def test_trades_counts_its_clean_passes(digits: Dataset) -> None:
    record = next(iter(Trainer(TINY.with_({"loss": "trades"}), digits)))
    assert record.calls["craft_forward"] == 3 * 512
    assert record.calls["craft_backward"] == 2 * 512
    assert record.calls["update_forward"] == record.calls["update_backward"] == 2 * 512
    assert record.train_acc is not None
    assert record.craft_acc is not None


def test_same_recipe_and_seed_give_the_same_bits(digits: Dataset) -> None:
    first, second = Trainer(TINY, digits), Trainer(TINY, digits)
    list(first), list(second)
    for name, tensor in weights_of(first).items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_resume_reaches_the_same_bits(digits: Dataset, tmp_path: Path) -> None:
    whole = Trainer(TINY, digits, folder=tmp_path / "whole")
    list(whole)
    part = Trainer(TINY, digits, folder=tmp_path / "part")
    next(iter(part))
    resumed = Trainer(TINY, digits, folder=tmp_path / "part")
    assert resumed.step == 4
    list(resumed)
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert resumed.best == whole.best
    a, about = load_weights(tmp_path / "whole" / "best.safetensors")
    b, _ = load_weights(tmp_path / "part" / "best.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert Recipe.from_yaml(about["recipe"]) == TINY


def test_a_finished_training_has_nothing_left_to_do(digits: Dataset, tmp_path: Path) -> None:
    list(Trainer(TINY, digits, folder=tmp_path))
    again = Trainer(TINY, digits, folder=tmp_path)
    assert again.done
    assert list(again) == []
    assert len(again.records) == 3


def test_a_checkpoint_of_another_recipe_is_refused(digits: Dataset, tmp_path: Path) -> None:
    next(iter(Trainer(TINY, digits, folder=tmp_path)))
    with pytest.raises(InputError, match="is of recipe"):
        Trainer(TINY.with_({"seed": 1}), digits, folder=tmp_path)


@pytest.mark.parametrize("key", ["precision", "craft.precision"])
def test_bfloat16_is_refused_where_the_device_has_none(key, tiny, monkeypatch):
    monkeypatch.setattr("robudget.backend.precision.has_bfloat16", lambda device: False)
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    with pytest.raises(InputError, match="'bfloat16' on cpu: not supported there"):
        Trainer(tiny.with_({key: "bfloat16"}), data.load("digits"), device=torch.device("cpu"))
