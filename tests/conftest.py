"""What several test folders share: recipes that train and are attacked in a second or two."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The suite runs on small models, which more threads only slow down; children (sweep workers) inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from robudget import cli
from robudget.recipe import Recipe

Run = Callable[..., tuple[int, str, str]]

SHARED = Path(__file__).resolve().parents[2] / "shared"

TINY = {
    "model.name": "wrn-10-1",
    "model.base": 2,
    "epochs": 2,
    "epoch_images": 256,
    "batch_size": 64,
    "craft.steps": 1,
    "validation.images": 20,
    "validation.steps": 2,
    "evaluation.images": 12,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Weights that a test draws are the same in any order of tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    """Digits, a WideResNet of some thousand parameters, two short epochs, twelve images for the full ensemble."""
    return Recipe.load("digits", TINY)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published runs, CIFAR-10 and the reference model, where there is one beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("no folder `shared` beside the checkout")
    return SHARED


@pytest.fixture
def robudget_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: its exit code, stdout and stderr."""

    def command(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["robudget", *args])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return command
