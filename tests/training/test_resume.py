"""Stopping anywhere and going on to the same bits: within an epoch, after kill -9, with every kind of state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from robudget import data
from robudget.data import Dataset
from robudget.errors import InputError
from robudget.recipe import Recipe
from robudget.training import Trainer, clock
from robudget.training.step import Outcome, Step

BASE = {
    "data.name": "digits",
    "data.crop": 1,
    "data.flip": False,
    "model.name": "wrn-10-1",
    "model.base": 2,
    "craft.steps": 2,
    "threat.eps": 0.1,
    "optim.lr_batch": None,
    "epochs": 3,
    "epoch_images": 320,
    "batch_size": 64,
    "validation.steps": 2,
    "validation.images": 32,
    "collapse.images": 16,
    "collapse.steps": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "ema": {"ema.decay": 0.9},
    "adamw": {"optim.name": "adamw", "optim.lr": 0.01},
    "trades, synthetic, cutmix": {"loss": "trades", "synthetic.source": "mixture", "data.cutmix": True},
    "free-at": {"loss": "free-at"},
    "fgsm-pgi": {"loss": "fgsm-pgi", "craft.steps": 1},
    "swa": {"ema.equal_after": 1, "optim.schedule": "trapezoid", "optim.decay_epochs": 1},
    "ikl": {"loss": "ikl", "beta": 20},
    "aligned": {"craft.grad_align": 0.2, "craft.steps": 1},
    "grad-norm": {"loss": "grad-norm", "beta": 1},
    "fractions": {"synthetic.source": "mixture", "synthetic.fraction": 1, "synthetic.later": [[1.5, 0.5]]},
    "weight perturbation, randaugment": {"awp.gamma": 0.01, "data.randaugment": 5},
    "restore": {"collapse.action": "restore"},
}


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


def same_bits(a: Trainer, b: Trainer) -> bool:
    pairs = [(a.model.state_dict(), b.model.state_dict())]
    if a.ema is not None and b.ema is not None:
        pairs.append((a.ema.model.state_dict(), b.ema.model.state_dict()))
    return all(torch.equal(x[name], y[name]) for x, y in pairs for name in x)


def timeless(trainer: Trainer) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.__dict__.items() if k != "seconds"} for record in trainer.records]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_crash_within_an_epoch(kind: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe().with_(BASE | KINDS[kind])
    whole = Trainer(recipe, digits)
    list(whole)
    monkeypatch.setattr(clock, "LOOK_STEPS", 1)
    step = Step.__call__

    def crashing(self: Step, x: Any, labels: Any, target: Any, number: int) -> Outcome:
        if number == 8:
            raise Crash
        return step(self, x, labels, target, number)

    monkeypatch.setattr(Step, "__call__", crashing)
    with pytest.raises(Crash):
        list(Trainer(recipe, digits, folder=tmp_path, save_seconds=0))
    monkeypatch.setattr(Step, "__call__", step)
    resumed = Trainer(recipe, digits, folder=tmp_path)
    assert resumed.step == 8  # of 5 in an epoch
    list(resumed)
    assert same_bits(whole, resumed)
    assert timeless(whole) == timeless(resumed)
    assert whole.best == resumed.best


@pytest.mark.usefixtures("forks")
def test_kill_9(digits: Dataset, tmp_path: Path) -> None:
    recipe = Recipe().with_(BASE | KINDS["ema"] | {"epochs": 12})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        import torch
        from robudget import data
        from robudget.recipe import Recipe
        from robudget.training import Trainer
        torch.set_num_threads(1)
        recipe = Recipe.load(Path(sys.argv[1]) / "recipe.yaml")
        for record in Trainer(recipe, data.load("digits"), folder=Path(sys.argv[1]) / "run"):
            print(record.epoch, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 3:
            time.sleep(0.02)  # somewhere within the next epoch
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, resumed = Trainer(recipe, digits), Trainer(recipe, digits, folder=tmp_path / "run")
        assert 3 <= len(resumed.records) < 12
        list(whole), list(resumed)
    finally:
        torch.set_num_threads(before)
    assert resumed.done
    assert same_bits(whole, resumed)
    assert timeless(whole) == timeless(resumed)


def test_resuming_under_other_circumstances_is_refused(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe().with_(BASE | {"epochs": 1, "precision": "float32"})
    list(Trainer(recipe, digits, folder=tmp_path))
    with pytest.raises(InputError, match="is of recipe"):
        Trainer(recipe.with_({"loss": "trades"}), digits, folder=tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.raises(InputError, match=r"made with threads = \d+, this run has 99"):
        Trainer(recipe, digits, folder=tmp_path)


def test_a_flipped_bit_falls_back_to_the_epoch_before(digits: Dataset, tmp_path: Path) -> None:
    recipe = Recipe().with_(BASE | {"precision": "float32"})
    whole = Trainer(recipe, digits, folder=tmp_path)
    list(whole)
    content = bytearray((tmp_path / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(bytes(content))
    heard: list[str] = []
    resumed = Trainer(recipe, digits, folder=tmp_path, notify=heard.append)
    assert resumed.step == 10
    assert "previous.pt" in heard[0]
    list(resumed)
    assert same_bits(whole, resumed)
